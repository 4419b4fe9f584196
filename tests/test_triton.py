"""The kernels for GPUs, interpreted: each against plain JAX, and a pass against the original."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import relative_error

from dydit_jax.fast.execution import triton
from dydit_jax.models.config import DiTConfig
from dydit_jax.models.dit import Model
from dydit_jax.models.execution import MLPStep
from dydit_jax.models.layers import layer_norm, modulate

pytestmark = pytest.mark.skipif(triton.triton is None, reason="This JAX has no Pallas for Triton.")

BATCH, TOKENS, WIDTH, ROWS = 3, 16, 96, 40


@pytest.fixture
def draw():
    """Return (shape) -> normal numbers, others each time."""
    generator = np.random.default_rng(0)
    return lambda *shape: jnp.asarray(generator.standard_normal(shape), jnp.float32)


def update_of(draw, kind: str):
    """Make the result of an MLP for no, all, or some of the tokens."""
    if kind == "none":
        return None
    if kind == "all":
        return triton.Update(draw(BATCH, TOKENS, WIDTH), None, draw(BATCH, WIDTH))
    row_of = np.full(BATCH * TOKENS, -1, np.int32)
    row_of[np.random.default_rng(1).permutation(len(row_of))[:30]] = np.random.default_rng(2).permutation(30)
    # Rows without a token may be anything.
    rows = draw(ROWS, WIDTH).at[30:].set(jnp.nan)
    return triton.Update(rows, jnp.asarray(row_of.reshape(BATCH, TOKENS)), draw(BATCH, WIDTH))


def added(stream):
    """Add by hand, token by token."""
    x, update, attention = np.array(stream.x, np.float64), stream.update, stream.attention
    for image in range(BATCH):
        for token in range(TOKENS):
            if update is not None and update.row_of is None:
                x[image, token] += np.float64(update.gate[image]) * update.rows[image, token]
            elif update is not None and update.row_of[image, token] >= 0:
                x[image, token] += np.float64(update.gate[image]) * update.rows[update.row_of[image, token]]
            if attention is not None:
                x[image, token] += np.float64(attention[1][image]) * attention[0][image, token]
    return x


def normed(x, shift, scale):
    return modulate(layer_norm(jnp.asarray(x)), shift, scale)


@pytest.mark.parametrize("kind", ["none", "all", "some"])
def test_kernels_add_and_norm(draw, kind):
    stream = triton.Stream(3 * draw(BATCH, TOKENS, WIDTH) + 1, update_of(draw, kind))
    attended, (gate, shift, scale) = draw(BATCH, TOKENS, WIDTH), draw(3, BATCH, WIDTH)
    waiting = triton.Stream(stream.x, stream.update, (attended, gate))
    before, after = added(stream), added(waiting)
    assert relative_error(stream.settled(), before) < 1e-6
    assert relative_error(triton.norm(stream, shift, scale, dtype=jnp.float32), normed(before, shift, scale)) < 1e-5
    x, counter = triton.add(waiting)
    assert relative_error(x, after) < 1e-6 and counter == 0
    x, found = triton.add_and_norm(waiting, shift, scale, dtype=jnp.bfloat16)
    assert relative_error(x, after) < 1e-6
    assert found.dtype == jnp.bfloat16 and relative_error(found, normed(after, shift, scale)) < 1e-2


@pytest.mark.parametrize("kind", ["all", "some"])
def test_kernel_adds_and_routes(draw, kind):
    attention = draw(BATCH, TOKENS, WIDTH), draw(BATCH, WIDTH)
    stream = triton.Stream(draw(BATCH, TOKENS, WIDTH), update_of(draw, kind), attention)
    kernel_in, bias_in, kernel_out, bias_out = draw(WIDTH, 6), draw(6), draw(6), draw(1)
    x, logits, counter = triton.add_and_route(stream, (kernel_in, bias_in, kernel_out, bias_out))
    after = added(stream)
    assert relative_error(x, after) < 1e-6 and counter == 0
    expected = np.maximum(after @ np.float64(kernel_in) + bias_in, 0) @ np.float64(kernel_out) + bias_out
    assert relative_error(logits, expected) < 1e-5


@pytest.mark.parametrize("capacity, routed_before", [(ROWS, False), (11, False), (ROWS, True)])
def test_kernel_packs_the_open_tokens(draw, capacity, routed_before):
    x, hidden = draw(BATCH, TOKENS, WIDTH), jax.nn.relu(draw(BATCH, TOKENS, 6))
    kernel, (shift, scale) = draw(6), draw(2, BATCH, WIDTH)
    bias = -jnp.median(hidden @ kernel)[None]
    logits, counter = hidden @ kernel + bias, jnp.zeros(1, jnp.int32)
    router = logits if routed_before else (hidden, kernel, bias)
    packed, row_of, gates = triton.pack(x, router, (shift, scale), counter, capacity=capacity, dtype=jnp.float32)
    is_open = np.asarray(logits) > 0
    assert 11 < is_open.sum() < ROWS
    np.testing.assert_array_equal(gates, is_open)
    placed = np.asarray(row_of)[np.asarray(row_of) >= 0]
    assert sorted(placed) == list(range(min(capacity, is_open.sum())))  # each once; those beyond have none
    assert is_open[np.asarray(row_of) >= 0].all()
    expected = normed(x, shift, scale)[np.asarray(row_of) >= 0]
    assert relative_error(packed[placed], expected) < 1e-5


class Router:
    """Two layers, as `MLPTokenRouter` has them."""

    def __init__(self, draw):
        self.layers = draw(WIDTH, 6), draw(6), draw(6), draw(1)

    def __call__(self, x):
        kernel, bias = self.last_layer()
        return (self.hidden(x) * kernel).sum(-1) + bias

    def hidden(self, x):
        kernel, bias = self.first_layer()
        return jax.nn.relu(jnp.dot(x, kernel, precision="highest") + bias)

    def first_layer(self):
        return self.layers[:2]

    def last_layer(self):
        return self.layers[2:]


@pytest.mark.parametrize("name", ["triton_fused", "triton_masked"])
def test_executions_in_these_kernels_are_the_product_with_the_gates(draw, name):
    x, attended, (gate_a, shift, scale, gate) = (
        draw(BATCH, TOKENS, WIDTH),
        draw(BATCH, TOKENS, WIDTH),
        draw(4, BATCH, WIDTH),
    )
    mlp, router = (lambda rows: jnp.exp(rows / 4) + 1), Router(draw)
    execution = dict(
        triton_fused=triton.TritonFused("gpu", (BATCH * TOKENS,)), triton_masked=triton.TritonMasked("gpu")
    )[name]
    step = MLPStep(mlp, router, shift, scale, gate, jnp.dtype("float32"))
    stream, gates = execution.update(execution.add(execution.enter(x), attended, gate_a), step)
    after = x + gate_a[:, None] * attended
    is_open = np.asarray(router(after)) > 0
    assert 0 < is_open.mean() < 1
    np.testing.assert_array_equal(gates, is_open)
    wanted = after + gate[:, None] * is_open[..., None] * mlp(normed(after, shift, scale))
    assert relative_error(execution.leave(stream), wanted) < 2e-6


def test_a_kernel_routes_where_bfloat16_allows_it(monkeypatch):
    for name in ("accepts", "accepts_routing"):
        monkeypatch.setattr(triton, name, lambda tokens, width: True)
    config = DiTConfig(depth=1, width=32, heads=4, patch=2, side=8, channels=1, routers="free")
    available = lambda **settings: triton.TritonFused.available(Model(config, platform="gpu", **settings), 1)
    assert available(dtype=jnp.dtype("bfloat16")) and not available()
