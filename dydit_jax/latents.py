"""Images to latents and back on a mesh: in slices, because the autoencoder works at full resolution.

Each slice is split over all devices; the last one is filled up, so that one compiled program serves all.
"""

import functools

import jax
import numpy as np
from jax.sharding import Mesh

from dydit_jax.models import autoencoder
from dydit_jax.sharding import batch_sharding, replicated

IMAGES_PER_DEVICE = 8


def decode_latents(params, latents, mesh: Mesh) -> np.ndarray:
    """Decode scaled latents [n,side/8,side/8,4] into images [n,side,side,3], about [-1, 1]."""
    return _in_slices(autoencoder.decode, params, np.asarray(latents), mesh)


def encode_images(params, images, mesh: Mesh, key=None) -> np.ndarray:
    """Encode images [n,side,side,3] in [-1, 1] into scaled latents [n,side/8,side/8,4].

    Args:
      params: of the autoencoder.
      images: side a multiple of 8.
      mesh: whose devices share the work.
      key: draws from each image's Gaussian; None takes its mean.
    """
    moments = _in_slices(autoencoder.encode, params, np.asarray(images, np.float32), mesh)
    return np.asarray(autoencoder.sample_latents(moments, key))


@functools.cache
def _compiled(function, mesh: Mesh):
    return jax.jit(function, in_shardings=(replicated(mesh), batch_sharding(mesh)))


def _in_slices(function, params, batch: np.ndarray, mesh: Mesh):
    """Apply `function(params, slice)` to slices of a batch and join the results, whatever tree they are."""
    size = -(-min(IMAGES_PER_DEVICE * mesh.size, len(batch)) // mesh.size) * mesh.size
    filled = np.concatenate([batch, np.repeat(batch[-1:], -len(batch) % size, axis=0)])
    run = _compiled(function, mesh)
    results = [jax.device_get(run(params, filled[first : first + size])) for first in range(0, len(filled), size)]
    return jax.tree.map(lambda *parts: np.concatenate(parts)[: len(batch)], *results)
