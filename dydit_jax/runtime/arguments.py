"""From the words of a command line to flags: the help, and one plain line for whatever is wrong with them."""

import difflib
import importlib.metadata
import pathlib
import re
import sys
import sysconfig
import textwrap
import traceback
from collections.abc import Mapping, Sequence

from absl import flags

PACKAGE = pathlib.Path(__file__).parents[1]
HELP, VERSION = ("--help", "-help", "-h"), ("--version", "-version")
HELP_WIDTH = 100
LIBRARIES = ("absl", "chex")  # whose flags are for themselves
KINDS = {"int": "integer", "float": "number", "comma separated list of strings": "a,b,c"}


def parse_flags(
    arguments: list[str], values: flags.FlagValues, *, about: str, required: Sequence[str], keys: Mapping[str, str]
) -> None:
    """Parse a command line; a config file is run meanwhile.

    A mistake ends the program with one line and exit code 2, --help and --version with what they ask for and 0.

    Args:
      arguments: name of the program, then what was typed.
      values: holds the flags.
      about: what the program does, for its help.
      required: names of the flags that must be given.
      keys: meanings of further flags by name, which exist as soon as a config file is read.
    """
    if set(HELP) & set(arguments[1:]):
        _end(0, format_help(values, about=about, required=required, keys=keys))
    if set(VERSION) & set(arguments[1:]):
        _end(0, f"dydit-jax {importlib.metadata.version('dydit-jax')}")
    values.set_gnu_getopt(False)  # stops at the first argument that belongs to no flag
    try:
        stray = values(arguments)[1:]
        message = _stray_argument(arguments, len(arguments) - len(stray), values, keys) if stray else ""
    except Exception as error:
        message = _mistake(error, values, keys)
        if message is None:
            raise
    missing = [name for name in required if not message and values[name].using_default_value]
    if missing:
        message = _missing_flag(missing[0], values)
    if message:
        _end(2, f"{arguments[0]}: {message}")


def _end(code: int, text: str) -> None:
    (sys.stderr if code else sys.stdout).write(f"{text}\n")
    sys.exit(code)


# --- Help ----------------------------------------------------------------------------------------


def format_help(
    values: flags.FlagValues, *, about: str = "", required: Sequence[str] = (), keys: Mapping[str, str] = {}
) -> str:
    """Return what a program does and what each of its flags means, those of every program last."""
    own, shared = [], []
    for module, found in values.flags_by_module_dict().items():
        if module.split(".")[0] not in LIBRARIES:
            (shared if module == "dydit_jax.runtime.console" else own).extend(found)
    sections = {
        "Flags": [_describe(flag, flag.name in required) for flag in own],
        "Keys of the config, each of them a flag": [_entry(f"--{name}", meaning) for name, meaning in keys.items()],
        "Flags of every command": [
            *(_describe(flag, False) for flag in shared),
            _entry("--version", "Print the version of this package."),
        ],
    }
    listed = [f"{title}:\n" + "\n".join(entries) for title, entries in sections.items() if entries]
    return "\n\n".join([about.strip(), *listed]).strip()


def _describe(flag: flags.Flag, required: bool) -> str:
    """Return one flag's name, meaning and default."""
    if required:
        note = " Required."
    elif flag.default is None or flag.default is False or flag.default == "":
        note = ""
    else:
        shown = ",".join(map(str, flag.default)) if isinstance(flag.default, (list, tuple)) else flag.default
        note = f" Default: {shown}."
    name = f"--{flag.name}" if flag.boolean else f"--{flag.name}=<{_kind(flag)}>"
    return _entry(name, (flag.help or "").rstrip(".") + "." + note)


def _kind(flag: flags.Flag) -> str:
    """Return what a flag's value is, in a word."""
    return KINDS.get(flag.flag_type(), "text")


def _entry(name: str, meaning: str) -> str:
    return f"  {name}\n" + textwrap.fill(meaning, HELP_WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)


# --- Mistakes ------------------------------------------------------------------------------------


def _stray_argument(arguments: list[str], first: int, values: flags.FlagValues, keys: Mapping[str, str]) -> str:
    """Say what the first argument that belongs to no flag was likely meant as."""
    stray, before = arguments[first], arguments[first - 1]
    name, equals, value = stray.partition("=")
    if equals and (name in values or name in keys):
        return f"Unknown argument {stray!r}; did you mean --{name}={value}?"
    typed = re.match(r"--?([\w.]+)(?:=(.*))?$", before) or (
        re.match(r"--?([\w.]+)$", arguments[first - 2]) if first > 2 else None
    )
    flag = values[typed[1]] if typed and typed[1] in values else None
    if flag is not None and isinstance(flag.parser, flags.ListParser):
        words = [word for word in (before if typed.string != before else typed[2], stray) if word]
        for word in arguments[first + 1 :]:
            if word.startswith("-"):
                break
            words.append(word)
        listed = ",".join(word.strip(",") for word in words)
        return f"Unknown argument {stray!r}; a list has commas and no spaces: give --{flag.name} {listed}."
    if flag is not None and flag.boolean and typed.string == before:
        return f"Unknown argument {stray!r}; did you mean --{flag.name}={stray}?"
    return f"Unknown argument {stray!r}; a value follows its flag, as in --name=value."


def _missing_flag(name: str, values: flags.FlagValues) -> str:
    return f"--{name} is required. {values[name].help.rstrip('.')}."


def _unknown_flag(name: str, values: flags.FlagValues, keys: Mapping[str, str]) -> str:
    """Name a flag that there is not, and those that were likely meant."""
    if name in keys:
        return f"--{name} is a key of the config; give --config before it."
    known = [*values, *keys]
    near = [other for other in known if other.rpartition(".")[2] == name.rpartition(".")[2]]
    near = near or difflib.get_close_matches(name, known, n=1)
    near = near or [other for other in known if difflib.get_close_matches(name, [other.rpartition(".")[2]])]
    hint = f" Did you mean {' or '.join(f'--{other}' for other in near[:3])}?" if near else " --help lists them."
    return f"Unknown flag --{name}.{hint}"


def _mistake(error: Exception, values: flags.FlagValues, keys: Mapping[str, str]) -> str | None:
    """Say in one line what is wrong with the flags or the config file; None where it is neither."""
    message, place = " ".join(str(error).split()), _config_line(error)
    if isinstance(error, flags.UnrecognizedFlagError):
        return _unknown_flag(error.flagname, values, keys)
    missing = isinstance(error, flags.IllegalFlagValueError) and re.match(r"flag --(\w+)=None: ", message)
    if missing:  # what absl says of a required flag
        return _missing_flag(missing[1], values)
    if isinstance(error, SyntaxError):
        return f"{place or 'The file of --config'} is no Python: {error.msg}."
    if "get_config" in message:
        return f"The file of --config has no function get_config ({message})."
    near = re.search(r'mean \\?"(\w+)', message)
    if isinstance(error, (AttributeError, KeyError)) and (near or not place):
        key = re.search(r"\w+", message).group()
        hint = f" Did you mean {near.group(1)!r}?" if near else ""
        return f"Unknown config key {key!r}.{hint}" + (f" ({place})" if place else "")
    if place:
        return f"{place}: {type(error).__name__}: {message}"
    return message if isinstance(error, (flags.Error, TypeError, ValueError)) else None


def _config_line(error: Exception) -> str:
    """Return file and line of a config that an error came out of; "" where it is of a library or of this package."""
    if isinstance(error, SyntaxError):
        return f"{error.filename}, line {error.lineno}" if error.filename else ""
    libraries = [sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")]
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path = pathlib.Path(frame.filename)
        is_config = path.is_relative_to(PACKAGE / "configs")
        if is_config or path.is_file() and not any(path.is_relative_to(folder) for folder in (*libraries, PACKAGE)):
            return f"{frame.filename}, line {frame.lineno}"
    return ""
