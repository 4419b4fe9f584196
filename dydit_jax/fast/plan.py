"""The plan of a sampling run: which heads and groups each step computes, known before the first one.

Heads and groups depend on the weights and the timestep alone. Their gates over the whole schedule are cut into a few
consecutive segments; each keeps the union of the units that are open at any of its steps, and becomes one compiled
program with narrowed weights. A unit in the union that is closed at a step is multiplied by its gate, so the result is
exact.

Where to cut is a shortest path: a segment costs its steps times the MACs of its union, and dynamic programming over the
cuts finds the cheapest plan for every number of segments. More segments waste less and compile longer.
"""

import dataclasses

import numpy as np
from etils import epath

from dydit_jax.errors import InputError
from dydit_jax.fast.usage import TokenUsage
from dydit_jax.models.cost import ModelMacs
from dydit_jax.runtime.files import write_atomically

MAX_SEGMENTS = 16
STEPS_PER_SEGMENT = 4  # on average; a program that runs less often is not worth compiling
TOLERATED_PADDING = 0.02  # of the MACs that an exact fit would need
CUTTING = (MAX_SEGMENTS, STEPS_PER_SEGMENT, TOLERATED_PADDING)  # part of the name that a plan is kept under


@dataclasses.dataclass(frozen=True)
class Segment:
    """Consecutive steps that share narrowed weights.

    Attributes:
      start, stop: steps of the run, counted from its first, stop excluded.
      heads, groups: kept units of each layer, ascending; a layer may keep none.
      head_gates, group_gates: per layer, bool [steps, kept], or None where every kept unit is always open.
    """

    start: int
    stop: int
    heads: tuple[tuple[int, ...], ...]
    groups: tuple[tuple[int, ...], ...]
    head_gates: tuple
    group_gates: tuple

    def __len__(self) -> int:
        return self.stop - self.start

    @property
    def kept(self) -> tuple:
        """Heads and groups, which fix the weights."""
        return self.heads, self.groups


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a schedule is run.

    Attributes:
      heads, groups: gates in the order of the run, bool [S,L,H] and [S,L,G].
      segments: consecutive, from the first step to the last.
      padding: MACs spent on closed units of a union, as a share of the MACs that an exact fit would need.
      execution: name of how tokens run, a key of `EXECUTIONS`.
      usage: of tokens, from a calibration, or None.
    """

    heads: np.ndarray
    groups: np.ndarray
    segments: tuple[Segment, ...]
    padding: float
    execution: str
    usage: TokenUsage | None = None

    def summary(self) -> str:
        """Return the plan as a line for people."""
        lengths = " + ".join(str(len(segment)) for segment in self.segments)
        return f"{len(self.segments)} segments of {lengths} steps, {100 * self.padding:.1f} % of the MACs are padding"

    def table(self, timesteps) -> str:
        """Return a line of text per segment: its timesteps, and the share of heads and groups that it keeps and needs.

        Args:
          timesteps: of the run [S].
        """
        lines = ["segment  steps   timesteps  heads kept (on)  groups kept (on)"]
        for number, segment in enumerate(self.segments):
            steps = slice(segment.start, segment.stop)
            shares = (
                sum(map(len, segment.heads)) / self.heads[0].size,
                self.heads[steps].mean(),
                sum(map(len, segment.groups)) / self.groups[0].size,
                self.groups[steps].mean(),
            )
            heads, heads_on, groups, groups_on = (f"{100 * share:.0f} %" for share in shares)
            span = f"{timesteps[segment.start]}..{timesteps[segment.stop - 1]}"
            lines.append(
                f"{number + 1:7d}  {len(segment):5d}  {span:>10}  {f'{heads} ({heads_on})':>15}  "
                f"{f'{groups} ({groups_on})':>16}"
            )
        return "\n".join(lines)

    def with_usage(self, usage: TokenUsage) -> "Plan":
        """Return the plan with more usage, for capacities that these images would have fitted into as well."""
        return dataclasses.replace(self, usage=usage if self.usage is None else self.usage.merge(usage))

    def save(self, path) -> None:
        """Write the plan as one .npz, whole or not at all.

        Raises:
          InputError: a place that can't be written to.
        """
        arrays = dict(heads=self.heads, groups=self.groups, ends=[segment.stop for segment in self.segments])
        arrays |= dict(execution=self.execution) | ({} if self.usage is None else dataclasses.asdict(self.usage))
        with write_atomically(path) as partial, partial.open("wb") as file:
            np.savez_compressed(file, **arrays)

    @classmethod
    def load(cls, path, macs: ModelMacs) -> "Plan":
        """Read what `save` wrote."""
        with epath.Path(path).open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            heads, groups, ends = arrays["heads"], arrays["groups"], [0, *arrays["ends"].tolist()]
            usage = {field.name: arrays[field.name][()] for field in dataclasses.fields(TokenUsage) if "mean" in arrays}
            plan = _cut(heads, groups, ends, macs, str(arrays["execution"]))
        return dataclasses.replace(plan, usage=TokenUsage(**usage) if usage else None)


def make_plan(heads, groups, macs: ModelMacs, *, execution: str, segments: int | None = None) -> Plan:
    """Cut a schedule into segments.

    Args:
      heads, groups: gates in the order of the run, [S,L,H] and [S,L,G], 0 or 1.
      macs: the model's counts.
      execution: name of how tokens run.
      segments: how many; None takes as few as keep the padding within 2 %, at most 16, and at most one
        for four steps.

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
    most = segments or min(MAX_SEGMENTS, -(-steps // STEPS_PER_SEGMENT))
    best, cuts = _cheapest_cuts(cost, most)
    if segments is None:
        enough = [n for n in range(1, most + 1) if best[n] <= (1 + TOLERATED_PADDING) * _exact_cost(cost)]
        segments = enough[0] if enough else most
    return _cut(heads, groups, _path(cuts, segments, steps), macs, execution)


def whole_segments(heads, groups, *, pieces: int) -> tuple[Segment, ...]:
    """Cut a schedule into equal pieces that leave nothing out, so that one compiled program serves them all.

    Args:
      heads, groups: gates [S,L,H] and [S,L,G]; a layer whose gates are all open needs no products.
      pieces: how many, a divisor of S.
    """
    heads, groups = np.asarray(heads, bool), np.asarray(groups, bool)
    steps, layers, units = heads.shape
    all_heads, all_groups = (tuple(range(units)),) * layers, (tuple(range(groups.shape[-1])),) * layers
    length = steps // pieces

    def by_layer(gates, start: int) -> tuple:
        layered = gates.swapaxes(0, 1)
        return tuple(None if layer.all() else layer[start : start + length] for layer in layered)

    return tuple(
        Segment(start, start + length, all_heads, all_groups, by_layer(heads, start), by_layer(groups, start))
        for start in range(0, steps, length)
    )


def executed_gates(segments, units: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the gates that segments execute, [S,L,units] of heads and of groups, float32 0 or 1.

    Args:
      segments: consecutive.
      units: number of the model's heads, and of its groups.
    """
    steps, layers = segments[-1].stop - segments[0].start, len(segments[0].heads)
    heads, groups = (np.zeros((steps, layers, units), np.float32) for _ in range(2))
    for segment in segments:
        rows = slice(segment.start - segments[0].start, segment.stop - segments[0].start)
        for layer in range(layers):
            for gates, kept, own in (
                (heads, segment.heads[layer], segment.head_gates[layer]),
                (groups, segment.groups[layer], segment.group_gates[layer]),
            ):
                gates[rows, layer, kept] = 1 if own is None else own
    return heads, groups


def _cut(heads: np.ndarray, groups: np.ndarray, ends: list[int], macs: ModelMacs, execution: str) -> Plan:
    """Return the plan with these cuts: ends of segments, from 0 to S."""
    cost = _segment_costs(heads, groups, macs)
    segments = tuple(_segment(heads, groups, start, stop) for start, stop in zip(ends[:-1], ends[1:]))
    padded = sum(cost[segment.start, segment.stop] for segment in segments)
    return Plan(heads, groups, segments, float(padded / _exact_cost(cost) - 1), execution)


def _exact_cost(cost: np.ndarray) -> float:
    """Return the cost with a segment for every step."""
    steps = np.arange(len(cost))
    return cost[steps, steps + 1].sum()


def _segment_costs(heads: np.ndarray, groups: np.ndarray, macs: ModelMacs) -> np.ndarray:
    """Return [S,S+1]: the MACs of a segment from a to b, infinite where b <= a; all tokens count as open."""
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
    """Return per layer the units that are open at any step, and their gates, or None where these are all open."""
    kept = [np.flatnonzero(layer.any(0)) for layer in gates.swapaxes(0, 1)]
    residual = [gates[:, layer, units] for layer, units in enumerate(kept)]
    return tuple(tuple(units.tolist()) for units in kept), tuple(None if g.all() else g for g in residual)
