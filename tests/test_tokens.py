"""Top-k tokens: a fixed number of rows per image, by score; the threshold's result where they suffice."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import relative_error

from dydit_jax.diffusion.process import Diffusion
from dydit_jax.diffusion.samplers import SamplingConfig
from dydit_jax.errors import InputError
from dydit_jax.models.config import DiTConfig
from dydit_jax.models.dit import Model
from dydit_jax.models.execution import Masked, TopK, execution_runs, run_on_rows, token_ranks
from dydit_jax.runtime.sharding import MeshConfig, batch_sharding, make_constrain_fn, make_mesh, replicated
from dydit_jax.sampling.generate import generate


def limited(model: Model, *shares: float) -> Model:
    return dataclasses.replace(model, config=dataclasses.replace(model.config, token_capacity=shares))


def inputs(config: DiTConfig, batch: int = 4):
    x = jax.random.normal(jax.random.key(3), (batch, config.side, config.side, config.channels))
    return x, jnp.arange(batch) * 200, jnp.arange(batch)


def test_ranks_count_from_the_largest_and_break_ties_by_position():
    scores = jnp.asarray([[0.5, 2.0, -1.0, 2.0], [0.0, 0.0, 0.0, 0.0]])
    np.testing.assert_array_equal(token_ranks(scores), [[2, 0, 3, 1], [0, 1, 2, 3]])


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
@pytest.mark.parametrize("capacity", [1, 5, 16])
def test_rows_get_what_a_product_with_the_gates_gives(platform, capacity):
    generator = np.random.default_rng(capacity)
    x = jnp.asarray(generator.standard_normal((3, 16, 4), np.float32))
    rows = token_ranks(generator.standard_normal((3, 16)))
    gates = jnp.asarray(generator.integers(0, 2, (3, 16)).astype(np.float32))
    function = lambda tokens: jnp.tanh(tokens) + 1
    run = functools.partial(run_on_rows, function, gates=gates, rows=rows, capacity=capacity, platform=platform)
    expected = jnp.where((rows < capacity)[..., None], gates[..., None] * function(x), 0)
    # Two programs' tanh differ by as much as 1.1e-6 where XLA optimizes little.
    np.testing.assert_allclose(jax.jit(run)(x), expected, rtol=2e-6)
    # The gradient is that of the product: nothing leaks into or out of tokens without a row.
    slope = jax.grad(lambda x: (run(x) ** 2).sum())(x)
    wanted = jax.grad(lambda x: (jnp.where((rows < capacity)[..., None], gates[..., None] * function(x), 0) ** 2).sum())
    np.testing.assert_allclose(slope, wanted(x), rtol=1e-5, atol=1e-6)


def test_capacity_that_suffices_equals_the_threshold(tiny):
    model, params = tiny
    arguments = inputs(model.config)
    expected, routing = model.apply(params, *arguments, mode="gated")
    most = float(routing.tokens.mean(-1).max())
    output, found = limited(model, min(1.0, most + 0.01)).apply(params, *arguments, mode="gated")
    np.testing.assert_array_equal(found.tokens, routing.tokens)
    assert relative_error(output, expected) < 1e-6


def test_small_capacity_keeps_the_largest_logits(tiny):
    model, params = tiny
    arguments = inputs(model.config)
    _, threshold = model.apply(params, *arguments, mode="gated")
    _, routing = limited(model, 0.25).apply(params, *arguments, mode="gated")
    first = np.asarray(threshold.tokens)[:, 0]  # the first block sees the same tokens in both
    kept = np.asarray(routing.tokens)[:, 0]
    np.testing.assert_array_equal(kept.sum(-1), np.minimum(first.sum(-1), 4))
    assert (kept <= first).all() and first.sum(-1).max() >= 4
    assert routing.tokens.sum(-1).max() == 4


def test_one_share_per_block_is_one_share_where_they_are_equal(tiny):
    model, params = tiny
    arguments = inputs(model.config)
    one, _ = limited(model, 0.5).apply(params, *arguments, mode="gated")
    many, _ = limited(model, 0.5, 0.5).apply(params, *arguments, mode="gated")
    np.testing.assert_array_equal(one, many)
    _, routing = limited(model, 0.25, 0.5).apply(params, *arguments, mode="gated")
    assert routing.tokens.sum(-1).max(0).tolist() == [4, 8]
    half, whole = TopK("cpu", (4,)), Masked("cpu")
    assert execution_runs((half, half, whole, half)) == [(0, 2, half), (2, 3, whole), (3, 4, half)]


def test_training_pass_saves_its_macs_and_trains_the_router(tiny_config):
    config = dataclasses.replace(tiny_config, width=64, side=16)
    arguments = inputs(config)

    def gradient(model):
        params = jax.jit(model.init)(jax.random.key(0))
        noise = model.router_noise(jax.random.key(1), 4)
        loss = lambda params: (model.apply(params, *arguments, mode="gated", noise=noise)[0] ** 2).mean()
        output = {"kernel": jax.random.normal(jax.random.key(2), params["output"]["kernel"].shape)}
        params["output"] |= output  # zero at the start: no gradient would reach the blocks
        params["blocks"]["modulation"]["bias"] += 0.1
        compiled = jax.jit(jax.grad(loss)).lower(params).compile()
        return compiled.cost_analysis()["flops"], compiled(params)

    whole, _ = gradient(Model(config))
    half, grads = gradient(limited(Model(config), 0.5))
    # Forward and both backward products of four images, two FLOPs each; a scan over the blocks is counted once.
    mlp = 3 * 2 * 4 * config.macs.mlp
    assert 0.45 * mlp < whole - half < 0.55 * mlp
    assert np.abs(grads["blocks"]["token_router"]["kernel_out"]).max() > 0


@pytest.mark.slow
def test_limited_model_on_a_mesh_moves_nothing_between_devices(tiny):
    model, params = tiny
    model, mesh = limited(model, 0.5), make_mesh(MeshConfig())
    arguments = inputs(model.config, 8)
    alone, _ = model.apply(params, *arguments, mode="gated")
    split = dataclasses.replace(model, constrain=make_constrain_fn(mesh))
    run = jax.jit(lambda *arguments: split.apply(*arguments, mode="gated")[0], out_shardings=batch_sharding(mesh))
    placed = (jax.device_put(params, replicated(mesh)), *jax.device_put(arguments, batch_sharding(mesh)))
    assert relative_error(run(*placed), alone) < 1e-5
    text = run.lower(*placed).compile().as_text()
    for collective in ("all-gather", "all-reduce", "all-to-all", "collective-permute"):
        assert collective not in text, collective


def test_limited_model_samples_the_same_fast_and_gated(tiny):
    model, params = tiny
    settings = dict(sampling=SamplingConfig(sampler="ddpm", steps="4"), process=Diffusion())
    fast, gated = (
        generate(limited(model, 0.25, 1.0), params, [1, 2], mode=mode, **settings) for mode in ("fast", "gated")
    )
    assert relative_error(fast.images, gated.images) < 1e-5
    assert gated.usage.mean[:, 0].max() <= 0.25 < gated.usage.mean[:, 1].max()


def test_a_capacity_lets_a_token_pass_at_least(tiny_config):
    assert dataclasses.replace(tiny_config, token_capacity=(1e-9,)).capacities == (1, 1)


@pytest.mark.parametrize(
    "shares, message", [((0.5, 0.5, 0.5), "one for each of the 2 blocks"), ((0.0,), "above 0"), ((1.5,), "at most 1")]
)
def test_impossible_capacities_are_refused(tiny_config, shares, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(tiny_config, token_capacity=shares)
    with pytest.raises(InputError, match="routers"):
        dataclasses.replace(tiny_config, routers="none", token_capacity=(0.5,))
