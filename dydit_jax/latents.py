"""Images to latents and back on a mesh: in slices, because the autoencoder works at full resolution."""

import math
from collections.abc import Callable

import chex
import numpy as np
from jax.sharding import Mesh

from dydit_jax.errors import InputError
from dydit_jax.models.autoencoder import Autoencoder, AutoencoderConfig, Moments, decode, encode, sample_latents
from dydit_jax.runtime.sharding import map_in_slices

IMAGES_PER_DEVICE = 8
SUMMED_AT_ONCE = 256  # images, whose latents are widened in memory


def require_channels(config: AutoencoderConfig, channels: int, name: str) -> None:
    """Raise unless an autoencoder decodes the latents of a model.

    Raises:
      InputError: latents of other channels.
    """
    if config.channels != channels:
        raise InputError(
            f"The model draws {channels} channels, but the latents of the autoencoder {name} have {config.channels}; "
            "name the model's own with sampling.autoencoder."
        )


def require_decoder(autoencoder: str, channels: int) -> None:
    """Raise where pictures are wanted of a model whose samples are latents, and nothing decodes them.

    Args:
      autoencoder: name of the decoder; "" for none.
      channels: of the model's samples.

    Raises:
      InputError: samples that are no pictures, without a decoder.
    """
    if not autoencoder and channels not in (1, 3):
        raise InputError(
            f"Pictures have 1 or 3 channels, but the model draws {channels}, which are latents; name their decoder as "
            "sampling.autoencoder."
        )


def decode_latents(autoencoder: Autoencoder, latents, mesh: Mesh) -> np.ndarray:
    """Decode what a model draws [n,side/f,side/f,C] into images [n,side,side,3], about [-1, 1]."""
    require_channels(autoencoder.config, np.shape(latents)[-1], "given")
    return _in_slices(decode, autoencoder, np.asarray(latents), mesh)


def encode_images(autoencoder: Autoencoder, images, mesh: Mesh, key=None) -> np.ndarray:
    """Encode images [n,side,side,3] in [-1, 1] into latents as a model sees them [n,side/f,side/f,C].

    Args:
      autoencoder: whose factor f divides the side.
      images: to encode.
      mesh: whose devices share the work.
      key: draws from each image's Gaussian; None takes its mean.
    """
    return np.asarray(sample_latents(encode_moments(autoencoder, images, mesh), autoencoder.config, key))


def encode_moments(
    autoencoder: Autoencoder, images, mesh: Mesh, report: Callable[[int], None] | None = None
) -> Moments:
    """Encode images [n,side,side,3] in [-1, 1] into the moments of their latents, [n,side/f,side/f,C] each.

    Args:
      autoencoder: whose factor f divides the side.
      images: to encode.
      mesh: whose devices share the work.
      report: called with the number of images that are done since its last call, or None.
    """
    chex.assert_shape(images, (None, None, None, 3))
    return _in_slices(encode, autoencoder, np.asarray(images, np.float32), mesh, report)


def sum_latents(moments) -> np.ndarray:
    """Return what mean and deviation of latents need, float64 [3,C]: sums of means, of their squares, of variances.

    Args:
      moments: [n,...,2C], mean and log-variance of each latent.
    """
    total = 0.0
    for first in range(0, len(moments), SUMMED_AT_ONCE):
        part = np.asarray(moments[first : first + SUMMED_AT_ONCE], np.float64).reshape(-1, moments.shape[-1])
        mean, log_variance = np.split(part, 2, axis=-1)
        total = total + np.stack([mean.sum(0), np.square(mean).sum(0), np.exp(log_variance).sum(0)])
    return total


def mean_and_deviation(sums, count: int) -> tuple[list[float], list[float]]:
    """Return mean and standard deviation per channel [C] of latents drawn from their Gaussians.

    Args:
      sums: one `sum_latents` per part, in an order that is always the same.
      count: of the latents' places in all parts.
    """
    total = np.array([[math.fsum(values) for values in zip(*rows)] for rows in zip(*sums)]) / count  # [3,C]
    mean, square, variance = total
    return mean.tolist(), np.sqrt(square - np.square(mean) + variance).tolist()


def _in_slices(function, autoencoder: Autoencoder, batch: np.ndarray, mesh: Mesh, report=None):
    return map_in_slices(function, autoencoder, batch, mesh, slice_size=IMAGES_PER_DEVICE * mesh.size, report=report)
