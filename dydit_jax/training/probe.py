"""A measurement: how well a model predicts the noise in each patch of an image at one timestep."""

import functools

import jax
import jax.numpy as jnp

from dydit_jax.diffusion.gaussian import at_steps, coefficients, diffuse
from dydit_jax.diffusion.schedules import DiffusionConfig, make_schedule
from dydit_jax.models.dit import Model


@functools.partial(jax.jit, static_argnames=("model", "diffusion", "mode"))
def patch_losses(params, batch, keys, timestep, *, model: Model, diffusion: DiffusionConfig, mode: str):
    """Return the squared error of the predicted noise, mean over the values of each patch, [B,N].

    Args:
      params: the parameter tree.
      batch: {"image": [B,side,side,C], "label": [B]}.
      keys: PRNG keys of the images [B]; with the timestep they fix the noise.
      timestep: the same for all images.
      model, diffusion: the network and its process.
      mode: "gated" or "complete".
    """
    config = model.config
    x0, labels = batch["image"], batch["label"]
    t = jnp.full(len(x0), timestep)
    draw = lambda key: jax.random.normal(jax.random.fold_in(key, timestep), x0.shape[1:], jnp.float32)
    noise = jax.vmap(draw)(keys)
    xt = diffuse(x0, noise, at_steps(coefficients(make_schedule(diffusion)), t))
    output, _ = model.apply(params, xt, t, labels, mode=mode)
    error = jnp.square(output[..., : config.channels] - noise)
    side = config.side // config.patch
    patches = error.reshape(-1, side, config.patch, side, config.patch, config.channels)
    return patches.mean((2, 4, 5)).reshape(-1, config.tokens)
