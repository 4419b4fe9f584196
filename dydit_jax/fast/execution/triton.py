"""Execution `triton`: GPU kernels that do everything between two matrix products in one pass over the tokens.

Norms, residuals, routing and packing move bytes and hardly compute. Beside narrowed products they take much of the
time, since XLA reads and writes the tokens more often than necessary. Here (Pallas for Triton) each row belongs to one
warp and stays in its registers:

    norm            the last MLP's result is added; norm, modulation             -> attention
    add             that, and attention's result, is added                       -> the new stream, and the router
    pack            gates; norm and modulation of the open tokens                -> MLP
    add_and_norm    as `add` and `norm` of the sum, where all tokens are open    -> the new stream, and the MLP

An MLP's result stays packed until a kernel that reads the tokens anyway adds it: `Stream`.

A counter that all programs share assigns the packed rows, in a random order. No result depends on that order, since
each row is computed separately. There are no gradients, and gates of heads and groups must be multiplied into the
weights, see `fold_gates`. JAX plans to drop this backend of Pallas; where it is missing, or refuses, `accepts` logs it
once, and other executions serve.
"""

import dataclasses
import functools
import logging
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from dydit_jax.fast.execution.lowering import lowered_once
from dydit_jax.fast.execution.xla import PackedExecution
from dydit_jax.models.execution import MLPStep, TokenExecution
from dydit_jax.models.layers import NORM_EPSILON

try:
    from jax.experimental.pallas import triton
except ImportError:
    triton = None

logger = logging.getLogger(__name__)

ROWS = 4  # of a program, and its warps. A warp that loads four numbers per thread needs no exchange between threads.
WIDEST_CHUNK = 128  # of the width that is loaded at once, like all sizes in Triton a power of two
NARROWEST_CHUNK = 32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Update:
    """What an MLP made and is still to be added to the residual stream.

    Attributes:
      rows: [B,N,D] of all tokens, or [R,D] of the open ones.
      row_of: of each token among the packed rows, negative where it has none [B,N]; None where rows are of all tokens.
      gate: of the modulation [B,D].
    """

    rows: jax.Array
    row_of: jax.Array | None
    gate: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Stream:
    """The residual stream and what is still to be added to it.

    Attributes:
      x: tokens [B,N,D], float32.
      update: of the last MLP, or None.
      attention: its result [B,N,D] and the gate of its modulation [B,D], or None.
    """

    x: jax.Array
    update: Update | None = None
    attention: tuple | None = None

    def settled(self):
        """Return the tokens [B,N,D] with the MLP's update added."""
        if self.update is None:
            return self.x
        rows, row_of = self.update.rows, self.update.row_of
        if row_of is not None:
            rows = jnp.where(row_of[..., None] >= 0, rows.at[row_of].get(mode="clip"), 0)
        return self.x + self.update.gate[:, None] * rows

    def flat(self) -> "Stream":
        """Return it with one axis of all tokens instead of [B,N]."""
        update = self.update
        if update is not None and update.row_of is None:
            update = dataclasses.replace(update, rows=_flat(update.rows))
        elif update is not None:
            update = dataclasses.replace(update, row_of=update.row_of.reshape(-1))
        attention = None if self.attention is None else (_flat(self.attention[0]), self.attention[1])
        return Stream(_flat(self.x), update, attention)


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
        x = add(stream)
        router = step.router.hidden(x), *step.router.last_layer()
        settings = dict(capacity=self.capacity[0], dtype=step.dtype)
        packed, row_of, gates = pack(x, router, (step.shift, step.scale), **settings)
        return Stream(x, Update(step.mlp(packed), row_of, step.gate)), gates


class TritonDense(_TritonSteps):
    """Every token passes the MLP, in the same kernels."""

    name = "triton_dense"
    routed = False

    def update(self, stream, step: MLPStep) -> tuple:
        """Run the MLP on all tokens; its result is added later."""
        x, normed = add_and_norm(stream, step.shift, step.scale, dtype=step.dtype)
        return Stream(x, Update(step.mlp(normed), None, step.gate)), None


@functools.cache
def accepts(tokens: int, width: int) -> bool:
    """Return whether the kernels compile for this many tokens of this width, by trying one of each kind."""
    if triton is None or tokens % ROWS or _chunk(width) < NARROWEST_CHUNK:
        return False
    shape = lambda *axes, dtype=jnp.float32: jax.ShapeDtypeStruct(axes, dtype)
    x, of_image = shape(1, tokens, width), shape(1, width)
    update = Update(shape(ROWS, width, dtype=jnp.bfloat16), shape(1, tokens, dtype=jnp.int32), of_image)

    def both(stream, hidden, kernel_out, bias_out, shift, scale):
        arguments = dict(capacity=ROWS, dtype=jnp.bfloat16)
        packed = pack(stream.x, (hidden, kernel_out, bias_out), (shift, scale), **arguments)
        waiting = dataclasses.replace(stream, attention=(stream.x, shift))
        return add_and_norm(waiting, shift, scale, dtype=jnp.bfloat16), packed

    try:
        jax.jit(both).lower(
            Stream(x, update), shape(1, tokens, ROWS), shape(ROWS), shape(1), of_image, of_image
        ).compile()
    except Exception as error:  # of the version of JAX, of Triton or of the device, in many ways
        logger.warning("Without kernels for GPUs, which cannot be had here: %s", " ".join(str(error).split())[:200])
        return False
    return True


def norm(stream: Stream, shift, scale, *, dtype):
    """Return the modulated norm [B,N,D] of a stream, in a dtype; shift and scale are of the modulation [B,D]."""
    _, normed = _add_and_norm(stream, (shift, scale), dtype=dtype, keep=False)
    return normed


def add(stream: Stream):
    """Return the tokens [B,N,D] of a stream with everything added."""
    x, _ = _add_and_norm(stream, None)
    return x


def add_and_norm(stream: Stream, shift, scale, *, dtype):
    """Return the tokens [B,N,D] of a stream with everything added, and their modulated norm in a dtype."""
    return _add_and_norm(stream, (shift, scale), dtype=dtype)


@lowered_once("capacity", "dtype")
def pack(x, router: tuple, modulation: tuple, *, capacity: int, dtype):
    """Route tokens; norm, modulate and pack the open ones.

    Args:
      x: tokens [B,N,D], float32.
      router: of the tokens what its first layer gives [B,N,R]; kernel and bias of its second layer, [R] and [1].
      modulation: shift and scale [B,D].
      capacity: R, rows for open tokens; those beyond get none.
      dtype: of the packed tokens.

    Returns:
      The packed tokens [R,D], arbitrary behind the last open one; the row of each token, negative where it has none,
      int32 [B,N]; the gates, float32 [B,N].
    """
    batch, tokens, width = x.shape
    rows = batch * tokens
    shape = jax.ShapeDtypeStruct
    # Behind the packed tokens the counter, whose first value it takes from the last argument.
    outputs = (
        shape((rows,), jnp.int32),
        shape((rows,), jnp.float32),
        shape((capacity, width), dtype),
        shape((1,), jnp.int32),
    )
    limit, zero = jnp.full(1, capacity, jnp.int32), jnp.zeros(1, jnp.int32)
    hidden, *last_layer = router
    inputs = _flat(x), (_flat(hidden), *last_layer), modulation, limit, zero
    aliases = {len(jax.tree.leaves(inputs)) - 1: len(outputs) - 1}
    row_of, gates, packed, _ = _call(_packing_kernel, outputs, (inputs,), rows=rows, tokens=tokens, aliases=aliases)
    return packed, row_of.reshape(batch, tokens), gates.reshape(batch, tokens)


@lowered_once("dtype", "keep")
def _add_and_norm(stream: Stream, modulation, *, dtype=None, keep: bool = True):
    """Return the new tokens, if they are to be kept, and the normed ones, if there is a modulation, else None each."""
    shape = stream.x.shape
    stream = stream.flat()
    outputs = (
        jax.ShapeDtypeStruct(stream.x.shape, jnp.float32) if keep else None,
        None if modulation is None else jax.ShapeDtypeStruct(stream.x.shape, dtype),
    )
    made = _call(_adding_kernel, outputs, (stream, modulation), rows=len(stream.x), tokens=shape[1])
    return jax.tree.map(lambda leaf: leaf.reshape(shape), made)


def _call(kernel, outputs, arguments: tuple, *, rows: int, tokens: int, aliases=None):
    # By `Element`: the code then does not say how many rows are packed, and one kernel serves every block.
    whole = lambda leaf: pl.BlockSpec(tuple(map(pl.Element, leaf.shape)), lambda _: (0,) * leaf.ndim)
    return pl.pallas_call(
        functools.partial(kernel, tokens=tokens),
        grid=(rows // ROWS,),
        in_specs=jax.tree.map(whole, arguments),
        out_specs=jax.tree.map(whole, outputs),
        out_shape=outputs,
        input_output_aliases=aliases or {},
        compiler_params=triton.CompilerParams(num_warps=ROWS, num_stages=1),
        interpret=jax.default_backend() != "gpu",  # for tests
    )(*arguments)


def _flat(x):
    return x.reshape(-1, x.shape[-1])


def _chunk(width: int) -> int:
    return math.gcd(width, WIDEST_CHUNK)


# --- In the kernels, whose arguments are references ----------------------------------------------


def _adding_kernel(stream, modulation, x, normed, *, tokens: int):
    """Write the tokens with everything added to x, and the normed ones to normed, where these are needed."""
    own = _Rows(tokens)
    parts = own.read(stream)
    if normed is not None:
        parts = list(parts)  # held until their mean is known
    if x is not None:
        for part, columns in parts:
            triton.store(x.at[own.index, columns], part)
    if normed is not None:
        own.write_normed(parts, modulation, normed, own.index)


def _packing_kernel(inputs, row_of, gates, packed, counter, *, tokens: int):
    """Write rows and gates of all tokens, and the normed open ones to their rows."""
    x, (hidden, kernel_out, bias_out), modulation, limit, _ = inputs
    own = _Rows(tokens)
    logits = own.product(hidden, kernel_out) + own.of_all(bias_out)  # [rows,1]
    is_open = (logits > 0).astype(jnp.int32)
    before = triton.atomic_add(counter, (jnp.int32(0),), is_open.sum())
    to, capacity = before + jnp.cumsum(is_open, axis=0) - 1, own.of_all(limit)
    placed = (is_open > 0) & (to < capacity)
    triton.store(row_of.at[own.index], jnp.where(placed, to, -1))
    triton.store(gates.at[own.index], is_open.astype(jnp.float32))
    to = jnp.where(placed, to, capacity)  # behind the last row, where nothing is written
    parts = list(own.read(Stream(x), wanted=placed))
    own.write_normed(parts, modulation, packed, to, wanted=placed)


class _Rows:
    """The rows of a program, all of one image.

    Indices are arrays of two axes, rows and columns, so that what they load is laid out alike over the threads.
    """

    def __init__(self, tokens: int):
        first = pl.program_id(0) * ROWS
        self.none = jnp.zeros((ROWS, 1), jnp.int32)
        self.index = first + jnp.arange(ROWS)[:, None]
        self.image = self.none + first // tokens

    def of_all(self, reference):
        """Return the only number of an array for each row [rows,1]."""
        return triton.load(reference.at[self.none])

    def product(self, left, right):
        """Return the product of the rows of left [*,R] with right [R]: [rows,1]."""
        size = right.shape[0]
        units = jnp.arange(pl.next_power_of_2(size))[None]
        inside = jnp.broadcast_to(units < size, (ROWS, units.shape[1]))
        load = lambda reference, *index: triton.load(reference.at[index], mask=inside, other=0.0)
        return (load(left, self.index, units) * load(right, self.none + units)).sum(1, keepdims=True)

    def read(self, stream: Stream, wanted=None) -> Iterator:
        """Yield the rows of a stream with everything added: pairs of [rows,chunk], float32, and its columns [1,chunk].

        Args:
          stream: with references.
          wanted: which rows are read, [rows,1]; None reads all.
        """
        width = stream.x.shape[1]
        chunk, update = _chunk(width), stream.update
        if update is not None and update.row_of is not None:
            row_of = triton.load(update.row_of.at[self.index])  # [rows,1]

        def load(reference, index, columns, where=None):
            if where is not None:
                where = jnp.broadcast_to(where, (ROWS, chunk))
            other = None if where is None else 0.0
            return triton.load(reference.at[index, columns], mask=where, other=other).astype(jnp.float32)

        for first in range(0, width, chunk):
            columns = first + jnp.arange(chunk)[None]
            part = load(stream.x, self.index, columns, wanted)
            if update is not None and update.row_of is None:
                part += load(update.gate, self.image, columns) * load(update.rows, self.index, columns)
            elif update is not None:
                made = load(update.rows, jnp.maximum(row_of, 0), columns, row_of >= 0)
                part += load(update.gate, self.image, columns) * made
            if stream.attention is not None:
                attended, gate = stream.attention
                part += load(gate, self.image, columns) * load(attended, self.index, columns)
            yield part, columns

    def write_normed(self, parts: list, modulation, output, index, wanted=None) -> None:
        """Norm and modulate rows.

        Args:
          parts: from `read`.
          modulation: references of shift and scale.
          output: where rows go.
          index: to which rows of it, [rows,1].
          wanted: which of them are written, [rows,1]; None writes all.
        """
        width = sum(columns.shape[1] for _, columns in parts)
        mean = sum(part for part, _ in parts).sum(1, keepdims=True) / width
        variance = sum((part - mean) ** 2 for part, _ in parts).sum(1, keepdims=True) / width
        inverse = jax.lax.rsqrt(variance + NORM_EPSILON)
        for part, columns in parts:
            shift, scale = (triton.load(reference.at[self.image, columns]) for reference in modulation)
            normed = ((part - mean) * inverse * (1 + scale) + shift).astype(output.dtype)
            where = None if wanted is None else jnp.broadcast_to(wanted, normed.shape)
            triton.store(output.at[index, columns], normed, mask=where)
