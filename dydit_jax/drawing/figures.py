"""Figures of what a model computed, and beside each the table of its numbers.

What is drawn: open gates over the timesteps, the plan of a fast run, the cost of a pass, tokens over the image that
they belong to. Nothing is computed here.
"""

import numpy as np

from dydit_jax.diffusion.process import format_time
from dydit_jax.drawing.style import (
    CLOSED,
    INK,
    KEPT,
    LEFT_OUT,
    LINES,
    OPEN,
    SMALL,
    TIMESTEPS,
    count_ticks,
    draw_field,
    escape_math,
    in_style,
    label_steps,
    new_figure,
    noise_left,
    shades,
)
from dydit_jax.models.cost import format_count

TINT = 0.7  # of the colour over a token that is left out

# --- Gates ---------------------------------------------------------------------------------------


def routing_table(samples) -> list[dict]:
    """Return one row per step and layer of a `generate.Samples`: open heads and groups, share of open tokens."""
    units = lambda gates: " ".join(map(str, np.flatnonzero(gates)))
    routing = samples.routing
    steps, layers, _ = routing.heads.shape
    return [
        dict(
            timestep=format_time(samples.timesteps[step]),
            layer=layer,
            heads=units(routing.heads[step, layer]),
            groups=units(routing.groups[step, layer]),
            tokens=f"{routing.tokens[step, layer].mean():.4f}",
        )
        for step in range(steps)
        for layer in range(layers)
    ]


@in_style
def draw_routing(samples, macs):
    """Draw which gates were open while images were made, and what a pass cost, over the timesteps.

    Args:
      samples: a `generate.Samples`.
      macs: the model's `ModelMacs`.

    Returns:
      A figure: heads, MLP groups, tokens, MACs.
    """
    figure = new_figure(7.2)
    axes = figure.subplots(4, 1, sharex=True, height_ratios=[3, 3, 3, 2.2])
    for axis, name in zip(axes, ("heads", "groups", "tokens")):
        gates = getattr(samples.routing, name)
        image = draw_field(axis, gates, cmap=shades(), vmin=0, vmax=1)
        axis.set_title(f"{'MLP groups' if name == 'groups' else name.title()}: {100 * gates.mean():.0f} % open")
    bar = figure.colorbar(image, ax=axes[:3], location="top", shrink=0.6, aspect=30, pad=0.01)
    bar.set_ticks([0, 0.5, 1], labels=["closed", "open in half of the images", "open"])
    bar.ax.tick_params(length=0)
    bar.outline.set_visible(False)
    _draw_cost(axes[3], samples.macs, macs.complete)
    label_steps(axes[3], np.asarray(samples.timesteps))
    return figure


def _draw_cost(axis, macs, complete: float) -> None:
    """Draw the MACs of a pass over the steps of a run, below the line of the complete model."""
    steps, share = np.arange(len(macs)), np.mean(macs) / complete
    axis.fill_between(steps, macs, step="mid", color=OPEN, alpha=0.15, linewidth=0)
    axis.step(steps, macs, where="mid", color=OPEN)
    axis.axhline(complete, color=LEFT_OUT, linestyle="--", linewidth=1.2)
    axis.annotate(
        f"every gate open: {format_count(complete)}",
        (0, complete),
        xytext=(0, -3),
        textcoords="offset points",
        va="top",
        color=LEFT_OUT,
    )
    axis.set_title(f"MACs per image and pass: {format_count(np.mean(macs))} on average, {100 * share:.0f} %")
    axis.set_ylim(0, 1.08 * complete)
    axis.yaxis.set_major_formatter(count_ticks())


@in_style
def draw_plan(plan, timesteps):
    """Draw the segments of a plan: what each layer keeps, and what of that is open.

    Args:
      plan: a `fast.plan.Plan`.
      timesteps: of the run [S].

    Returns:
      A figure: heads and MLP groups, with a line where one segment ends and the next begins.
    """
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    figure, colours = new_figure(5.2), (CLOSED, KEPT, OPEN)
    axes = figure.subplots(2, 1, sharex=True)
    for axis, gates, name in zip(axes, (plan.heads, plan.groups), ("heads", "groups")):
        kept = np.zeros(gates.shape, int)
        for segment in plan.segments:
            for layer, indices in enumerate(getattr(segment, name)):
                kept[segment.start : segment.stop, layer, list(indices)] = 1
        meanings = dict(cmap=ListedColormap(colours), vmin=-0.5, vmax=2.5, interpolation="nearest")
        draw_field(axis, kept + gates, **meanings)  # no mean of two meanings is a third one
        for segment in plan.segments[1:]:
            axis.axvline(segment.start - 0.5, color=INK, linewidth=1)
        title = "MLP groups" if name == "groups" else "Heads"
        axis.set_title(f"{title}: {100 * gates.mean():.0f} % open, {100 * kept.mean():.0f} % kept")
    label_steps(axes[1], timesteps)
    words = ("left out", "kept, but closed", "kept and open")
    handles = [Patch(facecolor=colour, label=label) for colour, label in zip(colours, words)]
    figure.legend(handles=handles, loc="outside upper left", ncols=3, handlelength=1, columnspacing=1.2)
    return figure


def plan_table(plan, timesteps) -> list[dict]:
    """Return one row per segment and layer of a plan."""
    return [
        dict(
            segment=number,
            first_timestep=format_time(timesteps[segment.start]),
            last_timestep=format_time(timesteps[segment.stop - 1]),
            steps=len(segment),
            layer=layer,
            heads=" ".join(map(str, segment.heads[layer])),
            groups=" ".join(map(str, segment.groups[layer])),
        )
        for number, segment in enumerate(plan.segments)
        for layer in range(plan.heads.shape[1])
    ]


@in_style
def draw_macs(timesteps: dict, macs: dict, complete: dict):
    """Draw the cost of a pass over the timesteps.

    Args:
      timesteps, macs: by model, the timesteps of the network's evaluations [S] and MACs per image and pass [S].
      complete: by model, MACs of a pass with every gate open.

    Returns:
      A figure.
    """
    figure = new_figure(3.4)
    axis = figure.subplots()
    lines, labels = [], []
    for (name, cost), (color, dashes) in zip(macs.items(), LINES * len(macs)):
        mean = np.mean(cost)
        labels.append(f"{escape_math(name)}: {format_count(mean)}, {100 * mean / complete[name]:.0f} % of complete")
        lines += axis.plot(timesteps[name], np.asarray(cost), linestyle=dashes, color=color, drawstyle="steps-mid")
        axis.axhline(complete[name], color=color, linestyle=dashes, linewidth=0.7)
    noise_left(axis, next(iter(timesteps.values())))
    axis.set_ylim(0)
    axis.yaxis.set_major_formatter(count_ticks())
    axis.set_xlabel(TIMESTEPS)
    axis.set_title("MACs per image and pass; thin lines: every gate open")
    figure.legend(handles=lines, labels=labels, loc="outside lower left")
    return figure


# --- Tokens --------------------------------------------------------------------------------------


@in_style
def draw_tokens(images: np.ndarray, tokens: np.ndarray, timesteps, layers):
    """Draw which tokens passed the MLPs over the images that came out.

    Args:
      images: uint8 [I,side,side,1 or 3].
      tokens: share of passes in which a token was open [I,T,L,N], at the T timesteps shown.
      timesteps: [T].
      layers: numbers of the layers to show of a single image, each in a row; below them the mean over all layers.
        Of several images only the mean is shown.

    Returns:
      A figure: tokens that were left out are tinted, their picture grey below the tint.
    """
    from matplotlib.patches import Patch

    count, columns = tokens.shape[:2]
    rows = [*layers, None] if count == 1 else [None]
    figure = new_figure(0.77 * len(rows) * count + 0.7)
    axes = figure.subplots(len(rows) * count, columns + 1, squeeze=False)
    for axis in axes.ravel():
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    for index, image in enumerate(images):
        for line, layer in zip(axes[index * len(rows) :], rows):
            label = "mean" if layer is None else f"layer {layer}"
            line[0].set_ylabel(label if count == 1 else f"image {index}")
            line[0].imshow(image, cmap="gray", vmin=0, vmax=255)
            for axis, gates in zip(line[1:], tokens[index]):
                open_tokens = gates.mean(0) if layer is None else gates[layer]
                axis.imshow(tint_closed(image, open_tokens))
                axis.set_xlabel(f"{100 * open_tokens.mean():.0f} %", fontsize=SMALL, labelpad=2)
    for axis, text in zip(axes[0], ("image", *(f"t = {format_time(timestep)}" for timestep in timesteps))):
        axis.set_title(text, loc="center", fontsize=SMALL)
    handles = [Patch(facecolor=LEFT_OUT, alpha=TINT, label="skips the MLP; below each picture the share that passes")]
    figure.legend(handles=handles, loc="outside upper left", handlelength=1)
    return figure


def tint_closed(image: np.ndarray, open_tokens: np.ndarray) -> np.ndarray:
    """Tint the tokens of an image that are closed.

    Args:
      image: uint8 [side,side,1 or 3].
      open_tokens: share of passes in which each was open [N].

    Returns:
      uint8 [side,side,3]. A token that was always open looks as it does in the image. The hue tells the others apart
      from any picture's white, black and grey.
    """
    from matplotlib.colors import to_rgb

    tokens, side = int(round(open_tokens.size**0.5)), image.shape[0]
    closed = 1 - open_tokens.reshape(tokens, tokens)
    closed = closed.repeat(side // tokens, 0).repeat(side // tokens, 1)[..., None]
    grey = image.mean(-1, keepdims=True)
    tinted = (1 - TINT) * grey + TINT * 255 * np.array(to_rgb(LEFT_OUT))
    return ((1 - closed) * image + closed * tinted).round().astype(np.uint8)


def token_table(tokens: np.ndarray, timesteps) -> list[dict]:
    """Return one row per image, timestep and layer of [I,T,L,N]: the share of passes in which each token was open."""
    return [
        dict(
            image=image,
            timestep=format_time(timestep),
            layer=layer,
            **{f"token_{n}": f"{on:g}" for n, on in enumerate(gates)},
        )
        for image, record in enumerate(tokens)
        for timestep, layers in zip(timesteps, record)
        for layer, gates in enumerate(layers)
    ]
