"""What stands in for something too large to be computed in a test."""

import contextlib
import types
from unittest import mock

import numpy as np

from dydit_jax.jobs import prepare_latents as preparation


@contextlib.contextmanager
def mean_for_autoencoder():
    """Put a plain mean over 8x8 pixels in the autoencoder's place; gives the list of how many images it is given."""
    given = []

    def encode(params, images, mesh, report):
        given.append(len(images))
        report(len(images))
        count, side = len(images), images.shape[1] // 8
        mean = images.reshape(count, side, 8, side, 8, 3).mean((2, 4))
        mean = np.concatenate([mean, mean[..., :1]], axis=-1)
        return types.SimpleNamespace(mean=mean, log_variance=np.full_like(mean, -20))

    with (
        mock.patch.object(preparation, "encode_moments", encode),
        mock.patch.object(preparation, "load_autoencoder", lambda name: {"weight": np.ones(3)}),
    ):
        yield given
