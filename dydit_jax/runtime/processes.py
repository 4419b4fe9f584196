"""Several processes as one program: starting them, agreeing on mistakes, leaving on notice.

A pod runs the same command on every host. What only one of them finds out - a folder that is missing there, another
configuration, a disk that is full - must end all of them with the same message: a process that stops alone leaves the
others waiting. Before work begins they compare notes (`on_all_processes`); from then on `peers` tells all of them what
ended one.
"""

import contextlib
import hashlib
import json
import logging
import os
import signal
import threading
from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import multihost_utils

from dydit_jax.errors import InputError
from dydit_jax.runtime.peers import Line

logger = logging.getLogger(__name__)

MESSAGE_BYTES = 1000
START_SECONDS = 300.0  # that processes wait for each other at the start
WHO_THEY_ARE = (
    "Where no pod or SLURM says who they are, every process needs --coordinator=HOST:PORT --num_processes=N "
    "--process_id=I."
)
_line: Line | None = None  # of this process, where there are several


@contextlib.contextmanager
def joined_processes(coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None):
    """Work with the other processes, from before anything else uses JAX to the end. Use as a context.

    What is raised inside ends all processes, with the exit code of the error: 2 for `InputError`, its own for
    `StopError`, 130 for Ctrl-C, else 1. A process that is lost ends the others with `RESTART_CODE`.

    Args:
      coordinator: "host:port" of the first process; None finds everything by itself, on Cloud TPU pods, under SLURM,
        Open MPI and on GKE.
      num_processes, process_id: how many there are and which this is; None together with `coordinator`.

    Raises:
      InputError: nothing found, or the others did not come.
    """
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    late = threading.Timer(START_SECONDS, _leave_late)
    late.daemon = True
    late.start()
    try:
        # JAX's own limit ends the process with SIGABRT and a page of addresses.
        limit = round(START_SECONDS) + 60
        jax.distributed.initialize(coordinator, num_processes, process_id, initialization_timeout=limit)
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"The processes did not come together ({reason}). {WHO_THEY_ARE}") from error
    finally:
        late.cancel()
    if jax.process_count() > 1:
        _join_line((coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS", "")).rpartition(":")[0])
    with one_for_all():
        yield
    if _line is not None:
        _line.goodbye()


def _leave_late() -> None:
    """End this process, which still waits for the others: nothing else gets it out of there."""
    logger.error(
        "The processes did not come together: not all were there after %.0f s. %s", START_SECONDS, WHO_THEY_ARE
    )
    os._exit(2)


def _join_line(host: str) -> None:
    """Make this process's end of the line, by which all learn what ended one."""
    global _line
    _line = Line()
    place = json.dumps(_line.listen([host] if host else [])) if is_main() else ""
    place = _messages(place)[0]
    if not is_main():
        _line.connect(jax.process_index(), json.loads(place))


def one_for_all(newest: Callable[[], str] | None = None):
    """Return a context in which any error of this process ends all of them, before it unwinds what waits for them.

    Args:
      newest: returns a sentence about the newest checkpoint, for reasons that do not name it.
    """
    return contextlib.nullcontext() if _line is None else _line.one_for_all(jax.process_index(), newest)


def is_main() -> bool:
    """Return whether this process is the one that writes what all of them share."""
    return jax.process_index() == 0


def on_all_processes(action: Callable):
    """Run an action in every process and return its result; if it fails in one, it fails in all.

    Raises:
      InputError: the message of the first process in which the action raised one.
    """
    message, result = "", None
    try:
        result = action()
    except InputError as error:
        message = str(error)
    for process, other in enumerate(_messages(message)):
        if other:
            raise InputError(other if jax.process_count() == 1 else f"Process {process}: {other}")
    return result


def require_same(what: str, value: str) -> None:
    """Raise unless all processes have the same value.

    Raises:
      InputError: in every process, naming one that differs from the first.
    """
    found = _messages(hashlib.sha256(value.encode()).hexdigest())
    differing = [process for process, other in enumerate(found) if other != found[0]]
    if differing:
        raise InputError(
            f"Process {differing[0]} has another {what} than process 0; start all of them with the same command."
        )


def from_main(numbers: list[int], limit: int) -> list[int]:
    """Return the main process's list of numbers below `limit`, ascending, in every process."""
    if jax.process_count() == 1:
        return numbers
    chosen = np.zeros(limit, bool)
    chosen[numbers] = True
    return np.flatnonzero(multihost_utils.broadcast_one_to_all(chosen)).tolist()


def _messages(message: str) -> list[str]:
    """Return what every process says, in all of them."""
    if jax.process_count() == 1:
        return [message]
    row = np.zeros(MESSAGE_BYTES, np.uint8)
    text = message.encode()[:MESSAGE_BYTES]
    row[: len(text)] = np.frombuffer(text, np.uint8)
    rows = multihost_utils.process_allgather(row).reshape(-1, MESSAGE_BYTES)
    return [bytes(row).rstrip(b"\0").decode(errors="ignore") for row in rows]


def to_host(tree):
    """Return a tree of arrays as numpy, whole in every process, wherever their shards lie."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    gather = lambda leaf: leaf if leaf.is_fully_addressable else multihost_utils.process_allgather(leaf, tiled=True)
    return jax.device_get(jax.tree.map(gather, tree))


class PreemptionNotice:
    """Whether this program has been asked to leave: SIGTERM, Ctrl-C, or the platform's maintenance notice.

    Use as a context. With several processes all of them learn it at the same point: they must ask at the same ones.
    """

    def __init__(self):
        self._heard, self._before, self._points = False, {}, 0

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            # Several processes: JAX's own service hears SIGTERM and makes all agree on a step.
            handlers = {signal.SIGTERM: self._hear, signal.SIGINT: self._hear}
            if jax.process_count() > 1:
                handlers = {signal.SIGINT: self._pass_on}
            self._before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        return self

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _hear(self, number, _):
        self._heard = True
        logger.warning("Stopping (%s): saving after this step.", signal.Signals(number).name)
        signal.signal(number, self._before[number])  # the second time means at once

    def _pass_on(self, number, _):
        logger.warning("Stopping (%s): all processes save the same step.", signal.Signals(number).name)
        signal.signal(number, self._before[number])
        os.kill(os.getpid(), signal.SIGTERM)

    def came(self) -> bool:
        """Return whether to leave now."""
        self._points += 1
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(self._points)
        return self._heard
