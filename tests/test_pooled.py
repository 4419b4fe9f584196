"""The kernels for TPUs, interpreted: both against plain JAX, and a pass against the original."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import channels_last, relative_error

from dydit_jax.fast.narrow import narrow
from dydit_jax.fast.tokens import can_run, capacities_of, forms_of, overflows, places_needed
from dydit_jax.models import pooled
from dydit_jax.models.dit import DiTConfig, Model
from dydit_jax.models.layers import layer_norm, modulate
from dydit_jax.sampling.generate import network_of

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


def test_models_that_kernels_do_not_serve():
    config = DiTConfig(depth=1, width=32, heads=4, patch=2, side=8, channels=1, routers="free")
    assert can_run(Model(config, platform="tpu"), "pooled", 2)
    assert "pooled" in forms_of(Model(config, platform="tpu"), 2)
    assert not can_run(Model(config, platform="cpu"), "pooled", 2)
    for fields in (dict(token_capacity=(0.5,)), dict(routers="none")):
        assert not can_run(Model(dataclasses.replace(config, **fields), platform="tpu"), "pooled", 2)
