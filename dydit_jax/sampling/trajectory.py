"""The way of a few images from noise: what the network saw at every step, and which tokens were open.

A job keeps means over its images alone (`generate.Samples`). Here each image keeps its own record. The images are the
same as those of `SamplingRun.draw`, whose noise they share; one step is compiled, and run for each row of the table.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from dydit_jax.diffusion.samplers import Sampler, SamplerState
from dydit_jax.diffusion.solvers import SolverTable
from dydit_jax.models.dit import Model
from dydit_jax.runtime.processes import to_host
from dydit_jax.runtime.settings import own_settings
from dydit_jax.sampling.generate import SamplingRun, checked_labels
from dydit_jax.sampling.guidance import condition_scale, guide
from dydit_jax.sampling.noise import first_noise, image_keys, step_noise


@dataclasses.dataclass(frozen=True)
class Trajectory:
    """A few images at every evaluation of the network, in the model's own space.

    Attributes:
      timesteps: of the evaluations [S], the most noise first.
      xt: what the network saw, float32 [S,B,side,side,C].
      x0: what it took the image for, float32 [S,B,side,side,C].
      tokens: open gates [S,B,L,N], 0 or 1; under guidance those of the pass with the label.
      images: the result, float32 [B,side,side,C].
    """

    timesteps: np.ndarray
    xt: np.ndarray
    x0: np.ndarray
    tokens: np.ndarray
    images: np.ndarray


@dataclasses.dataclass(frozen=True)
class StepSettings:
    """The static arguments of `run_step`: of `SegmentSettings`, and whether the routers are asked."""

    model: Model
    sampler: Sampler
    guided_channels: str
    evaluations: int
    mode: str


@own_settings()
def trace(
    run: SamplingRun, labels, *, seed: int = 0, mode: str = "gated", report: Callable[[int], None] | None = None
) -> Trajectory:
    """Draw the first images of a job and keep their way.

    Args:
      run: of the job.
      labels: of the images [B], which have the indices 0 .. B - 1.
      seed: of the job.
      mode: "gated" or "complete".
      report: called with the number of steps done since its last call.

    Raises:
      InputError: labels out of range.
    """
    labels = checked_labels(labels, run.model.config.classes)
    shape = (run.model.config.side, run.model.config.side, run.model.config.channels)
    keys = image_keys(seed, jnp.arange(len(labels)))
    sampler, records = Sampler(run.table.form, run.sampling.clip), []
    state = sampler.init(first_noise(keys, shape))
    for step, evaluations in enumerate(run.evaluations.tolist()):
        row = jax.tree.map(lambda column, step=step: column[step], run.table)
        settings = StepSettings(run.model, sampler, run.sampling.guided_channels, evaluations, mode)
        seen = state.xt
        state, tokens = run_step(run.params, state, row, labels, keys, settings=settings)
        records.append(to_host((seen, state.x0, tokens)))
        if report is not None:
            report(1)
    return Trajectory(run.table.timestep, *map(np.stack, zip(*records)), to_host(state.xt))


@functools.partial(jax.jit, static_argnames="settings")
def run_step(params, state: SamplerState, row: SolverTable, labels, keys, *, settings: StepSettings):
    """Run one row of a table; returns the state after it and the images' token gates [B,L,N]."""
    config = settings.model.config
    beta = condition_scale(row.guidance, len(labels), config=config)
    network = functools.partial(settings.model.apply, params, mode=settings.mode, beta=beta)
    guidance = dict(scale=row.guidance if settings.evaluations == 2 else None, guided_channels=settings.guided_channels)
    output, routing = guide(network, state.xt, row.timestep, labels, **guidance, config=config)
    noise = None if settings.sampler.form.noise == "none" else step_noise(keys, row.step, state.xt.shape[1:])
    return settings.sampler.step(state, output, row, noise), routing.tokens[: len(labels)]
