"""Products and their gradients are those of the definition on every platform, in the order that each is fast in."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import relative_error
from jax.test_util import check_grads

from dydit_jax.models.products import PLATFORMS, multiply, separate


@pytest.fixture(params=[(8, 32), (32, 8), (8, 8)], ids=str)
def arrays(request):
    """Return tokens [3,5,D], a kernel [D,E] and a gradient [3,5,E], float64."""
    width, features = request.param
    draw = lambda *shape: np.random.default_rng(0).normal(size=shape)
    return draw(3, 5, width), draw(width, features), draw(3, 5, features)


def differentiated(platform: str, gradient):
    """Return the jitted gradient, by tokens and kernel, of a product times `gradient`."""
    return jax.jit(jax.grad(lambda x, kernel: (multiply(x, kernel, platform=platform) * gradient).sum(), (0, 1)))


@pytest.mark.parametrize("platform", PLATFORMS)
def test_gradient_of_a_product_is_that_of_the_definition(arrays, platform):
    x, kernel, gradient = arrays
    with jax.enable_x64(True):
        found = differentiated(platform, gradient)(x, kernel)
        expected = gradient @ kernel.T, np.einsum("bnd,bne->de", x, gradient)
        for ours, own in zip(found, expected, strict=True):
            assert relative_error(ours, own) < 1e-12
        product = jax.jit(functools.partial(multiply, platform=platform))
        np.testing.assert_allclose(product(x, kernel), x @ kernel, rtol=1e-12)
        check_grads(product, (x, kernel), order=1, modes=["rev"], atol=1e-6, rtol=1e-6)


def test_on_a_cpu_the_narrower_factor_comes_first(arrays):
    x, kernel, gradient = arrays
    narrow, wide = sorted(kernel.shape)
    same_in_memory = f"f64[{narrow},{wide}]{{1,0}} dot(", f"f64[{wide},{narrow}]{{0,1}} dot("
    with jax.enable_x64(True):
        compiled = differentiated("cpu", gradient).lower(x, kernel).compile().as_text()
    assert any(text in compiled for text in same_in_memory)


@pytest.mark.parametrize("platform", PLATFORMS)
def test_tokens_may_be_none_and_have_any_axes(platform):
    kernel = jnp.ones((4, 6))
    for shape in ((0, 5), (3, 0), (7,), ()):
        assert multiply(jnp.ones((*shape, 4)), kernel, platform=platform).shape == (*shape, 6)
        of_x, of_kernel = differentiated(platform, 1.0)(jnp.ones((*shape, 4)), kernel)
        assert of_x.shape == (*shape, 4) and float(of_kernel.max()) == np.prod(shape)


def test_what_is_separate_has_no_barrier_where_a_gradient_is_taken():
    square = lambda x: separate(jnp.sin(x)).sum()
    assert "optimization_barrier" in jax.jit(square).lower(jnp.ones(3)).as_text()
    differentiate = jax.jit(jax.grad(square))
    assert "optimization_barrier" not in differentiate.lower(jnp.ones(3)).as_text()
    np.testing.assert_allclose(differentiate(jnp.ones(3)), np.cos(np.ones(3)), rtol=1e-6)
