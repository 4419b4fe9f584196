"""How a program ends for an error: with one line and an exit code, wherever one line says it all."""

import jax

from dydit_jax.errors import InputError, StopError
from dydit_jax.runtime.files import is_of_bucket

INTERRUPTED_CODE = 130  # as shells have it: 128 and SIGINT's number
OUT_OF_MEMORY = "RESOURCE_EXHAUSTED"  # in the text of JAX's error, which has no kind of its own
BUCKET_CLIENT = "gcsfs"  # in the text of fsspec's error, where it is not installed
# What takes more memory the larger it is, by the flag that a program has.
MEMORY_FLAGS = dict(
    batch_size="--batch_size", chunk="--chunk", config="--config.data.batch_size, or raise --config.train.accumulate"
)
PROGRAM_FLAGS = []  # names of the flags that this program has
SHOWN = 200  # letters of a library's message


def ending_of(error: BaseException) -> tuple[str, int] | None:
    """Return the line and the exit code that a program ends with, or None where only a traceback helps."""
    message = " ".join(str(error).split())
    if isinstance(error, InputError):
        return str(error), 2
    if isinstance(error, StopError):
        return str(error), error.code
    if isinstance(error, KeyboardInterrupt):
        return "Stopped by Ctrl-C.", INTERRUPTED_CODE
    if isinstance(error, MemoryError) or (isinstance(error, jax.errors.JaxRuntimeError) and OUT_OF_MEMORY in message):
        names = [name for flag, name in MEMORY_FLAGS.items() if flag in PROGRAM_FLAGS]
        return f"Out of memory; lower {' or '.join(names) or 'what is computed at once'} ({message[:SHOWN]}).", 1
    if isinstance(error, ImportError) and BUCKET_CLIENT in message:
        return "Paths at gs:// need the extra gcs: pip install 'dydit-jax[gcs]'.", 2
    if isinstance(error, OSError) or is_of_bucket(error):
        return f"{message.rstrip('.') or type(error).__name__}.", 1
    return None
