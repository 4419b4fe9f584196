"""Errors that programs print as a single line: a mistake that is the user's to mend, and a run that has to stop."""

import contextlib
from collections.abc import Iterator


class InputError(ValueError):
    """What came, what is allowed, what to do; raised before anything is compiled or written."""


class DamageError(InputError):
    """A file that is not as it was written; whether there is another is the caller's to say."""


def require_known(kind: str, name, known) -> None:
    """Raise unless `name` is one of `known`; the message lists them all.

    Raises:
      InputError: naming the kind, the name that came and every known name.
    """
    if name not in known:
        raise InputError(f"Unknown {kind} {name!r}; known: {', '.join(sorted(map(str, known)))}.")


@contextlib.contextmanager
def name_file(path) -> Iterator[None]:
    """Put the name of the file that is read before the message of an `InputError`, which may quote it."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{path}: {escape_unprintable(str(error))}") from error


def escape_unprintable(text: str) -> str:
    """Return a text with what can't be printed, or isn't Unicode, escaped: such letters command terminals."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def some_of(names, *, most: int = 4, separator: str = ", ") -> str:
    """Return the first of many names, and how many more there are."""
    names = list(names)
    rest = [f"and {len(names) - most} more"] if len(names) > most else []
    return separator.join([*map(str, names[:most]), *rest])


class StopError(Exception):
    """A run that can't or must not go on now; its state is saved, and `code` is the program's exit status."""

    def __init__(self, message: str, code: int = 1):
        super().__init__(message)
        self.code = code
