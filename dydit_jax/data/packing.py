"""Pictures of class folders or tars -> one prepared dataset of array_record files, without TensorFlow.

What comes out is an ordinary tensorflow_datasets dataset: `tfds.builder_from_directory` reads it, and so does
`data.name=tfds`. While it is being made it is in <out>/class_pictures/1.0.0.partial:

    source.json                          what it is made of
    class_pictures-train.array_record-*  pictures as they were, byte for byte, in the source's order; about 256 MiB each
    journal.jsonl                        a line per file of pictures, written after that is on the disk

A job that was killed continues after the last whole file of the journal. The folder gets its name when it is complete.
"""

import dataclasses
import io
import itertools
import json
import logging
import os
import pathlib
from collections.abc import Iterator

import tensorflow_datasets as tfds
from array_record.python import array_record_module

from dydit_jax.data.archives import PictureSource, open_pictures
from dydit_jax.data.folders import is_left_by_system
from dydit_jax.data.images import decode_image
from dydit_jax.errors import InputError
from dydit_jax.runtime.files import hold_lock, is_local, read_json, write_atomically, write_json
from dydit_jax.runtime.progress import counted

NAME, VERSION, SPLIT = "class_pictures", "1.0.0", "train"
SHARD_NAME = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_INDEX}"  # without their number, which is known last
SOURCE_FILE, JOURNAL_FILE = "source.json", "journal.jsonl"
SHARD_BYTES = 2**28
WRITER_OPTIONS = "group_size:1"  # any example can be read without its neighbours

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Shard:
    """A finished file of pictures: its line in the journal.

    Attributes:
      seen: pictures of the source that were gone through by its end, from the first one on.
      count: examples in it.
      size: bytes of the examples.
      file_size: bytes of the file.
      left_out: names of the unreadable pictures since the shard before.
    """

    seen: int
    count: int
    size: int
    file_size: int
    left_out: list[str]


def prepare_pictures(source: str, out: str, *, max_bad: int = 100) -> str:
    """Write a prepared dataset, or what is left of it.

    Args:
      source: see `archives.open_pictures`.
      out: folder for the dataset, on a disk: new, empty, or of the same job.
      max_bad: unreadable pictures that are left out, each named, before the preparation stops.

    Returns:
      What `data.path` should be.

    Raises:
      InputError: no such source, too many unreadable pictures, a full disk, or a folder of something else.
    """
    if not is_local(out):
        raise InputError(f"--out must be a folder on a disk, or a bucket mounted as one, not {out}.")
    pictures = open_pictures(source)
    folder = pathlib.Path(out) / NAME / VERSION
    partial = folder.with_name(f"{VERSION}.partial")
    job = dict(classes=pictures.classes, fingerprint=pictures.fingerprint)
    _require_free(pathlib.Path(out), folder, partial)
    with hold_lock(folder.with_name(f".{VERSION}.lock"), to=f"to prepare {folder}"):
        if not _is_finished(folder, job):
            _prepare(pictures, folder, partial, job, max_bad)
    count = tfds.builder_from_directory(str(folder)).info.splits[SPLIT].num_examples
    logger.info("%d pictures of %d classes: data.name=tfds, data.path=%s/%s", count, len(job["classes"]), folder, SPLIT)
    return f"{folder}/{SPLIT}"


def _prepare(source: PictureSource, folder: pathlib.Path, partial: pathlib.Path, job: dict, max_bad: int) -> None:
    """Make a dataset, or what is missing of it."""
    if (partial / SOURCE_FILE).is_file():
        _require_same(partial, job)
    else:
        write_json(partial / SOURCE_FILE, job)
    try:
        shards = _read_journal(partial)
        _write_shards(source, partial, shards, max_bad)
        _finish(source.classes, shards, partial, folder)
    except (OSError, RuntimeError) as error:  # a RuntimeError comes from the writer of array_record
        raise InputError(
            f"Can't write to {partial} ({' '.join(str(error).split())}). Make room there and give the same command "
            "again: it goes on."
        ) from error


# --- The folder of a job under way ---------------------------------------------------------------


def _require_free(out: pathlib.Path, folder: pathlib.Path, partial: pathlib.Path) -> None:
    """Raise if a folder holds anything but what an earlier run of this command may have left."""
    inside = lambda place: {path.name for path in place.iterdir()} if place.is_dir() else set()
    ours = {NAME} if (folder / SOURCE_FILE).is_file() or not folder.exists() else set()
    strange = (inside(out) - ours) | (inside(out / NAME) - {folder.name, partial.name})
    if any(not is_left_by_system(name) for name in strange):
        raise InputError(f"{out} is not empty and holds no dataset of this command; name another --out.")


def _is_finished(folder: pathlib.Path, job: dict) -> bool:
    """Return whether a finished dataset is there; raise if it is another job's."""
    if not (folder / SOURCE_FILE).is_file():
        return False
    _require_same(folder, job)
    logger.info("%s is complete.", folder)
    return True


def _require_same(folder: pathlib.Path, job: dict) -> None:
    if read_json(folder / SOURCE_FILE, remedy=f"remove {folder} and start again") != job:
        raise InputError(f"{folder} is made of other pictures than --source has now; name another --out.")


def _read_journal(partial: pathlib.Path) -> list[Shard]:
    """Return the shards that are whole; the journal loses lines that are not, or whose shards are not."""
    path, shards, kept = partial / JOURNAL_FILE, [], []
    lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
    for line in lines:
        shard = _read_line(line)
        if shard is None or not _is_whole(_shard_path(partial, len(shards)), shard):
            logger.warning("%s: what follows file %d is not whole and is made again.", partial, len(shards))
            break
        shards.append(shard)
        kept.append(line)
    if kept != lines:
        with write_atomically(path) as whole:
            whole.write_bytes(b"".join(kept))
    return shards


def _read_line(line: bytes) -> Shard | None:
    try:
        return Shard(**json.loads(line.decode()))
    except (ValueError, TypeError):
        return None


def _is_whole(path: pathlib.Path, shard: Shard) -> bool:
    return path.is_file() and path.stat().st_size == shard.file_size


def _shard_path(partial: pathlib.Path, number: int) -> pathlib.Path:
    return partial / _shard_names(partial).sharded_filepath(shard_index=number, num_shards=None).name


def _shard_names(partial: pathlib.Path) -> tfds.core.ShardedFileTemplate:
    return tfds.core.ShardedFileTemplate(
        data_dir=partial, template=SHARD_NAME, dataset_name=NAME, split=SPLIT, filetype_suffix="array_record"
    )


# --- Its shards ----------------------------------------------------------------------------------


def _write_shards(source: PictureSource, partial: pathlib.Path, shards: list[Shard], max_bad: int) -> None:
    """Write what is left of a source, and append to the shards and the journal."""
    seen = shards[-1].seen if shards else 0
    left_out = [name for shard in shards for name in shard.left_out]
    left = itertools.islice(source.pictures(), seen, None)
    pictures = counted(left, source.count, "picture", "preparing", done=seen)
    records = _records(enumerate(pictures, seen + 1), _features(source.classes), left_out, max_bad)
    with (partial / JOURNAL_FILE).open("a") as journal:
        for first in records:
            known = sum(len(shard.left_out) for shard in shards)
            shard = _write_shard(_shard_path(partial, len(shards)), itertools.chain([first], records))
            shards.append(dataclasses.replace(shard, left_out=left_out[known:]))
            journal.write(json.dumps(dataclasses.asdict(shards[-1])) + "\n")
            journal.flush()
            os.fsync(journal.fileno())


def _write_shard(path: pathlib.Path, records: Iterator[tuple[int, bytes]]) -> Shard:
    """Write records until the shard is full, and wait until it is on the disk."""
    count, size, seen = 0, 0, 0
    writer = array_record_module.ArrayRecordWriter(str(path), WRITER_OPTIONS)
    for number, record in records:
        writer.write(record)
        seen, count, size = number, count + 1, size + len(record)
        if size >= SHARD_BYTES:
            break
    writer.close()
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return Shard(seen, count, size, path.stat().st_size, [])


def _records(pictures, features, left_out: list[str], max_bad: int) -> Iterator[tuple[int, bytes]]:
    """Turn numbered pictures into numbered records; the names of those that can't be read go to a list."""
    for number, picture in pictures:
        try:
            content = picture.read()
            decode_image(content, picture.name)
        except InputError as error:
            left_out.append(picture.name)
            logger.warning("%s It is left out; %d so far.", error, len(left_out))
            if len(left_out) > max_bad:
                raise InputError(
                    f"{len(left_out)} pictures can't be read, the last of them {picture.name}; --max_bad allows "
                    f"{max_bad}."
                ) from error
            continue
        example = dict(image=io.BytesIO(content), label=picture.label, file_name=picture.name)
        yield number, features.serialize_example(features.encode_example(example))


def _features(classes: list[str]) -> tfds.features.FeaturesDict:
    return tfds.features.FeaturesDict(
        dict(
            image=tfds.features.Image(),
            label=tfds.features.ClassLabel(names=classes),
            file_name=tfds.features.Text(),
        )
    )


def _finish(classes: list[str], shards: list[Shard], partial: pathlib.Path, folder: pathlib.Path) -> None:
    """Describe the shards as tensorflow_datasets does and give the folder its name."""
    if not shards:
        raise InputError("No picture of the source can be read.")
    names = _shard_names(partial)
    split = tfds.core.SplitInfo(
        name=SPLIT,
        shard_lengths=[shard.count for shard in shards],
        num_bytes=sum(shard.size for shard in shards),
        filename_template=names,
    )
    tfds.folder_dataset.write_metadata(
        data_dir=str(partial),
        features=_features(classes),
        split_infos=[split],
        version=VERSION,
        filename_template=names,
        check_data=False,  # which would read all of it
    )
    for path in partial.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    partial.rename(folder)
