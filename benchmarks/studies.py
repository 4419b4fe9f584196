"""What the studies share: models that are trained to their end, images that a judge sees, means and differences.

Rows are flat mappings, one for each measurement; what is equal in them but the training seed is put together.
"""

import platform
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping

import jax
import numpy as np
from etils import epath

from dydit_jax.checkpoints import WEIGHTS_FILE
from dydit_jax.diffusion.samplers import SamplingConfig
from dydit_jax.pipeline import DrawJob, Pipeline


def train_to_end(config: str, workdir, settings: Mapping, script: str = "train.py") -> epath.Path:
    """Run or continue a training in a process of its own, unless it has ended.

    Args:
      config: name of a file of configs/.
      workdir: of the run.
      settings: keys of the config, such as "train.seed", with their values.
      script: that trains.

    Returns:
      The work directory.
    """
    workdir = epath.Path(workdir)
    if not (workdir / WEIGHTS_FILE).is_file():
        overrides = [f"--config.{key}={value}" for key, value in settings.items()]
        command = [sys.executable, script, f"--config=configs/{config}.py", f"--workdir={workdir}"]
        subprocess.run([*command, *overrides], check=True)
    return workdir


def draw_labels(count: int, classes: int = 10) -> np.ndarray:
    """Return the labels of the images of a measurement [n]: all classes in turn."""
    return np.arange(count) % classes


def measure(pipeline: Pipeline, judge, sampling: SamplingConfig, *, images: int, seed: int = 0) -> dict:
    """Draw images and let the judge see what a PNG would hold.

    Args:
      pipeline: of the model.
      judge: with `measure(images, labels)`, images float32 [n,side,side,C] in [-1, 1].
      sampling: how images are drawn.
      images: their number.
      seed: of sampling.

    Returns:
      What the judge says, and what a pass of the network cost.
    """
    labels = draw_labels(images)
    job = DrawJob(labels, np.arange(images), sampling, seed=seed)
    *_, last = batches = list(pipeline.draw(job))
    pixels = np.concatenate([batch.pixels for batch in batches])
    samples = last.result.samples
    return dict(
        judge.measure(pixels.astype(np.float32) / 127.5 - 1, labels),
        macs=samples.mean_macs,
        mac_ratio=open_share(pipeline, samples.mean_macs),
        **{name: float(gates.mean()) for name, gates in vars(samples.routing).items()},
        passes=float(samples.evaluations.mean()),
        sampler=sampling.sampler,
        steps=sampling.steps,
    )


def open_share(pipeline: Pipeline, macs: float) -> float:
    """Return the share of the work of attention and MLP that a pass of so many MACs does; 1 of a static model."""
    whole, blocks = pipeline.macs, pipeline.macs.complete - pipeline.macs.fixed
    return float((macs - whole.fixed - whole.routers) / blocks) if pipeline.weights.model.routers != "none" else 1.0


def provenance() -> dict[str, str]:
    """Return command, hardware and date, for the record."""
    return dict(
        command=f"python {' '.join(sys.argv)}",
        machine=f"{platform.machine()}, {jax.device_count()} x {jax.devices()[0].device_kind}",
        date=time.strftime("%Y-%m-%d"),
    )


# --- Numbers -------------------------------------------------------------------------------------


def values_of(rows: Iterable[Mapping], key: str, **same) -> np.ndarray:
    """Return what was measured in the rows with the same values under some keys [rows]."""
    return np.array([row[key] for row in rows if all(row[name] == value for name, value in same.items())])


def deviation(values: np.ndarray) -> float | None:
    """Return the standard deviation of the values of several seeds; one alone has none."""
    return float(values.std(ddof=1)) if len(values) > 1 else None


def mean_and_deviation(values: np.ndarray, places: int) -> str:
    """Write values of several seeds; one alone has no deviation."""
    spread = deviation(values)
    return f"{values.mean():.{places}f}" + ("" if spread is None else f" ± {spread:.{places}f}")


def difference(ours: np.ndarray, theirs: np.ndarray) -> dict:
    """Return how far one model is from another.

    Returns:
      `by`, the difference of their means over the training seeds, `deviation`, sqrt(s1^2 + s2^2), and `deviations`, the
      one in units of the other; the latter two are None where either has a single seed, and the last one where nothing
      differs from seed to seed.
    """
    by, spreads = float(ours.mean() - theirs.mean()), (deviation(ours), deviation(theirs))
    spread = None if None in spreads else float(np.hypot(*spreads))
    return dict(by=by, deviation=spread, deviations=by / spread if spread else None)


# --- Markdown ------------------------------------------------------------------------------------


def table_header(*names: str) -> list[str]:
    """Return the two lines that begin a table."""
    return [table_line(*names), "|---" * len(names) + "|"]


def table_line(*cells: str) -> str:
    """Return a line of a table."""
    return f"| {' | '.join(cells)} |"
