"""Train with samples and measures, sample, analyze and prepare latents: once each, on all devices that there are."""

import io
import pathlib
import sys
from unittest import mock

import jax.numpy as jnp
import numpy as np
from PIL import Image

from dydit_jax import latents
from dydit_jax.jobs import prepare_latents as preparation
from dydit_jax.jobs.analyze import Analysis, analyze
from dydit_jax.jobs.sample import Request, sample
from dydit_jax.jobs.train import train_and_evaluate
from dydit_jax.models.autoencoder import Autoencoder, AutoencoderConfig, Moments

CONFIG = dict(
    model=dict(depth=1, width=32, heads=2, patch=4, side=8, channels=1, classes=10, routers="first_on"),
    data=dict(name="digits", batch_size=8),
    optimizer=dict(learning_rate=1e-3),
    train=dict(steps=2, ema_decay=0.5),
    sampling=dict(sampler="ddim", steps="2", clip=1.0),
    mesh=dict(data=1, fsdp=-1),
    tracking=dict(every_steps=1, samples_every_steps=1, sample_labels=(1, 2, 3)),
)
PICTURES = 6
MEAN = Autoencoder(AutoencoderConfig(), {"weight": np.ones(3)})


def do_every_job(folder) -> None:
    """Leave a work directory `run`, a set `set`, an analysis `analysis` and latents `latents` in a folder."""
    folder = pathlib.Path(folder)
    run = str(folder / "run")
    train_and_evaluate(CONFIG, run)
    sample(Request(run, str(folder / "set"), num_images=6, batch_size=4))
    analyze(Analysis((run,), str(folder / "analysis"), num_examples=6, num_timesteps=3, labels=("1",), report=True))
    prepare(folder)


def prepare(folder: pathlib.Path) -> None:
    """Prepare latents of a few pictures, by a mean over 8x8 pixels in the autoencoder's place."""
    for number in range(PICTURES):
        pixels = np.random.default_rng(number).integers(0, 256, (20, 24, 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, format="PNG")
        path = folder / "pictures" / f"class{number % 2}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(file.getvalue())
    with (
        mock.patch.object(latents, "encode", encode_by_mean),
        mock.patch.object(preparation, "load_autoencoder", lambda name: MEAN),
    ):
        out, pictures = str(folder / "latents"), str(folder / "pictures")
        request = preparation.LatentsRequest(out, pictures, side=16, chunk=4, autoencoder="mean")
        preparation.prepare_latents(request)


def encode_by_mean(_, images) -> Moments:
    """Return [n,side/8,side/8,4], as `autoencoder.encode` does."""
    count, side = len(images), images.shape[1] // 8
    mean = images.reshape(count, side, 8, side, 8, 3).mean((2, 4))
    mean = jnp.concatenate([mean, mean[..., :1]], axis=-1)
    return Moments(mean, jnp.zeros_like(mean))


if __name__ == "__main__":
    do_every_job(sys.argv[1])
