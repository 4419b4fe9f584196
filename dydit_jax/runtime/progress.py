"""Bars for what takes longer than a few seconds, with an estimate that compiling does not spoil.

A bar counts work alone: its clock stands still while its thread compiles, or waits for a program that other threads
compile, and it says so. Several processes show the bars of the first one. Where standard error is no terminal, as in
the log of a job, a bar is a line every half minute.
"""

import concurrent.futures
import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping

import jax
from tqdm import tqdm

from dydit_jax.runtime.processes import is_main

BEGIN_EVENT = "/jax/compilation_cache/compile_requests_use_cache"
END_EVENT = "/jax/core/compile/backend_compile_duration"
SHORT_SECONDS = 2.0  # what is over by then needs no bar
TICK_SECONDS = 1.0
SECONDS_BETWEEN_LINES = 30.0  # without a terminal
COLUMNS, ROWS = 80, 24  # where none are known


class _Thread(threading.local):
    """What a thread has waited for programs, and its open bars."""

    def __init__(self):
        self.compile_seconds, self.bars = 0.0, []


_thread = _Thread()


class Progress:
    """A bar. Use as a context, in one thread.

    Attributes:
      done: units of work that are done.
    """

    def __init__(self, total: int, unit: str, name: str, *, done: int = 0, delay: float = SHORT_SECONDS):
        """Describe the work.

        Args:
          total: units of it; 0 where that is not known.
          unit: "image" or "step"; "B" are bytes, with the prefix that fits.
          name: what is done.
          done: units that an earlier job has done, which do not count for the estimate.
          delay: seconds until the bar is shown.
        """
        terminal = sys.stderr.isatty()
        interval = 0.1 if terminal else SECONDS_BETWEEN_LINES
        self._settings = dict(
            total=total or None,
            initial=done,
            unit=unit,
            unit_scale=unit == "B",
            desc=name,
            delay=delay,
            mininterval=interval,
            maxinterval=max(10.0, interval),
            file=sys.stderr,
            **_size_of(sys.stderr),
        )
        self.done, self._name = done, name

    def __enter__(self):
        hidden = jax.distributed.is_initialized() and not is_main()
        self._bar = tqdm(**self._settings, disable=hidden)
        self._compiled = _thread.compile_seconds
        self._bars = _thread.bars  # a generator may be closed by another thread
        self._bars.append(self)
        return self

    def __exit__(self, *_):
        self._bars.remove(self)
        self._rename(self._name)
        self._bar.close()

    def advance(self, units: float = 1) -> None:
        """Count units of work, or parts of one."""
        self._leave_out_compiling()
        self._rename(self._name)
        self.done += units
        self._bar.update(int(self.done + 1e-6) - self._bar.n)

    def say_compiling(self, *, now: bool) -> None:
        """Let the bar say that it waits for a program, now or when it is written the next time."""
        if not self._bar.disable:
            self._rename(f"{self._name}, compiling")
            if now and time.time() - self._bar.start_t >= self._bar.delay:
                self._bar.refresh()
                self._bar.delay = 0  # from now on it is there, and must be closed

    def _rename(self, name: str) -> None:
        self._bar.set_description(name, refresh=False)

    def _leave_out_compiling(self) -> None:
        """Move the bar's clock by what its thread has waited for programs since the last time."""
        waited = _thread.compile_seconds - self._compiled
        self._compiled = _thread.compile_seconds
        if not self._bar.disable:
            self._bar.start_t += waited
            self._bar.last_print_t += waited


def counted(items: Iterable, total: int, unit: str, name: str, *, done: int = 0) -> Iterator:
    """Iterate over items with a bar that counts them; see `Progress`."""
    with Progress(total, unit, name, done=done) as progress:
        for item in items:
            yield item
            progress.advance()


def counted_bytes(arrays: Mapping, name: str) -> Iterator[tuple]:
    """Iterate over the names and values of arrays, NumPy's or JAX's, with a bar that counts their bytes."""
    with Progress(sum(array.nbytes for array in arrays.values()), "B", name) as progress:
        for key, array in arrays.items():
            yield key, array
            progress.advance(array.nbytes)


def result_of(program: concurrent.futures.Future):
    """Return a program that another thread compiles; until then the bars of this thread say what they wait for."""
    if not program.done():
        began, terminal, silent = time.monotonic(), sys.stderr.isatty(), True
        while concurrent.futures.wait([program], timeout=TICK_SECONDS).not_done:
            for bar in _thread.bars:
                bar.say_compiling(now=terminal or silent)
            silent = False
        _thread.compile_seconds += time.monotonic() - began
    return program.result()


def compile_seconds() -> float:
    """Return how long this thread has compiled, and waited for programs, since it began."""
    return _thread.compile_seconds


def _size_of(stream) -> dict:
    """Return tqdm's settings for the size of a terminal; a log has none, nor has a container's terminal."""
    try:
        known = os.get_terminal_size(stream.fileno()).columns > 0
    except (OSError, ValueError):
        known = False
    return dict(dynamic_ncols=True) if known else dict(ncols=COLUMNS, nrows=ROWS)


def _note_begin(event: str, **_) -> None:
    if event == BEGIN_EVENT:
        for bar in _thread.bars:
            bar.say_compiling(now=sys.stderr.isatty())


def _note_end(event: str, seconds: float, **_) -> None:
    if event == END_EVENT:
        _thread.compile_seconds += seconds


jax.monitoring.register_event_listener(_note_begin)
jax.monitoring.register_event_duration_secs_listener(_note_end)
