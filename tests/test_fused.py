"""The kernels for GPUs, interpreted: each against plain JAX, and whole runs against `gated` and the original."""

import dataclasses
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import channels_last, relative_error

from dydit_jax.diffusion.samplers import SamplingConfig
from dydit_jax.diffusion.schedules import DiffusionConfig
from dydit_jax.fast.narrow import narrow
from dydit_jax.fast.plan import Shares
from dydit_jax.fast.tokens import can_run, default_form
from dydit_jax.generate import generate, network_of, plan_sampling
from dydit_jax.models import fused
from dydit_jax.models.dit import DiTConfig, Model
from dydit_jax.models.layers import layer_norm, modulate
from dydit_jax.sharding import MeshConfig, make_mesh

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


SETTINGS = dict(sampling=SamplingConfig(sampler="ddpm", steps="6", guidance=1.5), diffusion=DiffusionConfig())


@pytest.fixture(scope="module")
def run(tiny):
    """Return (mode, platform, plan) -> samples of the tiny model."""
    model, params = tiny

    def run(mode: str, platform: str, plan=None):
        return generate(dataclasses.replace(model, platform=platform), params, [1, 2], mode=mode, plan=plan, **SETTINGS)

    return run


@pytest.mark.parametrize(
    "form, calibrated", [("fused", "not"), ("fused", "well"), ("fused", "short"), ("fixed", "well")]
)
def test_a_run_for_gpus_is_the_gated_one(tiny, run, form, calibrated):
    model, params = tiny
    assert default_form(dataclasses.replace(model, platform="gpu")) == "fused"
    gated, plan = run("gated", "cpu"), plan_sampling(model, params, segments=2, **SETTINGS)
    if calibrated != "not":
        none = np.zeros_like(gated.shares.mean)
        plan = plan.widened(gated.shares if calibrated == "well" else Shares(none, none, none, 2))
    fast = run("fast", "gpu", dataclasses.replace(plan, form=form))
    assert relative_error(fast.images, gated.images) < 1e-5
    np.testing.assert_array_equal(fast.routing.tokens, gated.routing.tokens)
    # What does not fit is computed in full, and counted.
    assert bool(fast.over.any()) == (calibrated == "short")


@pytest.mark.slow
def test_a_fused_run_on_a_mesh_is_that_on_one_device(tiny):
    model, params = tiny
    model, labels = dataclasses.replace(model, platform="gpu"), [1, 2, 3, 4]
    alone = generate(model, params, labels, **SETTINGS)
    mesh = make_mesh(MeshConfig())
    assert mesh.size == 4
    together = generate(model, params, labels, mesh=mesh, **SETTINGS)
    assert relative_error(together.images, alone.images) < 1e-5
    np.testing.assert_array_equal(together.routing.tokens, alone.routing.tokens)


def test_a_complete_run_in_kernels_is_the_complete_one(run):
    assert relative_error(run("complete", "gpu").images, run("complete", "cpu").images) < 1e-5


def test_blocks_with_nothing_on_are_run(tiny):
    """No head or no group is kept: what is added is a bias."""
    model, params = tiny
    closed = jax.tree.map(lambda leaf: leaf, params)
    for name in ("head_router", "group_router"):
        closed[name]["bias"] = closed[name]["bias"].at[1].set(-1e3)
    both = [
        generate(dataclasses.replace(model, platform=platform), closed, [1, 2], mode=mode, **SETTINGS)
        for platform, mode in (("gpu", "fast"), ("cpu", "gated"))
    ]
    assert relative_error(both[0].images, both[1].images) < 1e-5


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


def test_a_plan_of_the_kernels_serves_those_who_lack_them(tiny, run):
    plan = plan_sampling(*tiny, segments=2, **SETTINGS)
    kept = dataclasses.replace(plan, form="fused")
    assert relative_error(run("fast", "cpu", kept).images, run("fast", "cpu", plan).images) == 0


def test_sizes_that_kernels_refuse():
    config = DiTConfig(depth=1, width=36, heads=4, patch=2, side=8, channels=1, routers="free")
    model = Model(config, platform="gpu")
    assert not model.runs_fused and not can_run(model, "fused", 1)
    limited = dataclasses.replace(config, width=32, token_capacity=(0.5,))
    assert not Model(limited, platform="gpu").runs_fused


def test_kernels_that_do_not_compile_are_told_once_and_not_used(monkeypatch, caplog):
    def refuse(*_, **__):
        raise NotImplementedError("this device is too old")

    monkeypatch.setattr(fused, "pack", refuse)
    fused.accepts.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert not fused.accepts(16, 64) and not fused.accepts(16, 64)
    assert caplog.text.count("too old") == 1
    fused.accepts.cache_clear()
