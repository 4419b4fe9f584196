"""Plans: cuts of the schedule, what they keep, and the usage of tokens that capacities are chosen by."""

import dataclasses
import itertools

import numpy as np
import pytest

from dydit_jax.errors import InputError
from dydit_jax.fast.execution.registry import find_execution
from dydit_jax.fast.plan import Plan, executed_gates, make_plan, whole_segments
from dydit_jax.fast.segmentation import Job
from dydit_jax.fast.usage import TokenUsage
from dydit_jax.models.config import DiTConfig


@pytest.fixture(scope="module")
def gates():
    """Gates of heads and groups over twelve steps that drift, with a layer that has none on at times."""
    generator = np.random.default_rng(0)
    phase = generator.uniform(0, 12, (1, 3, 4))
    heads = np.abs(np.arange(12)[:, None, None] - phase) < 4
    groups = np.abs(np.arange(12)[:, None, None] - phase[..., ::-1]) < 3
    heads[:, 1], groups[6:, 2] = False, False
    return heads, groups


MACS = DiTConfig(depth=3, width=64, heads=4, patch=2, side=8, routers="free").macs


def padded_cost(heads, groups, ends) -> float:
    """Count the MACs of a cut by hand."""
    total = 0.0
    for start, stop in zip(ends[:-1], ends[1:]):
        kept = heads[start:stop].any(0).sum() * MACS.attention / 4 + groups[start:stop].any(0).sum() * MACS.mlp / 4
        total += (stop - start) * (kept + MACS.fixed + MACS.routers)
    return total


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_plan_is_the_cheapest_of_all_cuts(gates, count):
    plan = make_plan(*gates, MACS, execution="switch", segments=count)
    ends = [segment.start for segment in plan.segments] + [12]
    cheapest = min(padded_cost(*gates, [0, *cuts, 12]) for cuts in itertools.combinations(range(1, 12), count - 1))
    assert ends[0] == 0 and len(plan.segments) == count
    assert padded_cost(*gates, ends) == pytest.approx(cheapest)
    exact = padded_cost(*gates, list(range(13)))
    assert plan.padding == pytest.approx(cheapest / exact - 1)


@pytest.mark.parametrize("count", range(1, 13))
def test_cuts_between_steps_with_the_same_gates_save_nothing(gates, count):
    slow = [np.repeat(gate[::3], 3, axis=0) for gate in gates]
    plan = make_plan(*slow, MACS, execution="switch", segments=count)
    cheapest = min(padded_cost(*slow, [0, *cuts, 12]) for cuts in itertools.combinations(range(1, 12), count - 1))
    assert padded_cost(*slow, [0, *(segment.stop for segment in plan.segments)]) == pytest.approx(cheapest)
    assert len(plan.segments) == count and (count > 4 or all(segment.start % 3 == 0 for segment in plan.segments))


def test_the_longest_schedule_is_planned_by_its_blocks(gates):
    long = [np.repeat(gate[:8:4], 50_000, axis=0) for gate in gates]
    plan = make_plan(*long, MACS, execution="switch")
    assert [(segment.start, segment.stop) for segment in plan.segments] == [(0, 50_000), (50_000, 100_000)]
    assert plan.padding == pytest.approx(0)
    constant = np.ones((100_000, 3, 4), bool)
    assert len(make_plan(constant, constant, MACS, execution="switch", job=Job(1, "cpu", 64)).segments) == 1


def test_plan_keeps_every_gate(gates):
    heads, groups = gates
    for segment in make_plan(heads, groups, MACS, execution="switch", segments=3).segments:
        for kept, residual, all_gates in (
            (segment.heads, segment.head_gates, heads),
            (segment.groups, segment.group_gates, groups),
        ):
            for layer, units in enumerate(kept):
                rebuilt = np.zeros((len(segment), 4), bool)
                rebuilt[:, list(units)] = True if residual[layer] is None else residual[layer]
                np.testing.assert_array_equal(rebuilt, all_gates[segment.start : segment.stop, layer])


def test_plan_takes_few_segments_within_the_tolerance(gates):
    slow = [np.repeat(gate, 4, axis=0) for gate in gates]
    plan = make_plan(*slow, MACS, execution="switch")
    assert plan.padding <= 0.02
    assert make_plan(*slow, MACS, execution="switch", segments=len(plan.segments) - 1).padding > 0.02
    assert "segments of" in plan.summary()
    assert len(make_plan(*gates, MACS, execution="switch").segments) == 3  # four steps for each
    constant = np.ones((12, 3, 4), bool)
    assert len(make_plan(constant, constant, MACS, execution="switch").segments) == 1


@pytest.mark.parametrize("count", [-1, 13])
def test_impossible_numbers_of_segments_are_refused(gates, count):
    with pytest.raises(InputError, match="from 1 to the 12 steps"):
        make_plan(*gates, MACS, execution="switch", segments=count)


def seen(shares) -> TokenUsage:
    """Return what images [images,S,L] had on, each packed by itself."""
    return TokenUsage(shares.mean(0), shares.std(0, ddof=1), shares.max(0), len(shares))


def calibration(shares) -> TokenUsage:
    return seen(shares).without_max_rows()


def test_hardly_any_batch_has_more_on_than_the_bound_of_a_few_images():
    images = np.random.default_rng(0).normal(0.6, 0.08, (4000, 1, 1))
    few, others = images[:2000].reshape(250, 8, 1, 1), images[2000:].reshape(125, 16, 1, 1)
    bounds = np.array([calibration(shares).upper_bound(16).item() for shares in few])
    # Of a normal distribution beyond four deviations, with one that eight values only estimate.
    assert (others.mean(1).ravel() > bounds[:, None]).mean() < 5e-3
    assert bounds.mean() < 0.6 + 5 * 0.08 * np.sqrt(1 / 8 + 1 / 16)
    # What they need is nearer to their mean the more images pack together, and the more were seen.
    assert (
        calibration(images).upper_bound(1) > calibration(images).upper_bound(16) > calibration(images).upper_bound(64)
    )
    assert bounds.mean() > calibration(images).upper_bound(16)
    assert calibration(np.full((8, 1, 1), 0.6)).upper_bound(16) == pytest.approx(0.62)  # alike, by chance perhaps
    assert seen(images).upper_bound(64) == images.max()


def test_shares_of_more_images_are_those_of_all():
    images = np.random.default_rng(0).random((12, 2, 3))
    joined, whole = seen(images[:4]).merge(seen(images[4:])), seen(images)
    np.testing.assert_allclose(joined.mean, whole.mean)
    np.testing.assert_allclose(
        joined.deviation, whole.deviation, rtol=0.1
    )  # weights are counts, not degrees of freedom
    np.testing.assert_array_equal(joined.max_rows, whole.max_rows)
    assert joined.images == 12


def test_plan_is_kept_and_read_again(tmp_path, gates):
    plan = make_plan(*gates, MACS, execution="gather", segments=3)
    usage = seen(np.random.default_rng(0).uniform(0.4, 0.6, (8, 12, 3)))
    plan.with_usage(usage.without_max_rows()).save(tmp_path / "plans" / "plan.npz")
    read = Plan.load(tmp_path / "plans" / "plan.npz", MACS)
    assert read.summary() == plan.summary() and read.execution == "gather"
    kept = lambda plan: [(segment.start, segment.heads, segment.groups) for segment in plan.segments]
    assert kept(read) == kept(plan)
    np.testing.assert_array_equal(read.usage.mean, usage.mean)
    np.testing.assert_array_equal(read.usage.upper_bound(4), usage.without_max_rows().upper_bound(4))
    assert read.usage.images == 8 and not read.usage.max_rows.any()
    plan.save(tmp_path / "plan.npz")
    assert Plan.load(tmp_path / "plan.npz", MACS).usage is None
    assert len(plan.table(np.arange(12)).splitlines()) == 4
    whole = make_plan(*gates, MACS, execution="gather", segments=0)
    whole.save(tmp_path / "whole.npz")
    read = Plan.load(tmp_path / "whole.npz", MACS)
    assert read.whole and read.narrowed_segments == 0 and read.summary() == whole.summary()


@pytest.mark.parametrize("name", ["switch", "gather", "one_hot"])
def test_nothing_that_overflowed_once_does_so_again(gates, name):
    few, fuller = (seen(np.full((4, 12, 3), share)) for share in (0.5, 0.9))
    plan = make_plan(*gates, MACS, execution=name).with_usage(few).with_usage(fuller)
    assert find_execution(name, "cpu").required_shares(plan.usage, 64).min() >= 0.9


def test_whole_segments_are_alike(gates):
    segments = whole_segments(*gates, pieces=3)
    assert [(s.start, s.stop) for s in segments] == [(0, 4), (4, 8), (8, 12)]
    assert all(segment.heads == ((0, 1, 2, 3),) * 3 for segment in segments)
    np.testing.assert_array_equal(np.concatenate([s.group_gates[2] for s in segments]), gates[1][:, 2])
    open_gates = np.ones((4, 1, 2), bool)
    assert whole_segments(open_gates, open_gates, pieces=1)[0].head_gates == (None,)


@pytest.mark.parametrize("count", [0, 1, 3, 12])
def test_segments_execute_the_gates_of_the_plan(gates, count):
    plan = make_plan(*gates, MACS, execution="switch", segments=count)
    for executed, wanted in zip(executed_gates(plan.segments, 4), gates):
        np.testing.assert_array_equal(executed, wanted)
    broken = dataclasses.replace(plan.segments[0], heads=((),) * 3, head_gates=(None,) * 3)
    assert (executed_gates([broken, *plan.segments[1:]], 4)[0] != gates[0]).any()


def test_a_plan_without_segments_leaves_nothing_out(gates):
    evaluations = np.repeat([1, 2, 1], [3, 5, 4])
    plan = make_plan(*gates, MACS, execution="switch", evaluations=evaluations, segments=0)
    assert plan.whole and plan.narrowed_segments == 0 and plan.execution == "masked"
    assert [(s.start, s.stop, s.evaluations) for s in plan.segments] == [(0, 3, 1), (3, 8, 2), (8, 12, 1)]
    assert {segment.kept for segment in plan.segments} == {(((0, 1, 2, 3),) * 3,) * 2}
    exact = sum(count * padded_cost(*gates, [step, step + 1]) for step, count in enumerate(evaluations))
    everything = evaluations.sum() * (MACS.complete + MACS.routers)
    assert plan.padding == pytest.approx(everything / exact - 1)
    assert plan.summary().startswith("0 segments, nothing is left out")
    assert len(plan.table(np.arange(12)).splitlines()) == 4


def test_a_plan_is_cut_where_guidance_begins_or_ends(gates):
    evaluations = np.repeat([1, 2, 1], [3, 5, 4])
    settings = dict(execution="switch", evaluations=evaluations)
    plan = make_plan(*gates, MACS, **settings, segments=3)
    assert [(s.start, s.stop, s.evaluations) for s in plan.segments] == [(0, 3, 1), (3, 8, 2), (8, 12, 1)]
    by_hand = sum(
        count * padded_cost(*gates, [start, stop]) for start, stop, count in ((0, 3, 1), (3, 8, 2), (8, 12, 1))
    )
    exact = sum(count * padded_cost(*gates, [step, step + 1]) for step, count in enumerate(evaluations))
    assert plan.padding == pytest.approx(by_hand / exact - 1)
    for segment in make_plan(*gates, MACS, **settings, segments=6).segments:
        assert len(set(evaluations[segment.start : segment.stop])) == 1
    assert len(make_plan(*gates, MACS, **settings).segments) >= 3
    with pytest.raises(InputError, match="from 3 .guidance begins or ends between them. to the 12 steps"):
        make_plan(*gates, MACS, **settings, segments=2)
    whole = whole_segments(*gates, pieces=4, evaluations=evaluations)
    assert [len(segment) for segment in whole] == [3, 5, 4] and [s.evaluations for s in whole] == [1, 2, 1]
    whole = whole_segments(*gates, pieces=12, evaluations=evaluations)
    assert [len(segment) for segment in whole] == [1] * 12
