"""The steps of a run as they were taken: timesteps, guidance, cost and segments, as table, text and figure."""

import itertools

import numpy as np

from dydit_jax.diffusion.process import format_time
from dydit_jax.drawing.style import CLOSED, INK, LEFT_OUT, OPEN, count_ticks, in_style, new_figure
from dydit_jax.models.cost import format_count

MOST_LINES = 30  # of the text; more steps are joined where they are alike


def step_table(samples, guidance, plan=None) -> list[dict]:
    """Return one row per step of a `generate.Samples`: what the network got, how often it ran, and what it cost.

    Args:
      samples: the record.
      guidance: scale at each step [S].
      plan: of `fast`, or None. A whole plan narrows nothing: its segments have no numbers.
    """
    rows = [
        dict(
            step=step,
            timestep=samples.timesteps[step].item(),
            guidance=float(guidance[step]),
            passes=int(samples.evaluations[step]),
            macs_per_pass=float(samples.macs[step]),
            executed_macs_per_pass=float(samples.executed_macs[step]),
        )
        for step in range(len(samples.timesteps))
    ]
    for number, segment in enumerate(plan.segments if plan is not None else ()):
        for row in rows[segment.start : segment.stop]:
            row["segment"] = "none" if plan.whole else number
    return rows


def step_columns(rows: list[dict]) -> dict[str, list]:
    """Return the columns of a step table, by name."""
    return {name: [row[name] for row in rows] for name in rows[0]}


def step_lines(rows: list[dict]) -> str:
    """Return a step table as text; of many steps, a line for those in a row with the same guidance and segment.

    Segments count from 1, as in the text of a plan.
    """
    alike = lambda row: (row["guidance"], row.get("segment"))
    groups = [[row] for row in rows]
    if len(rows) > MOST_LINES:
        groups = [list(group) for _, group in itertools.groupby(rows, alike)]
    number = lambda row: row["segment"] + 1 if isinstance(row.get("segment"), int) else row.get("segment", "")
    lines = ["steps    timesteps  guidance  passes  segment   MACs per pass  executed"]
    for group in groups:
        first, last = group[0], group[-1]
        span = lambda name, first=first, last=last: "..".join(
            dict.fromkeys(format_time(row[name]) for row in (first, last))
        )
        macs, executed = (np.mean([row[name] for row in group]) for name in ("macs_per_pass", "executed_macs_per_pass"))
        lines.append(
            f"{span('step'):8} {span('timestep'):>9} {first['guidance']:>9g} {first['passes']:>7} "
            f"{number(first):>8} {format_count(macs):>15} {format_count(executed):>9}"
        )
    return "\n".join(lines)


@in_style
def draw_steps(rows: list[dict], complete: float):
    """Draw a step table: timesteps, scale of guidance, and what all passes of an image cost; bands are segments.

    Args:
      rows: from `step_table`.
      complete: MACs of a pass with every gate open.

    Returns:
      A figure.
    """
    from matplotlib.ticker import MaxNLocator

    figure, steps = new_figure(5.4), np.arange(len(rows))
    axes = figure.subplots(3, 1, sharex=True, height_ratios=[1.2, 0.8, 1.2])
    columns = {name: np.array(values) for name, values in step_columns(rows).items()}
    passes, segments = columns["passes"], columns.get("segment", np.zeros(len(rows), int))
    narrowed = np.issubdtype(segments.dtype, np.integer) and "segment" in columns
    axes[0].plot(steps, columns["timestep"], marker="o", ms=2.5, color=OPEN)
    axes[0].set_title("Timestep of each evaluation")
    axes[1].step(steps, columns["guidance"], where="mid", color=OPEN)
    axes[1].set_title("Scale of guidance; 1: one pass")
    axes[1].set_ylim(0, 1.15 * columns["guidance"].max())
    cost = passes * columns["executed_macs_per_pass"]
    axes[2].fill_between(steps, cost, step="mid", color=OPEN, alpha=0.15, linewidth=0)
    axes[2].step(steps, cost, where="mid", color=OPEN)
    axes[2].step(steps, passes * complete, where="mid", color=LEFT_OUT, linestyle="--", linewidth=1.2)
    axes[2].set_title(f"MACs per image, {format_count(cost.sum())} in all; dashed: every gate open")
    axes[2].set_ylim(0, 1.1 * passes.max() * complete)
    axes[2].yaxis.set_major_formatter(count_ticks())
    bands = _segments(segments) if narrowed else "nothing is left out"
    axes[2].set_xlabel(f"evaluation, from noise (left) to image (right); {bands}")
    for axis in axes:
        for number in np.unique(segments)[1::2] if narrowed else ():
            inside = np.flatnonzero(segments == number)
            axis.axvspan(inside[0] - 0.5, inside[-1] + 0.5, color=CLOSED, alpha=0.6, linewidth=0, zorder=0)
        axis.tick_params(color=INK, length=2)
    axes[2].set_xlim(-0.5, len(rows) - 0.5)
    axes[2].xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def _segments(segments: np.ndarray) -> str:
    """Say what the bands are."""
    count = len(np.unique(segments))
    return "one segment" if count == 1 else f"bands: {count} segments"
