"""Where things lie that can be made or fetched again: downloads, converted weights, calibrations, compiled programs.

Compiled programs are code, ours and those that JAX keeps by itself: whoever can write to their folder can run code as
the user who reads it. Ours are read only from a folder of this user alone. JAX asks nobody, so this package gives it
such a folder or none; a user who names another one in JAX_COMPILATION_CACHE_DIR trusts all who can write there. The
cache itself may be shared: whoever can write to it could put another folder in the place of this one, so programs are
kept in the user's own cache then.
"""

import functools
import grp
import logging
import os
import pwd
import stat
from pathlib import Path

import jax

logger = logging.getLogger(__name__)

SECONDS_OF_USER = "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"
ROOTS = (0, 65534)  # the second is how a container shows a root that it does not map
LEAST_SECONDS = 0.1  # of compiling, from which on a program is kept; JAX's own second leaves most of a short run out


def cache_folder() -> Path:
    """Return $DYDIT_JAX_CACHE, or ~/.cache/dydit-jax."""
    return Path(os.environ.get("DYDIT_JAX_CACHE") or _own_cache())


def _own_cache() -> Path:
    return Path.home() / ".cache" / "dydit-jax"


def program_folder() -> str | None:
    """Return the folder for JAX's compiled programs, or None, with a warning, where it can't be one's own."""
    try:
        folder = (_make_cache() if os.environ.get("DYDIT_JAX_CACHE") else _make_own_cache()) / "programs"
        if shared := _shared_parent(folder):
            folder = _make_own_cache() / "programs"
            if own := _shared_parent(folder):
                warn_once(f"Compiled programs are not kept: others can write to {own}, or own it (chmod go-w {own}).")
                return None
            warn_once(f"Compiled programs are kept in {folder}: others can write to {shared}, or own it.")
        make_private(folder)
    except (OSError, RuntimeError) as error:  # a user without a home has the second
        warn_once(f"Compiled programs are not kept: {' '.join(str(error).split())}.")
        return None
    return str(folder) if is_private(folder) else None


def _make_cache() -> Path:
    """Make the folder of a cache that may be shared: for whom the umask allows."""
    cache_folder().mkdir(parents=True, exist_ok=True)
    return cache_folder()


def _make_own_cache() -> Path:
    """Make the folder of the user's own cache, for this user alone."""
    for folder in (_own_cache().parent, _own_cache()):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return _own_cache()


def keep_programs() -> None:
    """Let a second start find its programs compiled, in `program_folder` unless the user has chosen another place.

    Small programs too, unless the user has set `SECONDS_OF_USER`: those that a run begins with compile for a second.
    """
    if not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", program_folder())
    if SECONDS_OF_USER not in os.environ:
        name = SECONDS_OF_USER.lower()
        jax.config.update(name, min(getattr(jax.config, name), LEAST_SECONDS))


def make_private(folder: Path) -> None:
    """Make a folder for this user alone, and what is missing above it for whom the umask allows.

    What is there stays as it is.

    Raises:
      OSError: it can't be made.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)


def _shared_parent(folder: Path) -> Path | None:
    """Return a folder above one, in which others could put another one in its place; None where there is none.

    Where only owners rename, as in /tmp, they can't, nor in a folder that they can't enter. Links are followed, and
    could be replaced themselves.
    """
    for path in (folder.absolute(), folder.resolve()):
        for parent in reversed(path.parents):
            found = parent.stat()
            if _is_shared(found):
                return parent
            if _is_closed(found):
                break
    return None


def _is_shared(found: os.stat_result) -> bool:
    """Return whether others than this user and root can rename what lies in a folder."""
    if found.st_uid not in (*ROOTS, os.getuid()):
        return True
    others = found.st_mode & stat.S_IWOTH or (found.st_mode & stat.S_IWGRP and not _is_own_group(found.st_gid))
    return bool(others) and not found.st_mode & stat.S_ISVTX


def _is_closed(found: os.stat_result) -> bool:
    """Return whether nobody but this user and root comes to what lies below a folder."""
    return found.st_uid == os.getuid() and not found.st_mode & (stat.S_IXGRP | stat.S_IXOTH)


def _is_own_group(gid: int) -> bool:
    """Return whether a group is this user's alone: many systems give each user one, and a umask that lets it write."""
    try:
        group, user = grp.getgrgid(gid), pwd.getpwuid(os.getuid()).pw_name
    except KeyError:  # nobody knows who else is in it
        return False
    return group.gr_name == user and not {*group.gr_mem} - {user}


def is_private(folder: Path) -> bool:
    """Return whether a folder is this user's and closed to what others would write, or not there; warn where not."""
    try:
        found = folder.stat()
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError as error:
        warn_once(f"Compiled programs are neither read nor kept: {' '.join(str(error).split())}.")
        return False
    if belongs_to_user(found):
        return True
    warn_once(
        f"Compiled programs are neither read nor kept: others can write to {folder}, or own it. Take it from them "
        f"(chmod go-w {folder}), or name a folder of your own with JAX_COMPILATION_CACHE_DIR."
    )
    return False


def belongs_to_user(found: os.stat_result) -> bool:
    """Return whether a file or folder is this user's, and closed to what others would write."""
    return found.st_uid == os.getuid() and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


@functools.cache  # a run asks for many programs
def warn_once(message: str) -> None:
    """Log a warning, once in this process."""
    logger.warning(message)
