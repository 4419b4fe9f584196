"""Flags from the dataclass that they fill: names, types and defaults from its fields, meanings from its docstring."""

import dataclasses
import inspect
import re
import types
import typing

from absl import flags

from dydit_jax.errors import InputError

DEFINE = {
    str: flags.DEFINE_string,
    int: flags.DEFINE_integer,
    float: flags.DEFINE_float,
    bool: flags.DEFINE_bool,
    list: flags.DEFINE_list,
    tuple: flags.DEFINE_list,
}


def define_flags(cls, values: flags.FlagValues) -> list[str]:
    """Define a flag for every field of a dataclass; `read_flags` makes the record.

    Args:
      cls: a dataclass. Fields that no flag can hold, such as dicts, are left to the caller.
      values: where the flags are defined.

    Returns:
      Names of the flags that must be given: of the fields without a default.
    """
    required = []
    for field, define in _fields(cls):
        default = None if field.default is dataclasses.MISSING else field.default
        if define is flags.DEFINE_list and default is not None:
            default = [str(item) for item in default]
        define(field.name, default, read_meanings(cls)[field.name], flag_values=values)
        if field.default is dataclasses.MISSING:
            required.append(field.name)
    return required


def read_flags(cls, values: flags.FlagValues, **others):
    """Make the record from its parsed flags.

    Args:
      cls: the dataclass of `define_flags`.
      values: where the flags are.
      others: the fields that have no flag.

    Raises:
      InputError: a value that the dataclass refuses.
    """
    hints = typing.get_type_hints(cls)
    given = {field.name: values[field.name].value for field, _ in _fields(cls)}
    listed = [name for name, value in given.items() if value is not None and _kind(hints[name]) is tuple]
    tuples = {name: _numbers(given[name], hints[name], name) for name in listed}
    return cls(**given | tuples, **others)


def define_overrides(cls, section: str, values: flags.FlagValues) -> None:
    """Define a flag `--section.field` for every field of a dataclass, without a default."""
    for field, define in _fields(cls):
        define(f"{section}.{field.name}", None, read_meanings(cls)[field.name], flag_values=values)


def read_overrides(cls, section: str, values: flags.FlagValues) -> dict:
    """Return the fields that were given by `--section.field`.

    Raises:
      InputError: something else than a number in a list of numbers.
    """
    hints, given = typing.get_type_hints(cls), {}
    for field, define in _fields(cls):
        name, value = f"{section}.{field.name}", values[f"{section}.{field.name}"].value
        if value is not None:
            given[field.name] = _numbers(value, hints[field.name], name) if define is flags.DEFINE_list else value
    return given


def read_meanings(cls) -> dict[str, str]:
    """Return what each field of a dataclass means, from the `Attributes:` of its docstring, each on one line."""
    lines = (inspect.getdoc(cls) or "").partition("Attributes:\n")[2].splitlines()
    meanings, names = {field.name: "" for field in dataclasses.fields(cls)}, []
    for line in lines:
        start = re.match(r"  (\w+(?:, \w+)*): (.*)", line)
        if start:
            names = start[1].split(", ")
            meanings |= dict.fromkeys(names, start[2].strip())
        elif line.startswith("    "):
            meanings |= {name: f"{meanings[name]} {line.strip()}" for name in names}
        else:
            break
    return {name: meaning[:1].upper() + meaning[1:] for name, meaning in meanings.items()}


def _fields(cls) -> list[tuple]:
    """Return the fields that a flag can hold, each with the function that defines it; no flag holds lists of lists."""
    hints = typing.get_type_hints(cls)
    found = [(field, hints[field.name]) for field in dataclasses.fields(cls)]
    return [(field, DEFINE[_kind(hint)]) for field, hint in found if _kind(hint) in DEFINE and not _is_nested(hint)]


def _is_nested(hint) -> bool:
    """Return whether a type is a tuple of tuples."""
    return _kind(hint) is tuple and any(_kind(item) is tuple for item in typing.get_args(_without_none(hint)))


def _numbers(words: list[str], hint, name: str) -> tuple:
    """Return the words of a list as the numbers, or words, that its type wants."""
    kind = (typing.get_args(_without_none(hint)) or (str,))[0]
    try:
        return tuple(kind(word) for word in words)
    except ValueError as error:
        raise InputError(f"--{name} must be numbers with commas between them, not {','.join(words)}.") from error


def _kind(hint) -> type:
    """Return the class of a type, without `| None` and what a container holds."""
    hint = _without_none(hint)
    return typing.get_origin(hint) or hint


def _without_none(hint):
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return next(option for option in typing.get_args(hint) if option is not type(None))
    return hint
