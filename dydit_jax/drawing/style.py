"""One style for all figures: wide as a phone's screen, safe for colour-blind eyes, readable in grey.

A page shows a figure at most as wide as a phone's screen in points, or larger. So text is as large there as it is set
here, and nobody has to zoom. Colours are those of Okabe and Ito (https://jfly.uni-koeln.de/color); lines differ in
their dashes as well.
"""

import csv
import functools
import io
from collections.abc import Callable

import numpy as np
from etils import epath

from dydit_jax.diffusion.process import format_time
from dydit_jax.runtime.files import write_atomically

WIDTH, DPI = 4.8, 220  # inches, and pixels to the inch
INK, FAINT, PAPER = "#1f2933", "#8a94a0", "white"
OPEN, CLOSED = "#0072b2", "#e6eaee"
KEPT, LEFT_OUT = "#e69f00", "#d55e00"
LINES = (
    ("#0072b2", "-"),
    ("#d55e00", "--"),
    ("#009e73", "-."),
    ("#cc79a7", (0, (1, 1))),
    ("#56b4e9", (0, (5, 1))),
    ("#e69f00", (0, (3, 1, 1, 1, 1, 1))),
)
SMALL = 8.0  # points: below pictures
STYLE = {
    "font.size": 9.0,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.edgecolor": FAINT,
    "axes.titlelocation": "left",
    "axes.titlesize": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.6,
}
TIMESTEPS = "timestep, from noise (left) to image (right)"
MOST_TICKS = 7


def in_style(draw: Callable) -> Callable:
    """Let a function draw in this style. Matplotlib is imported now, not when a program starts that draws nothing."""

    @functools.wraps(draw)
    def draw_in_style(*arguments, **settings):
        import matplotlib

        with matplotlib.rc_context(STYLE):
            return draw(*arguments, **settings)

    return draw_in_style


def new_figure(height: float):
    """Return an empty figure of the common width and a height in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(WIDTH, height), layout="constrained", facecolor=PAPER)


def shades(name: str = "openness"):
    """Return the colours from closed (0) to open (1)."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list(name, [CLOSED, OPEN])


def count_ticks():
    """Return a formatter of ticks that gives counts their prefix: 6 M instead of 0.006 G."""
    from matplotlib.ticker import EngFormatter

    return EngFormatter()


def save_figure(path, figure) -> None:
    """Write a figure as what the suffix says, .png or .svg, on any kind of path, whole or not at all."""
    with write_atomically(path) as partial, partial.open("wb") as file:
        figure.savefig(file, format=epath.Path(path).suffix[1:], dpi=DPI)


def save_table(path, rows: list[dict]) -> None:
    """Write rows of equal keys as CSV, whole or not at all."""
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    with write_atomically(path) as partial:
        partial.write_text(text.getvalue())


def escape_math(name: str) -> str:
    """Return a name as a figure's text shows it, where two dollars would begin and end a formula."""
    return name.replace("$", r"\$")


def noise_left(axis, timesteps) -> None:
    """Let an axis of timesteps run from noise on the left to the image, as they do."""
    if timesteps[0] > timesteps[-1]:
        axis.invert_xaxis()


def spread_indices(count: int, shown: int) -> np.ndarray:
    """Return at most `shown` whole numbers, spread evenly from 0 to count - 1, ascending."""
    return np.unique(np.linspace(0, count - 1, min(shown, count)).round().astype(int))


def label_steps(axis, timesteps) -> None:
    """Write a few of the timesteps below an axis that counts steps."""
    shown = spread_indices(len(timesteps), MOST_TICKS)
    axis.set_xticks(shown, [format_time(timesteps[step]) for step in shown])
    axis.set_xlabel(TIMESTEPS)


def draw_field(axis, field, **colours):
    """Draw what each unit of each layer does at each step, a row per unit, with a gap between layers.

    Args:
      axis: to draw on.
      field: [S,L,U].
      colours: of `imshow`. By its default, rows that are less than a pixel high are averaged.

    Returns:
      The image, for a colour bar.
    """
    steps, layers, units = field.shape
    rows = field.transpose(1, 2, 0).reshape(layers * units, steps)
    image = axis.imshow(rows, aspect="auto", **colours)
    gap = min(1.5, 20 / layers)
    axis.hlines(np.arange(1, layers) * units - 0.5, -0.5, steps - 0.5, color=PAPER, linewidth=gap)
    shown = np.arange(0, layers, -(-layers // MOST_TICKS))
    axis.set_yticks((shown + 0.5) * units - 0.5, [str(layer) for layer in shown])
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    axis.set_ylabel("layer")
    return image
