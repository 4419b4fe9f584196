"""Classifier-free guidance: two passes mixed, run as one; or one pass of a network that is conditioned on the scale.

Source: https://arxiv.org/abs/2207.12598; that only the first three channels are guided is how the published DiT models
are sampled.
"""

import logging
from collections.abc import Callable, Mapping

import jax.numpy as jnp
import numpy as np

from dydit_jax.diffusion.samplers import SamplingConfig
from dydit_jax.diffusion.terms import LossConfig
from dydit_jax.errors import InputError
from dydit_jax.models.config import DiTConfig

logger = logging.getLogger(__name__)

GUIDED_FIRST_CHANNELS = 3


def guidance_scales(sampling: SamplingConfig, timesteps: np.ndarray, time_range: tuple) -> np.ndarray:
    """Return the scale of every evaluation of the network, float64 [S]; 1 where it is not guided.

    Args:
      sampling: a constant scale, with or without an interval, or a scale for each evaluation.
      timesteps: of the evaluations [S].
      time_range: the lowest and highest time of the process.

    Raises:
      InputError: an interval outside the range, or another number of scales.
    """
    scales, interval = sampling.guidance_scales, sampling.guidance_interval
    if scales is not None:
        if len(scales) != len(timesteps):
            raise InputError(
                f"sampling.guidance_scales must have one scale for each of the {len(timesteps)} evaluations of the "
                f"network, not {len(scales)}."
            )
        return np.array(scales)
    first, last = time_range
    low, high = interval or time_range
    if low < first or high > last:
        raise InputError(
            f"sampling.guidance_interval must be within the timesteps {first} to {last}, not ({low:g}, {high:g})."
        )
    return np.where((timesteps >= low) & (timesteps <= high), sampling.guidance, 1.0)


def evaluations_per_step(scales) -> np.ndarray:
    """Return how often a network runs on an image at each of the scales [S]: twice with guidance, int [S]."""
    return np.where(np.asarray(scales) == 1.0, 1, 2)


def evaluations_of(config: DiTConfig, scales: np.ndarray) -> np.ndarray:
    """Return how often a model runs on an image at each of the scales [S], int [S].

    Once where the model is conditioned on the scale and predicts the guided result itself, else as
    `evaluations_per_step` says.

    Raises:
      InputError: a scale below 1 of such a model, which has not seen it.
    """
    if not config.guidance_free:
        return evaluations_per_step(scales)
    if (scales < 1.0).any():
        raise InputError(
            f"This model has guidance in one pass, for scales from 1 on; sampling.guidance is {scales.min():g}. Two "
            "passes of it are not mixed."
        )
    return np.ones(scales.shape, int)


def condition_scale(scale, images: int, *, config: DiTConfig):
    """Return beta = 1 / scale for each of the images [B], where the model is conditioned on it; else None."""
    return jnp.full(images, 1 / scale) if config.guidance_free else None


def condition_labels(labels, *, evaluations: int, config: DiTConfig):
    """Return the labels that the network runs on: [B], or [2B] with "no class" for the second half."""
    return labels if evaluations == 1 else jnp.concatenate([labels, jnp.full_like(labels, config.null_label)])


def guide(network: Callable, x, t, labels, *, scale, guided_channels: str, config: DiTConfig):
    """Run a network with classifier-free guidance.

    Args:
      network: (x, t, labels) -> the output [B,side,side,2C] and anything else.
      x: [B,side,side,C].
      t: timestep, a scalar.
      labels: [B].
      scale: a scalar; None runs the network once, on the labels alone.
      guided_channels: one of `GUIDED_CHANNELS`.
      config: the model's.

    Returns:
      The output [B,side,side,2C] and the network's second result, of [2B,...] under guidance, with the conditional
      images first.
    """
    if scale is None:
        return network(x, jnp.full(x.shape[:1], t), labels)
    x, labels = jnp.concatenate([x, x]), condition_labels(labels, evaluations=2, config=config)
    output, record = network(x, jnp.full(x.shape[:1], t), labels)
    conditional, unconditional = jnp.split(output, 2)
    channels = config.channels
    if guided_channels == "first_three":
        channels = min(channels, GUIDED_FIRST_CHANNELS)
    mixed = unconditional + scale * (conditional - unconditional)
    return jnp.concatenate([mixed[..., :channels], conditional[..., channels:]], axis=-1), record


# --- What guidance needs of a model --------------------------------------------------------------


def require_trained(config: Mapping, sampling: SamplingConfig, *, labels=(), classes: int | None = None) -> None:
    """Raise where guidance or a label asks for what a model's training never showed it: "no class", or the scale.

    A training that started from other weights may have it from them: that is not known here, and a warning.

    Args:
      config: that the model was trained with, as plain dicts; {} where it is not known.
      sampling: the run's.
      labels: of the images.
      classes: of the model; this number as a label stands for "no class".

    Raises:
      InputError: a label dropout of 0; under guidance, also one of 1 or a model without classes, neither of which
        leaves a class to guide to, or a model that is conditioned on the scale and was trained at a scale of 1 alone.
    """
    if sampling.is_guided and classes == 0:
        raise InputError("Guidance needs classes, and this model has none; set sampling.guidance to 1.")
    loss, model = config.get("loss") or {}, config.get("model") or {}
    dropout = loss.get("label_dropout", LossConfig.label_dropout)
    guided, unlabelled = sampling.is_guided, bool(classes) and classes in np.asarray(labels).tolist()
    scale = sampling.guidance if sampling.guidance_scales is None else max(sampling.guidance_scales)
    asked = f"Guidance of {scale}" if guided else f"The label {classes}"
    if (guided and dropout in (0.0, 1.0)) or (unlabelled and dropout == 0.0):
        unseen, setting = "no class" if dropout == 0.0 else "any class", f"loss.label_dropout {dropout}"
        remedy = "Set sampling.guidance to 1 and give labels of classes, or train with a dropout of about 0.1."
    elif guided and model.get("guidance_free") and not loss.get("guidance_free"):
        unseen, setting = "scales of guidance", "model.guidance_free, but not loss.guidance_free"
        remedy = "Set sampling.guidance to 1, or train with loss.guidance_free."
    else:
        return
    message = f"{asked} needs a model that has seen {unseen}; this one was trained with {setting}."
    before = (config.get("train") or {}).get("init_from")
    if not before:
        raise InputError(f"{message} {remedy}")
    logger.warning("%s Whether %s had, from which it started, is not known.", message, before)


def require_label_table(params, config: DiTConfig) -> None:
    """Raise unless the table of labels has a row for each class and one for "no class": JAX would take the last one.

    Raises:
      InputError: more rows, or fewer.
    """
    rows = params["label_embed"]["table"].shape[0]
    if rows != config.classes + 1:
        raise InputError(
            f"The table of labels has {rows} rows; {config.classes} classes and no class need {config.classes + 1}."
        )
