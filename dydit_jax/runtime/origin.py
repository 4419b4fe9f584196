"""What made a result, for the record: the command, the time, the devices."""

import pathlib
import shlex
import sys
import time

import jax

from dydit_jax.runtime import last_words


def command_line() -> str:
    """Return the program as it was typed; "" where no program of this package runs, such as in a notebook."""
    if not last_words.PROGRAM_FLAGS:
        return ""
    program = pathlib.Path(sys.argv[0])
    start = ["python", str(program)] if program.suffix == ".py" else [program.name]
    return shlex.join([*start, *sys.argv[1:]])


def origin() -> dict[str, str]:
    """Return command, date and devices."""
    return dict(
        command=command_line(),
        date=time.strftime("%Y-%m-%d %H:%M"),
        device=f"{jax.device_count()} x {jax.devices()[0].device_kind}",
    )
