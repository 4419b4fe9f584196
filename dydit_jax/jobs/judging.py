"""FID and its kin while a model trains: of images from the EMA, by the numbers that `evaluate.py` gives for them.

The images are those that `sample.py --mode=gated` draws from the checkpoint of the same step with the training's seed
and precision, `--num_images` and the same sampling settings, none of them written. The best checkpoint by the FID,
which `<workdir>/best.json` names, is kept for good. A run that was stopped before it had measured a checkpoint does so
when it goes on.
"""

import dataclasses
import functools
import json
import logging
from collections.abc import Callable

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from dydit_jax.checkpoints import Run, Weights
from dydit_jax.checkpoints.best import BEST_FILE, read_best
from dydit_jax.checkpoints.reading import saved_steps
from dydit_jax.data.image_sets import ImageSet, open_images
from dydit_jax.jobs.evaluate import compare, image_statistics, load_inception, load_reference
from dydit_jax.loading import load_decoder
from dydit_jax.pipeline import DrawJob, Pipeline
from dydit_jax.runtime.files import write_json
from dydit_jax.runtime.processes import from_main, is_main
from dydit_jax.runtime.sharding import MeshConfig, make_mesh
from dydit_jax.sampling.noise import uniform_labels
from dydit_jax.training.experiment import Experiment, metrics_sampling
from dydit_jax.training.update import TrainState

logger = logging.getLogger(__name__)

FEATURES_BATCH = 64  # images at once, as in `evaluate.py`
SCORES = ("fid", "sfid", "inception_score", "precision", "recall")


class Judge:
    """Measures the EMA's images against a reference, and knows which checkpoint is the best.

    Args:
      experiment: with `tracking.metrics_...`; the reference and the network are read now.
      mesh: of the training, whose devices draw.

    Raises:
      InputError: no such reference or network, or statistics of another network.
    """

    def __init__(self, experiment: Experiment, mesh: Mesh):
        tracking, model = experiment.tracking, experiment.model
        # One that is not there must not end the run days later.
        load_decoder(experiment.sampling.autoencoder, model.channels, make_mesh(MeshConfig(), jax.local_devices()))
        self._experiment, self._mesh = experiment, mesh
        params, network = load_inception(tracking.metrics_inception)
        self._settings = dict(params=params, mesh=make_mesh(MeshConfig()), batch_size=FEATURES_BATCH)
        # Each process by itself: one that can't read the reference must not leave the others waiting.
        alone = self._settings | dict(mesh=make_mesh(MeshConfig(), jax.local_devices()))
        measure = functools.partial(image_statistics, **alone)
        self._reference = load_reference(tracking.metrics_reference, network, measure, open_images)
        about = dict(self._reference.about, network=network)
        sampling = dataclasses.asdict(metrics_sampling(experiment))
        record = dict(reference=about, images=tracking.metrics_images, sampling=sampling, seed=experiment.train.seed)
        self._measured = json.loads(json.dumps(record))
        self._by_step, self._path, self._run = {}, None, None

    def open(self, workdir, run: Run, step: int) -> None:
        """Take up what was measured before; later steps than the one that the run goes on from are forgotten."""
        self._path, self._run = epath.Path(workdir) / BEST_FILE, run
        known = self._known_values() if is_main() else {}
        steps = from_main(sorted(known.keys() & range(step + 1)), limit=step + 1)
        self._by_step = {step: known.get(step) for step in steps}  # of values the main process alone makes use
        self._choose()

    def is_due(self, step: int) -> bool:
        """Return whether the checkpoint of a step is to be measured, and has not been."""
        return step > 0 and step % self._experiment.tracking.metrics_every_steps == 0 and step not in self._by_step

    def measure(self, step: int, state: TrainState, moved: Callable[[str], None]) -> dict[str, float]:
        """Draw images from the EMA and measure them; all processes call this together.

        Args:
          step, state: of the training, whose checkpoint is kept if it is the best.
          moved: called with what is waited for, as each batch of images begins.

        Returns:
          The scores by name, "ema/fid" and so on; those that the reference does not allow are left out.
        """
        scores = compare(image_statistics(self._images(step, state, moved), **self._settings), self._reference)
        scores = {f"ema/{name}": float(scores[name]) for name in SCORES if scores.get(name) is not None}
        self._by_step[step] = scores["ema/fid"]
        best = self._choose()
        if is_main():
            record = dict(step=best, metric="fid", value=self._by_step[best], by_step=self._by_step)
            write_json(self._path, record | dict(measured=self._measured))
            logger.info(
                "step %d  FID %.3f of %d images  (best %.3f, step %d)",
                *(step, scores["ema/fid"], self._experiment.tracking.metrics_images, record["value"], best),
            )
        return scores

    def _known_values(self) -> dict[int, float]:
        """Return the values by step that an earlier start has measured with these settings.

        Raises:
          InputError: a file that is damaged.
        """
        record = read_best(self._path.parent)
        if record is None:
            return {}
        if record.get("measured") != self._measured:
            message = (
                "%s was measured with other settings; its best checkpoint, step %d, is kept until one is measured."
            )
            logger.warning(message, self._path, record["step"])
            return {}
        return record["by_step"]

    def _choose(self) -> int | None:
        """Have the run keep the best of the measured checkpoints that are there; return its step, or None."""
        there = set(saved_steps(self._path.parent)) if is_main() else set()
        steps = sorted(step for step in self._by_step if step in there)
        best = from_main([min(steps, key=self._by_step.get)] if steps else [], limit=max(self._by_step, default=0) + 1)
        if not best:
            return None
        self._run.keep_best(best[0])
        return best[0]

    def _images(self, step: int, state: TrainState, moved: Callable[[str], None]) -> ImageSet:
        """Return the images of a step, drawn when they are asked for."""
        experiment, count = self._experiment, self._experiment.tracking.metrics_images
        sampling = metrics_sampling(experiment)
        lora = experiment.lora if "lora" in experiment.train.trainable else None
        weights = Weights(experiment.model, experiment.process, sampling, state.with_ema(), dict(step=step), lora)
        pipeline = Pipeline(weights, precision=experiment.train.precision, mesh=self._mesh)
        seed, indices = experiment.train.seed, np.arange(count)
        labels = np.asarray(uniform_labels(seed, indices, experiment.model.classes), np.int32)
        mode = "complete" if experiment.model.routers == "none" else "gated"
        job = DrawJob(labels, indices, sampling, seed=seed, mode=mode)

        def draw():
            for batch in pipeline.draw(job):
                moved(f"the metrics of step {step}, image {batch.indices[-1] + 1} of {count}")
                for pixels in batch.pixels:
                    yield np.broadcast_to(pixels, (*pixels.shape[:2], 3))

        return ImageSet(f"the EMA at step {step}", count, "", draw)


def open_judge(experiment: Experiment, mesh: Mesh) -> Judge | None:
    """Return what measures the EMA, or None where `tracking.metrics_every_steps` is 0."""
    return Judge(experiment, mesh) if experiment.tracking.metrics_every_steps else None
