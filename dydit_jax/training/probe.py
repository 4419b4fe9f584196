"""A measurement: how well a model predicts the noise, or the velocity, in each patch of an image at one time."""

import functools

import jax
import jax.numpy as jnp

from dydit_jax.diffusion.process import Process, is_discrete, perturb
from dydit_jax.models.dit import Model


@functools.partial(jax.jit, static_argnames=("model", "process", "mode"))
def patch_losses(params, batch, keys, timestep, *, model: Model, process: Process, mode: str):
    """Return the squared error of the prediction, mean over the values of each patch, [B,N].

    Args:
      params: the parameter tree.
      batch: {"image": [B,side,side,C], "label": [B]}.
      keys: PRNG keys of the images [B]; with the timestep they fix the noise.
      timestep: the same for all images, of the dtype of the process.
      model, process: the network and its process.
      mode: "gated" or "complete".
    """
    config = model.config
    x0 = batch["image"]
    labels = batch["label"] if config.classes else jnp.full(len(x0), config.null_label)
    t = jnp.full(len(x0), timestep)
    word = timestep if is_discrete(process) else jax.lax.bitcast_convert_type(timestep, jnp.uint32)
    draw = lambda key: jax.random.normal(jax.random.fold_in(key, word), x0.shape[1:], jnp.float32)
    noise = jax.vmap(draw)(keys)
    xt = perturb(process, x0, noise, t)
    output, _ = model.apply(params, xt, t, labels, mode=mode)
    error = jnp.square(output[..., : config.channels] - process.target(x0, noise))
    side = config.side // config.patch
    patches = error.reshape(-1, side, config.patch, side, config.patch, config.channels)
    return patches.mean((2, 4, 5)).reshape(-1, config.tokens)
