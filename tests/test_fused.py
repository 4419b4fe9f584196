"""The kernels for GPUs, interpreted: each against plain JAX, and a pass against the original."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import channels_last, relative_error

from dydit_jax.fast.narrow import narrow
from dydit_jax.fast.tokens import can_run
from dydit_jax.models import fused
from dydit_jax.models.dit import DiTConfig, Model
from dydit_jax.models.layers import layer_norm, modulate
from dydit_jax.sampling.generate import network_of

pytestmark = pytest.mark.skipif(fused.triton is None, reason="This JAX has no Pallas for Triton.")

BATCH, TOKENS, WIDTH, PLACES = 3, 16, 96, 40


@pytest.fixture
def draw():
    """Return (shape) -> normal numbers, others each time."""
    generator = np.random.default_rng(0)
    return lambda *shape: jnp.asarray(generator.standard_normal(shape), jnp.float32)


def update_of(draw, kind: str):
    """Make what an MLP made of no, all, or some of the tokens."""
    if kind == "none":
        return None
    if kind == "all":
        return fused.Update(draw(BATCH, TOKENS, WIDTH), None, draw(BATCH, WIDTH))
    places = np.full(BATCH * TOKENS, -1, np.int32)
    places[np.random.default_rng(1).permutation(len(places))[:30]] = np.random.default_rng(2).permutation(30)
    # Rows without a token may be anything.
    rows = draw(PLACES, WIDTH).at[30:].set(jnp.nan)
    return fused.Update(rows, jnp.asarray(places.reshape(BATCH, TOKENS)), draw(BATCH, WIDTH))


def added(stream, attended=None, gate=None):
    """Add by hand, token by token."""
    x, update = np.array(stream.x, np.float64), stream.update
    for image in range(BATCH):
        for token in range(TOKENS):
            if update is not None and update.places is None:
                x[image, token] += np.float64(update.gate[image]) * update.rows[image, token]
            elif update is not None and update.places[image, token] >= 0:
                x[image, token] += np.float64(update.gate[image]) * update.rows[update.places[image, token]]
            if attended is not None:
                x[image, token] += np.float64(gate[image]) * attended[image, token]
    return x


def normed(x, shift, scale):
    return modulate(layer_norm(jnp.asarray(x)), shift, scale)


@pytest.mark.parametrize("kind", ["none", "all", "some"])
def test_kernels_add_and_norm(draw, kind):
    stream = fused.Stream(3 * draw(BATCH, TOKENS, WIDTH) + 1, update_of(draw, kind))
    attended, (gate, shift, scale) = draw(BATCH, TOKENS, WIDTH), draw(3, BATCH, WIDTH)
    before, after = added(stream), added(stream, attended, gate)
    assert relative_error(stream.settled(), before) < 1e-6
    assert relative_error(fused.norm(stream, shift, scale, dtype=jnp.float32), normed(before, shift, scale)) < 1e-5
    assert relative_error(fused.add(stream, attended, gate), after) < 1e-6
    x, found = fused.add_and_norm(stream, attended, gate, shift, scale, dtype=jnp.bfloat16)
    assert relative_error(x, after) < 1e-6
    assert found.dtype == jnp.bfloat16 and relative_error(found, normed(after, shift, scale)) < 1e-2


@pytest.mark.parametrize("capacity", [PLACES, 11])
def test_kernel_packs_the_tokens_that_are_on(draw, capacity):
    x, hidden = draw(BATCH, TOKENS, WIDTH), jax.nn.relu(draw(BATCH, TOKENS, 6))
    kernel, (shift, scale) = draw(6), draw(2, BATCH, WIDTH)
    bias = -jnp.median(hidden @ kernel)[None]
    packed, places, gates = fused.pack(x, hidden, kernel, bias, shift, scale, capacity=capacity, dtype=jnp.float32)
    is_open = np.asarray(hidden @ kernel + bias) > 0
    assert 11 < is_open.sum() < PLACES
    np.testing.assert_array_equal(gates, is_open)
    placed = np.asarray(places)[np.asarray(places) >= 0]
    assert sorted(placed) == list(range(min(capacity, is_open.sum())))  # each once; those beyond have none
    assert is_open[np.asarray(places) >= 0].all()
    expected = normed(x, shift, scale)[np.asarray(places) >= 0]
    assert relative_error(packed[placed], expected) < 1e-5


@pytest.mark.parametrize("form, output", [("fused", "out"), (None, "complete_out")])
def test_a_pass_in_kernels_is_that_of_the_original(golden_v2, form, output):
    """None opens all gates."""
    model, config = dataclasses.replace(golden_v2.model, platform="gpu"), golden_v2.config
    params = jax.tree.map(jnp.asarray, golden_v2.params)
    every = (tuple(range(config.heads)),) * config.depth
    layers = narrow(params["blocks"], heads=every, groups=every, dtype=jnp.dtype("float32"))
    capacities = ((config.tokens,),) * config.depth

    @jax.jit
    def one(x, t, label):  # gates are the same for all images of a run
        closed = [gate.swapaxes(0, 1) for gate in model.time_gates(params, t)]
        heads, groups = closed if form else ((None,) * config.depth,) * 2
        routing = dict(heads=heads, groups=groups, form=form, capacities=capacities)
        return network_of(model, params, layers, **routing)(x, t, label)

    images = range(len(golden_v2.inputs[0]))
    each = [one(*(jnp.asarray(array[i : i + 1]) for array in golden_v2.inputs)) for i in images]
    found, tokens = (jnp.concatenate(parts) for parts in zip(*each, strict=True))
    assert model.runs_fused
    assert relative_error(found, channels_last(golden_v2.arrays[output])) < 1e-5
    if form:
        np.testing.assert_array_equal(tokens, golden_v2.arrays["token_mask"][..., 0])


def test_sizes_that_kernels_refuse():
    config = DiTConfig(depth=1, width=36, heads=4, patch=2, side=8, channels=1, routers="free")
    model = Model(config, platform="gpu")
    assert not model.runs_fused and not can_run(model, "fused", 1)
    limited = dataclasses.replace(config, width=32, token_capacity=(0.5,))
    assert not Model(limited, platform="gpu").runs_fused
