"""The table and the figure of the Pareto page, from its points alone."""

import textwrap

from studies import table_header, table_line
from study_models import LAMBDAS, ONE_PASS, SHALLOWER, STATIC

from dydit_jax.drawing.style import INK, LINES, in_style, new_figure

# Costs, with what stands below their axis, and its unit.
COSTS = {
    "macs": ("million MACs per image, of all passes", 1e6),
    "seconds": ("milliseconds per image, in a batch", 1e-3),
}
QUALITY = "distance"
STATICS = (STATIC, SHALLOWER)
MODELS = (*STATICS, *LAMBDAS.values(), ONE_PASS)
MARKERS = {"none": "o", "constant": "s", "interval": "^"}
TITLE_COLUMNS = 58
TICKS = (1, 2, 5)  # of each power of ten


def front(points: list[dict], cost: str) -> list[dict]:
    """Return the points that no other beats in cost and in quality, the cheapest first."""
    found = []
    for point in sorted(points, key=lambda point: (point[cost], point[QUALITY])):
        if not found or point[QUALITY] < found[-1][QUALITY]:
            found.append(point)
    return found


def finding(points: list[dict], cost: str) -> str:
    """Say how many points of the front are of dynamic models."""
    best = front(points, cost)
    dynamic = sum(point["mode"] != "complete" for point in best)
    what = "MACs" if cost == "macs" else "seconds"
    if dynamic == len(best):
        return f"By {what}, all {len(best)} points that nothing beats are dynamic"
    return f"By {what}, {dynamic} of {len(best)} points that nothing beats are dynamic"


def table(points: list[dict]) -> str:
    """Return the points that nothing beats, by MACs or by seconds, as Markdown."""
    fronts = {cost: front(points, cost) for cost in COSTS}
    measures = [key for key in ("accuracy", QUALITY, "precision", "recall") if key in points[0]]
    headers = ("model", "solver, times", "guidance", "mode", "passes", "million MACs", "milliseconds", *measures)
    lines = table_header(*headers, "nothing beats it by")
    for point in sorted(points, key=lambda point: point["macs"]):
        by = [{"macs": "MACs", "seconds": "seconds"}[cost] for cost, best in fronts.items() if point in best]
        if by:
            cells = [point[key] for key in ("model", "solver", "guidance", "mode", "passes")]
            cells += [f"{point['macs'] / 1e6:.0f}", f"{1000 * point['seconds']:.1f}"]
            cells += [f"{point[key]:.{2 if key == QUALITY else 3}f}" for key in measures]
            lines.append(table_line(*map(str, cells), ", ".join(by)))
    return "\n".join(lines) + "\n"


@in_style
def draw(points: list[dict]):
    """Draw distance over MACs and over seconds, a mark for each point and a line through those that nothing beats."""
    from matplotlib.lines import Line2D
    from matplotlib.ticker import LogLocator, NullLocator, ScalarFormatter

    figure = new_figure(7.4)
    axes = figure.subplots(2, 1)
    colours = dict(zip(MODELS, (LINES[line][0] for line in (1, 5, 4, 0, 2, 3))))
    for axis, (cost, (label, unit)) in zip(axes, COSTS.items()):
        best = front(points, cost)
        axis.plot(
            [point[cost] / unit for point in best], [point[QUALITY] for point in best], color=INK, lw=0.8, zorder=1
        )
        for point in points:
            # Hollow: all gates open, or all of it computed and multiplied by them.
            colour, hollow = colours[point["model"]], point["model"] not in STATICS and point["mode"] != "fast"
            look = dict(marker=MARKERS[point["guidance"]], color=colour, ms=5, mew=1, mfc="none" if hollow else colour)
            axis.plot(point[cost] / unit, point[QUALITY], ls="", **look)
        axis.set(xscale="log", yscale="log", xlabel=label, ylabel="Fréchet distance")
        for line in (axis.xaxis, axis.yaxis):
            line.set_major_locator(LogLocator(subs=TICKS))
            line.set_minor_locator(NullLocator())
            line.set_major_formatter(ScalarFormatter())
        axis.set_title(textwrap.fill(finding(points, cost), TITLE_COLUMNS))
    of_models = [Line2D([], [], marker="o", ls="", color=colours[name], label=name) for name in MODELS]
    of_guidance = [
        Line2D([], [], marker=marker, ls="", color=INK, label=f"guidance: {name}") for name, marker in MARKERS.items()
    ]
    of_guidance.append(Line2D([], [], marker="o", ls="", color=INK, mfc="none", label="dynamic, but not in fast"))
    figure.legend(handles=[*of_models, *of_guidance], loc="outside lower left", ncols=2)
    return figure
