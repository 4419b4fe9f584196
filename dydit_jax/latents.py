"""Images to latents and back on a mesh: in slices, because the autoencoder works at full resolution."""

from collections.abc import Callable

import chex
import numpy as np
from jax.sharding import Mesh

from dydit_jax.models import autoencoder
from dydit_jax.runtime.sharding import map_in_slices

IMAGES_PER_DEVICE = 8
LATENT_CHANNELS = 4
LATENT_FACTOR = 8  # pixels along an image's side for each of its latents'


def decode_latents(params, latents, mesh: Mesh) -> np.ndarray:
    """Decode scaled latents [n,side/8,side/8,4] into images [n,side,side,3], about [-1, 1]."""
    chex.assert_shape(latents, (None, None, None, LATENT_CHANNELS))
    return _in_slices(autoencoder.decode, params, np.asarray(latents), mesh)


def encode_images(params, images, mesh: Mesh, key=None) -> np.ndarray:
    """Encode images [n,side,side,3] in [-1, 1] into scaled latents [n,side/8,side/8,4].

    Args:
      params: of the autoencoder.
      images: side a multiple of 8.
      mesh: whose devices share the work.
      key: draws from each image's Gaussian; None takes its mean.
    """
    return np.asarray(autoencoder.sample_latents(encode_moments(params, images, mesh), key))


def encode_moments(params, images, mesh: Mesh, report: Callable[[int], None] | None = None):
    """Encode images [n,side,side,3] in [-1, 1] into the moments of their latents, [n,side/8,side/8,4] each.

    Args:
      params: of the autoencoder.
      images: side a multiple of 8.
      mesh: whose devices share the work.
      report: called with the number of images that are done since its last call, or None.
    """
    chex.assert_shape(images, (None, None, None, 3))
    return _in_slices(autoencoder.encode, params, np.asarray(images, np.float32), mesh, report)


def _in_slices(function, params, batch: np.ndarray, mesh: Mesh, report=None) -> np.ndarray:
    return map_in_slices(function, params, batch, mesh, slice_size=IMAGES_PER_DEVICE * mesh.size, report=report)
