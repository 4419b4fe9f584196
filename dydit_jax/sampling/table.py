"""The table of a run: timesteps, solver and guidance of every evaluation of the network, known before the first."""

import dataclasses

import numpy as np

from dydit_jax.diffusion.samplers import SamplingConfig
from dydit_jax.diffusion.schedules import DiffusionConfig, make_schedule, respace
from dydit_jax.diffusion.solvers import Path, SolverTable, solver_table
from dydit_jax.sampling.guidance import guidance_scales


def make_table(sampling: SamplingConfig, diffusion: DiffusionConfig) -> SolverTable:
    """Tabulate a run from the most noise to the least, in float64; one row per evaluation of the network.

    Raises:
      InputError: timesteps that the schedule does not have, too few of them for the solver, or guidance that does not
        fit them.
    """
    schedule = respace(make_schedule(diffusion), sampling.steps)
    alphas_cumprod = np.append(schedule.alphas_cumprod[::-1], 1.0)
    path = Path(np.sqrt(alphas_cumprod), np.sqrt(1.0 - alphas_cumprod), sampling.eta)
    table = solver_table(sampling.sampler, path, schedule.timesteps[::-1])
    scales = guidance_scales(sampling, table.timestep, diffusion.train_steps)
    return dataclasses.replace(table, guidance=scales.astype(np.float32))
