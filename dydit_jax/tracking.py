"""What a run tells the world: JSON lines always, TensorBoard and Weights & Biases on request, and a clock."""

import dataclasses
import json
import time

from etils import epath

from dydit_jax.errors import InputError
from dydit_jax.records import require_range


@dataclasses.dataclass(frozen=True)
class TrackingConfig:
    """How often and where to.

    Attributes:
      every_steps: steps between two reports.
      tensorboard: write event files into <workdir>/tensorboard; needs the extra `tensorboard`.
      wandb_project: project of Weights & Biases, "" for none; needs the extra `wandb`.
    """

    every_steps: int = 100
    tensorboard: bool = False
    wandb_project: str = ""

    def __post_init__(self):
        require_range("tracking.every_steps", self.every_steps, low=1)


class JsonLines:
    """One JSON object per line, appended to <workdir>/metrics.jsonl."""

    def __init__(self, workdir):
        self._path = epath.Path(workdir) / "metrics.jsonl"
        self._lines = self._path.read_text().splitlines() if self._path.exists() else []

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Append a line, dropping lines of steps that a restart runs again."""
        kept = [line for line in self._lines if json.loads(line)["step"] < step]
        self._lines = [*kept, json.dumps(dict(step=step, **metrics))]
        self._path.write_text("\n".join(self._lines) + "\n")


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
