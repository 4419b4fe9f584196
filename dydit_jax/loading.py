"""From whatever a user calls a checkpoint to weights: a file, a folder, a run's work directory or a published name."""

import dataclasses
import functools
import logging
from collections.abc import Callable

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from dydit_jax.checkpoints import (
    WEIGHTS_FILE,
    Weights,
    is_run,
    load_run_weights,
    load_weights,
    read_arrays,
    read_run_config,
    split_step,
)
from dydit_jax.convert.conversion import AUTOENCODER_FORMAT, Conversion, convert, output_file
from dydit_jax.convert.published import SHIPPED, converted_file, fetch, known_names
from dydit_jax.diffusion.process import read_process
from dydit_jax.diffusion.samplers import SamplingConfig
from dydit_jax.errors import InputError, require_known
from dydit_jax.latents import decode_latents
from dydit_jax.models.config import read_model
from dydit_jax.records import read_record
from dydit_jax.runtime.files import hold_lock
from dydit_jax.runtime.settings import own_settings
from dydit_jax.runtime.sharding import replicated
from dydit_jax.trees import unflatten

logger = logging.getLogger(__name__)

WEIGHTS = ("ema", "params")
LARGE_SHARE = 0.01  # of the start in an EMA


@own_settings()
def load_checkpoint(checkpoint, from_step: int | None = None, weights: str = "ema") -> Weights:
    """Load weights for sampling, or to start a training from.

    Args:
      checkpoint: a `.safetensors` file of ours, a folder with one, a training's work directory (its newest step, EMA
        weights; nothing is changed in it), one of its checkpoints (`<workdir>/checkpoints/<step>`), or the name of a
        known model: "digits", which comes with the package, or a published one, which is fetched and converted once.
      from_step: another step than the newest, of a work directory.
      weights: "ema", which is warned of where it is still near its start, or "params", the raw parameters of a work
        directory.

    Raises:
      InputError: none of these, or a damaged one.
    """
    require_known("weights", weights, WEIGHTS)
    if from_step is None:
        checkpoint, from_step = split_step(checkpoint)
    path = _resolved(checkpoint, "model")
    if not is_run(path):
        if from_step is not None:
            raise InputError(f"--from_step={from_step} needs a training's work directory; {path} is none.")
        if weights != "ema":
            raise InputError(f"--weights={weights} needs a training's work directory; {path} holds one set of weights.")
        found = load_weights(output_file(path) if path.is_dir() else path)
        warn_of_start(found.about)
        return found
    config = read_run_config(path)
    sampling = read_record(SamplingConfig, config.get("sampling", {}), "sampling")
    found = load_run_weights(path, read_model(config["model"]), read_process(config), sampling, from_step, weights)
    about = dict(found.about, config=config)
    if weights == "ema":
        warn_of_start(about)
    return dataclasses.replace(found, about=about)


def warn_of_start(about: dict) -> None:
    """Warn where an EMA still holds much of what its training started from: its images are noise, or poor.

    Args:
      about: of weights; "config" and "step" where they come from a training.
    """
    decay, step = (about.get("config", {}).get("train") or {}).get("ema_decay"), about.get("step")
    if decay is None or step is None or decay**step <= LARGE_SHARE:
        return
    logger.warning(
        "After %d steps at a decay of %g the EMA still is %.1f %% of what training started from: its images will be "
        "noise, or poor. Train longer or with a smaller train.ema_decay; of a work directory, --weights=params takes "
        "the raw parameters.",
        *(step, decay, 100 * decay**step),
    )


def load_autoencoder(autoencoder) -> dict:
    """Load the parameters of an autoencoder from a `.safetensors` file of ours, a folder with one, or by name.

    Raises:
      InputError: neither.
    """
    path = _resolved(autoencoder, "autoencoder")
    leaves, _ = read_arrays(output_file(path) if path.is_dir() else path, AUTOENCODER_FORMAT)
    return unflatten(leaves)


def load_decoder(autoencoder: str, mesh: Mesh) -> Callable:
    """Return the function from samples [B,side,side,C] to images [B,side,side,1 or 3], about [-1, 1].

    Args:
      autoencoder: as for `load_autoencoder`; "" for models in pixels, whose samples are images.
      mesh: whose devices share the work.
    """
    if not autoencoder:
        return np.asarray
    params = jax.device_put(load_autoencoder(autoencoder), replicated(mesh))
    return functools.partial(decode_latents, params, mesh=mesh)


def _resolved(checkpoint, holds: str) -> epath.Path:
    """Return the path that the name of a "model" or "autoencoder" means."""
    path = epath.Path(checkpoint)
    if path.exists():
        if path.is_dir() and not is_run(path) and not (path / WEIGHTS_FILE).is_file():
            raise InputError(f"{path} is neither a run's work directory nor a folder with {WEIGHTS_FILE}.")
        return path
    name, known = str(checkpoint), known_names(holds)
    if name not in known:
        raise InputError(f"There is no file {path}, and no published {holds} of that name; known: {', '.join(known)}.")
    if name in SHIPPED:
        return epath.Path(SHIPPED[name])
    converted = converted_file(name)
    if not converted.exists():
        # Processes of one machine that start together need it once.
        with hold_lock(converted.with_name(converted.name + ".lock"), to=f"to convert {name}"):
            if not converted.exists():
                convert(Conversion(source=str(fetch(name)), out=str(converted)))
    return epath.Path(converted)
