"""Weights with routers made to order: a wanted share of heads, groups and tokens, smooth in the timestep.

Speed depends on what is open, not on what the images show, so a network with random weights measures it as well as a
trained one. The time routers are fitted, by least squares on the embeddings of the run's timesteps, to logits that
swing slowly; the bias of each token router is set where the wanted share of tokens passes on noised inputs.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from dydit_jax.models.dit import Model
from dydit_jax.models.layers import time_features

SWINGS = 0.5  # of every unit's logit over the whole run: about one in two units changes once
DEVIATION = 0.02  # of the kernels that start at zero
CALIBRATION_ROUNDS = 12
CALIBRATION_TIMESTEPS = (900, 500, 100)
LOGIT_RANGE = 8.0  # searched on both sides of zero for the token routers' biases


def profiled_params(
    model: Model, timesteps, shares: tuple[float, float, float], *, seed: int = 0, swings: float = SWINGS
) -> dict:
    """Make the weights.

    Args:
      model: the network; its routers must be of the layout "free".
      timesteps: of the run to be measured [S].
      shares: of heads, groups and tokens that are on, averaged over the run.
      seed: of all random numbers.
      swings: of every unit's logit over the run; less for a run that stands for a part of a longer one.

    Returns:
      A parameter tree.
    """
    key = jax.random.key(seed)
    params = jax.jit(model.init)(key)
    for number, path in enumerate((("blocks", "modulation"), ("output", "modulation"), ("output",))):
        part = functools.reduce(lambda tree, name: tree[name], path, params)
        draw = jax.random.normal(jax.random.fold_in(key, number), part["kernel"].shape)
        part["kernel"] = DEVIATION * draw
    embedding = _embedding(params["time_embed"], timesteps)
    generator = np.random.default_rng(seed)
    for name, share in zip(("head_router", "group_router"), shares):
        logits = swinging_logits(generator, len(timesteps), (model.config.depth, model.config.heads), share, swings)
        kernel = np.linalg.lstsq(embedding, logits.reshape(len(timesteps), -1), rcond=None)[0]  # [D,L*H]
        kernel = kernel.reshape(-1, model.config.depth, model.config.heads).transpose(1, 0, 2)
        params[name] = dict(kernel=jnp.asarray(kernel, jnp.float32), bias=jnp.zeros(logits.shape[1:]))
    return _with_token_share(model, params, shares[2], key)


def _embedding(part: dict, timesteps) -> np.ndarray:
    """Return the time embedding in float64 [S,D]."""
    part = {name: np.asarray(leaf, np.float64) for name, leaf in part.items()}
    hidden = np.asarray(time_features(jnp.asarray(timesteps)), np.float64) @ part["kernel_in"] + part["bias_in"]
    return hidden / (1 + np.exp(-hidden)) @ part["kernel_out"] + part["bias_out"]


def swinging_logits(generator, steps: int, units: tuple[int, int], share: float, swings: float = SWINGS) -> np.ndarray:
    """Return [S,L,H] cosines of random phase, shifted so that `share` of them is above zero."""
    phase = generator.uniform(0, 1, units)
    wave = np.cos(2 * np.pi * (swings * np.linspace(0, 1, steps)[:, None, None] + phase))
    level = generator.normal(0, 1, units)  # some units hardly ever change
    logits = wave + level
    return logits - np.quantile(logits, 1 - share)


def _with_token_share(model: Model, params: dict, share: float, key) -> dict:
    """Set the token routers' biases by bisection, all layers at once."""
    config = model.config
    batch = len(CALIBRATION_TIMESTEPS)
    x = jax.random.normal(key, (batch, config.side, config.side, config.channels))
    t, labels = jnp.asarray(CALIBRATION_TIMESTEPS), jnp.arange(batch) % config.classes
    router = params["blocks"]["token_router"]

    @jax.jit
    def shares_at(params, bias):
        blocks = dict(params["blocks"], token_router=dict(router, bias_out=bias[:, None]))
        _, routing = model.apply(dict(params, blocks=blocks), x, t, labels, mode="gated")
        return routing.tokens.mean((0, 2))

    low, high = np.full(config.depth, -LOGIT_RANGE, np.float32), np.full(config.depth, LOGIT_RANGE, np.float32)
    for _ in range(CALIBRATION_ROUNDS):
        middle = (low + high) / 2
        enough = np.asarray(shares_at(params, middle)) >= share
        low, high = np.where(enough, low, middle), np.where(enough, middle, high)
    return dict(params, blocks=dict(params["blocks"], token_router=dict(router, bias_out=jnp.asarray(high)[:, None])))
