"""The tables and figures of the study, from its results alone."""

import textwrap
from collections.abc import Mapping

import numpy as np
from studies import deviation, difference, table_header, table_line
from study_models import (
    DYNAMIC,
    DYNAMIC_FLOW,
    FLOW,
    LAMBDAS,
    NARROWER,
    QUESTIONS,
    SHALLOWER,
    STATIC,
    TRAINED_ON,
    VARIANTS,
)

from dydit_jax.drawing.style import FAINT, INK, LINES, OPEN, SMALL, count_ticks, in_style, new_figure
from dydit_jax.models.cost import format_count

MEASURES = {"accuracy": 3, "distance": 2, "precision": 3, "recall": 3}  # with their decimal places
MEASURED = 2.0  # deviations from which on a difference counts
TITLE_COLUMNS = 58
SINGLE = (STATIC, TRAINED_ON, NARROWER, SHALLOWER)  # models that are a point of the figure, not of a line
FLOWS = {FLOW: "o", DYNAMIC_FLOW: "v"}  # with their markers


def measures_of(found: Mapping) -> dict[str, int]:
    """Return the measures that the judge of the results has, with their decimal places."""
    return {name: places for name, places in MEASURES.items() if name in found["real"]}


def of_seeds(found: Mapping, model: str, key: str) -> list[np.ndarray]:
    """Return what was measured of a model: for each training seed, the values of its sampling seeds."""
    rows = [row for row in found["results"] if row["model"] == model]
    seeds = sorted({row["seed"] for row in rows})
    return [np.array([row[key] for row in rows if row["seed"] == seed]) for seed in seeds]


def means(found: Mapping, model: str, key: str) -> np.ndarray:
    """Return the means of a model over its sampling seeds [training seeds]."""
    return np.array([values.mean() for values in of_seeds(found, model, key)])


def models_of(found: Mapping) -> list[str]:
    """Return the models that were measured, in the order of the questions."""
    measured = {row["model"] for row in found["results"]}
    return [name for question in QUESTIONS for name in question.models if name in measured]


def sampling_deviation(values: list[np.ndarray]) -> float | None:
    """Return the standard deviation over sampling seeds, the root of its mean square over the training seeds."""
    squares = [deviation(of_seed) ** 2 for of_seed in values if len(of_seed) > 1]
    return float(np.sqrt(np.mean(squares))) if squares else None


# --- Tables --------------------------------------------------------------------------------------


def plan_table(rows: list[dict], rate: float) -> str:
    """Return the trainings in their order with their hours, and the hours in all."""
    lines = table_header("", "model", "training seed", "steps", "MACs", "hours", "state")
    for number, row in enumerate(rows, 1):
        macs, hours = format_count(row["macs"]), f"{row['hours']:.1f}"
        cells = (number, row["model"], row["seed"], row["steps"], macs, hours, row["state"])
        lines.append(table_line(*map(str, cells)))
    whole, left = (sum(row[key] for row in rows) for key in ("hours", "left"))
    speed = f"{format_count(rate)}MACs per second in training"
    return "\n".join([*lines, "", f"{whole:.1f} hours in all, {left:.1f} left, at {speed}.", ""])


def tables(found: Mapping) -> str:
    """Return the results as Markdown: all models, then a table of differences for each question."""
    parts = [_models_table(found)]
    for question in QUESTIONS:
        lines = _differences_table(found, question.pairs)
        if lines:
            parts += [f"**{question.text}**", "\n".join(lines)]
    return "\n\n".join(parts) + "\n"


def _models_table(found: Mapping) -> str:
    """Return a line per model: mean ± deviation over training seeds, and in brackets that over sampling seeds."""
    measures = measures_of(found)
    lines = table_header("model", "training seeds", "million MACs", "open share", *measures)
    for model in models_of(found):
        values = {key: of_seeds(found, model, key) for key in measures}
        macs, share = (means(found, model, key).mean() for key in ("macs", "mac_ratio"))
        cells = [_spread_cell(values[key], places) for key, places in measures.items()]
        seeds = str(len(next(iter(values.values()))))
        lines.append(table_line(model, seeds, f"{macs / 1e6:.2f}", f"{share:.3f}", *cells))
    real = [f"{found['real'][key]:.{places}f}" for key, places in measures.items()]
    return "\n".join([*lines, table_line("real test pictures", "", "", "", *real)])


def _spread_cell(values: list[np.ndarray], places: int) -> str:
    of_training = np.array([of_seed.mean() for of_seed in values])
    spreads = deviation(of_training), sampling_deviation(values)
    texts = ["" if spread is None else f"{spread:.{places}f}" for spread in spreads]
    return f"{of_training.mean():.{places}f}" + (texts[0] and f" ± {texts[0]}") + (texts[1] and f" ({texts[1]})")


def _differences_table(found: Mapping, pairs: tuple) -> list[str]:
    """Return a line per pair of models that are there: the first minus the second, and that in deviations."""
    measures, measured = measures_of(found), models_of(found)
    lines = []
    for model, other in pairs:
        if {model, other} <= set(measured):
            cells = []
            for key, places in measures.items():
                by = difference(means(found, model, key), means(found, other, key))
                counted = "" if by["deviations"] is None else f" ({by['deviations']:+.1f})"
                cells.append(f"{by['by']:+.{places}f}{counted}")
            lines.append(table_line(f"{model}, minus {other}", *cells))
    return [*table_header("difference (in deviations)", *measures), *lines] if lines else []


# --- Figures -------------------------------------------------------------------------------------


def nearness(found: Mapping, model: str, other: str) -> str:
    """Say whether a model's pictures are nearer to real ones than another's; "" where deviations are not known."""
    pair = (means(found, name, "distance") for name in (model, other))
    counted = difference(*pair)["deviations"]
    if counted is None:
        return ""
    if abs(counted) <= MEASURED:
        return "as near to real ones as"
    return "nearer to real ones than" if counted < 0 else "farther from real ones than"


def cost_finding(found: Mapping) -> str:
    """Say how a DyDiT compares with static models of its cost."""
    measured = models_of(found)
    others = {NARROWER: "a narrower static model", SHALLOWER: "a shallower one"}
    words = {name: nearness(found, DYNAMIC, name) for name in others if {DYNAMIC, name} <= set(measured)}
    if not all(words.values()) or len(words) < len(others):
        return "Fréchet distance to real pictures, over cost"
    if len(set(words.values())) == 1:
        return f"At its cost, a DyDiT's pictures are {words[NARROWER]} those of narrower and shallower static models"
    compared = " and ".join(f"{words[name]} those of {what}" for name, what in others.items())
    return f"At its cost, a DyDiT's pictures are {compared}"


@in_style
def draw_cost(found: Mapping):
    """Draw distance over cost, a point for each training seed and a line through the DyDiTs; None without a DyDiT."""
    measured = models_of(found)
    dynamic = [name for name in LAMBDAS.values() if name in measured]
    if not dynamic:
        return None
    figure = new_figure(3.9)
    axis = figure.subplots()
    of_model = lambda name: [means(found, name, key) for key in ("macs", "distance")]
    looks = zip(SINGLE, "soDP", [color for color, _ in LINES[1:5]])
    for name, marker, color in looks:
        if name in measured:
            axis.plot(*of_model(name), marker, color=color, label=name, ms=5.5, mew=0)
    for name in dynamic:
        macs, distance = of_model(name)
        axis.plot(macs, distance, "v", color=OPEN, ms=5.5, mew=0, label="DyDiT" if name == dynamic[0] else None)
        place = dict(textcoords="offset points", xytext=(7, 4), fontsize=SMALL)
        axis.annotate(name.removeprefix("DyDiT, "), (macs.mean(), distance.mean()), **place)
    axis.plot(*zip(*([values.mean() for values in of_model(name)] for name in dynamic)), color=OPEN, lw=1)
    for name, marker in FLOWS.items():
        if name in measured:
            axis.plot(*of_model(name), marker, color=INK, mfc="none", label=name, ms=5.5)
    axis.axhline(found["real"]["distance"], color=FAINT, lw=1, ls=":", label="real test pictures")
    axis.set_title(textwrap.fill(cost_finding(found), TITLE_COLUMNS))
    axis.set(ylim=0, xlabel="MACs per image and pass", ylabel="Fréchet distance")
    axis.xaxis.set_major_formatter(count_ticks())
    figure.legend(loc="outside lower left", ncols=2)
    return figure


def part_differences(found: Mapping) -> dict[str, dict]:
    """Return the differences in distance of the pairs whose models leave out a part of what a DyDiT learns."""
    measured = set(models_of(found))
    pairs = [pair for question in QUESTIONS for pair in question.pairs if pair[0] in VARIANTS]
    return {
        model: difference(*(means(found, name, "distance") for name in (model, other))) | dict(other=other)
        for model, other in pairs
        if {model, other} <= measured
    }


def parts_finding(differences: Mapping) -> str:
    """Say which parts are missed."""
    worse = [name for name, row in differences.items() if (row["deviations"] or 0) > MEASURED]
    if not any(row["deviations"] for row in differences.values()):
        return "What each change does to the distance to real pictures"
    if not worse:
        return "None of these makes the pictures measurably worse"
    return f"Measurably worse at equal cost: {', '.join(name.removeprefix('DyDiT, ') for name in worse)}"


@in_style
def draw_parts(found: Mapping):
    """Draw what turning parts off, or not learning them, does to the distance; None before any was measured."""
    differences = part_differences(found)
    if not differences:
        return None
    figure, rows = new_figure(1.4 + 0.42 * len(differences)), range(len(differences))
    axis = figure.subplots()
    spreads = [MEASURED * (row["deviation"] or 0) for row in differences.values()]
    axis.errorbar([row["by"] for row in differences.values()], rows, xerr=spreads, fmt="o", color=OPEN, ms=5.5, lw=1.2)
    axis.axvline(0, color=FAINT, lw=1)
    axis.set_yticks(rows, [f"{name}\nbeside {row['other']}" for name, row in differences.items()], fontsize=SMALL)
    axis.tick_params(color=INK, length=2)
    axis.set(ylim=(len(differences) - 0.5, -0.5))
    bars = f"; bars: {MEASURED:.0f} deviations" if any(spreads) else ""
    axis.set_xlabel(f"difference in Fréchet distance{bars}")
    figure.suptitle(textwrap.fill(parts_finding(differences), TITLE_COLUMNS), x=0.01, ha="left", fontsize=9.5)
    return figure
