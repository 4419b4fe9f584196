"""Figures of losses, over timesteps and over the patches of an image, and beside each the table of its numbers."""

import numpy as np

from dydit_jax.diffusion.process import format_time
from dydit_jax.drawing.style import (
    FAINT,
    LINES,
    SMALL,
    TIMESTEPS,
    escape_math,
    in_style,
    new_figure,
    noise_left,
    shades,
)

PERCENTS = (0, 5, 10, 20, 50, 100, 200, 500, 1000)  # ticks of a difference


@in_style
def draw_losses(timesteps: np.ndarray, losses: dict):
    """Draw the loss of several models over the timesteps, and below the difference to the first one in percent.

    Args:
      timesteps: from noise to image [T].
      losses: by model, mean squared error of the prediction per example [n,T], the same examples for all.

    Returns:
      A figure.
    """
    from matplotlib.ticker import FixedLocator, NullLocator

    names = list(losses)
    figure = new_figure(5.6 if len(names) > 1 else 3.4)
    axes = figure.subplots(2 if len(names) > 1 else 1, 1, sharex=True, squeeze=False)[:, 0]
    lines = []
    for name, (color, dashes) in zip(names, LINES * len(names)):
        lines += axes[0].plot(timesteps, losses[name].mean(0), linestyle=dashes, color=color)
        if name != names[0]:
            gap = 100 * (losses[name] - losses[names[0]]) / losses[names[0]].mean(0)
            mean, error = gap.mean(0), 2 * gap.std(0, ddof=1) / len(gap) ** 0.5
            axes[1].plot(timesteps, mean, linestyle=dashes, color=color)
            axes[1].fill_between(timesteps, mean - error, mean + error, color=color, alpha=0.15, linewidth=0)
    axes[0].set_yscale("log")
    axes[0].set_title(f"Mean squared error of the prediction, {len(losses[names[0]])} examples")
    if len(names) > 1:
        axes[1].axhline(0, color=FAINT, linewidth=0.8)
        axes[1].set_yscale("symlog", linthresh=10)  # a few percent can be read beside a multiple
        axes[1].yaxis.set_major_locator(FixedLocator([sign * value for value in PERCENTS for sign in (-1, 1)]))
        axes[1].yaxis.set_minor_locator(NullLocator())
        axes[1].yaxis.set_major_formatter(lambda value, _: f"{value:+g} %".replace("-", "−") if value else "0")
        axes[1].set_title(f"Difference to {escape_math(names[0])}; shaded: two standard errors")
    noise_left(axes[0], timesteps)
    axes[-1].set_xlabel(TIMESTEPS)
    # Of labels that are not given here, those that begin with "_" are left out.
    figure.legend(handles=lines, labels=list(map(escape_math, names)), loc="outside lower left", ncols=1)
    return figure


def loss_table(timesteps: np.ndarray, losses: dict) -> list[dict]:
    """Return one row per timestep and model: mean loss and difference to the first model, with standard errors."""
    first = next(iter(losses.values()))
    error = lambda values: values.std(ddof=1) / len(values) ** 0.5
    return [
        dict(
            timestep=format_time(timestep),
            model=name,
            loss=loss[:, column].mean(),
            standard_error=error(loss[:, column]),
            difference=(loss - first)[:, column].mean(),
            difference_standard_error=error((loss - first)[:, column]),
        )
        for column, timestep in enumerate(timesteps)
        for name, loss in losses.items()
    ]


@in_style
def draw_loss_maps(timesteps, maps: dict):
    """Draw where in the image the loss lies.

    Args:
      timesteps: the T that are shown.
      maps: by model, mean loss of each patch [T,N].

    Returns:
      A figure.
    """
    figure = new_figure(1.3 * len(maps) + 0.7)
    axes = figure.subplots(len(maps), len(timesteps), squeeze=False)
    relative = {name: field / field.mean(-1, keepdims=True) for name, field in maps.items()}
    top = max(field.max() for field in relative.values())
    for line, (name, field) in zip(axes, relative.items()):
        side = int(round(field.shape[-1] ** 0.5))
        for column, axis in enumerate(line):
            picture = axis.imshow(field[column].reshape(side, side), cmap=shades(), vmin=0, vmax=top)
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
            text = f"t = {format_time(timesteps[column])}\n{maps[name][column].mean():.2g}"
            axis.set_xlabel(text, fontsize=SMALL, labelpad=2)
        line[0].set_title(escape_math(name))
    bar = figure.colorbar(picture, ax=axes, location="bottom", shrink=0.7, aspect=30)
    bar.set_label("loss of a patch, in units of its map's mean")
    bar.outline.set_visible(False)
    return figure


def loss_map_table(timesteps, maps: dict) -> list[dict]:
    """Return one row per model, timestep and patch."""
    return [
        dict(model=name, timestep=format_time(timestep), patch=patch, loss=loss)
        for name, field in maps.items()
        for timestep, row in zip(timesteps, field)
        for patch, loss in enumerate(row)
    ]
