"""The plan of a sampling run: which heads and groups each step computes, known before the first one.

Heads and groups depend on the weights and the timestep alone. Their gates over the whole schedule are cut into a few
consecutive segments; each keeps the union of the units that are open at any of its steps, and becomes one compiled
program with narrowed weights. A unit in the union that is closed at a step is multiplied by its gate, so the result is
exact. Where guidance begins or ends, the network runs twice instead of once: there is always a cut.

Where to cut is a shortest path: a segment costs its steps times the MACs of its union, and dynamic programming over the
cuts finds the cheapest plan for every number of segments. More segments waste less and compile longer; how many a job
is worth says `segmentation`. A plan without segments leaves nothing out: `whole_segments`.
"""

import dataclasses

import numpy as np
from etils import epath

from dydit_jax.diffusion.process import format_time
from dydit_jax.errors import InputError
from dydit_jax.fast.segmentation import Job, choose_segments, expected_macs
from dydit_jax.fast.usage import TokenUsage
from dydit_jax.models.cost import ModelMacs
from dydit_jax.runtime.files import write_atomically

MAX_SEGMENTS = 16
STEPS_PER_SEGMENT = 4  # on average; a program that runs less often is not worth compiling
TOLERATED_PADDING = 0.02  # of the MACs that an exact fit would need


@dataclasses.dataclass(frozen=True)
class Segment:
    """Consecutive steps that share narrowed weights.

    Attributes:
      start, stop: steps of the run, counted from its first, stop excluded.
      heads, groups: kept units of each layer, ascending; a layer may keep none.
      head_gates, group_gates: per layer, bool [steps, kept], or None where every kept unit is always open.
      evaluations: how often the network runs on an image in each of the steps: twice with guidance.
    """

    start: int
    stop: int
    heads: tuple[tuple[int, ...], ...]
    groups: tuple[tuple[int, ...], ...]
    head_gates: tuple
    group_gates: tuple
    evaluations: int

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
      evaluations: how often the network runs on an image at each step, int [S]: twice with guidance.
      segments: consecutive, from the first step to the last; of a whole plan one for each of `even_runs`.
      padding: MACs spent on closed units of a union, as a share of the MACs that an exact fit would need.
      execution: name of how tokens run, a key of `EXECUTIONS`.
      usage: of tokens, from a calibration, or None.
      whole: whether nothing is left out at any step: no segment is narrowed.
    """

    heads: np.ndarray
    groups: np.ndarray
    evaluations: np.ndarray
    segments: tuple[Segment, ...]
    padding: float
    execution: str
    usage: TokenUsage | None = None
    whole: bool = False

    @property
    def narrowed_segments(self) -> int:
        """How many programs are narrowed; 0 for a whole plan."""
        return 0 if self.whole else len(self.segments)

    def summary(self) -> str:
        """Return the plan as a line for people."""
        padding = f"padding adds {100 * self.padding:.1f} % to the needed MACs"
        if self.whole:
            return f"0 segments, nothing is left out, {padding}"
        lengths = " + ".join(str(len(segment)) for segment in self.segments)
        return f"{len(self.segments)} segments of {lengths} steps, {padding}"

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
            span = f"{format_time(timesteps[segment.start])}..{format_time(timesteps[segment.stop - 1])}"
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
        arrays = dict(heads=self.heads, groups=self.groups, evaluations=self.evaluations)
        arrays |= dict(ends=[] if self.whole else [segment.stop for segment in self.segments])
        arrays |= dict(execution=self.execution) | ({} if self.usage is None else dataclasses.asdict(self.usage))
        with write_atomically(path) as partial, partial.open("wb") as file:
            np.savez_compressed(file, **arrays)

    @classmethod
    def load(cls, path, macs: ModelMacs) -> "Plan":
        """Read what `save` wrote."""
        with epath.Path(path).open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            steps = _Steps(arrays["heads"], arrays["groups"], arrays["evaluations"])
            ends = arrays["ends"].tolist()
            usage = {field.name: arrays[field.name][()] for field in dataclasses.fields(TokenUsage) if "mean" in arrays}
            plan = _cut(steps, [0, *ends], macs, str(arrays["execution"])) if ends else _whole_plan(steps, macs)
        return dataclasses.replace(plan, usage=TokenUsage(**usage) if usage else None)


@dataclasses.dataclass(frozen=True)
class _Steps:
    """What is known of each step: gates, bool [S,L,H] and [S,L,G], and evaluations of the network, int [S]."""

    heads: np.ndarray
    groups: np.ndarray
    evaluations: np.ndarray

    def __len__(self) -> int:
        return len(self.heads)


def make_plan(
    heads,
    groups,
    macs: ModelMacs,
    *,
    execution: str,
    evaluations=None,
    segments: int | None = None,
    job: Job | None = None,
) -> Plan:
    """Cut a schedule into segments.

    Args:
      heads, groups: gates in the order of the run, [S,L,H] and [S,L,G], 0 or 1.
      macs: the model's counts.
      execution: name of how tokens run; a whole plan masks them.
      evaluations: how often the network runs on an image at each step [S]; None for once.
      segments: how many, 0 for a whole plan; None chooses.
      job: whose length decides how many are worth compiling; None for one that never ends. Never more than keep the
        padding within 2 %, than 16, and than one for four steps.

    Returns:
      The cheapest plan.

    Raises:
      InputError: a number of segments that `require_segments` refuses.
    """
    heads, groups = np.asarray(heads, bool), np.asarray(groups, bool)
    steps = _Steps(heads, groups, np.ones(len(heads), int) if evaluations is None else np.asarray(evaluations))
    if segments is not None:
        require_segments(segments, steps.evaluations)
    cost = _segment_costs(steps, macs)
    most = segments or max(len(even_runs(steps.evaluations)), min(MAX_SEGMENTS, -(-len(steps) // STEPS_PER_SEGMENT)))
    best, cuts = _cheapest_cuts(cost, most)
    if segments is None:
        enough = [n for n in range(1, most + 1) if best[n] <= (1 + TOLERATED_PADDING) * _exact_cost(cost)]
        segments = enough[0] if enough else most
        segments = segments if job is None else _worth_compiling(steps, macs, segments, job)
    if segments == 0:
        return _whole_plan(steps, macs)
    return _cut(steps, _path(cuts, segments, len(steps)), macs, execution)


def _worth_compiling(steps: "_Steps", macs: ModelMacs, most: int, job: Job) -> int:
    """Return how many segments, from 0 to `most`, a job is worth."""
    narrowed, _ = _cheapest_cuts(_segment_costs(steps, expected_macs(macs, job)), most)
    whole = _whole_cost(steps, dataclasses.replace(macs, mlp=job.token_share * macs.mlp))
    programs = [len(even_runs(steps.evaluations)), *range(1, most + 1)]
    return choose_segments([whole, *narrowed[1:]], programs, layers=macs.layers, job=job)


def even_runs(evaluations) -> list[range]:
    """Return the longest runs of steps in which the network runs equally often, in order, for `evaluations` [S]."""
    changes = np.flatnonzero(np.diff(evaluations)) + 1
    ends = [0, *changes.tolist(), len(evaluations)]
    return [range(start, stop) for start, stop in zip(ends[:-1], ends[1:])]


def require_segments(segments: int, evaluations, name: str = "The number of segments") -> None:
    """Raise unless a schedule can be cut into so many segments, or none.

    Args:
      segments: how many.
      evaluations: of the network at each step [S].
      name: what the user calls the number.

    Raises:
      InputError: more segments than steps, or fewer than guidance that begins or ends makes of them.
    """
    least, steps = len(even_runs(evaluations)), len(evaluations)
    why = " (guidance begins or ends between them)" if least > 1 else ""
    if segments and not least <= segments <= steps:
        allowed = f"from {least}{why} to the {steps} steps of the run, or 0, which leaves nothing out"
        raise InputError(f"{name} must be {allowed}; not {segments}.")


def whole_segments(heads, groups, *, pieces: int, evaluations=None) -> tuple[Segment, ...]:
    """Cut a schedule into pieces that leave nothing out, so that few compiled programs serve them all.

    Args:
      heads, groups: gates [S,L,H] and [S,L,G]; a layer whose gates are all open needs no products.
      pieces: at most how many. Each part of the schedule in which the network runs equally often is cut into equally
        long ones, with its share of them.
      evaluations: how often the network runs on an image at each step [S]; None for once.
    """
    heads, groups = np.asarray(heads, bool), np.asarray(groups, bool)
    evaluations = np.ones(len(heads), int) if evaluations is None else np.asarray(evaluations)
    steps, layers, units = heads.shape
    all_heads, all_groups = (tuple(range(units)),) * layers, (tuple(range(groups.shape[-1])),) * layers

    def by_layer(gates, start: int, stop: int) -> tuple:
        layered = gates.swapaxes(0, 1)
        return tuple(None if layer.all() else layer[start:stop] for layer in layered)

    def piece(start: int, stop: int) -> Segment:
        gates = by_layer(heads, start, stop), by_layer(groups, start, stop)
        return Segment(start, stop, all_heads, all_groups, *gates, int(evaluations[start]))

    segments = []
    for run in even_runs(evaluations):
        share = max(1, pieces * len(run) // steps)
        length = len(run) // max(n for n in range(1, share + 1) if len(run) % n == 0)
        segments += [piece(start, start + length) for start in range(run.start, run.stop, length)]
    return tuple(segments)


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


def _cut(steps: _Steps, ends: list[int], macs: ModelMacs, execution: str) -> Plan:
    """Return the plan with these cuts: ends of segments, from 0 to S."""
    cost = _segment_costs(steps, macs)
    segments = tuple(_segment(steps, start, stop) for start, stop in zip(ends[:-1], ends[1:]))
    padded = sum(cost[segment.start, segment.stop] for segment in segments)
    return Plan(**vars(steps), segments=segments, padding=float(padded / _exact_cost(cost) - 1), execution=execution)


def _whole_plan(steps: _Steps, macs: ModelMacs) -> Plan:
    """Return the plan that leaves nothing out."""
    segments = whole_segments(steps.heads, steps.groups, pieces=1, evaluations=steps.evaluations)
    padding = float(_whole_cost(steps, macs) / _exact_cost(_segment_costs(steps, macs)) - 1)
    return Plan(**vars(steps), segments=segments, padding=padding, execution="masked", whole=True)


def _whole_cost(steps: _Steps, macs: ModelMacs) -> float:
    """Return the MACs of a run that leaves nothing out."""
    return float(steps.evaluations.sum() * (macs.complete + macs.routers))


def _exact_cost(cost: np.ndarray) -> float:
    """Return the cost with a segment for every step."""
    steps = np.arange(len(cost))
    return cost[steps, steps + 1].sum()


def _segment_costs(steps: _Steps, macs: ModelMacs) -> np.ndarray:
    """Return [S,S+1]: the MACs of a segment from a to b; all tokens count as open.

    Infinite where b <= a, and where the network runs once at some of the steps and twice at others.
    """
    heads, groups = steps.heads, steps.groups
    cost = np.full((len(steps), len(steps) + 1), np.inf)
    per_head, per_group = macs.attention / heads.shape[-1], macs.mlp / groups.shape[-1]
    rest = macs.fixed + macs.routers
    for run in even_runs(steps.evaluations):
        for start in run:
            kept_heads = np.logical_or.accumulate(heads[start : run.stop]).sum((1, 2))
            kept_groups = np.logical_or.accumulate(groups[start : run.stop]).sum((1, 2))
            evaluations = steps.evaluations[start] * np.arange(1, run.stop - start + 1)
            cost[start, start + 1 : run.stop + 1] = evaluations * (
                rest + per_head * kept_heads + per_group * kept_groups
            )
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


def _segment(steps: _Steps, start: int, stop: int) -> Segment:
    kept_heads, head_gates = _union(steps.heads[start:stop])
    kept_groups, group_gates = _union(steps.groups[start:stop])
    evaluations = int(steps.evaluations[start])
    return Segment(start, stop, kept_heads, kept_groups, head_gates, group_gates, evaluations)


def _union(gates: np.ndarray) -> tuple[tuple, tuple]:
    """Return per layer the units that are open at any step, and their gates, or None where these are all open."""
    kept = [np.flatnonzero(layer.any(0)) for layer in gates.swapaxes(0, 1)]
    residual = [gates[:, layer, units] for layer, units in enumerate(kept)]
    return tuple(tuple(units.tolist()) for units in kept), tuple(None if g.all() else g for g in residual)
