"""The one kind of error that is the user's to mend: programs print it as a single line."""


class InputError(ValueError):
    """What came, what is allowed, what to do; raised before anything is compiled or written."""


def require_known(kind: str, name, known) -> None:
    """Raise unless `name` is one of `known`; the message lists them all.

    Raises:
      InputError: naming the kind, the name that came and every known name.
    """
    if name not in known:
        raise InputError(f"Unknown {kind} {name!r}; known: {', '.join(sorted(map(str, known)))}.")
