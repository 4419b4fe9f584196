"""Registries: classes and functions by the name that a config uses, the built-in ones and a user's own.

Each registry has a protocol: a `typing.Protocol`, or a base class, whose documented methods say how they are called and
what they return. What is registered is checked against it at once; what its methods return is checked where they are
called, by `require_array`. `docs/extend.md` adds one of each.
"""

import functools
import inspect
from collections.abc import Callable, Mapping

from dydit_jax.errors import InputError


class Registry(dict):
    """What may stand under a key of the config, by name."""

    def __init__(self, kind: str, protocol: type, entries: Mapping, *, base: type = object):
        """Make a registry.

        Args:
          kind: of the entries, for messages, e.g. "time router".
          protocol: methods with a docstring are those that an entry must have. A function is an entry of a protocol
            with `__call__`.
          entries: the built-in ones.
          base: that classes must derive from.
        """
        super().__init__(entries)
        self.kind, self.protocol, self.base = kind, protocol, base

    def register(self, name: str) -> Callable:
        """Return a decorator that adds a class or function under a name. It replaces one that was added before it.

        Raises:
          InputError: a name that a built-in entry has, or what does not follow the protocol; says which method it
            is about and what that should return.
        """
        return functools.partial(self._add, name)

    def require(self, key: str, name: str) -> None:
        """Raise unless there is an entry of this name.

        Raises:
          InputError: with the config's key, the name that came and the known ones.
        """
        if name not in self:
            raise InputError(
                f"Unknown {key} {name!r}; known: {', '.join(sorted(self))}. A {self.kind} of your own is known once "
                "the module that registers it has been imported."
            )

    def _add(self, name: str, entry):
        if name in self and is_built_in(self[name]):
            raise InputError(f"{self.kind.capitalize()} {name!r} is built in; give {_name(entry)} another name.")
        if self.base is not object and not (isinstance(entry, type) and issubclass(entry, self.base)):
            raise InputError(f"{_name(entry)} is no {self.kind}: it must be a subclass of {self.base.__name__}.")
        for method, member in vars(self.protocol).items():
            function = getattr(member, "__func__", member)
            if inspect.isfunction(function) and function.__doc__ and function.__module__ == self.protocol.__module__:
                self._require_method(entry, method)
        self[name] = entry
        return entry

    def _require_method(self, entry, method: str) -> None:
        """Raise unless an entry has a method that can be called as the protocol's is."""
        wanted = getattr(self.protocol, method)
        parameters = inspect.signature(wanted).parameters.values()
        positional = [parameter.name for parameter in parameters if parameter.kind != parameter.KEYWORD_ONLY]
        keywords = {parameter.name: None for parameter in parameters if parameter.kind == parameter.KEYWORD_ONLY}
        if isinstance(entry, type):
            # Not those of `object` and of metaclasses, which `getattr` alone would find.
            found = getattr(entry, method) if any(method in vars(cls) for cls in entry.__mro__[:-1]) else None
        else:
            found, positional = entry if method == "__call__" else None, positional[1:]
        try:
            inspect.signature(found).bind(*positional, **keywords)
        except (TypeError, ValueError):
            came = f", not {method}{inspect.signature(found)}" if callable(found) else ""
            first = inspect.getdoc(wanted).splitlines()[0]
            raise InputError(
                f"{_name(entry)} is no {self.kind}: it needs {method}{inspect.signature(wanted)}{came}. "
                f"It must {first[0].lower()}{first[1:]}"
            ) from None


def is_built_in(entry) -> bool:
    """Return whether a class or function is part of this package."""
    return entry.__module__.partition(".")[0] == __name__.partition(".")[0]


def require_array(value, shape: tuple[int, ...], dtype: str = "", *, method: str, returns: str) -> None:
    """Raise unless a user's method returned an array of the right shape and dtype.

    Args:
      value: that came.
      shape, dtype: that are needed; an empty dtype allows any.
      method: the method, e.g. "MyRouter.__call__".
      returns: what it should return, in words.

    Raises:
      InputError: with the method, what came and what it should return.
    """
    found_shape, found_dtype = getattr(value, "shape", None), str(getattr(value, "dtype", ""))
    if found_shape != shape or found_dtype != (dtype or found_dtype):
        came = f"{found_dtype} {found_shape}" if found_dtype else type(value).__name__
        raise InputError(f"{method} must return {returns}, {f'{dtype} {shape}'.strip()}, not {came}.")


def _name(entry) -> str:
    """Return the name of a class or function for messages."""
    return getattr(entry, "__qualname__", repr(entry))
