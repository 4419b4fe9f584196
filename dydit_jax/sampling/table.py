"""The table of a run: times, solver and guidance of every evaluation of the network, known before the first."""

import dataclasses
import logging
from collections.abc import Mapping

import numpy as np

from dydit_jax.diffusion.process import Process, require_meaning
from dydit_jax.diffusion.samplers import SEARCHED, SamplingConfig
from dydit_jax.diffusion.solvers import SOLVERS, SolverTable, solver_table
from dydit_jax.errors import InputError
from dydit_jax.sampling.guidance import guidance_scales

logger = logging.getLogger(__name__)


def make_table(sampling: SamplingConfig, process: Process) -> SolverTable:
    """Tabulate a run from the most noise to the least, in float64; one row per evaluation of the network.

    Raises:
      InputError: a solver without meaning for the process, times that it does not have, too few of them for the solver,
        or guidance that does not fit them.
    """
    searched = sampling.sampler == SEARCHED
    sampler = "ddim" if searched else sampling.sampler
    require_meaning(process, "sampling.sampler", sampler, SOLVERS)
    path, timesteps = process.path(sampling.steps, sampler, sampling.eta)
    table = solver_table(sampler, path, timesteps)
    if searched:
        table = with_weights(table, sampling.searched_weights)
    if sampling.clip is not None and not np.any(table.estimate_from_x0, axis=1).all():
        raise InputError(
            f"sampling.clip has no meaning for {sampling.sampler} with the process {process.name}: it evaluates the "
            "network at the image itself. Leave the clip out, or take another sampler."
        )
    scales = guidance_scales(sampling, table.timestep, process.time_range())
    return dataclasses.replace(table, guidance=scales.astype(np.float32))


def warn_of_unlearnt_times(config: Mapping, table: SolverTable) -> None:
    """Warn where a run evaluates a model at a time that its training gave hardly any weight: t = 0 under min_snr.

    Args:
      config: that the model was trained with, as plain dicts; {} where it is not known.
      table: of the run.
    """
    weighting = (config.get("loss") or {}).get("weighting", "none")
    if weighting == "min_snr" and table.timestep.min() <= 0:
        logger.warning(
            "The timesteps end at t = 0, which a model trained with loss.weighting=min_snr has hardly learnt: its "
            "images may be grainy. Timesteps such as sampling.steps=trailing:%d end before it.",
            len(table),
        )


def with_weights(table: SolverTable, rows: tuple[tuple[float, ...], ...]) -> SolverTable:
    """Return a table of ddim, whose estimates are of x_0, with other weights.

    Args:
      table: of S rows.
      rows: weights of x and of the estimates, the newest first, for each of the S rows; those left out are 0.

    Raises:
      InputError: another number of rows.
    """
    if len(rows) != len(table):
        raise InputError(
            f"sampling.searched_weights must have a row for each of the {len(table)} timesteps, not {len(rows)}."
        )
    weights = np.zeros((len(table), 2, 1 + max(map(len, rows))), np.float32)
    for i, (of_x, *of_estimates) in enumerate(rows):
        weights[i, 0, 0] = of_x
        weights[i, 0, 2 : 2 + len(of_estimates)] = of_estimates
    return dataclasses.replace(table, weights=weights)
