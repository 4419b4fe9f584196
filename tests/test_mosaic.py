"""The kernels for TPUs, interpreted: both against plain JAX, and a pass against the original."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import relative_error

from dydit_jax.fast.execution import mosaic
from dydit_jax.fast.execution.mosaic import Mosaic
from dydit_jax.models.layers import layer_norm, modulate

WIDTH = 32


@pytest.mark.parametrize("images, tokens", [(3, 256), (5, 64), (12, 16), (9, 12)])  # units of 128, 64, 16 and 4 tokens
@pytest.mark.parametrize("share", [0.0, 0.3, 0.65, 0.97])
def test_tokens_come_back_where_they_fit_as_they_say(share, images, tokens):
    generator = np.random.default_rng(0)
    draw = lambda *shape: generator.standard_normal(shape).astype(np.float32)
    mlp = lambda packed: jnp.exp(packed / 4) + 1
    for case in range(3):  # images that differ widely
        gates = generator.random((images, tokens)) < generator.uniform(0, 2 * share, (images, 1))
        gates[0] |= share > 0 and case > 0
        if case == 2 and share:  # a unit's rows are filled to the last, and the others have no open token
            gates[:] = False
            gates[0, : mosaic.unit_size(tokens) - 8] = gates[1, -8:] = True
        gates = gates.astype(np.float32)
        every = images * tokens
        needed = np.asarray(Mosaic("tpu").rows_needed(gates[:, None]))
        execution = Mosaic("tpu").with_capacity(needed, images=images, tokens=tokens)
        [capacity] = execution.capacity
        assert gates.sum() <= capacity and needed[0] <= 1
        assert not execution.overflowed(needed, images=images, tokens=tokens).any()
        if capacity == every:  # nothing is packed
            continue
        x, shift, scale, gate = 3 * draw(images, tokens, WIDTH) + 1, *(draw(images, WIDTH) for _ in range(3))
        rows = mosaic.rows_of(jnp.asarray(gates), capacity=capacity)
        packed = mosaic.pack(x, rows, shift, scale, capacity=capacity, dtype=jnp.dtype("float32"))
        found = mosaic.spread(x, mlp(packed), rows, gate)
        wanted = x + gate[:, None] * gates[..., None] * mlp(modulate(layer_norm(x), shift, scale))
        assert packed.shape == (capacity, WIDTH)
        assert relative_error(found.x, wanted) < 1e-6
        for statistic, value in zip(found.statistics, (wanted.mean(-1), np.square(wanted).mean(-1)), strict=True):
            assert relative_error(statistic, value) < 1e-6


def test_rows_are_packed_exactly_in_bfloat16():
    x = jax.random.normal(jax.random.key(0), (2, 256, WIDTH))
    gates = (jax.random.uniform(jax.random.key(1), (2, 256)) < 0.5).astype(jnp.float32)
    nothing, capacity = jnp.zeros((2, WIDTH)), 384
    rows = mosaic.rows_of(gates, capacity=capacity)
    packed = mosaic.pack(x, rows, nothing, nothing, capacity=capacity, dtype=jnp.dtype("bfloat16"))
    wanted = layer_norm(x)[gates > 0].astype(jnp.bfloat16)
    # Norms differ in the last place of float32, and some of them are rounded to the next number.
    assert relative_error(packed[: len(wanted)].astype(jnp.float32), wanted.astype(jnp.float32)) < 2**-8
    assert (packed[: len(wanted)] == wanted).mean() > 0.99
