"""What stands in for something too large to be computed in a test."""

import contextlib
import types
from unittest import mock

import jax
import numpy as np

from dydit_jax.jobs import prepare_latents as preparation
from dydit_jax.models.autoencoder import Autoencoder, AutoencoderConfig, abstract_params

MEAN = Autoencoder(AutoencoderConfig(), {"weight": np.ones(3)})


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
        mock.patch.object(preparation, "load_autoencoder", lambda name: MEAN),
    ):
        yield given


def small_autoencoder(**record) -> Autoencoder:
    """Return an autoencoder of few channels with random weights; `record` replaces parts of its shape."""
    config = AutoencoderConfig(**dict(dict(widths=(32, 32, 32, 32), resnets=1), **record))
    draw = np.random.default_rng(0).standard_normal
    return Autoencoder(config, jax.tree.map(lambda leaf: 0.1 * draw(leaf.shape, np.float32), abstract_params(config)))
