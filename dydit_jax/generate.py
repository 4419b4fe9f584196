"""From noise to images: guidance, per-image randomness, the loop over the schedule.

Every image has its own key, made of the seed and its index, so that an image does not depend on the batch it was made
in. The loop runs as compiled scans over pieces of the schedule; between two pieces the host only reports progress.

Source of guidance: https://arxiv.org/abs/2207.12598; that only the first three channels are guided is how the published
DiT models are sampled.
"""

import dataclasses
import functools
import operator
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from dydit_jax.diffusion.gaussian import coefficients
from dydit_jax.diffusion.samplers import SamplerState, SamplingConfig, make_sampler, run_sampler
from dydit_jax.diffusion.schedules import DiffusionConfig, make_schedule, respace
from dydit_jax.errors import InputError, require_known
from dydit_jax.models.cost import routed_macs
from dydit_jax.models.dit import MODES, Model
from dydit_jax.models.routing import Routing

PROGRESS_PIECES = 10
GUIDED_FIRST_CHANNELS = 3


@dataclasses.dataclass(frozen=True)
class Samples:
    """Images and how they were computed.

    Attributes:
      images: float32 [B,side,side,C], in the model's own space.
      timesteps: what the network was told at each step [S].
      routing: means over the batch: heads [S,L,H], groups [S,L,G], tokens [S,L,N].
      macs: mean MACs of one image's forward pass at each step [S]; guidance runs two.
    """

    images: np.ndarray
    timesteps: np.ndarray
    routing: Routing
    macs: np.ndarray


def guided_apply(model: Model, params, x, t, labels, *, sampling: SamplingConfig, mode: str):
    """Run the network with classifier-free guidance.

    Args:
      model, params: the network.
      x: [B,side,side,C].
      t: timestep, a scalar.
      labels: [B].
      sampling: scale and channels; scale 1 runs the network once, on the labels alone.
      mode: "complete" or "gated".

    Returns:
      The output [B,side,side,2C] and the `Routing` of all images that were run, [2B,...] under guidance, the
      conditional ones first.
    """
    if sampling.guidance == 1.0:
        return model.apply(params, x, jnp.full(x.shape[:1], t), labels, mode=mode)
    x = jnp.concatenate([x, x])
    labels = jnp.concatenate([labels, jnp.full_like(labels, model.config.null_label)])
    output, routing = model.apply(params, x, jnp.full(x.shape[:1], t), labels, mode=mode)
    conditional, unconditional = jnp.split(output, 2)
    channels = model.config.channels
    if sampling.guided_channels == "first_three":
        channels = min(channels, GUIDED_FIRST_CHANNELS)
    guided = unconditional + sampling.guidance * (conditional - unconditional)
    return jnp.concatenate([guided[..., :channels], conditional[..., channels:]], axis=-1), routing


def image_keys(seed: int, indices):
    """Return one PRNG key per image, for indices [B]."""
    return jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(seed)))(indices)


def uniform_labels(seed: int, indices, classes: int):
    """Draw a label [B] for each image, a function of seed and index alone."""
    draw = lambda key: jax.random.randint(jax.random.fold_in(key, 2), (), 0, classes)
    return jax.vmap(draw)(image_keys(seed, indices))


def _normal(keys, shape):
    return jax.vmap(lambda key: jax.random.normal(key, shape))(keys)


def _first_noise(keys, shape):
    return _normal(jax.vmap(lambda key: jax.random.fold_in(key, 0))(keys), shape)


def _step_noise(keys, step, shape):
    return _normal(jax.vmap(lambda key: jax.random.fold_in(jax.random.fold_in(key, 1), step))(keys), shape)


@functools.partial(jax.jit, static_argnames=("model", "sampling", "mode"))
def _run_piece(params, state: SamplerState, steps, labels, keys, *, model: Model, sampling: SamplingConfig, mode: str):
    """Run consecutive steps; returns the state, and per step the mean routing and MACs."""

    def predict(x, timestep):
        output, routing = guided_apply(model, params, x, timestep, labels, sampling=sampling, mode=mode)
        macs = routed_macs(routing, model.config.macs) if mode == "gated" else float(model.config.macs.complete)
        return output, (jax.tree.map(lambda gates: gates.mean(0), routing), jnp.mean(macs))

    shape = state.current.shape[1:]
    return run_sampler(
        make_sampler(sampling), state, steps, predict=predict, noise_at=lambda step: _step_noise(keys, step, shape)
    )


def generate(
    model: Model,
    params,
    labels,
    *,
    sampling: SamplingConfig,
    diffusion: DiffusionConfig,
    seed: int = 0,
    indices=None,
    mode: str = "gated",
    report: Callable[[int], None] | None = None,
) -> Samples:
    """Draw one batch of images.

    Args:
      model, params: the network.
      labels: [B], 0 .. classes; `classes` itself stands for "no class".
      sampling: sampler, steps, guidance.
      diffusion: the process that the model was trained on.
      seed: with an image's index it fixes all its noise.
      indices: of the images, [B]; 0 .. B - 1 by default.
      mode: "complete" or "gated".
      report: called with the number of steps done since its last call.

    Returns:
      The images, and what was on while they were made.

    Raises:
      InputError: labels out of range, an unknown mode, or steps that the schedule does not have.
    """
    require_known("mode", mode, MODES)
    config, labels = model.config, _checked_labels(labels, model.config.classes)
    table = coefficients(respace(make_schedule(diffusion), sampling.steps))
    table = jax.tree.map(lambda column: column[::-1], table)  # from the most noise to the least
    count = len(table.step)
    keys = image_keys(seed, jnp.arange(len(labels)) if indices is None else jnp.asarray(indices))
    state = make_sampler(sampling).init(_first_noise(keys, (config.side, config.side, config.channels)))
    kept = []
    # Equal pieces, so that one compiled program serves them all; a short schedule runs in one.
    pieces = max(n for n in range(1, PROGRESS_PIECES + 1) if count % n == 0) if count >= 2 * PROGRESS_PIECES else 1
    for piece in np.split(np.arange(count), pieces):
        rows = jax.tree.map(operator.itemgetter(piece), table)
        state, record = _run_piece(params, state, rows, labels, keys, model=model, sampling=sampling, mode=mode)
        kept.append(jax.device_get(record))
        if report is not None:
            report(len(piece))
    routing, macs = jax.tree.map(lambda *parts: np.concatenate(parts), *kept)
    return Samples(np.asarray(state.current), table.timestep, routing, macs)


def _checked_labels(labels, classes: int):
    labels = np.asarray(labels, np.int32)
    wrong = labels[(labels < 0) | (labels > classes)]
    if wrong.size:
        raise InputError(
            f"Labels must be from 0 to {classes - 1}, or {classes} for no class; not {sorted(set(wrong.tolist()))}."
        )
    return jnp.asarray(labels)


def to_uint8(images) -> np.ndarray:
    """Turn images in [-1, 1] into uint8 by clip(127.5 x + 128, 0, 255), as the published samples were."""
    return np.clip(127.5 * np.asarray(images, np.float32) + 128.0, 0, 255).astype(np.uint8)
