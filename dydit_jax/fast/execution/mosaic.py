"""Execution `mosaic`, experimental: kernels for TPUs that pack the open tokens of all images of a pass together.

It was checked in interpreted mode and compiled for several TPUs, but has never run on one. Two Pallas kernels do what a
block does to tokens around its MLP; they find and leave all tokens in fast memory:

    pack      norm, modulation; the open tokens go to their rows                      -> MLP
    spread    the MLP's result goes back and is added to the residual stream          -> the stream and its statistics

A TPU moves short rows best by a product with zeros and ones. One product packs a unit of `UNIT` tokens, all of one
image, into a window of the same number of rows. The window begins at a whole tile, which it may share with the units
before. While the matrix units pack one unit, the vector units norm the next; under XLA both would take turns.

There are no gradients. Where the kernels are not available, `accepts` logs it once, and other executions serve.
"""

import dataclasses
import functools
import logging
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dydit_jax.fast.execution.xla import PackedExecution
from dydit_jax.models.execution import MLPStep, running_counts
from dydit_jax.models.layers import modulated_norm_thrice, single_pass_statistics
from dydit_jax.models.routing import straight_through_gate
from dydit_jax.runtime.sharding import run_without_mesh

logger = logging.getLogger(__name__)

UNIT = 128  # tokens that one product packs: as deep as a TPU's matrix units
NOWHERE = -2 * UNIT  # outside of every window
TILE = 8  # rows
UNITS_AT_ONCE = 4  # of a round of a kernel's loop, whose parts are scheduled together


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Stream:
    """The residual stream: tokens x [B,N,D], float32, and their mean and mean square [B,N], where known."""

    x: jax.Array
    statistics: tuple | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """The rows of packed tokens, int32: each unit's first row [U]; order in the unit [U,n], `NOWHERE` if closed."""

    first: jax.Array
    order: jax.Array


class Mosaic(PackedExecution):
    """Open tokens of all images of a pass share one capacity, packed by kernels."""

    name = "mosaic"

    @classmethod
    def available(cls, model, images: int) -> bool:
        """Return whether the kernels are available: on a TPU, for so many images, with routers, without top-k."""
        config = model.config
        suits = model.platform == "tpu" and config.routers != "none" and not config.token_capacity
        return suits and accepts(images, config.tokens, config.width, model.dtype)

    def least_capacity(self, tokens: int) -> int:
        """Return the rows of one unit."""
        return unit_size(tokens)

    def rows_needed(self, gates):
        """Return the share of rows that the units of each layer take."""
        return jnp.minimum(1, rows_reserved(gates.swapaxes(0, 1)).sum(-1) / gates[:, 0].size)

    def enter(self, tokens):
        """Return the stream of tokens [B,N,D]."""
        return Stream(tokens)

    def norm(self, stream, shift, scale, *, dtype):
        """Return the modulated norm three times, for queries, keys and values."""
        thrice = modulated_norm_thrice(stream.x, shift, scale, stream.statistics)
        return tuple(normed.astype(dtype) for normed in thrice)

    def add(self, stream, attended, gate):
        """Return the stream with the result of attention added."""
        return Stream(stream.x + gate[:, None] * attended)

    def update(self, stream, step: MLPStep) -> tuple:
        """Route, pack, run the MLP, spread."""
        batch, tokens, _ = stream.x.shape
        [capacity] = self.capacity
        if capacity == batch * tokens:
            x, gates = super().update(stream.x, step)
            return Stream(x), gates
        gates = straight_through_gate(step.logits(stream.x), None)
        rows = rows_of(gates, capacity=capacity)
        packed = pack(stream.x, rows, step.shift, step.scale, capacity=capacity, dtype=step.dtype)
        return spread(stream.x, step.mlp(packed[None])[0], rows, step.gate), gates

    def leave(self, stream):
        """Return the tokens [B,N,D]."""
        return stream.x


def unit_size(tokens: int) -> int:
    """Return the number of tokens in a unit, for images of so many tokens."""
    return math.gcd(tokens, UNIT)


@functools.cache
def accepts(images: int, tokens: int, width: int, dtype) -> bool:
    """Return whether the kernels compile for so many images of a pass, by trying."""
    shape = lambda *axes, dtype=jnp.float32: jax.ShapeDtypeStruct(axes, dtype)
    capacity = images * tokens

    def both(x, gates, made, vector):
        rows = rows_of(gates, capacity=capacity)
        packed = pack(x, rows, vector, vector, capacity=capacity, dtype=dtype)
        return packed, spread(x, made, rows, vector)

    arguments = shape(images, tokens, width), shape(images, tokens), shape(capacity, width, dtype=dtype)
    compiled = lambda: jax.jit(both).lower(*arguments, shape(images, width)).compile()
    try:
        run_without_mesh(compiled)
    except Exception as error:  # of the version of JAX, of its compiler or of the device, in many ways
        logger.warning("Without kernels for TPUs, which cannot be had here: %s", " ".join(str(error).split())[:200])
        return False
    return True


def rows_reserved(gates):
    """Return the rows that units of tokens take, [...,U], from their gates [...,B,N].

    One for each open token, or a whole unit where these might reach beyond a window that begins at the first tile.
    """
    is_open = _by_units(gates > 0)
    size, counts = is_open.shape[-1], is_open.sum(-1, dtype=jnp.int32)
    return jnp.where(counts > size - math.gcd(TILE, size), size, counts)


def rows_of(gates, *, capacity: int) -> Rows:
    """Assign rows to the open tokens of gates [B,N]; meaningless where they need more than the capacity.

    Units that take a whole unit's rows come first: each has its own window. The others follow without a gap.
    """
    is_open = _by_units(gates > 0)  # [U,n]
    size, reserved = is_open.shape[1], rows_reserved(gates)
    whole = reserved == size
    before = lambda rows: jnp.cumsum(rows) - rows
    wholes, others = jnp.where(whole, size, 0), jnp.where(whole, 0, reserved)
    first = jnp.where(whole, before(wholes), wholes.sum() + before(others))
    order = jnp.where(is_open, running_counts(is_open) - 1, NOWHERE)
    return Rows(jnp.minimum(first, capacity).astype(jnp.int32), order)


def _by_units(gates):
    """Return [...,B,N] as [...,U,n]."""
    return gates.reshape(*gates.shape[:-2], -1, unit_size(gates.shape[-1]))


def pack(x, rows: Rows, shift, scale, *, capacity: int, dtype):
    """Norm, modulate and pack the tokens that have a row.

    Args:
      x: tokens [B,N,D], float32.
      rows: of them.
      shift, scale: of the modulation [B,D].
      capacity: R, a multiple of `TILE` and at least a unit's tokens.
      dtype: of the result.

    Returns:
      [R,D], arbitrary where no token has its row.
    """
    statistics = tuple(_by_units(statistic[..., 0]) for statistic in single_pass_statistics(x))
    return _pack(x, rows, statistics, shift, scale, capacity=capacity, dtype=dtype)


@functools.partial(jax.jit, static_argnames=("capacity", "dtype"))
def _pack(x, rows, statistics: tuple, shift, scale, *, capacity: int, dtype):
    reach = capacity + rows.order.shape[1]  # the last window may reach beyond the capacity
    result = jax.ShapeDtypeStruct((reach, x.shape[-1]), dtype)
    arguments = rows.first, rows.order, x.reshape(-1, x.shape[-1]), *statistics, shift, scale
    [packed] = _call(_packing_kernel, [result], arguments)
    return packed[:capacity]


@jax.jit
def spread(x, made, rows: Rows, gate) -> Stream:
    """Add the MLP's result for packed tokens to the residual stream.

    Args:
      x: tokens [B,N,D], float32.
      made: that result [R,D].
      rows: of the tokens.
      gate: of the modulation [B,D].

    Returns:
      The new tokens, with their statistics.
    """
    shape, flat = x.shape, x.reshape(-1, x.shape[-1])
    result, statistic = (jax.ShapeDtypeStruct(axes, x.dtype) for axes in (flat.shape, rows.order.shape))
    arguments = rows.first, rows.order, flat, made, gate
    # Were it in place, a v6e's compiler would keep the stream of a deep network in the slow memory.
    x, *statistics = _call(_spreading_kernel, [result, statistic, statistic], arguments)
    return Stream(x.reshape(shape), tuple(leaf.reshape(shape[:2]) for leaf in statistics))


def _call(kernel, results, arguments: tuple):
    """Call a kernel on arrays that lie, but for the first argument, in fast memory as a whole."""
    in_fast_memory = lambda leaf: pltpu.VMEM(leaf.shape, leaf.dtype)
    of_scalars, whole = pl.BlockSpec(memory_space=pltpu.SMEM), pl.BlockSpec(memory_space=pltpu.VMEM)

    def call(scalars, *rest, interpret: bool):
        if not interpret:
            rest = [pltpu.with_memory_space_constraint(leaf, pltpu.VMEM) for leaf in rest]
        return pl.pallas_call(
            kernel,
            out_shape=[leaf if interpret else in_fast_memory(leaf) for leaf in results],
            in_specs=[of_scalars, *[whole] * len(rest)],
            out_specs=[whole] * len(results),
            interpret=interpret,
            name=kernel.__name__.strip("_"),
        )(scalars, *rest)

    # By the platform that it is lowered for: a program for TPUs may be compiled on another machine.
    compiled, interpreted = (functools.partial(call, interpret=interpret) for interpret in (False, True))
    return jax.lax.platform_dependent(*arguments, tpu=compiled, default=interpreted)


# --- In the kernels, whose arguments are references ----------------------------------------------


def _packing_kernel(first, order, x, mean, inverse, shift, scale, packed):
    """Write the open tokens, normed and modulated, to their rows."""
    size = order.shape[1]
    tile = math.gcd(TILE, size)
    exact = jax.lax.Precision.HIGHEST if packed.dtype == jnp.float32 else None

    def pack_unit(unit):
        tokens, image = _tokens_of(unit, order, x, shift)
        start = _down_to_tile(first[unit], tile)
        column = lambda rows: rows[pl.ds(unit, 1), :].reshape(size, 1)
        normed = (x[tokens, :] - column(mean)) * column(inverse)
        modulated = normed * (1 + scale[image, :]) + shift[image, :]
        offset = first[unit] - start
        chosen = _chosen(order, unit, offset).astype(packed.dtype)
        rows = jax.lax.dot(
            chosen, modulated.astype(packed.dtype), precision=exact, preferred_element_type=jnp.float32
        ).astype(packed.dtype)
        shared, own = pl.ds(start, tile), pl.ds(pl.multiple_of(start + tile, tile), size - tile)
        of_others = jax.lax.broadcasted_iota(jnp.int32, (tile, 1), 0) < offset
        packed[shared, :] = jnp.where(of_others, packed[shared, :], rows[:tile])
        # Rows behind a unit's own are for those to come, and zeros until then: what is read again must be finite.
        packed[own, :] = rows[tile:]

    _for_each_unit(pack_unit, len(order))


def _spreading_kernel(first, order, x, made, gate, result, mean, square):
    """Write tokens with the MLP's result added, and the means of them and of their squares."""
    size = order.shape[1]
    tile = math.gcd(TILE, size)
    exact = jax.lax.Precision.HIGHEST if made.dtype == jnp.float32 else None

    def spread_unit(unit):
        tokens, image = _tokens_of(unit, order, x, gate)
        start = jnp.minimum(_down_to_tile(first[unit], tile), made.shape[0] - size)
        start = pl.multiple_of(start, tile)
        chosen = _chosen(order, unit, first[unit] - start).astype(made.dtype)  # [rows,tokens]
        contract_rows = (((0,), (0,)), ((), ()))
        rows = jax.lax.dot_general(
            chosen, made[pl.ds(start, size), :], contract_rows, precision=exact, preferred_element_type=jnp.float32
        )
        new = x[tokens, :] + gate[image, :] * rows
        result[tokens, :] = new
        row = lambda column: column.reshape(1, size)
        mean[pl.ds(unit, 1), :] = row(new.mean(1, keepdims=True))
        square[pl.ds(unit, 1), :] = row((new * new).mean(1, keepdims=True))

    _for_each_unit(spread_unit, len(order))


def _for_each_unit(run, units: int) -> None:
    at_once = math.gcd(units, UNITS_AT_ONCE)

    def round_of_units(number, _):
        for unit in range(at_once):
            run(number * at_once + unit)

    jax.lax.fori_loop(0, units // at_once, round_of_units, None)


def _tokens_of(unit, order, x, of_images):
    """Return the rows of a unit's tokens and of its image."""
    units, size = order.shape
    image = jax.lax.div(unit, units // of_images.shape[0])
    return pl.ds(pl.multiple_of(unit * size, size), size), pl.ds(image, 1)


def _down_to_tile(row, tile: int):
    return pl.multiple_of(row - jax.lax.rem(row, tile), tile)


def _chosen(order, unit, offset):
    """Return for each row of a unit's window and each of its tokens whether they belong together [rows,tokens]."""
    size = order.shape[1]
    return order[pl.ds(unit, 1), :] + offset == jax.lax.broadcasted_iota(jnp.int32, (size, size), 0)
