"""Where the metrics and samples of a run go: `metrics.jsonl`, TensorBoard, Weights & Biases.

A run that goes on from step N has lines up to N from before, and repeats what came after N. So each writer is opened
with N: `metrics.jsonl` keeps the lines up to N and moves the others to `set_aside/metrics.jsonl`; TensorBoard hides
later events; Weights & Biases keeps the first value of a step, which is the same number.
"""

import json
import logging
import uuid

import numpy as np
from etils import epath

from dydit_jax.errors import InputError
from dydit_jax.runtime.files import is_local, read_json, write_atomically, write_json, write_tail
from dydit_jax.runtime.tracking import TrackingConfig

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"
SET_ASIDE_FOLDER = "set_aside"
WANDB_FILE = "wandb.json"


class JsonLines:
    """One line of JSON per step in <workdir>/metrics.jsonl.

    Lines are appended, and a line is extended where more is known of its step. Only the start of a run rewrites the
    file, whole or not at all, and only if it has to set lines aside.

    Args:
      workdir: of the run.
      step: from which the run goes on; 0 at its start.

    Raises:
      InputError: a work directory that can't be written to.
    """

    def __init__(self, workdir, step: int):
        self._path = epath.Path(workdir) / METRICS_FILE
        kept, others = [], []
        for line in self._path.read_bytes().splitlines(keepends=True) if self._path.exists() else []:
            found = _step_of(line)
            (others if found is None or found > step else kept).append(line)
        if others:
            self._set_aside(others, step)
            with write_atomically(self._path) as partial:
                partial.write_bytes(b"".join(kept))
        self._row, self._start, self._end = {}, 0, len(b"".join(kept))  # the last line, and its bytes

    def _set_aside(self, lines: list[bytes], step: int) -> None:
        path = self._path.parent / SET_ASIDE_FOLDER / METRICS_FILE
        path.parent.mkdir(exist_ok=True)
        whole = "".join(line.decode(errors="replace").removesuffix("\n") + "\n" for line in lines)
        write_tail(path, len(path.read_bytes()) if path.exists() else 0, whole)
        logger.warning(
            "%d lines of %s are not of steps up to %d; they are in %s.", len(lines), METRICS_FILE, step, path
        )

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Append a line, or extend the last one if it is of the same step.

        Raises:
          InputError: a disk that is full.
        """
        if self._row.get("step") != step:
            self._row, self._start = dict(step=step), self._end
        self._row |= metrics
        text = json.dumps(self._row) + "\n"
        write_tail(self._path, self._start, text)
        self._end = self._start + len(text.encode())

    def draw(self, step: int, picture) -> None:
        """Do nothing: the samples are files of the work directory already."""

    def close(self, code: int) -> None:
        """Do nothing: every line is on the disk."""


def _step_of(line: bytes) -> int | None:
    """Return the step of a line; None for one that a kill or a full disk has cut, or a disk has damaged."""
    try:
        return json.loads(line.decode())["step"] if line.endswith(b"\n") else None
    except (ValueError, KeyError, TypeError):
        return None


class TensorBoard:
    """Event files for TensorBoard: scalars, grids of samples, the config as text."""

    def __init__(self, workdir, step: int, settings: dict):
        try:
            import tensorboardX
        except ImportError as error:
            raise InputError("tracking.tensorboard needs: pip install 'dydit-jax[tensorboard]'.") from error
        folder = str(epath.Path(workdir) / "tensorboard")
        self._writer = tensorboardX.SummaryWriter(folder, purge_step=step + 1)
        code = "\n".join("    " + line for line in json.dumps(settings, indent=2).splitlines())
        self._writer.add_text("config", code, step)  # four spaces: a block of code in Markdown

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Add every metric as a scalar."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def draw(self, step: int, picture) -> None:
        """Add a picture."""
        self._writer.add_image("samples", np.asarray(picture.convert("RGB")), step, dataformats="HWC")
        self._writer.flush()

    def close(self, code: int) -> None:
        """Write what is left."""
        self._writer.close()


class WeightsAndBiases:
    """A run on Weights & Biases with an identifier that no other run has, kept in <workdir>/wandb.json."""

    def __init__(self, workdir, project: str, settings: dict):
        try:
            import wandb
        except ImportError as error:
            raise InputError("tracking.wandb_project needs: pip install 'dydit-jax[wandb]'.") from error
        workdir = epath.Path(workdir)
        if not (workdir / WANDB_FILE).exists():
            write_json(workdir / WANDB_FILE, dict(id=uuid.uuid4().hex))
        identifier = read_json(workdir / WANDB_FILE)["id"]
        where = dict(dir=str(workdir)) if is_local(workdir) else {}
        settings = json.loads(json.dumps(settings))  # lists for tuples, or a continued run's config seems to change
        self._image = wandb.Image
        self._run = wandb.init(
            project=project, name=workdir.name, id=identifier, resume="allow", config=settings, **where
        )

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Log the metrics of a step."""
        self._run.log(metrics, step=step)

    def draw(self, step: int, picture) -> None:
        """Log a picture."""
        self._run.log({"samples": self._image(picture)}, step=step)

    def close(self, code: int) -> None:
        """Send what is left, and whether the run has failed."""
        self._run.finish(exit_code=code)


class Writers:
    """All writers of a run as one. Use as a context."""

    def __init__(self, writers: list):
        self._writers = writers

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        for writer in self._writers:
            writer.close(0 if kind is None else 1)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Write the metrics of a step, or more of them."""
        for writer in self._writers:
            writer.write(step, metrics)

    def draw(self, step: int, picture) -> None:
        """Write the samples of a step.

        Args:
          step: that they are of.
          picture: a grid, as a `PIL.Image`.
        """
        for writer in self._writers:
            writer.draw(step, picture)


def open_writers(config: TrackingConfig, workdir, step: int, settings: dict) -> Writers:
    """Open the writers that the configuration asks for.

    Args:
      config: says which.
      workdir: of the run.
      step: from which the run goes on; 0 at its start.
      settings: the whole config of the run, to be shown beside its metrics.

    Raises:
      InputError: an extra that is not installed, or a work directory that can't be written to.
    """
    writers = [JsonLines(workdir, step)]
    if config.tensorboard:
        writers.append(TensorBoard(workdir, step, settings))
    if config.wandb_project:
        writers.append(WeightsAndBiases(workdir, config.wandb_project, settings))
    return Writers(writers)
