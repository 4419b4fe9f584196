"""What the command-line programs share: log lines for people, one line for a user's mistake."""

import contextlib
import logging
import pathlib
import re
import sys
import sysconfig
import traceback
from collections.abc import Callable

import absl.logging
import jax
from absl import app, flags

from dydit_jax.errors import InputError
from dydit_jax.runtime.cache import program_folder
from dydit_jax.runtime.last_words import ending_of
from dydit_jax.runtime.processes import joined_processes

DISTRIBUTED = flags.DEFINE_bool(
    "distributed",
    False,
    "Join the other processes of this job; on TPU pods, SLURM, Open MPI and GKE nothing else is needed.",
)
COORDINATOR = flags.DEFINE_string("coordinator", None, "host:port of process 0, where nothing else says.")
NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Processes of this job, with --coordinator.")
PROCESS_ID = flags.DEFINE_integer("process_id", None, "Number of this process, with --coordinator.")


def run(main: Callable[[], None]) -> None:
    """Parse flags and run a program.

    Its own log goes to standard error, one line per event; libraries are heard from warnings on. An `InputError` ends
    the program with its message on one line and exit code 2, a `StopError` with its own code, and so do memory that
    runs out, an error of the system (1) and Ctrl-C (130).
    """

    def guarded(_):
        logging.basicConfig(level=logging.WARNING, format="%(asctime)s  %(message)s", datefmt="%H:%M:%S", force=True)
        logging.getLogger("dydit_jax").setLevel(logging.INFO)
        absl.logging.set_verbosity(absl.logging.WARNING)
        # Says on every machine without a TPU that there is none.
        logging.getLogger("jax._src.xla_bridge").setLevel(logging.ERROR)
        _hush_storage()
        # A second start finds its programs compiled.
        jax.config.update("jax_compilation_cache_dir", jax.config.jax_compilation_cache_dir or program_folder())
        try:
            distributed = DISTRIBUTED.value or COORDINATOR.value
            place = (COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value)
            with joined_processes(*place) if distributed else contextlib.nullcontext():
                main()
        except (Exception, KeyboardInterrupt) as error:
            ending = ending_of(error)
            if ending is None:
                raise
            sys.stderr.write(f"{sys.argv[0]}: {ending[0]}\n")
            sys.exit(ending[1])

    app.run(guarded, flags_parser=_parse_flags)


def _hush_storage() -> None:
    """Keep off the terminal what Orbax drops when a write fails, a page for every array, in threads of its own.

    The error itself is raised where the run waits for the checkpoint, and ends it with one line.
    """
    absl.logging.get_absl_logger().addFilter(lambda record: not record.exc_info)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # "Task exception was never retrieved"
    shown = sys.unraisablehook
    sys.unraisablehook = lambda dropped: shown(dropped) if "loop is closed" not in str(dropped.exc_value) else None


def read_config(flag) -> dict:
    """Return the content of a config-file flag as plain dicts.

    Raises:
      InputError: a file that is missing or holds no configuration.
    """
    try:
        return flag.value.to_dict()
    except OSError as error:
        raise InputError(f"--{flag.name}: {' '.join(str(error).split())}") from error
    except AttributeError as error:
        told = f"get_config must return an ml_collections.ConfigDict, not {flag.value!r:.80}"
        raise InputError(f"--{flag.name}: {told}.") from error


def _parse_flags(arguments: list[str]) -> list[str]:
    """Parse flags; a config file is run meanwhile, so that any error may come out."""
    try:
        left = flags.FLAGS(arguments)
        if not left[1:]:
            return left
        message = f"Unknown argument {left[1]!r}; values follow their flag: --labels=0,1,2."
    except Exception as error:
        message = _flag_mistake(error)
        if message is None:
            raise
    sys.stderr.write(f"{arguments[0]}: {message}\n")
    sys.exit(2)


def _flag_mistake(error: Exception) -> str | None:
    """Say in one line what is wrong with the flags or the config file; None where it is neither."""
    message, place = " ".join(str(error).split()), _config_line(error)
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
    known = [*libraries, pathlib.Path(__file__).parents[1]]
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path = pathlib.Path(frame.filename)
        if path.is_file() and not any(path.is_relative_to(folder) for folder in known):
            return f"{frame.filename}, line {frame.lineno}"
    return ""
