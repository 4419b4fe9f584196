"""Running a function on those tokens alone that are on, with static shapes and nothing dropped.

The number of tokens that are on depends on the data, so a program needs a capacity. Each backend has its own best form:

    switch    the tokens of the batch are packed to the front; every layer takes the smallest of a few capacities that
              holds them, the last of which is the whole batch. For CPUs: a branch costs nothing there.
    fixed     packed likewise, into one capacity per layer
    fused     as `fixed`, in the kernels for GPUs that do everything else to tokens: `models/fused.py`
    multiply  everything is computed and multiplied by the gates: the mode `gated`
    one_hot   each image packs its own tokens into one capacity per layer, by a product with zeros and ones. For TPUs: a
              branch inside a block, or a gather of short rows, breaks the fusions around it.

With one capacity per layer a step may not fit. `overflows` says so after the steps of a segment, which the caller then
computes again, in full: what does not fit costs time, never exactness.

Never under `vmap`: a branch that is mapped becomes a selection, and every branch is computed.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from dydit_jax.fast.plan import MARGIN, Shares
from dydit_jax.models.dit import Model
from dydit_jax.models.tokens import multiply_by_gates, run_on_places

FORMS = ("switch", "fixed", "one_hot", "multiply")  # by `run_on_open_tokens`
CHECKED_FORMS = ("fixed", "fused", "one_hot")  # whose only capacity may be too small
DEFAULT_FORMS = {"cpu": "switch", "gpu": "fixed", "tpu": "one_hot"}
UNIFORM_CAPACITIES = 8  # when nothing is known about the counts
CALIBRATED_CAPACITIES = 4  # beside the whole batch
SEEN_WEIGHT = 5  # to one that a step needs the margin: the next capacity is only a branch away
ROW_MULTIPLE = 8
# Capacities of "fixed" and "fused" are as many parts of all rows: each further shape of a product is one more for which
# a GPU's compiler tries out kernels, while all wait.
PARTS = 128


def default_form(model: Model) -> str:
    """Return the form that serves a model's platform best as a rule."""
    return "fused" if model.runs_fused else DEFAULT_FORMS[model.platform]


def forms_of(model: Model) -> tuple[str, ...]:
    """Return the forms that a model can run in."""
    return (*FORMS, "fused") if model.runs_fused else FORMS


def counted_shares(form: str, shares: Shares) -> np.ndarray:
    """Return the shares that capacities of a form are chosen by: of the fullest image where each packs its own."""
    return shares.fullest if form == "one_hot" else shares.mean


def capacities_of(form: str, shares, *, images: int, tokens: int) -> tuple[int, ...]:
    """Choose the capacities of one layer within one segment.

    Args:
      form: one of `forms_of`.
      shares: `counted_shares` of a calibration, one per step of the segment. None if there was none.
      images: B of one pass on one device, guidance included.
      tokens: N.

    Returns:
      Ascending numbers of rows. "switch": up to four that leave the least unused over the steps, evenly spaced ones
      without shares, and the whole batch. Other forms: a single one, with a margin; everything without shares.
    """
    rows = _rows(form, images, tokens)
    if form == "multiply" or (form != "switch" and shares is None):
        return (rows,)
    if form != "switch":
        multiple = ROW_MULTIPLE if form == "one_hot" else max(ROW_MULTIPLE, rows // PARTS)
        return _rounded([rows * (np.max(shares) + MARGIN)], rows, multiple)
    if shares is None:
        wanted = rows * np.arange(1, UNIFORM_CAPACITIES + 1) / UNIFORM_CAPACITIES
        return _rounded([*wanted, rows], rows)
    return _calibrated(tuple(np.asarray(shares).tolist()), rows)


@functools.lru_cache(maxsize=4096)  # of all segments and layers: chosen once, not once per batch
def _calibrated(shares: tuple[float, ...], rows: int) -> tuple[int, ...]:
    shares = np.asarray(shares)
    wanted = np.minimum(rows, rows * np.concatenate([shares, shares + MARGIN]))
    weights = np.repeat([SEEN_WEIGHT, 1], len(shares))
    return _rounded([*_best_of(wanted, weights, CALIBRATED_CAPACITIES), rows], rows)


def _rounded(wanted, rows: int, multiple: int = ROW_MULTIPLE) -> tuple[int, ...]:
    sizes = np.minimum(rows, np.ceil(np.asarray(wanted) / multiple).astype(int) * multiple)
    return tuple(sorted(set(sizes.tolist())))


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


def run_on_open_tokens(form: str, capacities: tuple[int, ...], function, x, gates):
    """Apply a row-wise function to the tokens that are on.

    Args:
      form: one of `FORMS`.
      capacities: from `capacities_of`.
      function: maps tokens [b,n,D], of any b and n, to [b,n,D], each by itself.
      x: tokens [B,N,D].
      gates: [B,N], 0 or 1.

    Returns:
      [B,N,D]: the function's result where the gate is 1, zeros elsewhere. Meaningless where `overflows` says so.
    """
    batch, tokens, _ = x.shape
    if form == "one_hot":
        if capacities == (tokens,):
            return multiply_by_gates(function, x, gates)
        # A cumulative sum as a product, which is exact for zeros and ones: a TPU takes longer over the sum.
        counts = (gates @ jnp.triu(jnp.ones((tokens, tokens)))).astype(jnp.int32)
        places = jnp.where(gates > 0, counts - 1, tokens)
        on_rows = functools.partial(_run_on_rows, function)
        return run_on_places(on_rows, x, gates, places, capacity=capacities[0], platform="tpu")
    if capacities == (batch * tokens,):
        return multiply_by_gates(function, x, gates)
    return _run_packed(function, x, gates, capacities)


def _run_on_rows(function, packed):
    """Apply a function to the places of all images as one list of rows.

    A TPU's compiler fits the windows of its products to one long axis better than to images of odd length. The barrier
    keeps it from moving the reshape before the last product, which would copy what that product reads.
    """
    rows = function(packed.reshape(1, -1, packed.shape[-1]))
    return jax.lax.optimization_barrier(rows).reshape(packed.shape)


def _run_packed(function, x, gates, capacities: tuple[int, ...]):
    batch, tokens, width = x.shape
    rows = batch * tokens
    is_open = gates.reshape(rows) > 0
    # Of each open row among the open ones. Behind no barrier, a GPU counts them anew for every number that it moves.
    position = jax.lax.optimization_barrier(jnp.cumsum(is_open.astype(jnp.int32)) - 1)
    source = jnp.full(rows, rows, jnp.int32)
    source = source.at[jnp.where(is_open, position, rows)].set(
        jnp.arange(rows, dtype=jnp.int32), mode="drop", unique_indices=True
    )
    x = x.reshape(rows, width)

    def branch(capacity: int):
        def on_packed(x, source):
            packed = x.at[source[:capacity]].get(mode="clip")  # [capacity,D]
            return jnp.pad(function(packed[None])[0], ((0, capacities[-1] - capacity), (0, 0)))

        return on_packed

    # One branch is no switch; otherwise the smallest capacity that is not below the count.
    chosen = (position[-1] + 1 > np.asarray(capacities, np.int32)).sum()
    result = jax.lax.switch(chosen, [branch(capacity) for capacity in capacities], x, source)
    # `where`, not a product: rows beyond the count hold whatever the function made of copies.
    result = jnp.where(is_open[:, None], result.at[position].get(mode="clip"), 0)
    return result.reshape(batch, tokens, width)


def overflows(form: str, capacities: tuple[tuple[int, ...], ...], shares, *, images: int, tokens: int) -> np.ndarray:
    """Tell where more tokens were on than the largest capacity that saves anything.

    Under "switch" the layer was then computed in full; under the other forms its result is void.

    Args:
      form: one of `forms_of`.
      capacities: of each layer, from `capacities_of`.
      shares: [...,L] of the tokens that were on, see `counted_shares`.
      images, tokens: as for `capacities_of`.

    Returns:
      bool [...,L].
    """
    last = -2 if form == "switch" else -1
    largest = np.asarray([layer[last] if len(layer) > 1 else layer[-1] for layer in capacities])
    return np.rint(shares * _rows(form, images, tokens)) > largest


def _rows(form: str, images: int, tokens: int) -> int:
    """Return how many rows a capacity is a part of."""
    return tokens if form == "one_hot" else images * tokens


def runners(form: str, capacities: tuple[tuple[int, ...], ...]) -> list:
    """Return for each layer what `Block` wants as `run_on_tokens`."""
    return [functools.partial(run_on_open_tokens, form, layer) for layer in capacities]
