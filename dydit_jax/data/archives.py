"""Pictures with labels in class folders or tars, one after another, always in the same order.

Archives may come from strangers. Nothing is extracted: members are read in place, and only ordinary files of a
picture's size. Links, devices, FIFOs and sparse members count as unreadable pictures. An archive that is damaged
or cut is an error, not the end of the pictures.
"""

import collections
import dataclasses
import functools
import hashlib
import json
import logging
import pathlib
import tarfile
from collections.abc import Callable, Iterator

from dydit_jax.data.folders import is_left_by_system, is_picture, list_class_folders, log_ignored, name_order
from dydit_jax.data.images import MAX_BYTES, SUFFIXES, read_picture
from dydit_jax.errors import InputError, escape_unprintable
from dydit_jax.labels import spell_name
from dydit_jax.runtime.files import is_local, locate

READ_AT_ONCE = 2**20  # bytes after the end of a tar

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Picture:
    """A picture that can be read until the iterator that gave it goes on.

    Attributes:
      name: <class>/<file>, no two alike.
      label: of its class.
      read: returns the bytes of its file; raises an InputError if they can't be had.
    """

    name: str
    label: int
    read: Callable[[], bytes]


@dataclasses.dataclass(frozen=True)
class PictureSource:
    """Pictures that can be iterated over more than once.

    Attributes:
      classes: their names; a label is the position in here.
      fingerprint: checksum of the names of all pictures; of tars, of their names and lengths.
      count: of pictures; None for tars, which have to be read to know.
      pictures: makes an iterator.
    """

    classes: list[str]
    fingerprint: str
    count: int | None
    pictures: Callable[[], Iterator[Picture]]


def open_pictures(source: str) -> PictureSource:
    """Open class folders or tars.

    Args:
      source: a folder of class folders, a folder of one tar per class, or one tar of such tars
        (ILSVRC2012_img_train.tar). Classes are numbered in alphabetical order.

    Raises:
      InputError: nothing of the kind, or damaged. While the pictures are gone through: a tar that is damaged or has
        no pictures.
    """
    path = locate(source)
    if path.is_file():
        return _open_tar_of_tars(path)
    if not path.is_dir():
        raise InputError(f"There is no file or folder {source}.")
    tars = [tar for tar in path.glob("*.tar") if not is_left_by_system(tar.name)]
    tars.sort(key=lambda tar: name_order(tar.name))
    return _open_tars(path, tars) if tars else _open_class_folders(path)


def _open_class_folders(path) -> PictureSource:
    files, labels = list_class_folders(path)
    names = [escape_unprintable(f"{file.parent.name}/{file.name}") for file in files]

    def pictures():
        for name, label, file in zip(names, labels, files):
            yield Picture(name, int(label), functools.partial(read_picture, file))

    classes = list(dict.fromkeys(spell_name(file.parent.name) for file in files))
    return PictureSource(classes, _fingerprint(names), len(files), pictures)


def _open_tars(path, tars: list) -> PictureSource:
    wrong = [tar.name for tar in tars if is_local(tar) and not pathlib.Path(tar).is_file()]
    if wrong:
        raise InputError(f"{path / wrong[0]} is no ordinary file; remove it, or put its tar in its place.")
    names = {tar.name for tar in tars}
    log_ignored(path, sorted(place.name for place in path.iterdir() if place.name not in names))
    classes = [_class_name(tar.name) for tar in tars]

    def pictures():
        for label, tar in enumerate(tars):
            with tar.open("rb") as file:
                yield from _pictures_of_class(file, tar, classes[label], label)

    return PictureSource(classes, _fingerprint([(tar.name, tar.stat().length) for tar in tars]), None, pictures)


def _open_tar_of_tars(path) -> PictureSource:
    tars, others = [], []
    with path.open("rb") as file:
        for _, member in _walk(file, path):
            is_tar = member.name.endswith(".tar") and not is_left_by_system(member.name)
            if is_tar and (reason := _unusual(member)):
                raise InputError(
                    f"{escape_unprintable(member.name)} in {path} is {reason}; it must be an ordinary tar."
                )
            (tars if is_tar else others).append(member)
    if not tars:
        raise InputError(f"{path} holds no .tar per class.")
    tars.sort(key=lambda member: name_order(member.name))
    classes = [_class_name(member.name) for member in tars]
    twice = [name for name, count in collections.Counter(classes).items() if count > 1]
    if twice:
        raise InputError(f"{path} holds {twice[0]}.tar more than once; make an archive with one tar per class.")
    log_ignored(path, [escape_unprintable(member.name) for member in others if not member.isdir()])

    def pictures():
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as archive:
            for label, member in enumerate(tars):
                where = f"{classes[label]}.tar in {path}"
                yield from _pictures_of_class(archive.extractfile(member), where, classes[label], label)

    return PictureSource(classes, _fingerprint([(member.name, member.size) for member in tars]), None, pictures)


def _pictures_of_class(file, where, class_name: str, label: int) -> Iterator[Picture]:
    """Go through the pictures of one tar, of which all belong to one class."""
    seen, ignored = collections.Counter(), []
    for archive, member in _walk(file, where):
        if member.isdir() or not is_picture(member.name):
            ignored += [] if member.isdir() else [escape_unprintable(member.name)]
            continue
        name = escape_unprintable(f"{class_name}/{member.name.rsplit('/', 1)[-1]}")
        seen[name] += 1
        distinct = name if seen[name] == 1 else f"{name}#{seen[name]}"
        yield Picture(distinct, label, functools.partial(_read_member, archive, member, distinct))
    log_ignored(where, ignored)
    twice = [name for name, count in seen.items() if count > 1]
    if twice:
        logger.warning("%s: %d names occur more than once (%s); all are kept, as #2, ...", where, len(twice), twice[0])
    if not seen:
        raise InputError(f"{where} has no pictures ({', '.join(SUFFIXES)}); fill it or remove it.")


def _walk(file, where) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
    """Go through the members of an uncompressed tar.

    The standard library takes a damaged header for the end of an archive and follows lengths below zero in a circle.
    """
    last = "its beginning"
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            while (member := archive.next()) is not None:
                if member.size < 0:
                    raise tarfile.ReadError("a length below zero")
                yield archive, member
                last = escape_unprintable(member.name)
            _require_end(file, archive.offset, where)
    except InputError:
        raise
    except Exception as error:  # noqa: BLE001 (damaged headers end in errors of many kinds)
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(
            f"{where} is not a tar archive without compression, or it is damaged after {last}: {reason}."
        ) from error


def _require_end(file, offset: int, where) -> None:
    """Raise unless nothing but zeros follows the last member."""
    file.seek(offset)
    part = file.read(READ_AT_ONCE)
    if not part:
        logger.warning("%s has no closing blocks; it may have been cut.", where)
    while part:
        if part.strip(b"\0"):
            raise tarfile.ReadError(f"no header at byte {offset}, but the archive goes on")
        part = file.read(READ_AT_ONCE)


def _read_member(archive: tarfile.TarFile, member: tarfile.TarInfo, name: str) -> bytes:
    reason = _unusual(member) or (f"{member.size} bytes, more than {MAX_BYTES}" if member.size > MAX_BYTES else "")
    if reason:
        raise InputError(f"{name} is not a readable picture: {reason}.")
    try:
        return archive.extractfile(member).read()
    except (tarfile.TarError, OSError) as error:
        raise InputError(f"{name} is not a readable picture: {error}.") from error


def _unusual(member: tarfile.TarInfo) -> str:
    """Return what a member is if it is no ordinary file, else ""."""
    if member.issym() or member.islnk():
        return "a link"
    if member.issparse():
        return "a sparse file"
    return "" if member.isreg() else "a device, a FIFO or of an unknown kind"


def _class_name(name: str) -> str:
    return spell_name(name.rsplit("/", 1)[-1].removesuffix(".tar"))


def _fingerprint(content: list) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
