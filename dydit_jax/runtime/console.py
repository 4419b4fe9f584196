"""What the command-line programs share: log lines for people, one line for a user's mistake."""

import contextlib
import logging
import sys
import time
from collections.abc import Callable, Mapping, Sequence

import absl.logging
from absl import flags
from tqdm.contrib.logging import logging_redirect_tqdm

from dydit_jax.errors import InputError, escape_unprintable
from dydit_jax.runtime import last_words
from dydit_jax.runtime.arguments import parse_flags
from dydit_jax.runtime.cache import keep_programs
from dydit_jax.runtime.processes import joined_processes
from dydit_jax.runtime.tracking import duration

logger = logging.getLogger(__name__)


def run(
    main: Callable[[], None],
    values: flags.FlagValues = flags.FLAGS,
    *,
    about: str = "",
    required: Sequence[str] = (),
    keys: Mapping[str, str] = {},
) -> None:
    """Parse flags and run a program.

    Its own log goes to standard error, one line per event; libraries are heard from warnings on. An `InputError` ends
    the program with its message on one line and exit code 2, a `StopError` with its own code, and so do memory that
    runs out, an error of the system (1) and Ctrl-C (130). What files say of themselves may be in all of these, so
    letters that command a terminal are escaped.

    Args:
      main: what to do once the flags are parsed.
      values: the flags; those of every program are added.
      about, required, keys: see `parse_flags`.
    """
    _define_shared_flags(values)
    last_words.PROGRAM_FLAGS[:] = values
    parse_flags(sys.argv, values, about=about, required=required, keys=keys)
    handler = logging.StreamHandler()
    handler.setFormatter(_Printable("%(asctime)s  %(message)s", datefmt="%H:%M:%S"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("dydit_jax").setLevel(logging.INFO)
    absl.logging.set_verbosity(absl.logging.WARNING)
    # Says on every machine without a TPU that there is none.
    logging.getLogger("jax._src.xla_bridge").setLevel(logging.ERROR)
    _hush_storage()
    keep_programs()
    try:
        distributed = values["distributed"].value or values["coordinator"].value
        place = [values[name].value for name in ("coordinator", "num_processes", "process_id")]
        began = time.monotonic()
        with logging_redirect_tqdm(), joined_processes(*place) if distributed else contextlib.nullcontext():
            main()
            logger.info("Finished in %s.", duration(time.monotonic() - began))
    except (Exception, KeyboardInterrupt) as error:
        ending = last_words.ending_of(error)
        if ending is None:
            raise
        sys.stderr.write(f"{sys.argv[0]}: {escape_unprintable(ending[0])}\n")
        sys.exit(ending[1])


class _Printable(logging.Formatter):
    """Lines of the log in which nothing but their ends is unprintable."""

    def format(self, record: logging.LogRecord) -> str:
        return "\n".join(map(escape_unprintable, super().format(record).split("\n")))


def _define_shared_flags(values: flags.FlagValues) -> None:
    """Define the flags that every program has."""
    flags.DEFINE_bool(
        "distributed",
        False,
        "Join the other processes of this job; on TPU pods, SLURM, Open MPI and GKE nothing else is needed.",
        flag_values=values,
    )
    flags.DEFINE_string("coordinator", None, "host:port of process 0, where nothing else says.", flag_values=values)
    flags.DEFINE_integer("num_processes", None, "Processes of this job, with --coordinator.", flag_values=values)
    flags.DEFINE_integer("process_id", None, "Number of this process, with --coordinator.", flag_values=values)


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
        message = f"get_config must return an ml_collections.ConfigDict, not {flag.value!r:.80}"
        raise InputError(f"--{flag.name}: {message}.") from error
