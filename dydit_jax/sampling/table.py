"""The table of a run: times, solver and guidance of every evaluation of the network, known before the first."""

import dataclasses

import numpy as np

from dydit_jax.diffusion.process import Process, require_meaning
from dydit_jax.diffusion.samplers import SamplingConfig
from dydit_jax.diffusion.solvers import SOLVERS, SolverTable, solver_table
from dydit_jax.errors import InputError
from dydit_jax.sampling.guidance import guidance_scales


def make_table(sampling: SamplingConfig, process: Process) -> SolverTable:
    """Tabulate a run from the most noise to the least, in float64; one row per evaluation of the network.

    Raises:
      InputError: a solver without meaning for the process, times that it does not have, too few of them for the solver,
        or guidance that does not fit them.
    """
    require_meaning(process, "sampling.sampler", sampling.sampler, SOLVERS)
    path, timesteps = process.path(sampling.steps, sampling.sampler, sampling.eta)
    table = solver_table(sampling.sampler, path, timesteps)
    if sampling.clip is not None and not np.any(table.estimate_from_x0, axis=1).all():
        raise InputError(
            f"sampling.clip has no meaning for {sampling.sampler} with the process {process.name}: it evaluates the "
            "network at the image itself. Leave the clip out, or take another sampler."
        )
    scales = guidance_scales(sampling, table.timestep, process.time_range())
    return dataclasses.replace(table, guidance=scales.astype(np.float32))
