"""Running a function on those tokens alone that are on, with static shapes and nothing dropped.

The number of tokens that are on depends on the data, so a program needs a capacity. Tokens of the whole batch are
packed to the front, and the smallest of a few static capacities that holds them is taken; the last capacity is the
whole batch, so that every count has one. Rows that are off get zeros, exactly as if multiplied by their gate.

Never under `vmap`: a branch that is mapped becomes a selection, and every branch is computed.
"""

import jax
import jax.numpy as jnp
import numpy as np

UNIFORM_CAPACITIES = 8  # when nothing is known about the counts
CALIBRATED_CAPACITIES = 3  # beside the whole batch
MARGIN = 0.05  # of the rows, above what calibration saw
ROW_MULTIPLE = 8


def capacities_of(shares, rows: int) -> tuple[int, ...]:
    """Choose the capacities of one layer within one segment.

    Args:
      shares: of tokens that were on, one per step of the segment, from a calibration; None if there was none.
      rows: B * N.

    Returns:
      Ascending numbers of rows, the last one `rows`: evenly spaced without shares, otherwise the three that leave the
      least unused over the steps, with a margin.
    """
    if shares is None:
        wanted = rows * np.arange(1, UNIFORM_CAPACITIES + 1) / UNIFORM_CAPACITIES
        return _rounded(wanted, rows)
    wanted = np.sort(np.minimum(rows, rows * (np.asarray(shares) + MARGIN)))
    return _rounded(_best_of(wanted, CALIBRATED_CAPACITIES), rows)


def _rounded(wanted, rows: int) -> tuple[int, ...]:
    sizes = np.minimum(rows, np.ceil(np.asarray(wanted) / ROW_MULTIPLE).astype(int) * ROW_MULTIPLE)
    return tuple(sorted({*sizes.tolist(), rows}))


def _best_of(wanted: np.ndarray, count: int) -> list[float]:
    """Choose `count` of ascending values so that rounding each value up to a chosen one adds least."""
    total = len(wanted)
    # least[j, i]: the sum of the first i values rounded up, with j chosen, the last of them wanted[i - 1].
    least, before = np.full((count + 1, total + 1), np.inf), np.zeros((count + 1, total + 1), int)
    least[0, 0] = 0
    for chosen in range(1, count + 1):
        for end in range(1, total + 1):
            sums = least[chosen - 1, :end] + (end - np.arange(end)) * wanted[end - 1]
            before[chosen, end], least[chosen, end] = sums.argmin(), sums.min()
    chosen, end, picked = int(least[:, total].argmin()), total, []
    for j in range(chosen, 0, -1):
        picked.append(float(wanted[end - 1]))
        end = before[j, end]
    return picked


def run_on_open_tokens(function, x, gates, *, capacities: tuple[int, ...]):
    """Apply a row-wise function to the tokens that are on.

    Args:
      function: maps rows [1,R,D] to [1,R,D], each row by itself.
      x: tokens [B,N,D].
      gates: [B,N], 0 or 1.
      capacities: ascending numbers of rows; the last is B * N.

    Returns:
      [B,N,D]: the function's result where the gate is 1, zeros elsewhere.
    """
    batch, tokens, width = x.shape
    rows = batch * tokens
    is_open = gates.reshape(rows) > 0
    position = jnp.cumsum(is_open.astype(jnp.int32)) - 1  # of each open row among the open ones
    count = position[-1] + 1
    source = jnp.full(rows, rows, jnp.int32)
    source = source.at[jnp.where(is_open, position, rows)].set(
        jnp.arange(rows, dtype=jnp.int32), mode="drop", unique_indices=True
    )
    packed = x.reshape(rows, width).at[source].get(mode="clip")

    def branch(capacity: int):
        return lambda packed: jnp.pad(function(packed[None, :capacity])[0], ((0, rows - capacity), (0, 0)))

    chosen = jnp.searchsorted(jnp.asarray(capacities, jnp.int32), count)
    result = jax.lax.switch(chosen, [branch(capacity) for capacity in capacities], packed)
    # `where`, not a product: rows beyond the count hold whatever the function made of copies.
    result = jnp.where(is_open[:, None], result.at[position].get(mode="clip"), 0)
    return result.reshape(batch, tokens, width)
