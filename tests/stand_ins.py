"""What stands in for something too large to be computed in a test."""

import contextlib
import io
import types
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from dydit_jax.data.image_sets import open_images
from dydit_jax.jobs import evaluate as evaluation
from dydit_jax.jobs import judging, training_data
from dydit_jax.jobs import prepare_latents as preparation
from dydit_jax.models.autoencoder import Autoencoder, AutoencoderConfig, abstract_params
from dydit_jax.runtime.sharding import MeshConfig, make_mesh

TINY_NETWORK = dict(scale=np.float32(0.1))
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
        mock.patch.object(training_data, "load_autoencoder", lambda name: MEAN),
    ):
        yield given


def few_numbers(params, images) -> dict:
    """Return a few numbers of each image [B,8,8,3] in the place of Inception's features."""
    small = images.astype(jnp.float32).reshape(len(images), 4, 2, 4, 2, 3).mean((2, 4, 5)).reshape(len(images), 16)
    return dict(pool=jnp.sin(small[:, :8] * params["scale"]), spatial=small[:, 8:], logits=small[:, :4] / 100)


@contextlib.contextmanager
def few_numbers_for_inception():
    """Put a few numbers of each image in the place of Inception's features."""
    shapes = dict(mu=(8,), sigma=(8, 8), mu_s=(8,), sigma_s=(8, 8))
    with (
        mock.patch.object(evaluation, "features", few_numbers),
        mock.patch.object(evaluation, "MOMENT_SHAPES", shapes),
        mock.patch.object(evaluation, "load_inception", lambda name: (TINY_NETWORK, "tiny")),
        mock.patch.object(judging, "load_inception", lambda name: (TINY_NETWORK, "tiny")),
    ):
        yield


def write_tiny_reference(path):
    """Write the statistics of twenty random images, by the stand-in for Inception; return their file."""
    pixels = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 3), dtype=np.uint8)
    np.savez(path.with_name("reference.npz"), arr_0=pixels)
    settings = dict(params=TINY_NETWORK, mesh=make_mesh(MeshConfig()), batch_size=4)
    statistics = evaluation.image_statistics(open_images(path.with_name("reference.npz")), **settings)
    evaluation.save_statistics(path, statistics, "tiny")
    return path


def small_autoencoder(**record) -> Autoencoder:
    """Return an autoencoder of few channels with random weights; `record` replaces parts of its shape."""
    config = AutoencoderConfig(**dict(dict(widths=(32, 32, 32, 32), resnets=1), **record))
    draw = np.random.default_rng(0).standard_normal
    return Autoencoder(config, jax.tree.map(lambda leaf: 0.1 * draw(leaf.shape, np.float32), abstract_params(config)))


def png(number: int) -> bytes:
    """Return a file of random pixels, 24 x 20."""
    file = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, format="PNG")
    return file.getvalue()


def write_pictures(folder, count: int):
    """Write files of random pixels, in turn into the folders of two classes; return `folder`."""
    for number in range(count):
        place = folder / f"class{number % 2}"
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{number}.png").write_bytes(png(number))
    return folder
