"""What a run tells the world: metrics, samples, a clock, a profile, and that nothing moves any more."""

import dataclasses
import json
import logging
import threading
import time

import jax
import jax.numpy as jnp
from etils import epath

from dydit_jax.errors import InputError
from dydit_jax.records import require_range
from dydit_jax.runtime.files import write_atomically

logger = logging.getLogger(__name__)

# Dense bfloat16 peak of one chip, FLOP/s, as the makers state it; by the beginning of what JAX calls the device.
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,  # v5p
    "TPU v6 lite": 918e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
}
FLOPS_PER_MAC = 6  # of a training step: 2 forward, 4 backward
# By what is rematerialised: a whole forward pass, or what is not a product.
RECOMPUTED_FLOPS_PER_MAC = {"none": 0, "dots": 0, "block": 2}


@dataclasses.dataclass(frozen=True)
class TrackingConfig:
    """How often and where to.

    Attributes:
      every_steps: steps between two reports.
      tensorboard: write event files into <workdir>/tensorboard; needs the extra `tensorboard`.
      wandb_project: project of Weights & Biases, "" for none; needs the extra `wandb`.
      samples_every_steps: steps between two grids of images from the EMA weights, in <workdir>/samples, and measures
        of these weights (ema/...) on fixed examples; 0 for none.
      sample_labels: of these images.
      stall_seconds: after so long without movement the log says what the run is waiting for.
      profile: first and last step of a profile in <workdir>/profile, for TensorBoard or XProf; () for none.
    """

    every_steps: int = 100
    tensorboard: bool = False
    wandb_project: str = ""
    samples_every_steps: int = 0
    sample_labels: tuple[int, ...] = tuple(range(10))
    stall_seconds: float = 300.0
    profile: tuple[int, ...] = ()

    def __post_init__(self):
        require_range("tracking.samples_every_steps", self.samples_every_steps, low=0)
        require_range("tracking.stall_seconds", self.stall_seconds, low=1.0)
        if not self.sample_labels:
            raise InputError("tracking.sample_labels is empty; set tracking.samples_every_steps to 0 for no samples.")
        if self.profile and (len(self.profile) != 2 or not 0 <= self.profile[0] <= self.profile[1]):
            raise InputError(f"tracking.profile must be the first and the last step, (10, 15), not {self.profile}.")
        require_range("tracking.every_steps", self.every_steps, low=1)


class JsonLines:
    """One JSON object per line, appended to <workdir>/metrics.jsonl."""

    def __init__(self, workdir):
        self._path = epath.Path(workdir) / "metrics.jsonl"
        lines = self._path.read_text().splitlines() if self._path.exists() else []
        self._rows = {row["step"]: row for row in map(json.loads, lines)}

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Add metrics to the line of a step; what a restart runs again is written anew."""
        same = self._rows.get(step, {})
        if same.keys() & metrics.keys():
            same = {}
        earlier = {number: row for number, row in self._rows.items() if number < step}
        self._rows = earlier | {step: dict(same, step=step, **metrics)}
        text = "".join(json.dumps(row) + "\n" for row in self._rows.values())
        with write_atomically(self._path) as partial:  # a run that is killed here must still read it
            partial.write_text(text)


class TensorBoard:
    """Event files for TensorBoard."""

    def __init__(self, workdir):
        try:
            import tensorboardX
        except ImportError as error:
            raise InputError("tracking.tensorboard needs: pip install 'dydit-jax[tensorboard]'.") from error
        self._writer = tensorboardX.SummaryWriter(str(epath.Path(workdir) / "tensorboard"))

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Add every metric as a scalar."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()


class WeightsAndBiases:
    """A run on Weights & Biases, continued by the name of its work directory."""

    def __init__(self, workdir, project: str):
        try:
            import wandb
        except ImportError as error:
            raise InputError("tracking.wandb_project needs: pip install 'dydit-jax[wandb]'.") from error
        name = epath.Path(workdir).name
        self._run = wandb.init(project=project, name=name, id=name, resume="allow")

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Log the metrics of a step."""
        self._run.log(metrics, step=step)


def make_writers(config: TrackingConfig, workdir) -> list:
    """Return the writers that the configuration asks for; each has `write(step, metrics)`."""
    writers = [JsonLines(workdir)]
    if config.tensorboard:
        writers.append(TensorBoard(workdir))
    if config.wandb_project:
        writers.append(WeightsAndBiases(workdir, config.wandb_project))
    return writers


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


def flops_utilisation(macs_per_second: float, dtype) -> float | None:
    """Return the share of the chips' bfloat16 peak that a training step's MACs make; None where the peak is unknown."""
    peak = _peak_flops(dtype)
    return None if peak is None else FLOPS_PER_MAC * macs_per_second / peak


def best_case(macs: float, dtype, remat: str) -> tuple[float, float] | None:
    """Return what a training step would take at the chips' peak, and the share of it that counts as use.

    Args:
      macs: of all images and passes of a step.
      dtype: of the products.
      remat: what the backward pass computes again, as in `Model`.

    Returns:
      Seconds, and the utilisation that no step can exceed; None where the peak is unknown.
    """
    peak = _peak_flops(dtype)
    if peak is None:
        return None
    executed = FLOPS_PER_MAC + RECOMPUTED_FLOPS_PER_MAC[remat]
    return macs * executed / peak, FLOPS_PER_MAC / executed


def _peak_flops(dtype) -> float | None:
    """Return the dense peak of all chips of this job, where it is known."""
    kind = jax.devices()[0].device_kind
    peak = next((flops for name, flops in sorted(PEAK_FLOPS.items(), reverse=True) if kind.startswith(name)), None)
    return None if peak is None or dtype != jnp.bfloat16 else peak * jax.device_count()


class Watch:
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
                told = (duration(waiting), jax.process_index(), self._awaited)
                logger.warning("Nothing has moved for %s: process %d waits for %s.", *told)


class Profile:
    """A trace of the steps from `first` to `last` for TensorBoard or XProf. Use as a context."""

    def __init__(self, steps: tuple[int, ...], workdir):
        self._first, self._last = steps or (-1, -1)
        self._folder, self._running = str(epath.Path(workdir) / "profile"), False

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._stop()

    def at(self, step: int) -> None:
        """Start or stop before a step, where it is time."""
        if step == self._first:
            jax.profiler.start_trace(self._folder)
            self._running = True
        elif step > self._last:
            self._stop()

    def _stop(self) -> None:
        if self._running:
            jax.profiler.stop_trace()
            self._running = False
            logger.info("Wrote a profile of steps %d to %d to %s.", self._first, self._last, self._folder)
