"""The plan of a sampling run: which heads and groups each step computes, known before the first one.

Heads and groups depend on the weights and the timestep alone. Their gates over the whole schedule are cut into a few
consecutive segments; each keeps the union of the units that are open at any of its steps, and becomes one compiled
program with narrowed weights. A unit in the union that is closed at a step is multiplied by its gate, so the result is
exact. Where guidance begins or ends, the network runs twice instead of once: there is always a cut.

Where to cut is a shortest path: a segment costs its steps times the MACs of its union, and dynamic programming over the
cuts finds the cheapest plan for every number of segments. It cuts between blocks, runs of steps with the same gates: to
cut within one saves nothing, and the longest schedule has few. More segments waste less and compile longer; how many a
job is worth says `segmentation`. A plan without segments leaves nothing out: `whole_segments`.
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

    def __getitem__(self, chosen) -> "_Steps":
        return _Steps(self.heads[chosen], self.groups[chosen], self.evaluations[chosen])


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
    if segments == 0:
        return _whole_plan(steps, macs)
    blocks = _blocks(steps, least=segments or 1)
    most = segments or _most_segments(steps, blocks)
    unions = _unions(steps, blocks)
    best, cuts = _cheapest_cuts(_segment_costs(steps, unions, macs), most)
    if segments is None:
        tolerated = (1 + TOLERATED_PADDING) * _exact_cost(steps, macs)
        segments = next((n for n in range(1, most + 1) if best[n] <= tolerated), most)
        segments = segments if job is None else _worth_compiling(steps, unions, macs, segments, job)
    if segments == 0:
        return _whole_plan(steps, macs)
    return _cut(steps, blocks[_path(cuts, segments)].tolist(), macs, execution)


def _most_segments(steps: _Steps, blocks: np.ndarray) -> int:
    """Return how many segments a plan has at most, where it chooses."""
    sensible = min(MAX_SEGMENTS, -(-len(steps) // STEPS_PER_SEGMENT), len(blocks) - 1)
    return max(len(even_runs(steps.evaluations)), sensible)


def _worth_compiling(steps: _Steps, unions: tuple, macs: ModelMacs, most: int, job: Job) -> int:
    """Return how many segments, from 0 to `most`, a job is worth."""
    narrowed, _ = _cheapest_cuts(_segment_costs(steps, unions, expected_macs(macs, job)), most)
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
    by_layer = [[None if layer.all() else layer for layer in gates.swapaxes(0, 1)] for gates in (heads, groups)]

    def piece(start: int, stop: int) -> Segment:
        gates = (tuple(layer if layer is None else layer[start:stop] for layer in kind) for kind in by_layer)
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
    segments = tuple(_segment(steps, start, stop) for start, stop in zip(ends[:-1], ends[1:]))
    units = ([sum(map(len, kept)) for kept in segment.kept] for segment in segments)
    padded = sum(
        len(segment) * segment.evaluations * _pass_cost(steps, *kept, macs) for segment, kept in zip(segments, units)
    )
    padding = float(padded / _exact_cost(steps, macs) - 1)
    return Plan(**vars(steps), segments=segments, padding=padding, execution=execution)


def _whole_plan(steps: _Steps, macs: ModelMacs) -> Plan:
    """Return the plan that leaves nothing out."""
    segments = whole_segments(steps.heads, steps.groups, pieces=1, evaluations=steps.evaluations)
    padding = float(_whole_cost(steps, macs) / _exact_cost(steps, macs) - 1)
    return Plan(**vars(steps), segments=segments, padding=padding, execution="masked", whole=True)


def _whole_cost(steps: _Steps, macs: ModelMacs) -> float:
    """Return the MACs of a run that leaves nothing out."""
    return float(steps.evaluations.sum() * (macs.complete + macs.routers))


def _exact_cost(steps: _Steps, macs: ModelMacs) -> float:
    """Return the MACs of a run that computes at each step what is open there; all tokens count as open."""
    return float(steps.evaluations @ _pass_cost(steps, steps.heads.sum((1, 2)), steps.groups.sum((1, 2)), macs))


def _pass_cost(steps: _Steps, heads, groups, macs: ModelMacs):
    """Return the MACs of passes that compute so many heads and groups, over all layers; all tokens count as open."""
    per_head, per_group = macs.attention / steps.heads.shape[-1], macs.mlp / steps.groups.shape[-1]
    return macs.fixed + macs.routers + per_head * heads + per_group * groups


def _blocks(steps: _Steps, least: int) -> np.ndarray:
    """Return the ends of blocks, from 0 to S, [B+1]: of the longest runs of steps with the same gates and evaluations.

    Where these are fewer than `least`, the first steps become blocks of their own, which adds no cost.
    """
    gates = np.concatenate([steps.heads.reshape(len(steps), -1), steps.groups.reshape(len(steps), -1)], axis=1)
    changes = (gates[1:] != gates[:-1]).any(1) | (np.diff(steps.evaluations) != 0)
    changes[np.flatnonzero(~changes)[: max(0, least - 1 - changes.sum())]] = True
    return np.array([0, *(np.flatnonzero(changes) + 1), len(steps)])


def _unions(steps: _Steps, blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the passes of a segment from the start of block a to that of block b, and the heads and groups of each.

    All are [B,B+1]. Passes are infinite where b <= a, and where the network runs once at some of the steps and twice at
    others.
    """
    firsts = steps[blocks[:-1]]
    passes = np.full((len(firsts), len(blocks)), np.inf)
    heads, groups = (np.zeros(passes.shape, int) for _ in range(2))
    for run in even_runs(firsts.evaluations):
        for start in run:
            ends = slice(start + 1, run.stop + 1)
            passes[start, ends] = firsts.evaluations[start] * (blocks[ends] - blocks[start])
            for kept, gates in ((heads, firsts.heads), (groups, firsts.groups)):
                kept[start, ends] = np.logical_or.accumulate(gates[start : run.stop]).sum((1, 2))
    return passes, heads, groups


def _segment_costs(steps: _Steps, unions: tuple, macs: ModelMacs) -> np.ndarray:
    """Return the MACs of the segments of `_unions`, [B,B+1]; all tokens count as open."""
    passes, heads, groups = unions
    return passes * _pass_cost(steps, heads, groups, macs)


def _cheapest_cuts(cost: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the least cost with exactly 0 .. `most` segments, and for each the last cut before every block."""
    blocks = len(cost)
    best = np.full((most + 1, blocks + 1), np.inf)
    cuts = np.zeros((most + 1, blocks + 1), int)
    best[0, 0] = 0
    for count in range(1, most + 1):
        total = best[count - 1, :blocks, None] + cost  # [last cut, end]
        cuts[count] = total.argmin(0)
        best[count] = total[cuts[count], np.arange(blocks + 1)]
    return best[:, blocks], cuts


def _path(cuts: np.ndarray, segments: int) -> list[int]:
    """Return the blocks that so many segments start at, and the end."""
    ends = [cuts.shape[1] - 1]
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
