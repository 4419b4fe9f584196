"""Every platform's form of attention computes the same, alone and inside the reference model."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import relative_error
from jax.test_util import check_grads

from dydit_jax.errors import InputError
from dydit_jax.models.attention import attend
from dydit_jax.models.dit import rematerialised
from dydit_jax.models.layers import layer_norm, modulate, modulated_norm_thrice
from dydit_jax.models.products import PLATFORMS


@pytest.fixture(scope="module")
def arrays():
    generator = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(generator.standard_normal(shape, np.float32) / shape[-1] ** 0.5)
    gates = jnp.asarray([[1.0, 0.0, 1.0], [0.0, 1.0, 1.0]])
    return 4 * draw(2, 16, 24), draw(3, 24, 3, 8), draw(3, 3, 8), draw(3, 8, 24), gates


def by_hand(x, qkv, bias, out, gates):
    """The definition, in float64."""
    x, qkv, bias, out, gates = (np.asarray(array, np.float64) for array in (x, qkv, bias, out, gates))
    query, key, value = np.einsum("bnd,pdhk->pbhnk", x, qkv) + bias[:, None, :, None]
    scores = np.exp(query @ key.swapaxes(-1, -2) / np.sqrt(qkv.shape[-1]))
    heads = scores / scores.sum(-1, keepdims=True) @ value * gates[:, :, None, None]
    return np.einsum("bhnk,hkd->bnd", heads, out)


@pytest.mark.parametrize("platform", PLATFORMS)
def test_form_computes_attention(arrays, platform):
    *rest, gates = arrays
    assert relative_error(attend(*arrays, platform=platform), by_hand(*arrays)) < 1e-6
    every = jnp.ones_like(gates)
    assert relative_error(attend(*rest, None, platform=platform), by_hand(*rest, every)) < 1e-6


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
def test_gradients_are_the_same(arrays, platform):
    gradient = lambda platform: jax.grad(
        lambda qkv: (attend(arrays[0], qkv, *arrays[2:], platform=platform) ** 2).sum()
    )
    assert relative_error(gradient(platform)(arrays[1]), gradient("cpu")(arrays[1])) < 1e-5


def plain(x, qkv, bias, out, gates):
    """The definition, for the compiler's own gradient."""
    query, key, value = jnp.einsum("bnd,pdhk->pbhnk", x, qkv) + bias[:, None, :, None]
    weights = jax.nn.softmax(query @ key.swapaxes(-1, -2) / qkv.shape[-1] ** 0.5)
    return jnp.einsum("bhnk,hkd->bnd", weights @ value * gates[:, :, None, None], out)


def test_gradient_written_by_hand_is_that_of_the_definition(arrays):
    with jax.enable_x64(True):
        doubles = [jnp.asarray(np.asarray(array, np.float64)) for array in arrays]
        on_cpu = functools.partial(attend, platform="cpu")
        lose = lambda function: lambda *arrays: jnp.sin(function(*arrays)).sum()
        every = tuple(range(len(doubles)))
        found, expected = (jax.jit(jax.grad(lose(function), every))(*doubles) for function in (on_cpu, plain))
        for ours, own in zip(found, expected, strict=True):
            assert relative_error(ours, own) < 1e-12
        check_grads(jax.jit(on_cpu), doubles, order=1, modes=["rev"], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("remat", ["none", "block", "dots"])
def test_gradient_is_the_same_whatever_is_kept_for_it(arrays, remat):
    *weights, gates = arrays

    def lose(x, keep):
        run = keep(lambda x: attend(x, *weights[1:], gates, platform="cpu"), remat)
        return (jax.lax.scan(lambda x, _: (x + run(x), None), x, length=2)[0] ** 2).sum()

    compare = lambda x: [jax.grad(lose)(x, keep) for keep in (rematerialised, lambda function, _: function)]
    assert relative_error(*jax.jit(compare)(weights[0])) < 1e-6


def test_reference_model_is_the_same_as_written_for_a_tpu(golden_v2):
    x, t, labels = (jnp.asarray(array) for array in golden_v2.inputs)
    model = dataclasses.replace(golden_v2.model, platform="tpu")
    expected, gates = golden_v2.model.apply(golden_v2.params, x, t, labels, mode="gated")
    output, found = model.apply(golden_v2.params, x, t, labels, mode="gated")
    assert relative_error(output, expected) < 1e-5
    np.testing.assert_array_equal(found.tokens, gates.tokens)


def test_norm_in_one_pass_is_the_norm():
    x = jax.random.normal(jax.random.key(0), (2, 5, 64)) + 0.5
    assert relative_error(layer_norm(x, single_pass=True), layer_norm(x)) < 1e-6


def test_norm_written_three_times_is_one_norm():
    x = jax.random.normal(jax.random.key(0), (2, 5, 64)) + 0.5
    shift, scale = jax.random.normal(jax.random.key(1), (2, 2, 64))
    for modulated in modulated_norm_thrice(x, shift, scale):
        assert relative_error(modulated, modulate(layer_norm(x), shift, scale)) < 1e-6


def test_a_tpu_takes_an_input_for_each_of_queries_keys_and_values(arrays):
    x, *rest = arrays
    scaled = jnp.stack([kernel * (1 + i) for i, kernel in enumerate(rest[0])])
    expected = by_hand(x, scaled, *rest[1:])
    assert relative_error(attend((x, 2 * x, 3 * x), *rest, platform="tpu"), expected) < 1e-6


def test_unknown_platform_is_refused(arrays):
    with pytest.raises(InputError, match="Unknown platform 'abacus'"):
        attend(*arrays, platform="abacus")
