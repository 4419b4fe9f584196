"""The kernels of the execution `triton`, and the stream that they read: see `triton`.

Arguments of a kernel are references: what it reads, then what it writes. A program has some rows, all of one image.
"""

import dataclasses
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from dydit_jax.models.layers import NORM_EPSILON

try:
    from jax.experimental.pallas import triton
except ImportError:
    triton = None

ROWS = 4  # of a program, and its warps. A warp that loads four numbers per thread needs no exchange between threads.
WIDEST_CHUNK = 128  # of the width that is loaded at once, like all sizes in Triton a power of two
NARROWEST_CHUNK = 32
# Of a program whose product wants many rows: all that run at once hold their sums in registers (ptxas: none spilled).
ROUTED_ROWS, ROUTED_CHUNK, ROUTING_WARPS = 64, 64, 4
LEAST_ROWS_OF_PRODUCT = 16


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
            update = dataclasses.replace(update, rows=flat(update.rows))
        elif update is not None:
            update = dataclasses.replace(update, row_of=update.row_of.reshape(-1))
        attention = None if self.attention is None else (flat(self.attention[0]), self.attention[1])
        return Stream(flat(self.x), update, attention)


def flat(x):
    """Return [B,N,D] as [B*N,D]."""
    return x.reshape(-1, x.shape[-1])


def chunk_of(width: int) -> int:
    """Return how many columns are loaded at once."""
    return math.gcd(width, WIDEST_CHUNK)


def rows_of_routing(tokens: int) -> int:
    """Return the rows of a program of `routing_kernel`, for images of so many tokens."""
    return math.gcd(tokens, ROUTED_ROWS)


def adding_kernel(stream, modulation, x, normed, counter, *, tokens: int):
    """Write the tokens with everything added to x, the normed ones to normed, a zero to counter, as far as needed."""
    own = _Rows(tokens)
    if counter is not None:
        _reset(counter)
    parts = own.read(stream)
    if normed is not None:
        parts = list(parts)  # held until their mean is known
    if x is not None:
        for part, columns in parts:
            triton.store(x.at[own.index, columns], part)
    if normed is not None:
        own.write_normed(parts, modulation, normed, own.index)


def routing_kernel(stream, layers, x, logits, counter, *, tokens: int):
    """Write the tokens with everything added, their logits, and a zero to the counter."""
    kernel_in, bias_in, kernel_out, bias_out = layers
    own = _Rows(tokens, rows_of_routing(tokens))
    size = bias_in.shape[0]
    units = jnp.arange(pl.next_power_of_2(size))[None]  # [1,R]
    _reset(counter)
    chunk, row_of = math.gcd(x.shape[1], ROUTED_CHUNK), own.row_of(stream)
    where = jnp.broadcast_to(units < size, (chunk, units.shape[1]))

    def add_columns(number, hidden):
        columns = number * chunk + jnp.arange(chunk)
        part = own.read_columns(stream, columns[None], row_of)
        triton.store(x.at[own.index, columns[None]], part)
        kernel = triton.load(kernel_in.at[columns[:, None], units], mask=where, other=0.0)  # [chunk,R]
        return hidden + jnp.dot(part, kernel, precision="high")

    nothing = jnp.zeros((own.count, units.shape[1]), jnp.float32)
    hidden = jax.lax.fori_loop(0, x.shape[1] // chunk, add_columns, nothing)
    of_unit = lambda reference: triton.load(reference.at[units], mask=units < size, other=0.0)
    hidden = jnp.maximum(hidden + of_unit(bias_in), 0)
    made = (hidden * of_unit(kernel_out)).sum(1, keepdims=True) + own.of_all(bias_out)
    triton.store(logits.at[own.index], made)


def packing_kernel(inputs, row_of, gates, packed, counter, *, tokens: int):
    """Write rows and gates of all tokens, and the normed open ones to their rows."""
    x, router, modulation, limit, _ = inputs
    own = _Rows(tokens)
    if isinstance(router, tuple):
        hidden, kernel_out, bias_out = router
        logits = own.product(hidden, kernel_out) + own.of_all(bias_out)  # [rows,1]
    else:
        logits = triton.load(router.at[own.index])
    is_open = (logits > 0).astype(jnp.int32)
    before = triton.atomic_add(counter, (jnp.int32(0),), is_open.sum())
    to, capacity = before + jnp.cumsum(is_open, axis=0) - 1, own.of_all(limit)
    placed = (is_open > 0) & (to < capacity)
    triton.store(row_of.at[own.index], jnp.where(placed, to, -1))
    triton.store(gates.at[own.index], is_open.astype(jnp.float32))
    to = jnp.where(placed, to, capacity)  # behind the last row, where nothing is written
    parts = list(own.read(Stream(x), wanted=placed))
    own.write_normed(parts, modulation, packed, to, wanted=placed)


def _reset(counter) -> None:
    zero = jnp.zeros(1, jnp.int32)
    triton.store(counter.at[zero], zero)


class _Rows:
    """The rows of a program, all of one image.

    Indices are arrays of two axes, rows and columns, so that what they load is laid out alike over the threads.
    """

    def __init__(self, tokens: int, count: int = ROWS):
        first = pl.program_id(0) * count
        self.count = count
        self.none = jnp.zeros((count, 1), jnp.int32)
        self.index = first + jnp.arange(count)[:, None]
        self.image = self.none + first // tokens

    def of_all(self, reference):
        """Return the only number of an array for each row [rows,1]."""
        return triton.load(reference.at[self.none])

    def product(self, left, right):
        """Return the product of the rows of left [*,R] with right [R]: [rows,1]."""
        size = right.shape[0]
        units = jnp.arange(pl.next_power_of_2(size))[None]
        inside = jnp.broadcast_to(units < size, (self.count, units.shape[1]))
        load = lambda reference, *index: triton.load(reference.at[index], mask=inside, other=0.0)
        return (load(left, self.index, units) * load(right, self.none + units)).sum(1, keepdims=True)

    def read(self, stream: Stream, wanted=None) -> Iterator:
        """Yield the rows of a stream with everything added: pairs of [rows,chunk], float32, and its columns [1,chunk].

        Args:
          stream: with references.
          wanted: which rows are read, [rows,1]; None reads all.
        """
        width = stream.x.shape[1]
        chunk, row_of = chunk_of(width), self.row_of(stream)
        for first in range(0, width, chunk):
            columns = first + jnp.arange(chunk)[None]
            yield self.read_columns(stream, columns, row_of, wanted), columns

    def row_of(self, stream: Stream):
        """Return the packed rows of the last MLP's result [rows,1], None where none are packed."""
        update = stream.update
        packed = update is not None and update.row_of is not None
        return triton.load(update.row_of.at[self.index]) if packed else None

    def read_columns(self, stream: Stream, columns, row_of, wanted=None):
        """Return some columns [1,chunk] of the rows with everything added, float32 [rows,chunk].

        Args:
          stream, wanted: as for `read`.
          columns: numbers.
          row_of: from the method of this name.
        """
        update = stream.update

        def load(reference, index, where=None):
            if where is not None:
                where = jnp.broadcast_to(where, (self.count, columns.shape[1]))
            other = None if where is None else 0.0
            return triton.load(reference.at[index, columns], mask=where, other=other).astype(jnp.float32)

        part = load(stream.x, self.index, wanted)
        if row_of is not None:
            made = load(update.rows, jnp.maximum(row_of, 0), row_of >= 0)
            part += load(update.gate, self.image) * made
        elif update is not None:
            part += load(update.gate, self.image) * load(update.rows, self.index)
        if stream.attention is not None:
            attended, gate = stream.attention
            part += load(gate, self.image) * load(attended, self.index)
        return part

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
