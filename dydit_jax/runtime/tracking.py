"""How a run is watched: how often it reports, its pace, a warning where nothing moves, a profile of its steps."""

import dataclasses
import logging
import threading
import time

import jax
from etils import epath

from dydit_jax.errors import InputError
from dydit_jax.records import require_range
from dydit_jax.runtime.processes import from_main, is_main

logger = logging.getLogger(__name__)

PROFILE_REQUEST = "profile.now"  # a file in the work directory that asks for a profile
PROFILED_STEPS = 5  # after a request


@dataclasses.dataclass(frozen=True)
class TrackingConfig:
    """How often a run reports, and where to.

    Attributes:
      every_steps: steps between two reports.
      tensorboard: write event files into <workdir>/tensorboard; needs the extra `tensorboard`.
      wandb_project: project of Weights & Biases, "" for none; needs the extra `wandb`. The run's identifier is in
        <workdir>/wandb.json, so a restart continues the same run.
      samples_every_steps: steps between two grids of images from the EMA weights, in <workdir>/samples, and measures
        of these weights (ema/...) on fixed examples; 0 for none.
      sample_labels: of these images.
      metrics_every_steps: steps between two measurements of the EMA's FID and its kin, each with a checkpoint, of which
        the best is kept for good; 0 for none.
      metrics_reference: what is compared with, as for `evaluate.py`: statistics, a reference batch, images.
      metrics_images: how many images are drawn for it.
      metrics_sampler, metrics_steps: sampler and timesteps of these images, such as ddim and 20; "" for those of the
        section sampling.
      metrics_inception: the network, as for `evaluate.py`.
      stall_seconds: after so long without movement the log says what the run is waiting for.
      profile: first and last step of a profile in <workdir>/profile, for TensorBoard or XProf; () for none. At any
        time `touch <workdir>/profile.now` asks for one of 5 steps after the next report.
    """

    every_steps: int = 100
    tensorboard: bool = False
    wandb_project: str = ""
    samples_every_steps: int = 0
    sample_labels: tuple[int, ...] = tuple(range(10))
    metrics_every_steps: int = 0
    metrics_reference: str = ""
    metrics_images: int = 10_000
    metrics_sampler: str = ""
    metrics_steps: str = ""
    metrics_inception: str = "inception-2015"
    stall_seconds: float = 300.0
    profile: tuple[int, ...] = ()

    def __post_init__(self):
        require_range("tracking.samples_every_steps", self.samples_every_steps, low=0)
        require_range("tracking.metrics_every_steps", self.metrics_every_steps, low=0)
        require_range("tracking.metrics_images", self.metrics_images, low=2, high=1_000_000)
        if self.metrics_every_steps and not self.metrics_reference:
            raise InputError("tracking.metrics_every_steps needs tracking.metrics_reference, what to compare with.")
        require_range("tracking.stall_seconds", self.stall_seconds, 1.0, 1e9)  # threads wait no longer
        if not self.sample_labels:
            raise InputError("tracking.sample_labels is empty; set tracking.samples_every_steps to 0 for no samples.")
        if self.profile and (len(self.profile) != 2 or not 0 <= self.profile[0] <= self.profile[1]):
            raise InputError(f"tracking.profile must be the first and the last step, (10, 15), not {self.profile}.")
        require_range("tracking.every_steps", self.every_steps, low=1)


class Clock:
    """Steps per second since the last reading, and the time left at that pace."""

    def __init__(self, step: int, last_step: int):
        self._step, self._last_step, self._time = step, last_step, time.monotonic()

    def read(self, step: int) -> tuple[float, float]:
        """Return steps per second since the last reading and seconds left."""
        now = time.monotonic()
        pace = (step - self._step) / max(now - self._time, 1e-9)
        self._step, self._time = step, now
        return pace, (self._last_step - step) / max(pace, 1e-9)


def duration(seconds: float) -> str:
    """Write seconds as people do: "42s", "3m 07s", "5h 12m"."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h {minutes:02d}m" if hours else f"{minutes}m {seconds:02d}s" if minutes else f"{seconds}s"


class StallWatchdog:
    """Says in the log when a run has been waiting for the same thing for too long. Use as a context."""

    def __init__(self, seconds: float):
        self._seconds, self._left = seconds, threading.Event()
        self._awaited, self._since, self._said = "the start", time.monotonic(), False
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._left.set()
        self._thread.join()

    def now(self, awaited: str) -> None:
        """Say what the run waits for from now on."""
        self._awaited, self._since, self._said = awaited, time.monotonic(), False

    def _look(self) -> None:
        while not self._left.wait(self._seconds / 4):
            waiting = time.monotonic() - self._since
            if waiting > self._seconds and not self._said:
                self._said = True
                found = (duration(waiting), jax.process_index(), self._awaited)
                logger.warning("Nothing has moved for %s: process %d waits for %s.", *found)


class Profile:
    """Traces of steps for TensorBoard or XProf: those that the config names, and those asked for. Use as a context.

    Args:
      steps: first and last step to trace, or ().
      workdir: of the run; traces go to its folder `profile`, and a file `profile.now` in it asks for one.
    """

    def __init__(self, steps: tuple[int, ...], workdir):
        self._last_by_first = dict([steps] if steps else [])
        self._request = epath.Path(workdir) / PROFILE_REQUEST
        folder = epath.Path(workdir) / "profile"
        if jax.process_count() > 1:  # those of one machine would write the same file
            folder /= f"process_{jax.process_index()}"
        self._folder, self._traced = str(folder), None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._stop()

    def look(self, step: int) -> None:
        """Plan a trace of the steps from `step` on if a file asks for it; all processes must look at the same steps."""
        asked = is_main() and self._request.exists()
        if from_main([0] * asked, limit=1):
            self._last_by_first[step] = step + PROFILED_STEPS - 1
            if is_main():
                self._request.unlink(missing_ok=True)

    def at(self, step: int) -> None:
        """Start or stop before a step, where it is time."""
        if self._traced is None and step in self._last_by_first:
            self._traced = step, self._last_by_first[step]
            jax.profiler.start_trace(self._folder)
        elif self._traced is not None and step > self._traced[1]:
            self._stop()

    def _stop(self) -> None:
        if self._traced is not None:
            jax.profiler.stop_trace()
            logger.info("Wrote a profile of steps %d to %d to %s.", *self._traced, self._folder)
            self._traced = None
