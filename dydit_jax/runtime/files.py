"""Files that are whole or not there: writing under another name first, and reading with one clear line.

A program may be killed at any instruction, a disk may fill up, and several programs may write one file of a cache at
once. So nothing is written under its own name: `write_atomically` gives a name in the same folder that nobody else
has, and renames when all is on the disk. What a kill leaves behind ends in `.partial` and can be deleted.
"""

import codecs
import contextlib
import errno
import fcntl
import json
import logging
import os
import pathlib
import stat
import uuid
from collections.abc import Iterator

from etils import epath

from dydit_jax.errors import InputError

BUCKET = "gs://"
CLIENTS = ("aiohttp.", "gcsfs.", "google.api_core.", "google.auth.", "google.cloud.")  # of buckets
MOST_LEVELS = 100  # of JSON; ours has a few

logger = logging.getLogger(__name__)


def is_local(path) -> bool:
    """Return whether a path is of this machine's file system, not of a bucket."""
    return "://" not in str(path)


def locate(path) -> epath.Path:
    """Return where a file or folder is that a user names.

    Args:
      path: of this machine or a bucket (`gs://...`).

    Raises:
      InputError: an address of another kind.
    """
    if "://" in str(path).removeprefix(BUCKET):
        raise InputError(
            f"{path} is an address, and files are read and written on this machine and at {BUCKET} alone; fetch it, or "
            "name such a path. Weights may also be read from https:// and hf://."
        )
    return epath.Path(path)


def require_local(path) -> pathlib.Path:
    """Return a path of this machine, of what is read nowhere else.

    Raises:
      InputError: an address, or a path in a bucket.
    """
    if not is_local(path):
        raise InputError(f"{path} is not on this machine, and this can only be read from a disk. Copy it first.")
    return pathlib.Path(path)


def is_of_bucket(error: BaseException) -> bool:
    """Return whether an error is of a bucket's client: these have no base of their own, and few are `OSError`s."""
    return type(error).__module__.startswith(CLIENTS)


@contextlib.contextmanager
def as_system_errors() -> Iterator[None]:
    """Raise what a bucket's client raises as an `OSError`, as a disk does."""
    try:
        yield
    except Exception as error:
        if not is_of_bucket(error):
            raise
        raise OSError(" ".join(str(error).split()) or type(error).__name__) from error


@contextlib.contextmanager
def write_atomically(path) -> Iterator[epath.Path]:
    """Write a file that appears whole, or not at all; its folder is made where it is missing.

    The content is on the disk before the file takes its name: a machine that loses power has the old file or the new
    one. The mode is that of any new file under the umask, whatever mode the writer gives. In a bucket the object
    is renamed by copying it.

    Args:
      path: of this machine or a bucket (`gs://...`).

    Yields:
      The path to write to; it does not end as `path` does, so a writer that goes by the suffix needs its format named.

    Raises:
      InputError: a place that can't be written to, or a disk that is full. Nothing is left there then, and a file that
        already had the name is as it was. What is no error of the system passes as it is.
    """
    path = locate(path)
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex[:12]}.partial")
    try:
        with as_system_errors():
            path.parent.mkdir(parents=True, exist_ok=True)
            mode = _create(partial)
            yield partial
            _settle(partial, mode)
            partial.replace(path)
    except OSError as error:
        reason = error.strerror or " ".join(str(error).split())
        raise InputError(
            f"Can't write {path} ({reason}). Make room there, or name a place that you can write to."
        ) from error
    finally:
        with contextlib.suppress(OSError), as_system_errors():  # the first error is the one to tell
            partial.unlink(missing_ok=True)


def _create(partial: epath.Path) -> int | None:
    """Make an empty file and return the mode that the umask gives it; None in a bucket."""
    if not is_local(partial):
        return None
    with pathlib.Path(partial).open("xb") as file:
        return stat.S_IMODE(os.fstat(file.fileno()).st_mode)


def _settle(partial: epath.Path, mode: int | None) -> None:
    """Give a file its mode and wait until it is on the disk, which some file systems only now find full."""
    if mode is None:
        return
    with pathlib.Path(partial).open("rb") as file:
        os.fchmod(file.fileno(), mode)
        os.fsync(file.fileno())


def write_tail(path, start: int, text: str) -> None:
    """Write a file's bytes from `start` to its new end, which are on the disk when this returns.

    A kill in the middle leaves at worst a last line that is cut. Objects in buckets have no tail to write: they are
    written again, whole or not at all.

    Raises:
      InputError: a place that can't be written to, or a disk that is full.
    """
    path = locate(path)
    if not is_local(path):
        before = path.read_bytes()[:start] if start else b""
        with write_atomically(path) as partial:
            partial.write_bytes(before + text.encode())
        return
    try:
        with pathlib.Path(path).open("r+b" if path.exists() else "xb") as file:
            file.seek(start)
            file.write(text.encode())
            file.truncate()
            _flush(file)
    except OSError as error:
        raise InputError(
            f"Can't write {path} ({error.strerror or error}). Make room there, or name a place that you can write to."
        ) from error


def _flush(file) -> None:
    """Wait until what was written is on the disk."""
    file.flush()
    os.fsync(file.fileno())


def make_folder(folder) -> None:
    """Make a folder for others to be moved into; a bucket has one only where an object lies, so an empty one does."""
    folder = epath.Path(folder)
    folder.mkdir(exist_ok=True)
    if not folder.is_dir():
        (folder / ".keep").write_bytes(b"")


def write_json(path, content) -> None:
    """Write mappings, lists, strings and numbers as JSON, whole or not at all.

    Raises:
      InputError: see `write_atomically`.
    """
    text = json.dumps(content, indent=2) + "\n"
    with write_atomically(path) as partial:
        partial.write_text(text)


def read_json(path, *, remedy: str = "restore it from a copy, or remove it and start again", kind: type = dict):
    """Return what a JSON file holds.

    Args:
      path: of this machine or a bucket.
      remedy: what the user can do about a damaged file, for the message.
      kind: of its content: `dict` or `list`.

    Raises:
      InputError: no such file, one that can't be read, is empty, cut short or no JSON, or holds another kind.
    """
    path = locate(path)
    try:
        with as_system_errors():
            text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = "is no text" if isinstance(error, UnicodeDecodeError) else f"can't be read ({error.strerror or error})"
        raise InputError(f"{path} {reason}; {remedy}.") from error
    return parse_json(text, path, remedy=remedy, kind=kind)


def decode_text(content: bytes) -> str:
    """Return the text of a file that people write: UTF-8, or UTF-16 with its mark, both as Windows writes them too.

    Raises:
      UnicodeDecodeError: bytes that are neither.
    """
    is_wide = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return content.decode("utf-16" if is_wide else "utf-8-sig")


def parse_json(text: str, holder, *, remedy: str, kind: type = dict):
    """Return what JSON from anywhere holds; `read_json` of a text.

    Args:
      text: JSON.
      holder: of the text, for the message.
      remedy, kind: as for `read_json`.

    Raises:
      InputError: a text that is empty, cut short or no JSON, nested too deep, or of another kind.
    """
    if not text.strip():
        raise InputError(f"{holder} is empty; {remedy}.")
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{holder} is damaged or cut short ({error}); {remedy}.") from error
    if _is_deep(content):
        raise InputError(f"{holder} is nested more than {MOST_LEVELS} levels deep; {remedy}.")
    if not isinstance(content, kind):
        expected = "a list" if kind is list else "a mapping"
        raise InputError(f"{holder} holds {type(content).__name__}, not {expected}; {remedy}.")
    return content


def _is_deep(content) -> bool:
    """Return whether JSON is nested deeper than what walks through it should go."""
    level = [content]
    for _ in range(MOST_LEVELS):
        inner = [each.values() if isinstance(each, dict) else each for each in level if isinstance(each, dict | list)]
        level = [value for values in inner for value in values]
    return bool(level)


@contextlib.contextmanager
def hold_lock(path, *, to: str) -> Iterator[None]:
    """Let one process at a time through; the others wait.

    The lock is the kernel's, on a file that stays there: it ends with its process, however that ends. Between machines
    it holds where the shared disk keeps locks: NFS does, Lustre if mounted with `flock`, a mounted bucket does not and
    locks within one machine. Where there are no locks at all every process goes through, with a warning.

    Args:
      path: of the file to lock, on this machine's file system.
      to: what is done under the lock, for the message to those who wait: "to fetch x".

    Raises:
      InputError: the file can't be made.
    """
    path = pathlib.Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("ab")
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"Can't write {path} ({reason}) {to}; name a place that you can write to.") from error
    with file:
        _lock(file, path, to)
        yield


def _lock(file, path: pathlib.Path, to: str) -> None:
    """Lock an open file, as soon as nobody else has it; closing it ends the lock."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        logger.info("Another process holds %s %s; waiting for it.", path, to)
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
            raise
        logger.warning("There are no locks where %s lies (%s): nothing else should run %s now.", path, error, to)
