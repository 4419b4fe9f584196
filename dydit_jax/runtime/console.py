"""What the command-line programs share: log lines for people, one line for a user's mistake."""

import logging
import re
import sys
from collections.abc import Callable

import absl.logging
import jax
from absl import app, flags

from dydit_jax.errors import InputError, StopError
from dydit_jax.runtime.cache import program_folder
from dydit_jax.runtime.processes import start_processes

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
    the program with its message on one line and exit code 2, a `StopError` with its own code.
    """

    def guarded(_):
        logging.basicConfig(level=logging.WARNING, format="%(asctime)s  %(message)s", datefmt="%H:%M:%S", force=True)
        logging.getLogger("dydit_jax").setLevel(logging.INFO)
        absl.logging.set_verbosity(absl.logging.WARNING)
        # Says on every machine without a TPU that there is none.
        logging.getLogger("jax._src.xla_bridge").setLevel(logging.ERROR)
        # A second start finds its programs compiled.
        jax.config.update("jax_compilation_cache_dir", jax.config.jax_compilation_cache_dir or program_folder())
        try:
            if DISTRIBUTED.value or COORDINATOR.value:
                start_processes(COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value)
            main()
        except (InputError, StopError) as error:
            sys.stderr.write(f"{sys.argv[0]}: {error}\n")
            sys.exit(error.code if isinstance(error, StopError) else 2)

    app.run(guarded, flags_parser=_parse_flags)


def read_config(flag) -> dict:
    """Return the content of a config-file flag as plain dicts.

    Raises:
      InputError: a file that is missing or does not run.
    """
    try:
        return flag.value.to_dict()
    except OSError as error:
        raise InputError(f"--{flag.name}: {' '.join(str(error).split())}") from error


def _parse_flags(arguments: list[str]) -> list[str]:
    """Parse flags; config flags raise several kinds of error for a mistyped key or value."""
    try:
        return flags.FLAGS(arguments)
    except (AttributeError, KeyError) as error:
        key = re.search(r"\w+", str(error)).group()
        near = re.search(r'mean \\?"(\w+)', str(error))
        message = f"Unknown config key {key!r}." + (f" Did you mean {near.group(1)!r}?" if near else "")
    except (flags.Error, TypeError, ValueError) as error:
        message = " ".join(str(error).split())
    sys.stderr.write(f"{arguments[0]}: {message}\n")
    sys.exit(2)
