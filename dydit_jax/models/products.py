"""Products of tokens with kernels, each with a gradient in the form that its platform does best.

    cpu   tokens are flattened, so that the gradient of a kernel is a product of two matrices as well: for a sum over
          two axes both factors would be copied first
    tpu   tokens keep their axes; of the two factors of a kernel's gradient the narrower one is transposed
    gpu   plain

The kernel's gradient sums over tokens: one of its factors is read across. CPUs take longer where that is the wider one,
a TPU's compiler copies it first. There are no second derivatives. What it gains: docs/speed/README.md.
"""

import math

import jax
import jax.numpy as jnp

PLATFORMS = ("cpu", "gpu", "tpu")


def multiply(x, kernel, *, platform: str):
    """Return the product of tokens [...,D] with a kernel [D,E], [...,E].

    Args:
      x, kernel: of one dtype.
      platform: one of `PLATFORMS`.
    """
    if platform == "gpu":
        return x @ kernel
    if platform == "tpu":
        return _multiply_tokens(x, kernel)
    *outer, width = x.shape
    rows = math.prod(outer)  # not -1, which has no meaning where there is no token
    return _multiply_matrices(x.reshape(rows, width), kernel).reshape(*outer, kernel.shape[-1])


@jax.custom_vjp
def separate(x):
    """Return x, which the compiler does not make part of what follows; with a gradient it may.

    In training a TPU gains by that freedom: the step keeps the product that x is made of, and makes x again.
    """
    return jax.lax.optimization_barrier(x)


separate.defvjp(lambda x: (x, None), lambda _, gradient: (gradient,))


@jax.custom_vjp
def _multiply_matrices(x, kernel):
    """Return the product of rows [R,D] and a kernel [D,E]."""
    return x @ kernel


def _multiply_matrices_backward(kept, gradient):
    x, kernel = kept
    if x.shape[1] <= gradient.shape[1]:
        of_kernel = x.T @ gradient
    else:
        # Without the barrier the compiler would exchange the two again, to spare the transposition.
        of_kernel = jax.lax.optimization_barrier(gradient.T @ x).T
    return gradient @ kernel.T, of_kernel


@jax.custom_vjp
def _multiply_tokens(x, kernel):
    """Return the product of tokens [...,D] and a kernel [D,E]."""
    return x @ kernel


def _multiply_tokens_backward(kept, gradient):
    x, kernel = kept
    if x.shape[-1] <= gradient.shape[-1]:
        of_kernel = _sum_over_tokens(x, gradient)
    else:
        of_kernel = jax.lax.optimization_barrier(_sum_over_tokens(gradient, x)).T
    return gradient @ kernel.T, of_kernel


def _sum_over_tokens(narrow, wide):
    """Return the sum over tokens of narrow [...,D] times wide [...,E], [D,E], with a transposed copy of `narrow`."""
    transposed = jax.lax.optimization_barrier(jnp.moveaxis(narrow, -1, 0))
    return jnp.tensordot(transposed, wide, narrow.ndim - 1)


def _keep_factors(x, kernel):
    return x @ kernel, (x, kernel)


_multiply_matrices.defvjp(_keep_factors, _multiply_matrices_backward)
_multiply_tokens.defvjp(_keep_factors, _multiply_tokens_backward)
