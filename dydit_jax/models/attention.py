"""Multi-head attention, written in the way that is fastest on each platform, behind one function.

The same arithmetic three times, each with its axes in an order that needs no copies:

    cpu   plain matrix products; the division by the softmax's sum comes last, on N * K numbers instead of N * N; a
          gradient of its own, without a copy of the weights
    tpu   three einsums straight into [B,H,K,N], tokens last: a reshape of [B,N,H*K] would move every value once more
    gpu   plain matrix products that take their biases along; between them cuDNN's fused attention where it accepts the
          head size and the dtype, XLA's own kernels elsewhere

Scores are in the dtype of the products, the softmax in float32. Their costs: docs/speed/README.md.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from dydit_jax.errors import require_known
from dydit_jax.models.products import PLATFORMS, multiply

TRIAL_TOKENS = 64
ATTENDED = "attended"  # the name of what heads return, for rematerialisation


def attend(x, qkv, bias, out, gates, *, platform: str):
    """Attend over tokens and project back.

    Args:
      x: tokens [B,N,D], in the dtype of the products, like all other arrays; for "tpu" also three of them, for queries,
        keys and values.
      qkv: kernels of queries, keys and values, one array [3,D,H,K] or three [D,H,K].
      bias: theirs, [3,H,K] or three [H,K]; or one for each token, [3,B,N,H,K] or three [B,N,H,K].
      out: kernel of the output projection [H,K,D], or several, [H,K,...].
      gates: of the heads, [B or 1,H], or None (all open).
      platform: one of `PLATFORMS`.

    Returns:
      [B,N,D], without the projection's bias; of several kernels the product with each, [B,N,...].

    Raises:
      InputError: an unknown platform.
    """
    require_known("platform", platform, PLATFORMS)
    return {"cpu": _attend_cpu, "gpu": _attend_gpu, "tpu": _attend_tpu}[platform](x, qkv, bias, out, gates)


def _attend_cpu(x, qkv, bias, out, gates):
    batch, tokens, _ = x.shape
    heads, size, _ = jax.tree.leaves(out)[0].shape

    product = functools.partial(multiply, platform="cpu")

    def project(kernel, bias):
        projected = product(x, kernel.reshape(-1, heads * size)) + bias.reshape(*bias.shape[:-2], heads * size)
        return projected.reshape(batch, tokens, heads, size).swapaxes(1, 2)  # [B,H,N,K]

    attended = _weigh_values(*map(project, qkv, bias))  # [B,H,N,K]
    if gates is not None:
        attended = attended * gates[:, :, None, None].astype(x.dtype)
    attended = attended.swapaxes(1, 2).reshape(batch, tokens, heads * size)
    return jax.tree.map(lambda kernel: product(attended, kernel.reshape(heads * size, -1)), out)


@jax.custom_vjp
def _weigh_values(query, key, value):
    """Return the values weighed by the softmax of the scores, like all arguments [B,H,N,K].

    The gradient is written by hand. It computes the weights again, with keys first, so that the two largest of its
    products need no transposed copy of them. There is no second derivative.
    """
    return _weigh_values_forward(query, key, value)[0]


def _weigh_values_forward(query, key, value):
    scores = _at_least_float32(jnp.einsum("bhnk,bhmk->bhnm", _scaled(query), key))  # [B,H,N,N]
    weights = jnp.exp(scores - scores.max(-1, keepdims=True))
    attended = jnp.einsum("bhnm,bhmk->bhnk", weights.astype(value.dtype), value)
    # The division comes last, on N * K numbers instead of N * N.
    attended = checkpoint_name((attended / weights.sum(-1, keepdims=True)).astype(value.dtype), ATTENDED)
    return attended, (query, key, value, attended)


def _weigh_values_backward(kept, gradient):
    query, key, value, attended = kept
    scaled, dtype = _scaled(query), query.dtype
    scores = _at_least_float32(jnp.einsum("bhmk,bhnk->bhmn", key, scaled))  # keys first
    weights = jnp.exp(scores - scores.max(-2, keepdims=True))
    gradient = gradient / weights.sum(-2)[..., None]  # [B,H,N,K], float32
    # Of each row the sum of weights times their gradients, from N * K numbers instead of N * N.
    of_sum = (gradient * attended).sum(-1)[:, :, None]  # [B,H,1,N]
    gradient = gradient.astype(dtype)
    of_value = jnp.einsum("bhmn,bhnk->bhmk", weights.astype(dtype), gradient)
    of_weights = jnp.einsum("bhmk,bhnk->bhmn", value, gradient)
    of_scores = (weights * (of_weights - of_sum)).astype(dtype)
    return (
        _scaled(jnp.einsum("bhmn,bhmk->bhnk", of_scores, key)),
        jnp.einsum("bhmn,bhnk->bhmk", of_scores, scaled),
        of_value,
    )


def _at_least_float32(scores):
    return scores.astype(jnp.promote_types(scores.dtype, jnp.float32))


def _scaled(query):
    return query * (1 / math.sqrt(query.shape[-1]))


_weigh_values.defvjp(_weigh_values_forward, _weigh_values_backward)


def _attend_tpu(x, qkv, bias, out, gates):
    # Three products, not one and a split: splitting [B,N,3HK] into heads copies it.
    inputs = x if isinstance(x, tuple) else (x,) * 3
    query, key, value = (jnp.einsum("bnd,dhk->bhkn", inputs[i], qkv[i]) + _tokens_last(bias[i]) for i in range(3))
    size, dtype = value.shape[2], value.dtype
    # N * N numbers per head are neither scaled nor divided here: N * K queries and values are.
    scores = jnp.einsum("bhkn,bhkm->bhnm", query * (1 / math.sqrt(size)), key)  # [B,H,N,N]
    largest = jax.lax.stop_gradient(scores.max(-1, keepdims=True)).astype(jnp.float32)
    weights = jnp.exp(scores.astype(jnp.float32) - largest).astype(dtype)
    # A row of ones below the values: the product that weighs them gives the sum of the weights as well.
    value = jnp.concatenate([value, jnp.ones_like(value[:, :, :1])], axis=2)  # [B,H,K+1,N]
    attended = jnp.einsum("bhnm,bhkm->bhkn", weights, value)
    scale = (1 if gates is None else gates[:, :, None, None]) / attended[:, :, -1:].astype(jnp.float32)
    # Behind a barrier it is made once per token and head, not for each of the K numbers that it scales.
    scale = jax.lax.optimization_barrier(scale)  # [B,H,1,N]
    attended = (attended[:, :, :-1] * scale).astype(dtype)  # [B,H,K,N]
    return jax.tree.map(lambda kernel: jnp.einsum("bhkn,hkd->bnd", attended, kernel), out)


def _tokens_last(bias):
    """Return a bias [H,K], or one for each token [B,N,H,K], as it is added to [B,H,K,N]."""
    return bias[..., None] if bias.ndim == 2 else jnp.moveaxis(bias, 1, -1)


def _attend_gpu(x, qkv, bias, out, gates):
    batch, tokens, width = x.shape
    heads, size, _ = jax.tree.leaves(out)[0].shape

    def project(kernel, bias):  # flat: the bias then rides on the product
        projected = x @ kernel.reshape(width, heads * size) + bias.reshape(*bias.shape[:-2], heads * size)
        return projected.reshape(batch, tokens, heads, size)

    query, key, value = map(project, qkv, bias)
    implementation = "cudnn" if _cudnn_accepts(size, x.dtype) else "xla"
    attended = jax.nn.dot_product_attention(query, key, value, implementation=implementation)  # [B,N,H,K]
    if gates is not None:
        attended = attended * gates[:, None, :, None].astype(x.dtype)
    attended = attended.reshape(batch, tokens, heads * size)
    return jax.tree.map(lambda kernel: attended @ kernel.reshape(heads * size, -1), out)


@functools.cache
def _cudnn_accepts(size: int, dtype) -> bool:
    """Return whether cuDNN's fused attention works here, by trying: devices, versions and head sizes decide."""
    if dtype not in (jnp.bfloat16, jnp.float16):
        return False
    probe = jax.ShapeDtypeStruct((1, TRIAL_TOKENS, 1, size), dtype)
    attention = functools.partial(jax.nn.dot_product_attention, implementation="cudnn")
    try:
        jax.jit(attention).lower(probe, probe, probe).compile()
    except Exception:  # it raises ValueError, RuntimeError or NotImplementedError, by version
        return False
    return True
