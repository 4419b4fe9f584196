"""Class folders or tars of pictures -> one prepared dataset of array_record files, without TensorFlow.

What comes out is an ordinary tensorflow_datasets dataset: `tfds.builder_from_directory` reads it, and so does
`data.name=tfds`.
"""

import io
import logging
import tarfile
from collections.abc import Iterator

import tensorflow_datasets as tfds
from etils import epath
from tqdm import tqdm

from dydit_jax.data.images import decode_image
from dydit_jax.data.sources import SUFFIXES, list_class_folders
from dydit_jax.errors import InputError

logger = logging.getLogger(__name__)


class ClassPictures(tfds.core.GeneratorBasedBuilder):
    """Pictures as they were, byte for byte, with label and file name."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, pictures, classes, **settings):
        """Take an iterable of (key, bytes, label) and the names of the classes."""
        self._pictures, self._classes = pictures, classes
        super().__init__(file_format="array_record", **settings)

    def _info(self):
        features = tfds.features.FeaturesDict(
            dict(
                image=tfds.features.Image(),
                label=tfds.features.ClassLabel(names=self._classes),
                file_name=tfds.features.Text(),
            )
        )
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, _):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for key, content, label in self._pictures:
            yield key, dict(image=io.BytesIO(content), label=label, file_name=key)


def prepare_pictures(source: str, out: str, *, max_bad: int = 100) -> str:
    """Write a prepared dataset.

    Args:
      source: a folder of class folders, a folder of one tar per class, or one tar of such tars
        (ILSVRC2012_img_train.tar). Classes are numbered in alphabetical order.
      out: folder for the dataset; must be new or empty.
      max_bad: unreadable pictures that are left out, each named, before the preparation stops.

    Returns:
      What `data.path` should be.

    Raises:
      InputError: nothing of the kind, too many unreadable pictures, or a folder that is not empty.
    """
    folder = epath.Path(out)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{out} is not empty; name another --out.")
    classes, pictures = open_pictures(source)
    builder = ClassPictures(_readable(pictures, max_bad), classes, data_dir=str(folder))
    builder.download_and_prepare()
    path = f"{builder.data_dir}/train"
    logger.info(
        "%d pictures of %d classes; use data.name=tfds, data.path=%s",
        builder.info.splits.total_num_examples,
        len(classes),
        path,
    )
    return path


def open_pictures(source: str) -> tuple[list[str], Iterator[tuple[str, bytes, int]]]:
    """Return the names of the classes and an iterator over (key, bytes, label); see `prepare_pictures`."""
    path = epath.Path(source)
    if path.is_file():
        if not tarfile.is_tarfile(path):
            raise InputError(f"{source} is not a tar archive.")
        with tarfile.open(path) as outer:
            members = sorted(name for name in outer.getnames() if name.endswith(".tar"))
        if not members:
            raise InputError(f"{source} holds no .tar per class.")
        return [_class_name(name) for name in members], _in_tar_of_tars(path, members)
    if not path.is_dir():
        raise InputError(f"There is no file or folder {source}.")
    tars = sorted(path.glob("*.tar"))
    if tars:
        return [_class_name(tar.name) for tar in tars], _in_tars(tars)
    files, labels = list_class_folders(path)
    read = ((f"{file.parent.name}/{file.name}", file.read_bytes(), int(label)) for file, label in zip(files, labels))
    return sorted({file.parent.name for file in files}), tqdm(read, total=len(files), unit="picture", desc="preparing")


def _class_name(name: str) -> str:
    return name.rsplit("/", 1)[-1].removesuffix(".tar")


def _in_tars(tars: list):
    for label, path in enumerate(tqdm(tars, unit="class", desc="preparing")):
        with tarfile.open(path) as archive:
            yield from _members(archive, _class_name(path.name), label)


def _in_tar_of_tars(path, members: list[str]):
    with tarfile.open(path) as outer:
        for label, name in enumerate(tqdm(members, unit="class", desc="preparing")):
            with tarfile.open(fileobj=outer.extractfile(name)) as archive:
                yield from _members(archive, _class_name(name), label)


def _members(archive: tarfile.TarFile, name: str, label: int):
    for member in archive:
        if member.isfile() and member.name.lower().endswith(SUFFIXES):
            yield f"{name}/{member.name.rsplit('/', 1)[-1]}", archive.extractfile(member).read(), label


def _readable(pictures, max_bad: int):
    """Leave out what can't be decoded, up to a limit."""
    bad = 0
    for key, content, label in pictures:
        try:
            decode_image(content, key)
        except InputError as error:
            bad += 1
            logger.warning("%s It is left out; %d so far.", error, bad)
            if bad > max_bad:
                raise InputError(
                    f"{bad} pictures can't be read, the last of them {key}; --max_bad allows {max_bad}."
                ) from error
            continue
        yield key, content, label
