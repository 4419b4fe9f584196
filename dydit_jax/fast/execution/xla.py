"""Executions that XLA compiles: pack the open tokens, run the MLP on them, spread the result.

    switch    the tokens of the batch are packed to the front; a layer takes the smallest of a few capacities that holds
              them, the last of which is the whole batch. For CPUs: a branch costs nothing there.
    gather    packed likewise, into one capacity per layer
    one_hot   each image packs its own tokens into one capacity per layer, by a product with zeros and ones. For TPUs:
              a branch inside a block, or a gather of short rows, breaks the fusions around it.

With one capacity per layer a step may overflow. The runner then computes the segment again, densely: an overflow costs
time, never exactness.

Never under `vmap`: a branch that is mapped becomes a selection, and every branch is computed.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from dydit_jax.models.execution import TokenExecution, run_on_rows, running_counts
from dydit_jax.models.layers import modulated_norm_thrice

UNIFORM_CAPACITIES = 8  # of `switch`, where nothing is known about the counts
CALIBRATED_CAPACITIES = 4  # of `switch`, beside the whole batch
SWITCH_MARGIN = 0.05  # of all tokens
SEEN_WEIGHT = 5  # against 1 for a step that needs the margin: the next capacity is only a branch away
ROW_MULTIPLE = 8  # rows of a TPU's tile
# Capacities of a whole pass are rounded to 1/128 of its rows: every distinct shape costs a GPU an autotuning pass.
CAPACITY_STEPS = 128


class PackedExecution(TokenExecution):
    """One capacity per layer, shared by all images of a pass; what does not fit makes the pass void."""

    may_overflow = True

    def required_shares(self, usage, images: int) -> np.ndarray:
        """Return a bound that other images will hardly exceed: a single capacity must hold whatever comes."""
        return usage.upper_bound(self.packed_together(images))

    def packed_together(self, images: int) -> int:
        """Return how many of a pass's images share their rows."""
        return images

    def choose_capacity(self, shares, *, images: int, tokens: int) -> tuple[int, ...]:
        """Choose one number of rows that holds every step of the segment; all of them where nothing is known."""
        rows = self.rows(images, tokens)
        if shares is None:
            return (rows,)
        wanted = max(self.least_capacity(tokens), rows * np.max(shares))
        return round_capacities([wanted], rows, self.capacity_multiple(rows))

    def least_capacity(self, tokens: int) -> int:
        """Return the smallest capacity that the execution can run."""
        return 1

    def capacity_multiple(self, rows: int) -> int:
        """Return what a capacity is a multiple of."""
        return max(ROW_MULTIPLE, rows // CAPACITY_STEPS)

    def rows(self, images: int, tokens: int) -> int:
        """Return how many rows there are for all tokens that share them."""
        return images * tokens

    def overflowed(self, needed, *, images: int, tokens: int) -> np.ndarray:
        """Return where more rows were needed than the capacity has."""
        return np.rint(needed * self.rows(images, tokens)) > self.capacity[-1]

    def rows_run(self, needed, *, images: int, tokens: int) -> np.ndarray:
        """Return the rows of the capacity, whatever is needed."""
        packs = images * tokens // self.rows(images, tokens)
        return np.full(np.shape(needed), packs * self.capacity[-1])


class Gather(PackedExecution):
    """Tokens are packed by index, into one capacity."""

    name = "gather"

    def run(self, function, tokens, gates, ranks):
        """Apply the function to the open tokens; meaningless where more are open than the capacity has rows."""
        batch, count, _ = tokens.shape
        if self.capacity == (batch * count,):
            return super().run(function, tokens, gates, ranks)
        return _run_packed(function, tokens, gates, self.capacity)


class Switch(Gather):
    """As `gather`, with several capacities, of which the last holds everything."""

    name = "switch"
    may_overflow = False

    def required_shares(self, usage, images: int) -> np.ndarray:
        """Return what was seen on average, and where that once fell short the most, so that it does not again."""
        return np.maximum(usage.mean, usage.max_rows)

    def choose_capacity(self, shares, *, images: int, tokens: int) -> tuple[int, ...]:
        """Choose capacities that leave the fewest rows unused over the steps, evenly spaced ones without shares."""
        rows = self.rows(images, tokens)
        if shares is None:
            wanted = rows * np.arange(1, UNIFORM_CAPACITIES + 1) / UNIFORM_CAPACITIES
            return round_capacities([*wanted, rows], rows)
        return _calibrated_capacities(tuple(np.asarray(shares).tolist()), rows)

    def overflowed(self, needed, *, images: int, tokens: int) -> np.ndarray:
        """Return where more rows were needed than the largest capacity below all; the layer then ran on all."""
        largest = self.capacity[-2] if len(self.capacity) > 1 else self.capacity[-1]
        return np.rint(needed * self.rows(images, tokens)) > largest

    def rows_run(self, needed, *, images: int, tokens: int) -> np.ndarray:
        """Return the smallest capacity that holds what was needed."""
        wanted = np.rint(np.asarray(needed) * self.rows(images, tokens))
        return np.asarray(self.capacity)[np.searchsorted(self.capacity, wanted)]


class OneHot(PackedExecution):
    """Each image packs its own tokens, by a product with zeros and ones."""

    name = "one_hot"

    def packed_together(self, images: int) -> int:
        """Return 1: images do not share rows."""
        return 1

    def capacity_multiple(self, rows: int) -> int:
        """Return the rows of a tile."""
        return ROW_MULTIPLE

    def rows(self, images: int, tokens: int) -> int:
        """Return the tokens of one image."""
        return tokens

    def rows_needed(self, gates):
        """Return the share of the image that has most open, in each layer."""
        return gates.mean(-1).max(0)

    def norm(self, stream, shift, scale, *, dtype):
        """Return the modulated norm three times on a TPU, for queries, keys and values."""
        if self.platform != "tpu":
            return super().norm(stream, shift, scale, dtype=dtype)
        return tuple(normed.astype(dtype) for normed in modulated_norm_thrice(stream, shift, scale))

    def run(self, function, tokens, gates, ranks):
        """Apply the function to the open tokens; meaningless where an image has more than its capacity."""
        count = tokens.shape[1]
        if self.capacity == (count,):
            return super().run(function, tokens, gates, ranks)
        rows = jnp.where(gates > 0, running_counts(gates) - 1, count)
        on_rows = functools.partial(_run_as_one_list, function)
        return run_on_rows(on_rows, tokens, gates, rows, capacity=self.capacity[0], platform="tpu")


def round_capacities(wanted, rows: int, multiple: int = ROW_MULTIPLE) -> tuple[int, ...]:
    """Round capacities up to a multiple, at most all rows; ascending, each once."""
    sizes = np.minimum(rows, np.ceil(np.asarray(wanted) / multiple).astype(int) * multiple)
    return tuple(sorted(set(sizes.tolist())))


@functools.lru_cache(maxsize=4096)  # of all segments and layers: chosen once, not once per batch
def _calibrated_capacities(shares: tuple[float, ...], rows: int) -> tuple[int, ...]:
    shares = np.asarray(shares)
    wanted = np.minimum(rows, rows * np.concatenate([shares, shares + SWITCH_MARGIN]))
    weights = np.repeat([SEEN_WEIGHT, 1], len(shares))
    return round_capacities([*_best_of(wanted, weights, CALIBRATED_CAPACITIES), rows], rows)


def _best_of(wanted: np.ndarray, weights: np.ndarray, count: int) -> list[float]:
    """Choose `count` of the wanted values so that rounding each of them up to a chosen one adds least."""
    order = np.argsort(wanted)
    wanted, until = wanted[order], np.concatenate([[0], np.cumsum(weights[order])])
    total = len(wanted)
    # least[j, i]: the sum of the first i values rounded up, with j chosen, the last of them wanted[i - 1].
    least, before = np.full((count + 1, total + 1), np.inf), np.zeros((count + 1, total + 1), int)
    least[0, 0] = 0
    for chosen in range(1, count + 1):
        for end in range(1, total + 1):
            sums = least[chosen - 1, :end] + (until[end] - until[:end]) * wanted[end - 1]
            before[chosen, end], least[chosen, end] = sums.argmin(), sums.min()
    chosen, end, picked = int(least[:, total].argmin()), total, []
    for j in range(chosen, 0, -1):
        picked.append(float(wanted[end - 1]))
        end = before[j, end]
    return picked


def _run_as_one_list(function, packed):
    """Apply a function to the rows of all images as one list.

    A TPU's compiler fits the windows of its products to one long axis better than to images of odd length. The barrier
    keeps it from moving the reshape before the last product, which would copy what that product reads.
    """
    rows = function(packed.reshape(1, -1, packed.shape[-1]))
    return jax.lax.optimization_barrier(rows).reshape(packed.shape)


def _run_packed(function, tokens, gates, capacities: tuple[int, ...]):
    batch, count, width = tokens.shape
    rows = batch * count
    is_open = gates.reshape(rows) > 0
    # Of each open row among the open ones. Without the barrier, a GPU counts them again for every number that it moves.
    position = jax.lax.optimization_barrier(jnp.cumsum(is_open.astype(jnp.int32)) - 1)
    source = jnp.full(rows, rows, jnp.int32)
    source = source.at[jnp.where(is_open, position, rows)].set(
        jnp.arange(rows, dtype=jnp.int32), mode="drop", unique_indices=True
    )
    tokens = tokens.reshape(rows, width)

    def branch(capacity: int):
        def on_packed(tokens, source):
            packed = tokens.at[source[:capacity]].get(mode="clip")  # [capacity,D]
            return jnp.pad(function(packed[None])[0], ((0, capacities[-1] - capacity), (0, 0)))

        return on_packed

    # One branch is no switch; otherwise the smallest capacity that is not below the count.
    chosen = (position[-1] + 1 > np.asarray(capacities, np.int32)).sum()
    result = jax.lax.switch(chosen, [branch(capacity) for capacity in capacities], tokens, source)
    # `where`, not a product: rows beyond the count hold whatever the function made of copies.
    result = jnp.where(is_open[:, None], result.at[position].get(mode="clip"), 0)
    return result.reshape(batch, count, width)
