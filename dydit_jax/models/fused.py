"""Kernels for GPUs: all that happens to a token between two products of a block, in one pass over it.

Norms, residuals, routing and packing move bytes and hardly compute. Beside narrowed products they weigh much, since
XLA reads and writes the tokens more often than must be. Here, in Pallas for Triton, a row of a program is a warp's and
stays in its registers:

    norm            what the last MLP made is added; norm, modulation        -> attention
    add             that, and what attention made, is added                  -> the new residual stream, and the router
    pack            gates; norm and modulation of the tokens that are on     -> MLP
    add_and_norm    as `add` and `norm` of the sum, where all tokens are on  -> the new residual stream, and the MLP

An MLP's result stays as it is, packed, until a kernel that reads the tokens anyway adds it: `Stream`.

Packed rows are dealt out by a counter that all programs share, in an order of chance. No result depends on it: rows are
computed each by itself. There are no gradients. JAX means to drop this backend of Pallas one day; where it is missing,
or refuses, `accepts` says so once, and blocks run as XLA fuses them.
"""

import concurrent.futures
import dataclasses
import functools
import logging
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from dydit_jax.models.layers import NORM_EPSILON
from dydit_jax.runtime.settings import own_settings

try:
    from jax.experimental.pallas import triton
except ImportError:
    triton = None

logger = logging.getLogger(__name__)

CUSTOM_CALLS = ("__gpu$xla.gpu.triton",)  # what a kernel is to XLA
ROWS = 4  # of a program, and its warps. A warp that loads four numbers per thread needs no exchange between threads.
WIDEST_CHUNK = 128  # of the width that is loaded at once, like all sizes in Triton a power of two
NARROWEST_CHUNK = 32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Update:
    """What an MLP made and is still to be added to the residual stream.

    Attributes:
      rows: [B,N,D] of all tokens, or [P,D] of those that are on.
      places: of each token among the packed rows, negative where it has none [B,N]; None where rows are of all tokens.
      gate: of the modulation [B,D].
    """

    rows: jax.Array
    places: jax.Array | None
    gate: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Stream:
    """The residual stream: tokens x [B,N,D], float32, and what is still to be added to them."""

    x: jax.Array
    update: Update | None = None

    def settled(self):
        """Return the tokens [B,N,D] with everything added."""
        if self.update is None:
            return self.x
        rows, places = self.update.rows, self.update.places
        if places is not None:
            rows = jnp.where(places[..., None] >= 0, rows.at[places].get(mode="clip"), 0)
        return self.x + self.update.gate[:, None] * rows

    def flat(self) -> "Stream":
        """Return it with one axis of all tokens instead of [B,N]."""
        update = self.update
        if update is not None and update.places is None:
            update = dataclasses.replace(update, rows=_flat(update.rows))
        elif update is not None:
            update = dataclasses.replace(update, places=update.places.reshape(-1))
        return Stream(_flat(self.x), update)


@functools.cache
def accepts(tokens: int, width: int) -> bool:
    """Tell whether the kernels can be had for this many tokens of this width, by compiling one of each kind."""
    if triton is None or tokens % ROWS or _chunk(width) < NARROWEST_CHUNK:
        return False
    shape = lambda *axes, dtype=jnp.float32: jax.ShapeDtypeStruct(axes, dtype)
    x, of_image = shape(1, tokens, width), shape(1, width)
    update = Update(shape(ROWS, width, dtype=jnp.bfloat16), shape(1, tokens, dtype=jnp.int32), of_image)

    def both(stream, hidden, kernel_out, bias_out, shift, scale):
        arguments = dict(capacity=ROWS, dtype=jnp.bfloat16)
        packed = pack(stream.x, hidden, kernel_out, bias_out, shift, scale, **arguments)
        return add_and_norm(stream, stream.x, shift, shift, scale, dtype=jnp.bfloat16), packed

    try:
        jax.jit(both).lower(
            Stream(x, update), shape(1, tokens, ROWS), shape(ROWS), shape(1), of_image, of_image
        ).compile()
    except Exception as error:  # of the version of JAX, of Triton or of the device, in many ways
        logger.warning("Without kernels for GPUs, which cannot be had here: %s", " ".join(str(error).split())[:200])
        return False
    return True


def norm(stream: Stream, shift, scale, *, dtype):
    """Norm and modulate the tokens of a stream.

    Args:
      stream: of tokens [B,N,D].
      shift, scale: of the modulation [B,D].
      dtype: of the result.

    Returns:
      [B,N,D].
    """
    _, normed = _add_and_norm(stream, None, (shift, scale), dtype=dtype, keep=False)
    return normed


def add(stream: Stream, attended, gate):
    """Add what attention made, [B,N,D], times a gate of the modulation [B,D]; return the new tokens [B,N,D]."""
    x, _ = _add_and_norm(stream, (_flat(attended), gate), None)
    return x


def add_and_norm(stream: Stream, attended, gate, shift, scale, *, dtype):
    """Add as `add` does; norm and modulate the sum as `norm` does; return both."""
    return _add_and_norm(stream, (_flat(attended), gate), (shift, scale), dtype=dtype)


def _lowered_once(*static_argnames: str):
    """Make a function's calls share what it lowers to, those of the same shapes and settings, in whatever programs.

    Lowering a kernel takes JAX longer than all else of a block, and a run has many programs of many blocks.

    Args:
      static_argnames: of the settings, all given by name.
    """

    def decorate(function):
        jitted = jax.jit(function, static_argnames=static_argnames)

        @functools.cache
        @own_settings()
        def lowered(structure, shapes, settings):
            arguments = jax.tree.unflatten(structure, [jax.ShapeDtypeStruct(*shape) for shape in shapes])
            checks = [jax.export.DisabledSafetyCheck.custom_call(name) for name in CUSTOM_CALLS]  # it is never stored
            return jax.jit(jax.export.export(jitted, disabled_checks=checks)(*arguments, **dict(settings)).call)

        @functools.wraps(function)
        def call(*arguments, **settings):
            leaves, structure = jax.tree.flatten(arguments)
            shapes = tuple((leaf.shape, leaf.dtype) for leaf in leaves)
            key = structure, shapes, tuple(settings.items())
            return _lowering.submit(lowered, *key).result()(*arguments)

        return call

    return decorate


# A thread of its own, which does not know the mesh that a caller is traced for, and in which nothing is lowered twice.
_lowering = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="kernels")


@_lowered_once("capacity", "dtype")
def pack(x, hidden, kernel_out, bias_out, shift, scale, *, capacity: int, dtype):
    """Route tokens; norm, modulate and pack those that are on.

    Args:
      x: tokens [B,N,D], float32.
      hidden: what the first layer of the router makes of them [B,N,R].
      kernel_out, bias_out: of its second layer, [R] and [1].
      shift, scale: of the modulation [B,D].
      capacity: P, places for tokens that are on; those beyond get none.
      dtype: of the packed tokens.

    Returns:
      The packed tokens [P,D], arbitrary behind the last that is on; the place of each token, negative where it has
      none, int32 [B,N]; the gates, float32 [B,N].
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
    arguments = _flat(x), _flat(hidden), kernel_out, bias_out, shift, scale, limit, zero
    aliases = {len(arguments) - 1: len(outputs) - 1}
    places, gates, packed, _ = _call(_packing_kernel, outputs, arguments, rows=rows, tokens=tokens, aliases=aliases)
    return packed, places.reshape(batch, tokens), gates.reshape(batch, tokens)


@_lowered_once("dtype", "keep")
def _add_and_norm(stream: Stream, attention, modulation, *, dtype=None, keep: bool = True):
    """Return the new tokens, if they are to be kept, and the normed ones, if there is a modulation, else None each."""
    shape = stream.x.shape
    stream = stream.flat()
    outputs = (
        jax.ShapeDtypeStruct(stream.x.shape, jnp.float32) if keep else None,
        None if modulation is None else jax.ShapeDtypeStruct(stream.x.shape, dtype),
    )
    arguments = stream, attention, modulation
    made = _call(_adding_kernel, outputs, arguments, rows=len(stream.x), tokens=shape[1])
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


def _adding_kernel(stream, attention, modulation, x, normed, *, tokens: int):
    """Write the tokens with everything added to x, and normed ones to normed, where these are wanted."""
    own = _Rows(tokens)
    parts = own.read(stream, attention)
    if normed is not None:
        parts = list(parts)  # held until their mean is known
    if x is not None:
        for part, columns in parts:
            triton.store(x.at[own.index, columns], part)
    if normed is not None:
        own.write_normed(parts, modulation, normed, own.index)


def _packing_kernel(
    x, hidden, kernel_out, bias_out, shift, scale, limit, _, places, gates, packed, counter, *, tokens: int
):
    """Write places and gates of all tokens, and normed those that are on to their places."""
    own = _Rows(tokens)
    logits = own.product(hidden, kernel_out) + own.of_all(bias_out)  # [rows,1]
    is_open = (logits > 0).astype(jnp.int32)
    before = triton.atomic_add(counter, (jnp.int32(0),), is_open.sum())
    to, capacity = before + jnp.cumsum(is_open, axis=0) - 1, own.of_all(limit)
    placed = (is_open > 0) & (to < capacity)
    triton.store(places.at[own.index], jnp.where(placed, to, -1))
    triton.store(gates.at[own.index], is_open.astype(jnp.float32))
    to = jnp.where(placed, to, capacity)  # behind the last row, where nothing is written
    parts = list(own.read(Stream(x), None, wanted=placed))
    own.write_normed(parts, (shift, scale), packed, to, wanted=placed)


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

    def read(self, stream, attention, wanted=None) -> Iterator:
        """Yield the rows of a stream with everything added: pairs of [rows,chunk], float32, and its columns [1,chunk].

        Args:
          stream: with references.
          attention: what it made, and its gate; or None.
          wanted: which rows are read, [rows,1]; None reads all.
        """
        width = stream.x.shape[1]
        chunk, update = _chunk(width), stream.update
        if update is not None and update.places is not None:
            places = triton.load(update.places.at[self.index])  # [rows,1]

        def load(reference, index, columns, where=None):
            if where is not None:
                where = jnp.broadcast_to(where, (ROWS, chunk))
            other = None if where is None else 0.0
            return triton.load(reference.at[index, columns], mask=where, other=other).astype(jnp.float32)

        for first in range(0, width, chunk):
            columns = first + jnp.arange(chunk)[None]
            part = load(stream.x, self.index, columns, wanted)
            if update is not None and update.places is None:
                part += load(update.gate, self.image, columns) * load(update.rows, self.index, columns)
            elif update is not None:
                made = load(update.rows, jnp.maximum(places, 0), columns, places >= 0)
                part += load(update.gate, self.image, columns) * made
            if attention is not None:
                attended, gate = attention
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
