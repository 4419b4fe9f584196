"""MACs come from dimensions, agree with what is published and with what XLA counts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dydit_jax.models.config import DiTConfig, published_config
from dydit_jax.models.cost import routed_macs, routed_ratio
from dydit_jax.models.dit import Model
from dydit_jax.models.routing import Routing


@pytest.mark.parametrize(
    "name, side, published", [("XL/2", 32, 118.64), ("B/2", 32, 23.01), ("S/2", 32, 6.06), ("XL/2", 64, 524.60)]
)
def test_complete_model_costs_what_is_published(name, side, published):
    macs = published_config(name, side=side).macs.complete / 1e9
    assert macs == pytest.approx(published, rel=0.002)


def test_xl2_at_256_pixels_costs_118_6_giga():
    assert round(published_config("XL/2", side=32).macs.complete / 1e9, 1) == 118.6


def test_count_agrees_with_xla():
    config = DiTConfig(depth=1, width=256, heads=4, patch=2, side=16)
    model = Model(config)
    arguments = (
        model.abstract_params(),
        jax.ShapeDtypeStruct((1, 16, 16, 4), jnp.float32),
        jax.ShapeDtypeStruct((1,), jnp.int32),
        jax.ShapeDtypeStruct((1,), jnp.int32),
    )
    compiled = jax.jit(lambda *a: model.apply(*a, mode="complete")).lower(*arguments).compile()
    # XLA also counts norms, softmax, GELU and additions (measured: 2.8 % more).
    assert compiled.cost_analysis()["flops"] / 2 == pytest.approx(config.macs.complete, rel=0.05)


def test_open_routing_costs_the_complete_model_and_its_routers(tiny):
    model, _ = tiny
    macs = model.config.macs
    np.testing.assert_allclose(routed_macs(model.open_routing(2), macs), macs.complete + macs.routers, rtol=1e-6)
    np.testing.assert_allclose(routed_ratio(model.open_routing(2), attention=1.0, mlp=1.7), 1.0, rtol=1e-6)


def test_counts_of_a_large_model_fit_into_a_compiled_program():
    config = published_config("XL/2", side=64, routers="first_on")
    open_gates = Routing(*(jnp.ones((1, config.depth, n)) for n in (config.heads, config.heads, config.tokens)))
    macs = jax.jit(lambda routing: routed_macs(routing, config.macs))(open_gates)
    np.testing.assert_allclose(macs, config.macs.complete + config.macs.routers, rtol=1e-6)


def test_ratio_weighs_heads_groups_and_tokens_per_image():
    routing = Routing(
        heads=jnp.asarray([[[1.0, 0, 0, 0]], [[1, 1, 1, 1]]]),
        groups=jnp.asarray([[[1.0, 1, 0, 0]], [[0, 0, 0, 0]]]),
        tokens=jnp.asarray([[[1.0, 0]], [[1, 1]]]),
    )
    expected = [(0.25 * 3 + 0.5 * 0.5 * 5) / 8, 3 / 8]
    np.testing.assert_allclose(routed_ratio(routing, attention=3.0, mlp=5.0), expected, rtol=1e-6)


def test_halves_of_the_published_budget_are_plausible():
    """DyDiT at lambda 0.5 is published with 57.88 G MACs: half the blocks' work."""
    macs = published_config("XL/2", side=32, routers="first_on").macs
    assert macs.layers * (macs.attention + macs.mlp) / 2e9 == pytest.approx(57.88, rel=0.03)
