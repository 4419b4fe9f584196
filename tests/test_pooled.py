"""The kernels for TPUs, interpreted: both against plain JAX, and whole runs against `gated` and the original."""

import dataclasses
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import channels_last, relative_error

from dydit_jax.diffusion.samplers import SamplingConfig
from dydit_jax.diffusion.schedules import DiffusionConfig
from dydit_jax.fast import trial
from dydit_jax.fast.narrow import narrow
from dydit_jax.fast.plan import Shares
from dydit_jax.fast.tokens import can_run, capacities_of, forms_of, overflows, places_needed
from dydit_jax.generate import generate, network_of, plan_sampling
from dydit_jax.models import pooled
from dydit_jax.models.dit import DiTConfig, Model
from dydit_jax.models.layers import layer_norm, modulate
from dydit_jax.sharding import MeshConfig, make_mesh, replicated

WIDTH = 32


@pytest.mark.parametrize("images, tokens", [(3, 256), (5, 64), (12, 16), (9, 12)])  # units of 128, 64, 16 and 4 tokens
@pytest.mark.parametrize("share", [0.0, 0.3, 0.65, 0.97])
def test_tokens_come_back_where_they_fit_as_they_say(share, images, tokens):
    generator = np.random.default_rng(0)
    draw = lambda *shape: generator.standard_normal(shape).astype(np.float32)
    mlp = lambda rows: jnp.exp(rows / 4) + 1
    for case in range(3):  # images that differ widely
        gates = generator.random((images, tokens)) < generator.uniform(0, 2 * share, (images, 1))
        gates[0] |= share > 0 and case > 0
        if case == 2 and share:  # a unit's places are filled to the last, and the others have no token on
            gates[:] = False
            gates[0, : pooled.unit_size(tokens) - 8] = gates[1, -8:] = True
        gates = gates.astype(np.float32)
        rows = images * tokens
        needed = places_needed("pooled", gates[:, None])
        [capacity] = capacities_of("pooled", np.asarray(needed), images=images, tokens=tokens)
        assert gates.sum() <= capacity and needed[0] <= 1
        assert not overflows("pooled", ((capacity,),), needed, images=images, tokens=tokens).any()
        if capacity == rows:  # nothing is packed
            continue
        x, shift, scale, gate = 3 * draw(images, tokens, WIDTH) + 1, *(draw(images, WIDTH) for _ in range(3))
        places = pooled.places_of(jnp.asarray(gates), capacity=capacity)
        packed = pooled.pack(x, places, shift, scale, capacity=capacity, dtype=jnp.dtype("float32"))
        found = pooled.spread(x, mlp(packed), places, gate)
        wanted = x + gate[:, None] * gates[..., None] * mlp(modulate(layer_norm(x), shift, scale))
        assert packed.shape == (capacity, WIDTH)
        assert relative_error(found.x, wanted) < 1e-6
        for statistic, value in zip(found.statistics, (wanted.mean(-1), np.square(wanted).mean(-1)), strict=True):
            assert relative_error(statistic, value) < 1e-6


def test_rows_are_packed_exactly_in_bfloat16():
    x = jax.random.normal(jax.random.key(0), (2, 256, WIDTH))
    gates = (jax.random.uniform(jax.random.key(1), (2, 256)) < 0.5).astype(jnp.float32)
    nothing, capacity = jnp.zeros((2, WIDTH)), 384
    places = pooled.places_of(gates, capacity=capacity)
    packed = pooled.pack(x, places, nothing, nothing, capacity=capacity, dtype=jnp.dtype("bfloat16"))
    wanted = layer_norm(x)[gates > 0].astype(jnp.bfloat16)
    # Norms differ in the last place of float32, and some of them are rounded to the next number.
    assert relative_error(packed[: len(wanted)].astype(jnp.float32), wanted.astype(jnp.float32)) < 2**-8
    assert (packed[: len(wanted)] == wanted).mean() > 0.99


SETTINGS = dict(sampling=SamplingConfig(sampler="ddpm", steps="4", guidance=2.0), diffusion=DiffusionConfig())


@pytest.fixture
def run(tiny):
    """Return (mode, platform, plan) -> samples of the tiny model."""
    model, params = tiny

    def run(mode: str, platform: str, plan=None):
        return generate(dataclasses.replace(model, platform=platform), params, [1, 2], mode=mode, plan=plan, **SETTINGS)

    return run


@pytest.mark.parametrize("calibrated", ["not", "well", "short"])
def test_a_run_in_kernels_is_the_gated_one(tiny, run, calibrated):
    model, params = tiny
    gated, plan = run("gated", "cpu"), plan_sampling(model, params, segments=2, **SETTINGS)
    if calibrated != "not":
        none = np.zeros_like(gated.shares.mean)
        plan = plan.widened(gated.shares if calibrated == "well" else Shares(none, none, none, 2))
    fast = run("fast", "tpu", dataclasses.replace(plan, form="pooled"))
    assert relative_error(fast.images, gated.images) < 1e-5
    np.testing.assert_array_equal(fast.routing.tokens, gated.routing.tokens)
    # What does not fit is computed in full, and counted.
    assert bool(fast.over.any()) == (calibrated == "short")


@pytest.mark.slow
def test_a_run_in_kernels_on_a_mesh_is_that_on_one_device(tiny):
    model, params = tiny
    theirs, labels = dataclasses.replace(model, platform="tpu"), [1, 2, 3, 4]
    alone = generate(model, params, labels, mode="gated", **SETTINGS)
    plan = dataclasses.replace(plan_sampling(model, params, **SETTINGS), form="pooled").widened(alone.shares)
    mesh = make_mesh(MeshConfig())
    assert mesh.size == 4
    together = generate(theirs, params, labels, plan=plan, mesh=mesh, **SETTINGS)
    assert relative_error(together.images, alone.images) < 1e-5
    np.testing.assert_allclose(together.routing.tokens, alone.routing.tokens, atol=1e-6)


@pytest.mark.parametrize("places", ["all", "fewer"])
def test_a_pass_in_kernels_is_that_of_the_original(golden_v2, places):
    model, config = dataclasses.replace(golden_v2.model, platform="tpu"), golden_v2.config
    params = jax.tree.map(jnp.asarray, golden_v2.params)
    every = (tuple(range(config.heads)),) * config.depth
    layers = narrow(params["blocks"], heads=every, groups=every, dtype=jnp.dtype("float32"))
    masks = golden_v2.arrays["token_mask"][..., 0]  # [B,L,N]
    sizes = dict(images=4, tokens=config.tokens)

    def capacities(mask):
        if places == "all":
            return ((sizes["images"] * config.tokens,),) * config.depth
        needed = np.asarray(places_needed("pooled", jnp.asarray(mask)))
        found = tuple(capacities_of("pooled", share, **sizes) for share in needed)
        assert min(found) < (sizes["images"] * config.tokens,)
        return found

    def four(image):  # gates are the same for all images of a run: of the same one, of whose tokens some pack together
        x, t, label, mask = (
            np.repeat(array[image : image + 1], sizes["images"], 0) for array in (*golden_v2.inputs, masks)
        )
        heads, groups = (gate.swapaxes(0, 1) for gate in model.time_gates(params, jnp.asarray(t[:1])))
        routing = dict(heads=heads, groups=groups, form="pooled", capacities=capacities(mask))
        return jax.jit(network_of(model, params, layers, **routing))(x, t, label)

    found, tokens = (jnp.stack(parts) for parts in zip(*map(four, range(len(masks))), strict=True))  # [B,4,...]
    wanted = channels_last(golden_v2.arrays["out"])
    assert relative_error(found, jnp.broadcast_to(wanted[:, None], found.shape)) < 1e-5
    np.testing.assert_array_equal(tokens, np.broadcast_to(masks[:, None], tokens.shape))


def test_forms_race_on_one_device_whatever_mesh_is_set(tiny, monkeypatch):
    """A TPU's compiler does not share kernels out over a mesh by itself."""
    model, params = tiny
    plan, mesh = plan_sampling(model, params, segments=2, **SETTINGS), make_mesh(MeshConfig())
    none = np.zeros(plan.heads.shape[:2])
    plan = plan.widened(Shares(none + 0.4, none, none, 2))
    race, seen = trial._race, []

    def watched(model, params, *arguments, **settings):
        seen.append((jax.sharding.get_abstract_mesh().empty, {len(leaf.devices()) for leaf in jax.tree.leaves(params)}))
        return race(model, params, *arguments, **settings)

    monkeypatch.setattr(trial, "_race", watched)
    with jax.set_mesh(mesh):
        theirs = dataclasses.replace(model, platform="tpu")
        form = trial.fastest_form(theirs, jax.device_put(params, replicated(mesh)), plan, images=2, runs=2)
    assert mesh.size == 4 and seen == [(True, {1})] and form in forms_of(theirs, 4)


def test_a_plan_of_the_kernels_serves_those_who_lack_them(tiny, run):
    plan = plan_sampling(*tiny, segments=2, **SETTINGS)
    kept = dataclasses.replace(plan, form="pooled")
    assert relative_error(run("fast", "cpu", kept).images, run("fast", "cpu", plan).images) == 0


def test_models_that_kernels_do_not_serve():
    config = DiTConfig(depth=1, width=32, heads=4, patch=2, side=8, channels=1, routers="free")
    assert can_run(Model(config, platform="tpu"), "pooled", 2)
    assert "pooled" in forms_of(Model(config, platform="tpu"), 2)
    assert not can_run(Model(config, platform="cpu"), "pooled", 2)
    for fields in (dict(token_capacity=(0.5,)), dict(routers="none")):
        assert not can_run(Model(dataclasses.replace(config, **fields), platform="tpu"), "pooled", 2)


def test_kernels_that_do_not_compile_are_told_once_and_not_used(monkeypatch, caplog):
    def refuse(*_, **__):
        raise NotImplementedError("too little fast memory")

    monkeypatch.setattr(pooled, "pack", refuse)
    pooled.accepts.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert not pooled.accepts(2, 16, 64, jnp.dtype("float32"))
        assert not pooled.accepts(2, 16, 64, jnp.dtype("float32"))
    assert caplog.text.count("too little fast memory") == 1
    pooled.accepts.cache_clear()
