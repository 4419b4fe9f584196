"""Gates are exactly 0 or 1 forward, soft backward, and each layout switches what it says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import relative_error
from flax import nnx

from dydit_jax.models.config import DiTConfig
from dydit_jax.models.dit import Model
from dydit_jax.models.routing import (
    LinearTimeRouter,
    MLPTokenRouter,
    dot_in_three_passes,
    hard_gate,
    straight_through_gate,
)


def test_gate_opens_strictly_above_one_half():
    np.testing.assert_array_equal(hard_gate(jnp.asarray([-1.0, 0.0, 1e-30, 2.0])), [0, 0, 1, 1])


def test_training_gate_is_exactly_zero_or_one():
    logits = 10 * jax.random.normal(jax.random.key(0), (10_000,))
    gates = straight_through_gate(logits, jax.random.logistic(jax.random.key(1), logits.shape))
    assert set(np.unique(gates)) == {0.0, 1.0}


def test_training_gate_carries_the_gradient_of_the_soft_one():
    logits, noise = jnp.asarray([-3.0, 0.5, 4.0]), jnp.asarray([1.0, -2.0, 0.3])
    gradient = jax.grad(lambda logits: straight_through_gate(logits, noise).sum())(logits)
    expected = jax.grad(lambda logits: jax.nn.sigmoid((logits + noise) / 5).sum())(logits)
    np.testing.assert_allclose(gradient, expected, rtol=1e-6)


def test_training_gate_opens_with_the_probability_of_its_logit():
    noise = jax.random.logistic(jax.random.key(0), (100_000,))
    share = straight_through_gate(jnp.full(100_000, 0.7), noise).mean()
    assert abs(float(share) - float(jax.nn.sigmoid(0.7))) < 0.01


@pytest.mark.parametrize("layout, outputs", [("free", 4), ("first_on", 3)])
def test_layouts_differ_in_the_first_unit(layout, outputs):
    router = LinearTimeRouter(layers=2, width=16, units=4, layout=layout, rngs=nnx.Rngs(0))
    router.bias[...] = jnp.full((2, outputs), -100.0)
    gates = router(jnp.zeros(3), jnp.zeros((3, 16)), None)
    assert gates.shape == (3, 2, 4)
    np.testing.assert_array_equal(gates[..., 0], layout == "first_on")
    assert not gates[..., 1:].any()


def test_time_gates_are_those_of_the_forward_pass_whatever_the_label(tiny):
    model, params = tiny
    t = jnp.asarray([0, 300, 600, 999])
    heads, groups = model.time_gates(params, t)
    x = jax.random.normal(jax.random.key(0), (4, 8, 8, 1))
    for labels in (jnp.zeros(4, int), jnp.full(4, 10)):
        _, routing = model.apply(params, x, t, labels, mode="gated")
        np.testing.assert_array_equal(routing.heads, heads)
        np.testing.assert_array_equal(routing.groups, groups)
    assert 0 < float(heads.mean()) < 1


def test_block_with_every_gate_shut_adds_the_biases_alone(tiny):
    model, params = tiny
    config = DiTConfig(**{**vars(model.config), "routers": "free"})
    free = Model(config)
    fresh = jax.jit(free.init)(jax.random.key(0))
    params = dict(params, head_router=dict(fresh["head_router"]), group_router=dict(fresh["group_router"]))
    for router in ("head_router", "group_router"):
        params[router]["bias"] = params[router]["bias"] - 1000.0
    x, t, labels = jax.random.normal(jax.random.key(0), (2, 8, 8, 1)), jnp.asarray([5, 6]), jnp.asarray([1, 2])
    prediction, routing = free.apply(params, x, t, labels, mode="gated")
    assert not routing.heads.any() and not routing.groups.any()
    blocks = dict(params["blocks"])
    blocks["attention"] = dict(blocks["attention"], out=jnp.zeros_like(blocks["attention"]["out"]))
    blocks["mlp"] = dict(blocks["mlp"], down=jnp.zeros_like(blocks["mlp"]["down"]))
    expected, _ = free.apply(dict(params, blocks=blocks), x, t, labels, mode="gated")
    np.testing.assert_allclose(prediction, expected, atol=1e-6)


@pytest.mark.parametrize("dtype, precision", [("bfloat16", "HIGH"), ("float32", "HIGHEST")])
def test_token_router_is_more_exact_than_what_reaches_it(dtype, precision):
    router = MLPTokenRouter(width=32, dtype=jnp.dtype(dtype), rngs=nnx.Rngs(0))
    program = str(jax.make_jaxpr(lambda x: router(x))(jnp.zeros((1, 4, 32))))
    assert f"Precision.{precision})" in program


def test_three_passes_lose_little_and_their_gradient_nothing():
    x = jax.random.normal(jax.random.key(0), (2, 8, 64))
    kernel = jax.random.normal(jax.random.key(1), (64, 4))
    expected = np.asarray(x, np.float64) @ np.asarray(kernel, np.float64)
    # What is left out is 2^-8 of 2^-8 of the terms; one pass alone is off by 3e-3.
    assert relative_error(jax.jit(dot_in_three_passes)(x, kernel), expected) < 2e-5
    gradients = lambda dot: jax.grad(lambda x, kernel: (dot(x, kernel) * expected).sum(), argnums=(0, 1))(x, kernel)
    for ours, theirs in zip(gradients(dot_in_three_passes), gradients(jnp.dot), strict=True):
        assert relative_error(ours, theirs) < 1e-6


def test_a_bfloat16_router_for_tpus_runs_in_three_passes():
    router = lambda platform: MLPTokenRouter(width=64, dtype=jnp.bfloat16, platform=platform, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (1, 32, 64))
    product = lambda platform: router(platform).hidden(x)
    assert 0 < relative_error(product("tpu"), product("cpu")) < 2e-5


def test_noise_from_the_same_key_gives_the_same_gates(tiny):
    model, params = tiny
    x, t, labels = jax.random.normal(jax.random.key(0), (4, 8, 8, 1)), jnp.arange(4) * 200, jnp.arange(4)
    draw = lambda key: model.apply(
        params, x, t, labels, mode="gated", noise=model.router_noise(jax.random.key(key), 4)
    )[1]
    same, again, other = draw(1), draw(1), draw(2)
    np.testing.assert_array_equal(same.tokens, again.tokens)
    assert (same.tokens != other.tokens).any() and (same.heads != other.heads).any()


def test_static_model_reports_an_open_routing(tiny_config):
    model = Model(DiTConfig(**{**vars(tiny_config), "routers": "none"}))
    _, routing = model.apply(
        jax.jit(model.init)(jax.random.key(0)), jnp.zeros((3, 8, 8, 1)), jnp.zeros(3), jnp.zeros(3, int), mode="gated"
    )
    assert routing.heads.shape == (3, 2, 4) and routing.tokens.shape == (3, 2, 16)
    assert all(bool((gates == 1).all()) for gates in jax.tree.leaves(routing))
