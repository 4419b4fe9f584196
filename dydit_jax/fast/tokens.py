"""Running a function on those tokens alone that are on, with static shapes and nothing dropped.

The number of tokens that are on depends on the data, so a program needs a capacity. Each backend has its own best form:

    switch    the tokens of the batch are packed to the front; every layer takes the smallest of a few capacities that
              holds them, the last of which is the whole batch. For CPUs: a branch costs nothing there.
    fixed     packed likewise, into one capacity per layer
    fused     as `fixed`, in the kernels for GPUs that do everything else to tokens: `models/fused.py`
    multiply  everything is computed and multiplied by the gates: the mode `gated`
    one_hot   each image packs its own tokens into one capacity per layer, by a product with zeros and ones. For TPUs:
              a branch inside a block, or a gather of short rows, breaks the fusions around it.
    pooled    the images of a pass pack theirs together, by such products too, in the kernels for TPUs that do all else
              to tokens around the MLP: `models/pooled.py`

With one capacity per layer a step may not fit. `overflows` says so after the steps of a segment, which the caller then
computes again, in full: what does not fit costs time, never exactness.

Never under `vmap`: a branch that is mapped becomes a selection, and every branch is computed.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from dydit_jax.fast.plan import Shares
from dydit_jax.models.dit import Model
from dydit_jax.models.pooled import rows_reserved, unit_size
from dydit_jax.models.tokens import multiply_by_gates, run_on_places, running_counts

FORMS = ("switch", "fixed", "one_hot", "multiply")  # by `run_on_open_tokens`
KERNEL_FORMS = ("fused", "pooled")
CHECKED_FORMS = ("fixed", "fused", "pooled", "one_hot")  # whose only capacity may be too small
DEFAULT_FORMS = {"cpu": "switch", "gpu": "fixed", "tpu": "one_hot"}
UNIFORM_CAPACITIES = 8  # when nothing is known about the counts
CALIBRATED_CAPACITIES = 4  # beside the whole batch
MARGIN = 0.05  # of "switch", of all tokens
SEEN_WEIGHT = 5  # to one that a step needs the margin: the next capacity is only a branch away
ROW_MULTIPLE = 8  # the rows of a TPU's tile
# Capacities of all images together are as many parts of all rows: each further shape of a product is one more for which
# a GPU's compiler tries out kernels, while all wait.
PARTS = 128


def default_form(model: Model) -> str:
    """Return the form that serves a model's platform best as a rule."""
    return "fused" if model.runs_fused else DEFAULT_FORMS[model.platform]


def can_run(model: Model, form: str, images: int) -> bool:
    """Tell whether a model can run so many images of one pass, guidance included, in a form."""
    if form == "fused":
        return model.runs_fused
    return model.runs_pooled(images) if form == "pooled" else form in FORMS


def forms_of(model: Model, images: int) -> tuple[str, ...]:
    """Return the forms that a model can run so many images of one pass in."""
    return tuple(form for form in (*FORMS, *KERNEL_FORMS) if can_run(model, form, images))


def packed_together(form: str, images: int) -> int:
    """Return how many of a pass's images share their places."""
    return 1 if form == "one_hot" else images


def counted_shares(form: str, shares: Shares, images: int) -> np.ndarray:
    """Return the shares [S,L] that capacities of a form are chosen by, for passes of so many images.

    A single capacity must hold whatever comes, so it is chosen by a bound. "switch" has the next one, and takes what
    was seen: on average, and where that once fell short the most, so that it does not fall short again.
    """
    if form == "switch":
        return np.maximum(shares.mean, shares.most)
    return shares.bound(packed_together(form, images))


def capacities_of(form: str, shares, *, images: int, tokens: int) -> tuple[int, ...]:
    """Choose the capacities of one layer within one segment.

    Args:
      form: one of `forms_of`.
      shares: `counted_shares` of a calibration, one per step of the segment. None if there was none.
      images: B of one pass on one device, guidance included.
      tokens: N.

    Returns:
      Ascending numbers of rows. "switch": up to four that leave the least unused over the steps, evenly spaced ones
      without shares, and the whole batch. Other forms: a single one; everything without shares.
    """
    rows = _rows(form, images, tokens)
    if form == "multiply" or (form != "switch" and shares is None):
        return (rows,)
    if form != "switch":
        multiple = ROW_MULTIPLE if form == "one_hot" else max(ROW_MULTIPLE, rows // PARTS)
        least = unit_size(tokens) if form == "pooled" else 0
        return _rounded([max(least, rows * np.max(shares))], rows, multiple)
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
        places = jnp.where(gates > 0, running_counts(gates) - 1, tokens)
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


def places_needed(form: str | None, gates):
    """Return the share of a form's places that gates need in each layer: [L] from [B,L,N].

    Args:
      form: one of `forms_of`, or None: all are open.
      gates: of the images of a pass.
    """
    if form == "one_hot":
        return gates.mean(-1).max(0)
    if form == "pooled":
        return jnp.minimum(1, rows_reserved(gates.swapaxes(0, 1)).sum(-1) / gates[:, 0].size)
    return gates.mean((0, 2))


def overflows(form: str, capacities: tuple[tuple[int, ...], ...], needed, *, images: int, tokens: int) -> np.ndarray:
    """Tell where more tokens were on than the largest capacity that saves anything.

    Under "switch" the layer was then computed in full; under the other forms its result is void.

    Args:
      form: one of `forms_of`.
      capacities: of each layer, from `capacities_of`.
      needed: shares of the places, [...,L] from `places_needed`.
      images, tokens: as for `capacities_of`.

    Returns:
      bool [...,L].
    """
    last = -2 if form == "switch" else -1
    largest = np.asarray([layer[last] if len(layer) > 1 else layer[-1] for layer in capacities])
    return np.rint(needed * _rows(form, images, tokens)) > largest


def _rows(form: str, images: int, tokens: int) -> int:
    """Return how many rows a capacity is a part of."""
    return tokens if form == "one_hot" else images * tokens


def runners(form: str, capacities: tuple[tuple[int, ...], ...]) -> list:
    """Return for each layer what `Block` wants as `run_on_tokens`."""
    return [functools.partial(run_on_open_tokens, form, layer) for layer in capacities]
