"""From noise to images: guidance, per-image randomness, the loop over the schedule.

Every image has its own key, made of the seed and its index, so that an image does not depend on the batch it was made
in. The loop runs as compiled scans over pieces of the schedule; between two pieces the host only reports progress. In
the mode `fast`, the default, the pieces are the segments of a plan, each on weights narrowed to what it needs.

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
from jax.sharding import Mesh, PartitionSpec

from dydit_jax.diffusion.gaussian import coefficients
from dydit_jax.diffusion.samplers import SamplerState, SamplingConfig, make_sampler, run_sampler
from dydit_jax.diffusion.schedules import DiffusionConfig, make_schedule, respace
from dydit_jax.errors import InputError, require_known
from dydit_jax.fast.narrow import narrow
from dydit_jax.fast.plan import make_plan
from dydit_jax.fast.tokens import capacities_of, run_on_open_tokens
from dydit_jax.models.cost import routed_macs
from dydit_jax.models.dit import MODES as APPLY_MODES
from dydit_jax.models.dit import DiTConfig, Model
from dydit_jax.models.routing import Routing
from dydit_jax.sharding import BATCH, batch_sharding, replicated, require_divisible

MODES = (*APPLY_MODES, "fast")
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


def guided(run: Callable, x, t, labels, *, sampling: SamplingConfig, config: DiTConfig):
    """Run a network with classifier-free guidance.

    Args:
      run: (x, t, labels) -> the output [B,side,side,2C] and anything else.
      x: [B,side,side,C].
      t: timestep, a scalar.
      labels: [B].
      sampling: scale and channels; scale 1 runs the network once, on the labels alone.
      config: the model's.

    Returns:
      The output [B,side,side,2C] and what else `run` gave, for [2B,...] under guidance, the conditional images first.
    """
    if sampling.guidance == 1.0:
        return run(x, jnp.full(x.shape[:1], t), labels)
    x = jnp.concatenate([x, x])
    labels = jnp.concatenate([labels, jnp.full_like(labels, config.null_label)])
    output, record = run(x, jnp.full(x.shape[:1], t), labels)
    conditional, unconditional = jnp.split(output, 2)
    channels = config.channels
    if sampling.guided_channels == "first_three":
        channels = min(channels, GUIDED_FIRST_CHANNELS)
    mixed = unconditional + sampling.guidance * (conditional - unconditional)
    return jnp.concatenate([mixed[..., :channels], conditional[..., channels:]], axis=-1), record


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


# --- The loop ------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames=("model", "sampling", "mode"))
def _run_piece(params, state: SamplerState, steps, labels, keys, *, model: Model, sampling: SamplingConfig, mode: str):
    """Run consecutive steps; returns the state, and per step the mean routing and MACs."""

    def predict(x, c, _):
        run = functools.partial(model.apply, params, mode=mode)
        output, routing = guided(run, x, c.timestep, labels, sampling=sampling, config=model.config)
        macs = routed_macs(routing, model.config.macs) if mode == "gated" else float(model.config.macs.complete)
        return output, (jax.tree.map(lambda gates: gates.mean(0), routing), jnp.mean(macs))

    return _run(state, steps, None, keys, predict, sampling)


@functools.partial(jax.jit, static_argnames=("model", "sampling", "capacities", "mesh"))
def _run_segment(params, layers, state, steps, gates, labels, keys, *, model: Model, sampling, capacities, mesh):
    """Run a segment's steps on its narrowed layers, each device on its own images.

    Returns:
      The state, and per device and step the mean token gates [devices,S,L,N].
    """
    run_on_tokens = [functools.partial(run_on_open_tokens, capacities=layer) for layer in capacities]

    def run_on_a_device(params, layers, state, steps, gates, labels, keys):
        def predict(x, c, gates):
            run = functools.partial(
                model.apply_layers, params, layers, heads=gates[0], groups=gates[1], run_on_tokens=run_on_tokens
            )
            output, tokens = guided(run, x, c.timestep, labels, sampling=sampling, config=model.config)
            return output, tokens.mean(0)

        state, tokens = _run(state, steps, gates, keys, predict, sampling)
        return state, tokens[None]

    if mesh is None:
        return run_on_a_device(params, layers, state, steps, gates, labels, keys)
    # Packing tokens over all devices would move them between devices at every layer; this way nothing is moved.
    split, whole = BATCH, PartitionSpec()
    return jax.shard_map(
        run_on_a_device,
        mesh=mesh,
        in_specs=(whole, whole, split, whole, whole, split, split),
        out_specs=(split, split),
        check_vma=False,
    )(params, layers, state, steps, gates, labels, keys)


def _run(state: SamplerState, steps, extra, keys, predict, sampling: SamplingConfig):
    """Run the sampler over steps, with each image's own noise."""
    shape = state.current.shape[1:]
    noise_at = lambda step: _step_noise(keys, step, shape)
    return run_sampler(make_sampler(sampling), state, steps, extra, predict=predict, noise_at=noise_at)


def generate(
    model: Model,
    params,
    labels,
    *,
    sampling: SamplingConfig,
    diffusion: DiffusionConfig,
    seed: int = 0,
    indices=None,
    mode: str = "fast",
    segments: int | None = None,
    shares: np.ndarray | None = None,
    mesh: Mesh | None = None,
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
      mode: "fast" (only what is on is computed), "gated" (all is computed and multiplied by the gates) or "complete".
      segments: into how many programs `fast` cuts the schedule; None decides by itself.
      shares: of tokens that are on, [S,L], from `token_shares` of earlier samples of the same settings: `fast` then
        chooses its capacities by them. Results do not depend on it.
      mesh: whose devices share the batch, which they must divide; None computes on one device.
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
    keys = image_keys(seed, jnp.arange(len(labels)) if indices is None else jnp.asarray(indices))
    state = make_sampler(sampling).init(_first_noise(keys, (config.side, config.side, config.channels)))
    if mesh is not None:
        require_divisible(mesh, len(labels))
        params = jax.device_put(params, replicated(mesh))
        state, labels, keys = jax.device_put((state, labels, keys), batch_sharding(mesh))
    batch = _Batch(model, params, sampling, labels, keys, mesh, report or (lambda steps: None))
    if mode == "fast":
        state, routing, macs = _run_fast(batch, state, table, segments, shares)
    else:
        state, routing, macs = _run_whole(batch, state, table, mode)
    return Samples(np.asarray(state.current), table.timestep, routing, macs)


@dataclasses.dataclass(frozen=True)
class _Batch:
    """What stays the same from the first step to the last."""

    model: Model
    params: dict
    sampling: SamplingConfig
    labels: jax.Array
    keys: jax.Array
    mesh: Mesh | None
    report: Callable[[int], None]


def _run_whole(batch: _Batch, state: SamplerState, table, mode: str):
    """Run the full weights over the schedule, in equal pieces: one compiled program serves them all."""
    count = len(table.step)
    pieces = max(n for n in range(1, PROGRESS_PIECES + 1) if count % n == 0) if count >= 2 * PROGRESS_PIECES else 1
    kept = []
    for piece in np.split(np.arange(count), pieces):
        rows = jax.tree.map(operator.itemgetter(piece), table)
        settings = dict(model=batch.model, sampling=batch.sampling, mode=mode)
        state, record = _run_piece(batch.params, state, rows, batch.labels, batch.keys, **settings)
        kept.append(jax.device_get(record))
        batch.report(len(piece))
    return state, *jax.tree.map(lambda *parts: np.concatenate(parts), *kept)


@functools.partial(jax.jit, static_argnames="model")
def _time_gates(params, timesteps, *, model: Model):
    """Return the gates of a whole schedule; compiled once per model, not once per batch."""
    return model.time_gates(params, timesteps)


def _run_fast(batch: _Batch, state: SamplerState, table, segments: int | None, shares):
    """Plan the schedule and run each segment on its narrowed weights, one segment's weights in memory at a time."""
    model, config = batch.model, batch.model.config
    heads, groups = jax.device_get(_time_gates(batch.params, table.timestep, model=model))
    devices = 1 if batch.mesh is None else batch.mesh.shape["data"] * batch.mesh.shape["fsdp"]
    images = len(batch.labels) // devices * (1 if batch.sampling.guidance == 1.0 else 2)
    tokens = []
    for segment in make_plan(heads, groups, config.macs, segments=segments).segments:
        rows = jax.tree.map(operator.itemgetter(slice(segment.start, segment.stop)), table)
        # [steps,1,kept] per layer: the same for all images.
        gates = jax.tree.map(lambda gate: gate[:, None].astype(np.float32), (segment.head_gates, segment.group_gates))
        seen = [None] * config.depth if shares is None else shares[segment.start : segment.stop].T
        capacities = tuple(capacities_of(layer, images * config.tokens) for layer in seen)
        settings = dict(model=model, sampling=batch.sampling, capacities=capacities, mesh=batch.mesh)
        layers = narrow(batch.params, segment)
        state, record = _run_segment(batch.params, layers, state, rows, gates, batch.labels, batch.keys, **settings)
        tokens.append(jax.device_get(record).mean(0))
        batch.report(len(segment))
    routing = Routing(heads, groups, np.concatenate(tokens))
    return state, routing, np.asarray(routed_macs(routing, config.macs))


def token_shares(samples: Samples) -> np.ndarray:
    """Return the share of tokens that were on at each step in each layer [S,L], the calibration of `fast`."""
    return np.asarray(samples.routing.tokens).mean(-1)


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
