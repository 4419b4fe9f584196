"""A searched solver: the file that `dydit-search-solver` writes, and how it becomes settings of a run.

It belongs to one model: to its weights, by their checksum, and to the process that they were trained on.
"""

import logging
import sys
import typing
from collections.abc import Callable, Mapping

from dydit_jax.diffusion.process import Process, process_sections
from dydit_jax.diffusion.samplers import SEARCHED, SamplingConfig, require_rows
from dydit_jax.errors import InputError, name_file
from dydit_jax.records import read_mapping
from dydit_jax.runtime.files import read_json

logger = logging.getLogger(__name__)

FORMAT = "dydit-jax searched solver 1"
SUFFIX = ".json"
SHOWN_DIGITS = 12  # of a checksum
# What the weights were fitted to beside the model; they work with others too, but not as well.
FITTED_TO = ("clip", "guidance", "guidance_interval", "guidance_scales", "guided_channels")


class Solver(typing.TypedDict):
    """What a file says of a searched solver; other keys say how it was found."""

    format: str
    checksum: str
    process: dict
    evaluations: int
    timesteps: list
    weights: list
    sampling: dict


def is_searched(sampler: str) -> bool:
    """Return whether the name of a sampler is that of a file."""
    return sampler.endswith(SUFFIX)


def fitted_to(sampling: SamplingConfig) -> dict:
    """Return the settings that a searched solver depends on, as JSON gives them back."""
    found = {name: getattr(sampling, name) for name in FITTED_TO}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in found.items()}


def read_searched(path, process: Process, checksum: Callable[[], str]) -> dict:
    """Return the settings that a searched solver stands for: sampler, steps and weights.

    Args:
      path: of the file.
      process: that the model was trained on.
      checksum: -> of the model's weights.

    Raises:
      InputError: no such file, no JSON, another format, another model or process, or numbers that do not fit.
    """
    remedy = "make it again with dydit-search-solver"
    found = read_json(path, remedy=remedy)
    if found.get("format") != FORMAT:
        what = f"its format is {found.get('format')!r:.80}, not {FORMAT!r}"
        raise InputError(f"{path} holds no searched solver: {what}; {remedy}.")
    with name_file(path):
        found = read_mapping(Solver, found, "solver")
    described = process_sections(process)
    if found["process"] != described:
        raise InputError(f"{path} is for another process or schedule, {found['process']}; this model has {described}.")
    own = checksum()
    if found["checksum"] != own:
        theirs = str(found["checksum"])[:SHOWN_DIGITS]
        raise InputError(
            f"{path} was fitted to other weights: their SHA-256 is {theirs}..., this model's is "
            f"{own[:SHOWN_DIGITS]}... Search a solver for this model with dydit-search-solver."
        )
    evaluations, timesteps, weights = (found[key] for key in ("evaluations", "timesteps", "weights"))
    _require_numbers(timesteps, f"timesteps in {path}")
    if not len(weights) == len(timesteps) == evaluations:
        raise InputError(
            f"{path} has {len(weights)} rows of weights and {len(timesteps)} timesteps for {evaluations} evaluations; "
            f"it needs one of each for every evaluation. Restore it, or {remedy}."
        )
    for number, row in enumerate(weights):
        _require_numbers(row, f"weights[{number}] in {path}")
    weights = tuple(tuple(map(float, row)) for row in weights)
    require_rows(weights, f"weights in {path}")
    return dict(
        sampler=SEARCHED, steps=listed(timesteps), eta=0.0, searched_weights=weights, fitted_to=found["sampling"]
    )


def warn_of_other_settings(path, fitted: Mapping, sampling: SamplingConfig) -> None:
    """Warn where a run's guidance or clipping is not that which a solver was fitted with."""
    now = fitted_to(sampling)
    changed = [name for name in FITTED_TO if fitted.get(name) != now[name]]
    if changed:
        before = ", ".join(f"{name} {fitted.get(name)}" for name in changed)
        this = ", ".join(f"{name} {now[name]}" for name in changed)
        logger.warning("%s was fitted with %s; this run has %s, and may do worse.", path, before, this)


def listed(timesteps: list) -> str:
    """Return `sampling.steps` of just these timesteps, the noisiest first."""
    return "list:" + ",".join(map(str, timesteps))


def _require_numbers(values, where: str) -> None:
    if not isinstance(values, list) or not values:
        raise InputError(f"{where} must be a list of numbers, not {values!r:.40}.")
    for value in values:
        if type(value) not in (int, float) or not abs(value) <= sys.float_info.max:
            raise InputError(f"{where} must be finite numbers, not {value!r:.40}.")
