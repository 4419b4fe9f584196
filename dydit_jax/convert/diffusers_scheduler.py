"""The scheduler of a diffusers' pipeline: which diffusion its model was trained on, read and written.

diffusers describes a schedule by the name of a formula and its ends, or by all betas. The betas tell which it is.
"""

from pathlib import Path

import numpy as np

from dydit_jax.diffusion.process import Diffusion
from dydit_jax.diffusion.schedules import SCHEDULES, make_schedule, squared_cosine_betas
from dydit_jax.errors import InputError, name_file
from dydit_jax.runtime.files import read_json

TRANSFORMER, SCHEDULER, SCHEDULER_FILE = "transformer", "scheduler", "scheduler_config.json"
VERSION = "0.30.0"  # of diffusers, since which the classes have these names
ROUNDING = 1e-3  # of betas that were computed in float32, where the least lose three digits


def scheduler_beside(folder) -> Path | None:
    """Return where a pipeline describes its scheduler, by the folder of its transformer; None for other folders."""
    folder = Path(folder)
    return folder.parent / SCHEDULER / SCHEDULER_FILE if folder.name == TRANSFORMER else None


def read_scheduler(path) -> Diffusion:
    """Return the diffusion that a `scheduler_config.json` describes.

    Raises:
      InputError: a network that predicts something else than noise, or betas of no schedule here.
    """
    config = read_json(path, remedy="copy the folder again")
    predicts, steps = config.get("prediction_type", "epsilon"), config.get("num_train_timesteps")
    if predicts != "epsilon":
        raise InputError(f"{path} has the prediction_type {predicts!r:.80}; here networks predict noise, 'epsilon'.")
    if type(steps) is not int:
        raise InputError(f"{path} has {steps!r:.80} num_train_timesteps; copy the folder again.")
    with name_file(path):
        diffusions = [Diffusion(name, steps) for name in SCHEDULES]
    betas = _betas(config, steps)
    for diffusion in diffusions if betas is not None else ():
        if np.allclose(betas, SCHEDULES[diffusion.schedule](steps), rtol=ROUNDING, atol=0):
            return diffusion
    shape = {name: config.get(name) for name in ("beta_schedule", "beta_start", "beta_end")}
    raise InputError(
        f"{path} describes a schedule that can't be sampled on here ({str(shape)[1:-1]:.200}, "
        f"{'all betas' if config.get('trained_betas') else 'no trained_betas'}, {steps} steps); known: linear from "
        "0.0001 to 0.02, both times 1000 / steps, and squared_cosine, there squaredcos_cap_v2. If the model was "
        "trained on one of these, correct the file."
    )


def _betas(config: dict, steps: int) -> np.ndarray | None:
    """Return the betas of a description, float64 [T]; None where they are of a kind that is none of ours."""
    listed, kind = config.get("trained_betas"), config.get("beta_schedule")
    ends = (config.get("beta_start"), config.get("beta_end"))
    if config.get("rescale_betas_zero_snr"):
        return None
    if listed is not None:
        is_whole = isinstance(listed, list) and len(listed) == steps and all(map(_is_beta, listed))
        return np.array(listed) if is_whole else None
    if kind == "linear" and all(map(_is_beta, ends)):
        return np.linspace(*ends, steps)
    return squared_cosine_betas(steps) if kind == "squaredcos_cap_v2" else None


def _is_beta(value) -> bool:
    return type(value) is float and 0 < value < 1


def scheduler_config(diffusion: Diffusion) -> dict:
    """Return the arguments of a `DDIMScheduler` for a process."""
    betas = make_schedule(diffusion).betas
    shape = dict(beta_schedule="linear", beta_start=float(betas[0]), beta_end=float(betas[-1]), trained_betas=None)
    if diffusion.schedule != "linear":
        shape = dict(trained_betas=betas.tolist())
    return dict(
        _class_name="DDIMScheduler",
        _diffusers_version=VERSION,
        num_train_timesteps=diffusion.train_steps,
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=0,
        prediction_type="epsilon",
        **shape,
    )
