"""The folder of a job of `tools/prepare_latents.py`: its arrays, written by rows, and the journals of what is done.

    <out>/job.json            what makes the latents, so that another job is not continued
    <out>/*.npy.partial       the arrays, until all rows are there
    <out>/progress-0.jsonl    of each process: a line per chunk, written after the chunk is on the disk

What a kill or damage has left of a line names no chunk, so that its pictures are encoded again.
"""

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import pathlib
from collections.abc import Sequence

import jax
import numpy as np

from dydit_jax.data.latent_files import (
    CHECKSUMS_FILE,
    CLASSES_KEY,
    INFO_FILE,
    LABELS_FILE,
    LATENTS_FILE,
    checksums_of,
    load_array,
)
from dydit_jax.errors import InputError
from dydit_jax.latents import mean_and_deviation, sum_latents
from dydit_jax.models.autoencoder import AutoencoderConfig
from dydit_jax.records import read_record
from dydit_jax.runtime.files import read_json, write_atomically, write_json
from dydit_jax.runtime.locks import FolderLock

logger = logging.getLogger(__name__)

JOB_FILE, JOURNALS = "job.json", "progress-*.jsonl"
ARRAYS = (LATENTS_FILE, LABELS_FILE, CHECKSUMS_FILE)


def begin_folder(out, job: dict, remedy: str) -> None:
    """Make the empty arrays, or find that they are this job's and what is in the journals is whole.

    Args:
      out: the folder.
      job: all that makes the latents, see `prepare_latents`. The autoencoder's name may be another one, as its weights
        and record are compared.
      remedy: what the user can do where they are of another job, for the message.

    Raises:
      InputError: latents of another job, or a damaged description.
    """
    known = next((out / file for file in (INFO_FILE, JOB_FILE) if (out / file).is_file()), None)
    if known is None:
        write_json(out / JOB_FILE, job)
    else:
        before_records = dict(autoencoder_record=describe_autoencoder(AutoencoderConfig()))
        found = before_records | read_json(known, remedy=f"remove {out} and start again")
        changed = [key for key in job if key != "autoencoder" and found.get(key) != job[key]]
        if changed:
            raise InputError(f"{out} holds latents made otherwise ({', '.join(changed)} differ); {remedy}.")
    if not (out / INFO_FILE).is_file():
        _make_arrays(out, job)
        _drop_damaged(out, job["chunk"])


def _make_arrays(out, job: dict) -> None:
    """Make what is not there of the arrays, of zeros that take no room yet."""
    config = read_record(AutoencoderConfig, job["autoencoder_record"], JOB_FILE)
    count, side = job["count"], job["side"] // config.factor
    moments = ((count, 2, side, side, 2 * config.channels), np.float16)
    shapes = dict(zip(ARRAYS, (moments, ((count,), np.int32), ((count,), np.uint32))))
    missing = {name: shape for name, shape in shapes.items() if not _current(out, name).is_file()}
    if missing and any(out.glob(JOURNALS)):
        raise InputError(f"{out} lacks {', '.join(missing)}; remove the folder and start again.")
    for name, (shape, dtype) in missing.items():
        with write_atomically(_current(out, name)) as partial:
            np.lib.format.open_memmap(partial, "w+", dtype=dtype, shape=shape)


def _drop_damaged(out, chunk: int) -> None:
    """Drop from every journal what a kill has cut off, and its last chunk if that is not as it was written."""
    moments, labels = (load_array(_current(out, name), mmap_mode="r") for name in (LATENTS_FILE, LABELS_FILE))
    for path in out.glob(JOURNALS):
        lines = _read_journal(path)
        for line in lines[-1:]:
            rows = slice(line["first"], line["first"] + chunk)
            if _digest(moments[rows], labels[rows]) != line["sha256"]:
                logger.warning("Pictures from %d on are encoded again: they are not as they were.", line["first"])
                lines.remove(line)
        with write_atomically(path) as partial:
            partial.write_text("".join(json.dumps(line) + "\n" for line in lines))


def require_shared(out) -> None:
    """Raise where this process does not see the folder that the main one has begun.

    Raises:
      InputError: a folder on a disk of one machine alone.
    """
    if not (out / INFO_FILE).is_file() and not (out / JOB_FILE).is_file():
        raise InputError(f"{out} is not what process 0 sees there; name a folder that all machines share.")


def read_journals(out) -> dict[int, dict]:
    """Return the line of every chunk that is done, by its first picture."""
    return {line["first"]: line for path in out.glob(JOURNALS) for line in _read_journal(path)}


def _read_journal(path) -> list[dict]:
    """Return the lines of a journal that are whole."""
    lines = []
    for text in path.read_bytes().decode(errors="replace").splitlines():
        with contextlib.suppress(ValueError, RecursionError):
            line = json.loads(text)
            if isinstance(line, dict) and type(line.get("first")) is int and isinstance(line.get("sha256"), str):
                lines.append(line)
    return lines


class Arrays:
    """The arrays of a job under way, written by rows. Use as a context.

    By ordinary writes, not through a memory map, which writes whole pages: other machines write the neighbouring rows.

    Args:
      out: the folder.
      lock: of it, asked for before every write; None in processes that do not hold it.
    """

    def __init__(self, out, lock: FolderLock | None):
        self._lock = lock
        paths = [pathlib.Path(_current(out, name)) for name in ARRAYS]
        self._offsets = [load_array(path, mmap_mode="r").offset for path in paths]
        self._stack = contextlib.ExitStack()
        self._files = [self._stack.enter_context(path.open("r+b")) for path in paths]
        journal = out / JOURNALS.replace("*", str(jax.process_index()))
        self._journal = self._stack.enter_context(journal.open("a"))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._stack.close()

    def write(self, first: int, moments: np.ndarray, labels: np.ndarray) -> None:
        """Write rows from `first` on, and then say so in the journal.

        Raises:
          InputError: a disk that is full, or fails.
          StopError: another command has taken the folder over.
        """
        if self._lock is not None:
            self._lock.require_held()
        try:
            for file, offset, rows in zip(self._files, self._offsets, (moments, labels, checksums_of(moments, labels))):
                file.seek(offset + first * rows[0].nbytes)
                file.write(np.ascontiguousarray(rows).tobytes())
                file.flush()
                os.fsync(file.fileno())
            line = dict(first=first, sha256=_digest(moments, labels), sums=sum_latents(moments).tolist())
            self._journal.write(json.dumps(line) + "\n")
            self._journal.flush()
        except OSError as error:
            raise InputError(
                f"Can't write {file.name} ({error.strerror}). Make room and repeat the command; it goes on from here."
            ) from error


def finish_folder(out, job: dict, class_names: Sequence[str]) -> None:
    """Give the arrays their names and describe them; the journals are not needed any more.

    Raises:
      InputError: pictures whose latents are in no journal.
    """
    done, starts = read_journals(out), range(0, job["count"], job["chunk"])
    missing = [first for first in starts if first not in done]
    if missing:
        raise InputError(f"{out} lacks the pictures from {missing[0]} on; repeat the command.")
    statistics = find_statistics(out, job["chunk"], {first: line.get("sums") for first, line in done.items()})
    for name in ARRAYS:
        _current(out, name).replace(out / name)
    chunks = [done[first]["sha256"] for first in starts]
    checksum_of_all = hashlib.sha256("".join(chunks).encode()).hexdigest()
    used = {name: job["autoencoder_record"][name] for name in ("scale", "shift")}
    described = job | used | statistics | {CLASSES_KEY: list(class_names)}
    write_json(out / INFO_FILE, described | dict(checksum=checksum_of_all, chunks=chunks))
    for path in (*out.glob(JOURNALS), *out.glob("*.partial")):  # the latter of jobs that were killed
        path.unlink(missing_ok=True)  # one may be the lock's, which comes and goes


def find_statistics(out, chunk: int, sums: dict[int, list]) -> dict:
    """Return mean and standard deviation of each channel; chunks of which no sums are known are read for them."""
    moments = load_array(_current(out, LATENTS_FILE), mmap_mode="r")
    count, views, height, width, channels = moments.shape
    starts = range(0, count, chunk)
    is_known = lambda first: np.shape(sums.get(first)) == (3, channels // 2)
    known = [sums[first] if is_known(first) else sum_latents(moments[first : first + chunk]) for first in starts]
    mean, std = mean_and_deviation(known, count * views * height * width)
    return dict(mean=mean, std=std)


def describe_autoencoder(config: AutoencoderConfig) -> dict:
    """Return an autoencoder's record as it reads when it comes back from a description."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def _current(out, name: str):
    """Return where an array lies as long as the job is not finished; a kill while it finished may have renamed it."""
    return out / name if (out / name).is_file() else out / f"{name}.partial"


def _digest(moments: np.ndarray, labels: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(moments).tobytes() + np.ascontiguousarray(labels).tobytes()).hexdigest()
