"""The picture and the tables of `quality.py`."""

import numpy as np

from dydit_jax.drawing.style import LINES, in_style, new_figure

MEASURES = {"error": "Error to DDIM-1000", "accuracy": "Accuracy", "distance": "Fréchet distance"}
PLACES = {"error": 4, "accuracy": 3, "distance": 2}
SHOWN = ("ddpm", "ddim", "dpmpp_2m", "unipc", "heun", "ab4")


def line_of(cells: list[dict], solver: str, guidance: str, measure: str) -> tuple[list, list]:
    """Return numbers of evaluations and what was measured there, without what was not."""
    rows = [row for row in cells if (row["solver"], row["guidance"]) == (solver, guidance)]
    known = sorted((row["evaluations"], row[measure]) for row in rows if row[measure] is not None)
    return [evaluations for evaluations, _ in known], [value for _, value in known]


@in_style
def draw(cells: list[dict]):
    """Draw error, accuracy and distance over evaluations without guidance, and the distance with it."""
    from matplotlib.ticker import NullLocator

    figure, others = new_figure(9.4), list(dict.fromkeys(row["guidance"] for row in cells))[1:]
    panels = [*((measure, "1") for measure in MEASURES), *(("distance", guidance) for guidance in others)]
    axes = figure.subplots(len(panels), 1, sharex=True, height_ratios=[1.3, 1, 1.3, *(1 for _ in others)])
    for axis, (measure, guidance) in zip(axes, panels):
        for solver, (colour, dashes) in zip(SHOWN, LINES):
            evaluations, values = line_of(cells, solver, guidance, measure)
            axis.plot(evaluations, values, marker="o", ms=3, linestyle=dashes, color=colour, label=solver)
        axis.set_title(f"{MEASURES[measure]}, guidance {guidance}")
        axis.set_xscale("log")
        if measure == "error":
            axis.set_yscale("log")
    axes[-1].set_xticks(sorted({row["evaluations"] for row in cells}), sorted({row["evaluations"] for row in cells}))
    axes[-1].xaxis.set_minor_locator(NullLocator())
    axes[-1].set_xlabel("evaluations of the network")
    figure.legend(*axes[1].get_legend_handles_labels(), loc="outside lower left", ncols=3)
    return figure


def tables(found: dict) -> str:
    """Return the results as Markdown: a table per measure and guidance, and the settings beside DDPM."""
    cells, parts = found["cells"], []
    numbers = sorted({row["evaluations"] for row in cells})
    for guidance in dict.fromkeys(row["guidance"] for row in cells):
        for measure, title in MEASURES.items():
            lines = [f"{title}, guidance {guidance}", ""]
            lines += ["| solver | " + " | ".join(map(str, numbers)) + " |", "|---" * (1 + len(numbers)) + "|"]
            for solver in dict.fromkeys(row["solver"] for row in cells):
                values = dict(zip(*line_of(cells, solver, guidance, measure)))
                shown = [f"{values[n]:.{PLACES[measure]}f}" if n in values else "" for n in numbers]
                lines.append(f"| `{solver}` | {' | '.join(shown)} |")
            parts.append("\n".join(lines))
    parts.append(settings_table(found["settings"]))
    return "\n\n".join(parts) + "\n"


def settings_table(rows: list[dict]) -> str:
    """Return mean and standard deviation over the seeds of each setting."""
    values = lambda name, key: np.array([row[key] for row in rows if row["setting"] == name])
    lines = ["| setting | seeds | accuracy | distance |", "|---|---|---|---|"]
    for name in dict.fromkeys(row["setting"] for row in rows):
        cells = []
        for key in ("accuracy", "distance"):
            of_seeds = values(name, key)
            cells.append(f"{of_seeds.mean():.3f} ± {of_seeds.std(ddof=len(of_seeds) > 1):.3f}")
        lines.append(f"| {name} | {len(of_seeds)} | {' | '.join(cells)} |")
    return "\n".join(lines)
