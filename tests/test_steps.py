"""The steps of a run as a table, as text and as a figure."""

import types

import numpy as np

from dydit_jax.drawing.steps import draw_steps, step_columns, step_lines, step_table
from dydit_jax.drawing.style import save_figure


def samples_of(timesteps) -> types.SimpleNamespace:
    """Return a record of that many steps: the first half is guided, and costs grow."""
    count = len(timesteps)
    return types.SimpleNamespace(
        timesteps=np.asarray(timesteps),
        evaluations=np.where(np.arange(count) < count // 2, 2, 1),
        macs=np.linspace(1e6, 2e6, count),
        executed_macs=np.linspace(1.5e6, 3e6, count),
    )


def plan_of(*cuts, whole: bool = False) -> types.SimpleNamespace:
    segments = [types.SimpleNamespace(start=a, stop=b) for a, b in zip(cuts, cuts[1:])]
    return types.SimpleNamespace(segments=segments, whole=whole)


def test_few_steps_are_told_one_by_one():
    rows = step_table(samples_of(np.int32([999, 600, 300, 0])), [2.0, 2.0, 1.0, 1.0], plan_of(0, 2, 4))
    assert rows[1] == dict(
        step=1, timestep=600, guidance=2.0, passes=2, macs_per_pass=1e6 * 4 / 3, executed_macs_per_pass=2e6, segment=0
    )
    assert step_columns(rows)["segment"] == [0, 0, 1, 1] and step_columns(rows)["timestep"] == [999, 600, 300, 0]
    header, *lines = step_lines(rows).splitlines()
    assert header.split()[:5] == ["steps", "timesteps", "guidance", "passes", "segment"]
    assert lines[1].split() == ["1", "600", "2", "2", "1", "1.3", "M", "2.0", "M"]
    assert "segment" not in step_table(samples_of(np.float32([0, 0.5])), [1.0, 1.0])[0]


def test_many_steps_alike_share_a_line():
    rows = step_table(samples_of(np.arange(249, -1, -1)), np.repeat([1.5, 1.0], 125), plan_of(0, 125, 200, 250))
    lines = [line.split() for line in step_lines(rows).splitlines()[1:]]
    assert [line[:5] for line in lines] == [
        ["0..124", "249..125", "1.5", "2", "1"],
        ["125..199", "124..50", "1", "1", "2"],
        ["200..249", "49..0", "1", "1", "3"],
    ]


def test_figure_has_a_band_for_every_other_segment(tmp_path):
    rows = step_table(samples_of(np.float32([0, 0.25, 0.5, 0.75])), [2.0, 2.0, 1.0, 1.0], plan_of(0, 1, 3, 4))
    figure = draw_steps(rows, complete=4e6)
    for axis in figure.axes:
        assert [(patch.get_x(), patch.get_width()) for patch in axis.patches] == [(0.5, 2.0)]
    assert "bands: 3 segments" in figure.axes[-1].get_xlabel() and "12.5 M in all" in figure.axes[-1].get_title("left")
    save_figure(tmp_path / "steps.png", figure)
    for plan, words in (
        (plan_of(0, 4), "one segment"),
        (None, "nothing is left out"),
        (plan_of(0, 2, 4, whole=True), "nothing is left out"),
    ):
        figure = draw_steps(step_table(samples_of(np.int32([3, 2, 1, 0])), [1.0] * 4, plan), complete=4e6)
        assert words in figure.axes[-1].get_xlabel() and not figure.axes[0].patches
