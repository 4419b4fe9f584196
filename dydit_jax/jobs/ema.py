"""What a training shows of its EMA weights on the way: samples, and losses on examples that stay the same."""

import dataclasses

import jax
import numpy as np
from jax.sharding import Mesh

from dydit_jax.data.batches import examples
from dydit_jax.diffusion.process import format_time, time_after
from dydit_jax.drawing.pictures import draw_grid, label_texts, save_image, to_uint8
from dydit_jax.loading import warn_of_start
from dydit_jax.models.dit import Model
from dydit_jax.runtime.processes import is_main, to_host
from dydit_jax.runtime.sharding import batch_sharding, round_up
from dydit_jax.sampling.generate import SamplingRun
from dydit_jax.sampling.noise import image_keys
from dydit_jax.training.experiment import Experiment
from dydit_jax.training.probe import patch_losses
from dydit_jax.training.update import TrainState

SAMPLES_FOLDER = "samples"
SHOWN_EXAMPLES = 64  # that the EMA is measured on, with every grid of samples
SHOWN_TENTHS = (1, 3, 5, 7, 9)  # of the timesteps


def place_examples(data, experiment: Experiment, mesh: Mesh) -> tuple:
    """Return the batch and its keys that the EMA is measured on, in their shards."""
    found = examples(data, count=SHOWN_EXAMPLES)
    rows = np.resize(np.arange(len(found["label"])), round_up(SHOWN_EXAMPLES, mesh.size))
    batch = {name: column[rows] for name, column in found.items()}
    place = lambda batch, rows: (batch, image_keys(experiment.train.seed, rows))
    return jax.jit(place, out_shardings=batch_sharding(mesh))(batch, rows)


def measure_ema(state: TrainState, model: Model, experiment: Experiment, shown: tuple) -> dict:
    """Return the EMA weights' loss on the same examples and noise every time, at times from one end to the other."""
    mode = "complete" if experiment.model.routers == "none" else "gated"
    settings = dict(model=model, process=experiment.process, mode=mode)
    times, params = [time_after(experiment.process, part, 10) for part in SHOWN_TENTHS], state.with_ema()
    losses = [patch_losses(params, *shown, t, **settings) for t in times]
    return {f"ema/loss_t{format_time(t)}": float(to_host(loss).mean()) for t, loss in zip(times, losses)}


def draw_samples(
    step: int, state: TrainState, workdir, model: Model, experiment: Experiment, mesh: Mesh, decode
) -> tuple:
    """Draw images from the EMA weights, on the same mesh, into samples/<step>.png; return the grid and their cost."""
    if is_main():
        warn_of_start(dict(config=dataclasses.asdict(experiment), step=step))
    labels = np.asarray(experiment.tracking.sample_labels, np.int32)
    filled = np.resize(labels, round_up(len(labels), mesh.size))
    settings = dict(sampling=experiment.sampling, process=experiment.process)
    run = SamplingRun(model, state.with_ema(), **settings, mesh=mesh if mesh.size > 1 else None)
    mode = "complete" if experiment.model.routers == "none" else "gated"
    samples = run.draw(filled, seed=experiment.train.seed, mode=mode)
    pixels = to_uint8(decode(samples.images), what=f"EMA's sample at step {step}, number")[: len(labels)]
    grid = draw_grid(pixels, min(len(labels), 10), label_texts(labels, model.config.classes))
    if is_main():
        save_image(workdir / SAMPLES_FOLDER / f"{step:08d}.png", grid)
    return grid, {"ema/macs_share": samples.mean_macs / model.config.macs.complete}
