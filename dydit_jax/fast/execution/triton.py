"""Execution `triton`: GPU kernels that do everything between two matrix products in one pass over the tokens.

Norms, residuals, routing and packing move bytes and hardly compute. Beside narrowed products they take much of the
time, since XLA reads and writes the tokens more often than necessary. Here (Pallas for Triton) each row belongs to one
warp and stays in its registers:

    norm            the last MLP's result is added; norm, modulation             -> attention
    add             that, and attention's result, is added                       -> the new stream, and the router
    pack            gates; norm and modulation of the open tokens                -> MLP
    add_and_norm    as `add` and `norm` of the sum, where all tokens have rows   -> the new stream, and the MLP
    add_and_route   as `add`, and the router's products                          -> the new stream, and logits

An MLP's result stays packed until a kernel that reads the tokens anyway adds it: `Stream`.

Three more executions are made of them: `triton_fused`, experimental, routes in the kernel that adds; `triton_masked`
and `triton_dense` leave nothing out.

A counter that all programs share assigns the packed rows, in a random order; the kernel before resets it. No result
depends on that order, since each row is computed separately. There are no gradients, and gates of heads and groups must
be multiplied into the weights, see `fold_gates`. JAX plans to drop this backend of Pallas; where it is missing, or
refuses, `accepts` logs it once, and other executions serve.
"""

import dataclasses
import functools
import logging

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from dydit_jax.fast.execution.lowering import lowered_once
from dydit_jax.fast.execution.triton_kernels import (
    LEAST_ROWS_OF_PRODUCT,
    NARROWEST_CHUNK,
    ROUTING_WARPS,
    ROWS,
    Stream,
    Update,
    adding_kernel,
    chunk_of,
    flat,
    packing_kernel,
    routing_kernel,
    rows_of_routing,
    triton,
)
from dydit_jax.fast.execution.xla import PackedExecution
from dydit_jax.models.execution import MLPStep, TokenExecution
from dydit_jax.models.routing import TOKEN_ROUTER_REDUCTION, hard_gate

logger = logging.getLogger(__name__)


class _TritonSteps(TokenExecution):
    """The steps of a block that do not depend on which tokens are open."""

    @classmethod
    def available(cls, model, images: int) -> bool:
        """Return whether the kernels are available: on a GPU, for sizes that they accept, without top-k."""
        config = model.config
        suits = model.platform == "gpu" and not config.token_capacity and config.token_router == "mlp"
        return suits and accepts(config.tokens, config.width)

    def enter(self, tokens):
        """Return the stream of tokens [B,N,D]."""
        return Stream(tokens)

    def norm(self, stream, shift, scale, *, dtype):
        """Return the modulated norm [B,N,D]."""
        return norm(stream, shift, scale, dtype=dtype)

    def add(self, stream, attended, gate):
        """Return the stream with the result of attention, to be added by the next kernel that reads the tokens."""
        return dataclasses.replace(stream, attention=(attended, gate))

    def leave(self, stream):
        """Return the tokens [B,N,D]."""
        return stream.settled()


class Triton(_TritonSteps, PackedExecution):
    """Open tokens of all images share one capacity; kernels do everything but the products."""

    name = "triton"

    def update(self, stream, step: MLPStep) -> tuple:
        """Route, pack, run the MLP; its result is added later."""
        x, router, counter = self.added_and_routed(stream, step.router)
        settings = dict(capacity=self.capacity[0], dtype=step.dtype)
        packed, row_of, gates = pack(x, router, (step.shift, step.scale), counter, **settings)
        return Stream(x, Update(step.mlp(packed), row_of, step.gate)), gates

    def added_and_routed(self, stream, router) -> tuple:
        """Return the tokens with everything added, and what `pack` takes of their router, and as its counter."""
        x, counter = add(stream)
        return x, (router.hidden(x), *router.last_layer()), counter


class TritonFused(Triton):
    """As `triton`, with the router's first product in the kernel that adds: the tokens are read once less."""

    name = "triton_fused"

    @classmethod
    def available(cls, model, images: int) -> bool:
        """Return whether the kernels are available, and the router's product may be made in TF32, as in them."""
        suits = model.dtype == jnp.bfloat16 and super().available(model, images)
        return suits and accepts_routing(model.config.tokens, model.config.width)

    def added_and_routed(self, stream, router) -> tuple:
        """Return the tokens with everything added, their logits and a counter."""
        return add_and_route(stream, (*router.first_layer(), *router.last_layer()))


class TritonDense(_TritonSteps):
    """Every token passes the MLP, in the same kernels."""

    name = "triton_dense"
    routed = False

    def update(self, stream, step: MLPStep) -> tuple:
        """Run the MLP on all tokens; its result is added later."""
        x, normed = add_and_norm(stream, step.shift, step.scale, dtype=step.dtype)
        return Stream(x, Update(step.mlp(normed), None, step.gate)), None


class TritonMasked(_TritonSteps):
    """Every token passes the MLP, in the same kernels; the results of closed ones are never read."""

    name = "triton_masked"

    def update(self, stream, step: MLPStep) -> tuple:
        """Route and run the MLP on all tokens; the result of the open ones is added later."""
        x, normed = add_and_norm(stream, step.shift, step.scale, dtype=step.dtype)
        gates = hard_gate(step.logits(x))
        own_rows = jnp.arange(gates.size, dtype=jnp.int32).reshape(gates.shape)
        row_of = jnp.where(gates > 0, own_rows, -1)
        return Stream(x, Update(flat(step.mlp(normed)), row_of, step.gate)), gates


@functools.cache
def accepts(tokens: int, width: int) -> bool:
    """Return whether the kernels compile for this many tokens of this width, by trying one of each kind."""
    if triton is None or tokens % ROWS or chunk_of(width) < NARROWEST_CHUNK:
        return False
    stream, of_image = _stream_of_one_image(tokens, width)
    shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)

    def both(stream, hidden, kernel_out, bias_out, shift, scale):
        settings = dict(capacity=ROWS, dtype=jnp.bfloat16)
        _, counter = add(stream)
        packed = pack(stream.x, (hidden, kernel_out, bias_out), (shift, scale), counter, **settings)
        return add_and_norm(stream, shift, scale, dtype=jnp.bfloat16), packed

    return _compiles(both, stream, shape((1, tokens, ROWS)), shape((ROWS,)), shape((1,)), of_image, of_image)


@functools.cache
def accepts_routing(tokens: int, width: int) -> bool:
    """Return whether the kernel that routes compiles too, likewise."""
    if rows_of_routing(tokens) < LEAST_ROWS_OF_PRODUCT or not accepts(tokens, width):
        return False
    stream, _ = _stream_of_one_image(tokens, width)
    shape, reduced = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32), width // TOKEN_ROUTER_REDUCTION
    return _compiles(
        add_and_route, stream, (shape((width, reduced)), shape((reduced,)), shape((reduced,)), shape((1,)))
    )


def _stream_of_one_image(tokens: int, width: int) -> tuple[Stream, jax.ShapeDtypeStruct]:
    """Return the shapes of a stream with everything that may be added, and of an array [1,D]."""
    shape = lambda *axes, dtype=jnp.float32: jax.ShapeDtypeStruct(axes, dtype)
    x, of_image = shape(1, tokens, width), shape(1, width)
    update = Update(shape(ROWS, width, dtype=jnp.bfloat16), shape(1, tokens, dtype=jnp.int32), of_image)
    return Stream(x, update, (x, of_image)), of_image


def _compiles(function, *arguments) -> bool:
    try:
        jax.jit(function).lower(*arguments).compile()
    except Exception as error:  # of the version of JAX, of Triton or of the device, in many ways
        logger.warning("Without kernels for GPUs, which cannot be had here: %s", " ".join(str(error).split())[:200])
        return False
    return True


def norm(stream: Stream, shift, scale, *, dtype):
    """Return the modulated norm [B,N,D] of a stream, in a dtype; shift and scale are of the modulation [B,D]."""
    _, normed, _ = _add_and_norm(stream, (shift, scale), dtype=dtype, keep=False)
    return normed


def add(stream: Stream) -> tuple:
    """Return the tokens [B,N,D] of a stream with everything added, and a counter for `pack`, int32 [1]."""
    x, _, counter = _add_and_norm(stream, None)
    return x, counter


def add_and_norm(stream: Stream, shift, scale, *, dtype):
    """Return the tokens [B,N,D] of a stream with everything added, and their modulated norm in a dtype."""
    x, normed, _ = _add_and_norm(stream, (shift, scale), dtype=dtype)
    return x, normed


@lowered_once()
def add_and_route(stream: Stream, layers: tuple) -> tuple:
    """Add everything and route.

    Args:
      stream: of the tokens.
      layers: of their router, kernel and bias of the first, [D,R] and [R], and of the second, [R] and [1].

    Returns:
      The tokens [B,N,D]; their logits, float32 [B,N]; a counter for `pack`, int32 [1].
    """
    batch, tokens, width = stream.x.shape
    rows = batch * tokens
    shape = jax.ShapeDtypeStruct
    outputs = shape((rows, width), jnp.float32), shape((rows,), jnp.float32), shape((1,), jnp.int32)
    settings = dict(rows=rows, tokens=tokens, of_program=rows_of_routing(tokens), warps=ROUTING_WARPS)
    x, logits, counter = _call(routing_kernel, outputs, (stream.flat(), layers), **settings)
    return x.reshape(batch, tokens, width), logits.reshape(batch, tokens), counter


@lowered_once("capacity", "dtype")
def pack(x, router, modulation: tuple, counter, *, capacity: int, dtype):
    """Route tokens; norm, modulate and pack the open ones.

    Args:
      x: tokens [B,N,D], float32.
      router: logits of the tokens [B,N]; or what the first layer of their router gives [B,N,R], and kernel and bias of
        the second layer, [R] and [1].
      modulation: shift and scale [B,D].
      counter: zero, int32 [1].
      capacity: R, rows for open tokens; those beyond get none.
      dtype: of the packed tokens.

    Returns:
      The packed tokens [R,D], arbitrary behind the last open one; the row of each token, negative where it has none,
      int32 [B,N]; the gates, float32 [B,N].
    """
    batch, tokens, width = x.shape
    rows = batch * tokens
    shape = jax.ShapeDtypeStruct
    # Behind the packed tokens the counter, in the place of the last argument.
    outputs = (
        shape((rows,), jnp.int32),
        shape((rows,), jnp.float32),
        shape((capacity, width), dtype),
        shape((1,), jnp.int32),
    )
    limit = jnp.full(1, capacity, jnp.int32)
    router = (flat(router[0]), *router[1:]) if isinstance(router, tuple) else router.reshape(rows)
    inputs = flat(x), router, modulation, limit, counter
    aliases = {len(jax.tree.leaves(inputs)) - 1: len(outputs) - 1}
    row_of, gates, packed, _ = _call(packing_kernel, outputs, (inputs,), rows=rows, tokens=tokens, aliases=aliases)
    return packed, row_of.reshape(batch, tokens), gates.reshape(batch, tokens)


@lowered_once("dtype", "keep")
def _add_and_norm(stream: Stream, modulation, *, dtype=None, keep: bool = True):
    """Return the new tokens, if they are to be kept; the normed ones, if there is a modulation, else a zero [1]."""
    shape = stream.x.shape
    stream = stream.flat()
    outputs = (
        jax.ShapeDtypeStruct(stream.x.shape, jnp.float32) if keep else None,
        None if modulation is None else jax.ShapeDtypeStruct(stream.x.shape, dtype),
        jax.ShapeDtypeStruct((1,), jnp.int32) if modulation is None else None,
    )
    *made, counter = _call(adding_kernel, outputs, (stream, modulation), rows=len(stream.x), tokens=shape[1])
    return *(None if leaf is None else leaf.reshape(shape) for leaf in made), counter


def _call(kernel, outputs, arguments: tuple, *, rows: int, tokens: int, aliases=None, of_program=ROWS, warps=ROWS):
    # By `Element`: the code then does not say how many rows are packed, and one kernel serves every block.
    whole = lambda leaf: pl.BlockSpec(tuple(map(pl.Element, leaf.shape)), lambda _: (0,) * leaf.ndim)
    return pl.pallas_call(
        functools.partial(kernel, tokens=tokens),
        grid=(rows // of_program,),
        in_specs=jax.tree.map(whole, arguments),
        out_specs=jax.tree.map(whole, outputs),
        out_shape=outputs,
        input_output_aliases=aliases or {},
        compiler_params=triton.CompilerParams(num_warps=warps, num_stages=1),
        interpret=jax.default_backend() != "gpu",  # for tests
    )(*arguments)
