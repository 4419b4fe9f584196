"""Strict reading of plain mappings into frozen dataclasses.

Config files and checkpoint metadata are mappings; the program works on frozen dataclasses. This is the
border: unknown keys, wrong types and wrong tuple lengths end here, with the full name of the key. Ranges
are the business of each record's `__post_init__`.
"""

import dataclasses
import difflib
import sys
import types
import typing
from collections.abc import Mapping

from dydit_jax.errors import InputError


def read_record(cls, mapping: Mapping, where: str):
    """Make a `cls` from `mapping`.

    Args:
      cls: a frozen dataclass whose fields are int, float, str, bool, tuples of these, or `X | None`.
      mapping: field names to values; missing fields keep their defaults.
      where: the section's name, for messages, e.g. "model".

    Returns:
      An instance of `cls`.

    Raises:
      InputError: a key that `cls` does not have (with the nearest known one), a value of another type, or
        a value that `cls` itself refuses.
    """
    require_mapping(mapping, where)
    mapping = with_current_names(cls, mapping)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    values = {}
    for key, value in mapping.items():
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1)
            hint = f" Did you mean {where}.{near[0]}?" if near else ""
            raise InputError(f"Unknown key {where}.{key};{hint} known: {', '.join(sorted(fields))}.")
        values[key] = _checked(value, hints[key], f"{where}.{key}")
    missing = [name for name, field in fields.items() if name not in values and _required(field)]
    if missing:
        raise InputError(f"{where} lacks {', '.join(missing)}.")
    return cls(**values)


def read_mapping(cls, mapping: Mapping, where: str) -> dict:
    """Check what a mapping of somebody else's, or of another version, has in the keys that are read of it.

    Args:
      cls: a `typing.TypedDict` of these keys. Their types are those of `read_record`'s fields, `dict`,
        `dict[str, type]`, a `TypedDict` for a mapping within, or `Annotated[type, low, high]` for a range.
      mapping: may have other keys, with any values.
      where: as for `read_record`.

    Returns:
      The mapping, integers as floats and lists as tuples where `cls` says so, without keys of `cls` that hold None.

    Raises:
      InputError: no mapping, a required key that is not there, or a value of another type or out of its range.
    """
    require_mapping(mapping, where)
    hints = typing.get_type_hints(cls, include_extras=True)
    found = {key: value for key, value in mapping.items() if value is not None or key not in hints}
    missing = sorted(cls.__required_keys__ - found.keys())
    if missing:
        raise InputError(f"{where} lacks {', '.join(missing)}.")
    return found | {key: _checked(found[key], hints[key], f"{where}.{key}") for key in hints if key in found}


def require_mapping(value, where: str) -> None:
    """Raise unless a value is a mapping.

    Raises:
      InputError: with the value.
    """
    if not isinstance(value, Mapping):
        raise InputError(f"{where} must be a section with keys, not {value!r:.80}.")


def with_current_names(cls, mapping: Mapping) -> dict:
    """Return a mapping in which keys of earlier versions, listed in `cls.RENAMED`, have the names of today."""
    renamed = getattr(cls, "RENAMED", {})
    return {renamed.get(key, key): value for key, value in mapping.items()}


def _required(field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _checked(value, kind, where: str):
    """Return `value` as `kind`; integers pass as floats, lists as tuples, nothing else. Floats are finite."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        options = typing.get_args(kind)
        if value is None and type(None) in options:
            return None
        kind = next(option for option in options if option is not type(None))
    if typing.get_origin(kind) is typing.Annotated:
        kind, *limits = typing.get_args(kind)
        value = _checked(value, kind, where)
        require_range(where, value, *limits)
        return value
    if typing.is_typeddict(kind):
        return read_mapping(kind, value, where)
    if typing.get_origin(kind) is dict:
        require_mapping(value, where)
        inner = typing.get_args(kind)[1]
        return {key: _checked(item, inner, f"{where}.{key!s:.80}") for key, item in value.items()}
    if typing.get_origin(kind) is tuple:
        return _checked_tuple(value, typing.get_args(kind), where)
    if kind is float and type(value) in (int, float):
        if not abs(value) <= sys.float_info.max:
            raise InputError(f"{where} must be a finite number, not {value!r:.40}.")
        return float(value)
    # `type(...) is`, because True is an int to isinstance.
    if type(value) is not kind:
        raise InputError(f"{where} must be of type {kind.__name__}, not {value!r:.80}.")
    return value


def _checked_tuple(value, kinds, where: str) -> tuple:
    if not isinstance(value, (tuple, list)):
        raise InputError(f"{where} must be a tuple, not {value!r:.80}.")
    if kinds[-1] is Ellipsis:
        kinds = (kinds[0],) * len(value)
    if len(value) != len(kinds):
        raise InputError(f"{where} must have {len(kinds)} values, not {len(value)}: {tuple(value)!r}.")
    return tuple(_checked(item, kind, f"{where}[{i}]") for i, (item, kind) in enumerate(zip(value, kinds)))


def require_range(where: str, value, low=None, high=None) -> None:
    """Raise unless `low <= value <= high`; None leaves a side open.

    Raises:
      InputError: with the value and what is allowed.
    """
    if (low is not None and not value >= low) or (high is not None and not value <= high):
        allowed = f"at least {low}" if high is None else f"at most {high}" if low is None else f"from {low} to {high}"
        raise InputError(f"{where} must be {allowed}, not {value!r}.")
