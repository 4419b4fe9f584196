"""One program per folder, on one machine or many: a lock that outlives no program.

Two witnesses say who works in a folder. The kernel's lock (flock) on the folder itself is seen by all programs of
a machine and ends with its owner, however that ended; buckets and some shared disks have none. The file `lock.json`
says host, process and start, and is written again every 15 seconds; every machine that sees the folder sees it.

* The kernel's lock is another's: refused.
* `lock.json` is of this machine, and its process is gone: taken over at once. A killed run goes on without waiting.
* It is of another machine, or from before this one started: watched for a minute, whatever its clock says. Written
  again, the other lives: refused. Not written again: taken over, with a warning.

A program that stood still for longer and was taken over finds out before it next saves, and stops. Two that start on
two machines in the same second may both begin: the later one's file stays, and the other stops likewise.
"""

import contextlib
import fcntl
import json
import logging
import os
import pathlib
import socket
import threading
import time
from collections.abc import Iterator

from etils import epath

from dydit_jax.errors import InputError, StopError
from dydit_jax.runtime.files import as_system_errors, is_local, write_json

logger = logging.getLogger(__name__)

LOCK_FILE = "lock.json"
RENEW_SECONDS = 15.0
WATCH_SECONDS = 60.0
POLL_SECONDS = 0.2
ENDING_SECONDS = 3.0  # that a killed process may take to let go of the kernel's lock


class FolderLock:
    """The lock of one folder, which is made where it is missing; held while its context is open."""

    def __init__(self, folder):
        self._path = epath.Path(folder) / LOCK_FILE
        self._owner = dict(host=socket.gethostname(), pid=os.getpid(), machine=_machine(), began=time.time_ns())
        self._kernel = None
        self._left = threading.Event()
        self._renewing = threading.Thread(target=self._keep_renewing, daemon=True)

    def __enter__(self):
        """Take the lock.

        Raises:
          InputError: another program works in the folder, and nothing is changed then; or it can't be written to.
        """
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"Can't write to {self._path.parent}: {error.strerror or error}.") from error
        self._kernel = _kernel_lock(self._path)
        try:
            self._await_the_last_owner()
            self._renew()
        except BaseException:
            self._release_kernel_lock()
            raise
        self._renewing.start()
        return self

    def __exit__(self, *_):
        self._left.set()
        self._renewing.join()
        with contextlib.suppress(OSError), as_system_errors():
            if self._is_ours():
                self._path.unlink(missing_ok=True)
        self._release_kernel_lock()

    def require_held(self) -> None:
        """Raise if another program has taken the folder over.

        Raises:
          StopError: naming it.
        """
        if not self._is_ours():
            raise StopError(
                f"{self._path.parent} was taken over by {_named(_read(self._path))}, because this process had not been "
                "heard of for a minute; it stops before it writes there."
            )

    def _await_the_last_owner(self) -> None:
        """Return when the folder is free: its last owner has left, is known to be dead, or gives no sign of life."""
        found, ends = _read(self._path), time.monotonic() + WATCH_SECONDS
        if found is None or self._is_dead(found):
            return
        logger.warning(
            "%s was in use by %s: watching for %d s whether it still is.",
            *(self._path.parent, _named(found), WATCH_SECONDS),
        )
        while time.monotonic() < ends:
            time.sleep(POLL_SECONDS)
            now = _read(self._path)
            if now is None:
                return
            if now != found:
                raise _in_use(self._path.parent, now)
        logger.warning("%s: no sign of life of %s, taken over.", self._path.parent, _named(found))

    def _is_dead(self, found: dict) -> bool:
        """Return whether the owner of a file is surely gone: of this machine, and no process holds the lock."""
        if found.get("machine") != self._owner["machine"]:
            return False
        return self._kernel is not None or not _is_alive(found.get("pid"))

    def _is_ours(self) -> bool:
        """Return whether no other program has written its name; a file that is gone or unreadable names none."""
        found = _read(self._path) or self._owner
        return all(found.get(key) == value for key, value in self._owner.items())

    def _keep_renewing(self) -> None:
        """Renew the file until this program leaves the folder, or another has taken it over."""
        while not self._left.wait(RENEW_SECONDS):
            try:
                if not self._is_ours():
                    return
                self._renew()
            except Exception as error:  # noqa: BLE001 (whatever it is may pass; others take over where it does not)
                logger.warning("%s could not be renewed; trying again in %g s. (%s)", self._path, RENEW_SECONDS, error)

    def _renew(self) -> None:
        write_json(self._path, dict(self._owner, renewed=time.time()))

    def _release_kernel_lock(self) -> None:
        if self._kernel is not None:
            os.close(self._kernel)


def is_free(folder) -> bool:
    """Return whether a folder can be filled: not there, or nothing in it but what a kill has left."""
    folder = epath.Path(folder)
    if not folder.exists():
        return True
    is_left = lambda path: path.name == LOCK_FILE or path.suffix == ".partial"
    return folder.is_dir() and all(map(is_left, folder.iterdir()))


@contextlib.contextmanager
def claim_folder(folder, *signs: str) -> Iterator[FolderLock]:
    """Hold a folder that can be filled, or that a job of the same kind has begun to fill.

    Args:
      folder: made where it is missing.
      signs: files by which a job's folder is known: one of them is there.

    Raises:
      InputError: anything else in it, and nothing is changed then; in use by another program, or not to be written to.
    """
    folder = epath.Path(folder)
    _require_free_or_begun(folder, signs)  # a stranger's lock.json may be anything
    with FolderLock(folder) as lock:
        _require_free_or_begun(folder, signs)  # its last owner may just have left
        yield lock


def _require_free_or_begun(folder, signs: tuple[str, ...]) -> None:
    try:
        is_known = any((folder / sign).is_file() for sign in signs) or is_free(folder)
    except OSError as error:
        raise InputError(f"Can't write to {folder}: {error.strerror or error}.") from error
    if not is_known:
        raise InputError(f"{folder} is not empty and has no {' or '.join(signs)}; name another folder.")


def _kernel_lock(path) -> int | None:
    """Take the kernel's lock on the folder of a lock file; None where there is none to be had.

    Raises:
      InputError: it is another process's.
    """
    if not is_local(path):
        return None
    try:
        descriptor = os.open(path.parent, os.O_RDONLY)
    except OSError:
        return None
    ends = time.monotonic() + ENDING_SECONDS
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if time.monotonic() > ends:
                os.close(descriptor)
                raise _in_use(path.parent, _read(path)) from error
            time.sleep(POLL_SECONDS)
        except OSError:  # a file system without such locks
            os.close(descriptor)
            return None
        else:
            return descriptor


def _in_use(folder, owner: dict | None) -> InputError:
    return InputError(
        f"{folder} is in use by {_named(owner)}; wait for it, stop it, or name another folder. One program at a time."
    )


def _named(owner: dict | None) -> str:
    if not owner or "pid" not in owner:
        return "another process"
    return f"process {owner['pid']} on {owner.get('host')}"


def _read(path) -> dict | None:
    """Return what a lock file says, {} for one that is no record, None for one that is not there."""
    try:
        with as_system_errors():
            found = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _is_alive(pid) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, TypeError, ValueError, OverflowError):
        return False
    except PermissionError:  # another user's
        return True
    return True


def _machine() -> str:
    """Name this machine since its last start, as far as its processes see each other: containers are apart."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(str(pathlib.Path("/proc/self/ns/pid").stat().st_ino))
    return "/".join(parts)
