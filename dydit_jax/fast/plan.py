"""The plan of a sampling run: which heads and groups are kept when, known before the first step.

Heads and groups depend on the weights and the timestep alone. Their gates over the whole schedule are cut into a few
consecutive segments; each segment keeps the union of what is on at any of its steps, and becomes one compiled program
with narrowed weights. What is in the union but off at a step is still multiplied by its gate, so the result is exact.

Where to cut is a shortest path: a segment costs its steps times the MACs of its union, and dynamic programming over the
cuts finds the cheapest plan for every number of segments. More segments waste less and compile longer.
"""

import dataclasses

import numpy as np

from dydit_jax.errors import InputError
from dydit_jax.models.cost import ModelMacs

MAX_SEGMENTS = 12
TOLERATED_PADDING = 0.03  # of the MACs that an exact fit would need


@dataclasses.dataclass(frozen=True)
class Segment:
    """Consecutive steps that share narrowed weights.

    Attributes:
      start, stop: steps of the run, counted from its first, stop excluded.
      heads, groups: kept units of each layer, ascending; a layer may keep none.
      head_gates, group_gates: per layer, bool [steps, kept], or None where all that is kept is always on.
    """

    start: int
    stop: int
    heads: tuple[tuple[int, ...], ...]
    groups: tuple[tuple[int, ...], ...]
    head_gates: tuple
    group_gates: tuple

    def __len__(self) -> int:
        return self.stop - self.start


@dataclasses.dataclass(frozen=True)
class Plan:
    """The segments of a run in order, and the share of MACs spent on what is in a union but off."""

    segments: tuple[Segment, ...]
    padding: float

    def in_words(self) -> str:
        """Return the plan as a line for people."""
        lengths = " + ".join(str(len(segment)) for segment in self.segments)
        return f"{len(self.segments)} segments of {lengths} steps, {100 * self.padding:.1f} % of the MACs are padding"


def make_plan(heads, groups, macs: ModelMacs, *, segments: int | None = None) -> Plan:
    """Cut a schedule into segments.

    Args:
      heads, groups: gates in the order of the run, [S,L,H] and [S,L,G], 0 or 1.
      macs: the model's counts.
      segments: how many; None takes as few as keep the padding within 3 %, at most 12.

    Returns:
      The cheapest plan.

    Raises:
      InputError: fewer than one segment, or more than steps.
    """
    heads, groups = np.asarray(heads, bool), np.asarray(groups, bool)
    steps = len(heads)
    if segments is not None and not 1 <= segments <= steps:
        raise InputError(f"The number of segments must be from 1 to the {steps} steps of the run, not {segments}.")
    cost = _segment_costs(heads, groups, macs)
    exact = cost[np.arange(steps), np.arange(steps) + 1].sum()
    most = segments or min(MAX_SEGMENTS, steps)
    best, cuts = _cheapest_cuts(cost, most)
    if segments is None:
        enough = [count for count in range(1, most + 1) if best[count] <= (1 + TOLERATED_PADDING) * exact]
        segments = enough[0] if enough else most
    ends = _path(cuts, segments, steps)
    made = tuple(_segment(heads, groups, start, stop) for start, stop in zip(ends[:-1], ends[1:]))
    return Plan(made, float(best[segments] / exact - 1))


def _segment_costs(heads: np.ndarray, groups: np.ndarray, macs: ModelMacs) -> np.ndarray:
    """Return [S,S+1]: the MACs of a segment from a to b, infinite where b <= a; tokens are taken as all on."""
    steps = len(heads)
    cost = np.full((steps, steps + 1), np.inf)
    per_head, per_group = macs.attention / heads.shape[-1], macs.mlp / groups.shape[-1]
    rest = macs.fixed + macs.routers
    for start in range(steps):
        kept_heads = np.logical_or.accumulate(heads[start:]).sum((1, 2))
        kept_groups = np.logical_or.accumulate(groups[start:]).sum((1, 2))
        length = np.arange(1, steps - start + 1)
        cost[start, start + 1 :] = length * (rest + per_head * kept_heads + per_group * kept_groups)
    return cost


def _cheapest_cuts(cost: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the least cost with exactly 0 .. `most` segments, and for each the last cut before every step."""
    steps = len(cost)
    best = np.full((most + 1, steps + 1), np.inf)
    cuts = np.zeros((most + 1, steps + 1), int)
    best[0, 0] = 0
    for count in range(1, most + 1):
        total = best[count - 1, :steps, None] + cost  # [last cut, end]
        cuts[count], best[count] = total.argmin(0), total.min(0)
    return best[:, steps], cuts


def _path(cuts: np.ndarray, segments: int, steps: int) -> list[int]:
    ends = [steps]
    for count in range(segments, 0, -1):
        ends.append(int(cuts[count, ends[-1]]))
    return ends[::-1]


def _segment(heads: np.ndarray, groups: np.ndarray, start: int, stop: int) -> Segment:
    kept_heads, head_gates = _union(heads[start:stop])
    kept_groups, group_gates = _union(groups[start:stop])
    return Segment(start, stop, kept_heads, kept_groups, head_gates, group_gates)


def _union(gates: np.ndarray) -> tuple[tuple, tuple]:
    """Return per layer what is on at any step, and the gates within that, or None where they are all open."""
    kept = [np.flatnonzero(layer.any(0)) for layer in gates.swapaxes(0, 1)]
    residual = [gates[:, layer, units] for layer, units in enumerate(kept)]
    return tuple(tuple(units.tolist()) for units in kept), tuple(None if g.all() else g for g in residual)
