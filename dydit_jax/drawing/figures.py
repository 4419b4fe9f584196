"""Figures, readable in grey, and beside each the table of its numbers.

What is drawn: what was on over the timesteps, the plan of a fast run, losses over timesteps and patches, tokens over
the image that they belong to. Nothing is computed here.
"""

import csv
import io

import numpy as np
from etils import epath

from dydit_jax.runtime.files import write_atomically

LINES = (("black", "-"), ("0.5", "-"), ("black", "--"), ("0.5", "--"), ("black", ":"), ("0.5", ":"))
NOISE_LEFT = "timestep: noise on the left, image on the right"


def _figure(width: float, height: float):
    from matplotlib.figure import Figure  # here: most programs draw none

    return Figure(figsize=(width, height), layout="constrained")


def save_figure(path, figure) -> None:
    """Write a figure as what the suffix says, .png or .svg, on any kind of path, whole or not at all."""
    with write_atomically(path) as partial, partial.open("wb") as file:
        figure.savefig(file, format=epath.Path(path).suffix[1:], dpi=110)


def save_table(path, rows: list[dict]) -> None:
    """Write rows of equal keys as CSV, whole or not at all."""
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    with write_atomically(path) as partial:
        partial.write_text(text.getvalue())


def _label_steps(axis, timesteps) -> None:
    """Write nine of the timesteps below an axis that counts steps."""
    shown = np.unique(np.linspace(0, len(timesteps) - 1, 9).round().astype(int))
    axis.set_xticks(shown, [str(timesteps[step]) for step in shown])


# --- What was on ---------------------------------------------------------------------------------


def routing_table(samples) -> list[dict]:
    """Return one row per step and layer of a `generate.Samples`: heads and groups that were on, share of tokens."""
    units = lambda gates: " ".join(map(str, np.flatnonzero(gates)))
    routing = samples.routing
    steps, layers, _ = routing.heads.shape
    return [
        dict(
            timestep=int(samples.timesteps[step]),
            layer=layer,
            heads=units(routing.heads[step, layer]),
            groups=units(routing.groups[step, layer]),
            tokens=f"{routing.tokens[step, layer].mean():.4f}",
        )
        for step in range(steps)
        for layer in range(layers)
    ]


def draw_routing(samples, macs):
    """Draw what was on while images were made: heads, groups, tokens and MACs over the timesteps.

    Args:
      samples: a `generate.Samples`.
      macs: the model's `ModelMacs`.

    Returns:
      A figure, readable in grey.
    """
    routing, timesteps = samples.routing, np.asarray(samples.timesteps)
    figure = _figure(12, 9)
    axes = figure.subplots(4, 1, sharex=True, height_ratios=[3, 3, 3, 2])
    edges = np.arange(len(timesteps) + 1) - 0.5
    panels = (
        (routing.heads, "heads", "layer and head"),
        (routing.groups, "MLP groups", "layer and group"),
        (routing.tokens, "tokens", "layer and token"),
    )
    for axis, (gates, name, label) in zip(axes, panels):
        steps, layers, units = gates.shape
        field = gates.transpose(1, 2, 0).reshape(layers * units, steps)
        grey = dict(cmap="gray_r", vmin=0, vmax=1, rasterized=True)  # as vectors it would make an SVG of megabytes
        mesh = axis.pcolormesh(edges, np.arange(layers * units + 1), field, **grey)
        axis.set_yticks(np.arange(layers) * units + units / 2, [f"{layer}" for layer in range(layers)])
        axis.hlines(np.arange(1, layers) * units, edges[0], edges[-1], color="tab:orange", linewidth=1)
        axis.invert_yaxis()
        axis.set_ylabel(label)
        axis.set_title(f"{name}: {100 * gates.mean():.0f} % on", loc="left", fontsize=10)
    figure.colorbar(mesh, ax=axes[:3], label="share of images with this unit on", shrink=0.6)
    axes[3].step(np.arange(len(timesteps)), samples.macs / 1e9, where="mid", color="black", label="dynamic")
    axes[3].axhline(macs.complete / 1e9, color="tab:gray", linestyle="--", label="complete (static DiT)")
    axes[3].set_ylim(bottom=0)
    axes[3].set_ylabel("GMACs per pass")
    axes[3].legend(loc="lower right", fontsize=9)
    _label_steps(axes[3], timesteps)
    axes[3].set_xlabel(NOISE_LEFT)
    axes[3].set_xlim(edges[0], edges[-1])
    return figure


def draw_plan(plan, timesteps):
    """Draw the segments of a plan: what each layer keeps, and what of that is on.

    Args:
      plan: a `fast.plan.Plan`.
      timesteps: of the run [S].

    Returns:
      A figure, readable in grey: black is on, light grey is kept but off (padding), white is left out.
    """
    figure = _figure(12, 7)
    axes = figure.subplots(2, 1, sharex=True)
    steps, layers, _ = plan.heads.shape
    for axis, gates, name in zip(axes, (plan.heads, plan.groups), ("heads", "groups")):
        units = gates.shape[-1]
        kept = np.zeros(gates.shape)
        for segment in plan.segments:
            for layer, indices in enumerate(getattr(segment, name)):
                kept[segment.start : segment.stop, layer, list(indices)] = 1
        field = (0.2 * kept + 0.8 * gates).transpose(1, 2, 0).reshape(layers * units, steps)
        axis.imshow(field, cmap="gray_r", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
        axis.set_yticks((np.arange(layers) + 0.5) * units - 0.5, [str(layer) for layer in range(layers)])
        axis.hlines(np.arange(1, layers) * units - 0.5, -0.5, steps - 0.5, color="tab:orange", linewidth=1)
        axis.vlines([s.start - 0.5 for s in plan.segments[1:]], -0.5, layers * units - 0.5, color="tab:blue")
        axis.set_ylabel(f"layer and {name[:-1]}")
        told = f"{name}: {100 * gates.mean():.0f} % on, {100 * kept.mean():.0f} % kept"
        axis.set_title(told, loc="left", fontsize=10)
    axes[1].set_xlabel(f"{NOISE_LEFT}; vertical lines cut segments")
    _label_steps(axes[1], timesteps)
    figure.suptitle(f"{plan.summary()}; black: open, light grey: kept but closed, white: left out", fontsize=10)
    return figure


def plan_table(plan, timesteps) -> list[dict]:
    """Return one row per segment and layer of a plan."""
    return [
        dict(
            segment=number,
            first_timestep=int(timesteps[segment.start]),
            last_timestep=int(timesteps[segment.stop - 1]),
            steps=len(segment),
            layer=layer,
            heads=" ".join(map(str, segment.heads[layer])),
            groups=" ".join(map(str, segment.groups[layer])),
        )
        for number, segment in enumerate(plan.segments)
        for layer in range(plan.heads.shape[1])
    ]


def draw_tokens(images: np.ndarray, tokens: np.ndarray, timesteps, layers):
    """Draw which tokens passed the MLPs over the images that came out.

    Args:
      images: uint8 [I,side,side,1 or 3].
      tokens: share of passes in which a token was on [I,T,L,N], at the T timesteps shown.
      timesteps: [T].
      layers: numbers of the layers to show, each in a row; below them the mean over all layers.

    Returns:
      A figure: covered in white is what was off.
    """
    count, columns = tokens.shape[:2]
    rows = [*layers, None] if count == 1 else [None]
    figure = _figure(1.3 * (columns + 1) + 0.9, 1.35 * len(rows) * count + 0.8)
    axes = figure.subplots(len(rows) * count, columns + 1, squeeze=False)
    side = int(round(tokens.shape[-1] ** 0.5))
    for index, image in enumerate(images):
        shown = np.repeat(image, 3, axis=-1) if image.shape[-1] == 1 else image
        for r, layer in enumerate(rows):
            line = axes[index * len(rows) + r]
            line[0].imshow(shown)
            for column in range(columns):
                on = tokens[index, column].mean(0) if layer is None else tokens[index, column, layer]
                cover = np.kron(1 - on.reshape(side, side), np.ones((image.shape[0] // side,) * 2))[..., None]
                line[column + 1].imshow((shown * (1 - 0.8 * cover) + 255 * 0.8 * cover).astype(np.uint8))
                line[column + 1].set_xlabel(f"{100 * on.mean():.0f} %", fontsize=8, labelpad=2)
            told = "all layers" if layer is None else f"layer {layer}"
            line[0].set_ylabel(told if count == 1 else f"image {index}", fontsize=9)
    for axis in axes.ravel():
        axis.set_xticks([])
        axis.set_yticks([])
    axes[0, 0].set_title("image", fontsize=9)
    for column, timestep in enumerate(timesteps):
        axes[0, column + 1].set_title(f"t = {timestep}", fontsize=9)
    figure.suptitle(
        "Tokens that pass the MLPs, over the image that comes out; white: left out; below: share on", fontsize=10
    )
    return figure


def token_table(tokens: np.ndarray, timesteps) -> list[dict]:
    """Return one row per image, timestep and layer of [I,T,L,N]: the share of passes in which each token was on."""
    return [
        dict(
            image=image, timestep=int(timestep), layer=layer, **{f"token_{n}": f"{on:g}" for n, on in enumerate(gates)}
        )
        for image, record in enumerate(tokens)
        for timestep, layers in zip(timesteps, record)
        for layer, gates in enumerate(layers)
    ]


def draw_macs(timesteps: dict, macs: dict, complete: dict):
    """Draw the cost of a pass over the timesteps.

    Args:
      timesteps, macs: by model, what the network was told [S] and MACs per image and pass [S].
      complete: by model, MACs of a pass with every gate open.
    """
    figure = _figure(8, 3.8)
    axis = figure.subplots()
    for (name, cost), (color, style) in zip(macs.items(), LINES * len(macs)):
        told = f"{name}: {100 * np.mean(cost) / complete[name]:.0f} % of complete"
        axis.plot(timesteps[name], np.asarray(cost) / 1e9, style, color=color, label=told, drawstyle="steps-mid")
        axis.axhline(complete[name] / 1e9, color=color, linestyle=style, linewidth=0.6)
    axis.invert_xaxis()
    axis.set_ylim(0)
    axis.set_xlabel(NOISE_LEFT)
    axis.set_ylabel("GMACs per image and pass")
    axis.set_title("Thin lines: every gate open", loc="left", fontsize=10)
    axis.legend(fontsize=9)
    return figure


# --- Losses --------------------------------------------------------------------------------------


def draw_losses(timesteps: np.ndarray, losses: dict):
    """Draw the loss of several models over the timesteps, and below what each lacks to the first.

    Args:
      timesteps: [T].
      losses: by model, mean squared error of the predicted noise per example [n,T], the same examples for all.
    """
    names = list(losses)
    figure = _figure(8, 6.4 if len(names) > 1 else 3.8)
    axes = figure.subplots(2 if len(names) > 1 else 1, 1, sharex=True, squeeze=False)[:, 0]
    for name, (color, style) in zip(names, LINES * len(names)):
        axes[0].plot(timesteps, losses[name].mean(0), style, color=color, label=name)
        if name != names[0]:
            gap = losses[name] - losses[names[0]]
            mean, error = gap.mean(0), 2 * gap.std(0, ddof=1) / len(gap) ** 0.5
            axes[1].plot(timesteps, mean, style, color=color, label=f"{name} - {names[0]}")
            axes[1].fill_between(timesteps, mean - error, mean + error, color=color, alpha=0.15, linewidth=0)
    axes[0].set_yscale("log")
    axes[0].set_ylabel("mean squared error of the noise")
    axes[0].set_title(f"{len(losses[names[0]])} examples", loc="left", fontsize=10)
    if len(names) > 1:
        axes[1].axhline(0, color="0.7", linewidth=0.8)
        axes[1].set_ylabel("difference")
        axes[1].set_title("The same examples and noise; shaded: two standard errors", loc="left", fontsize=10)
    axes[0].invert_xaxis()
    axes[-1].set_xlabel(NOISE_LEFT)
    for axis in axes:
        axis.legend(fontsize=9)
    return figure


def loss_table(timesteps: np.ndarray, losses: dict) -> list[dict]:
    """Return one row per timestep and model: mean loss and difference to the first model, with standard errors."""
    first = next(iter(losses.values()))
    error = lambda values: values.std(ddof=1) / len(values) ** 0.5
    return [
        dict(
            timestep=int(timestep),
            model=name,
            loss=loss[:, column].mean(),
            standard_error=error(loss[:, column]),
            difference=(loss - first)[:, column].mean(),
            difference_standard_error=error((loss - first)[:, column]),
        )
        for column, timestep in enumerate(timesteps)
        for name, loss in losses.items()
    ]


def draw_loss_maps(timesteps, maps: dict):
    """Draw where in the image the loss lies.

    Args:
      timesteps: the T that are shown.
      maps: by model, mean loss of each patch [T,N].
    """
    figure = _figure(1.5 * len(timesteps) + 1.6, 1.7 * len(maps) + 0.7)
    axes = figure.subplots(len(maps), len(timesteps), squeeze=False)
    relative = {name: field / field.mean(-1, keepdims=True) for name, field in maps.items()}
    top = max(field.max() for field in relative.values())
    for line, (name, field) in zip(axes, relative.items()):
        side = int(round(field.shape[-1] ** 0.5))
        for column, axis in enumerate(line):
            picture = axis.imshow(field[column].reshape(side, side), cmap="gray", vmin=0, vmax=top)
            axis.set_xticks([])
            axis.set_yticks([])
            axis.set_xlabel(f"mean {maps[name][column].mean():.2g}", fontsize=8, labelpad=2)
        line[0].set_ylabel(name, fontsize=9)
    for axis, timestep in zip(axes[0], timesteps):
        axis.set_title(f"t = {timestep}", fontsize=9)
    figure.colorbar(picture, ax=axes, label="loss of a patch / mean of its map", shrink=0.8)
    return figure


def loss_map_table(timesteps, maps: dict) -> list[dict]:
    """Return one row per model, timestep and patch."""
    return [
        dict(model=name, timestep=int(timestep), patch=patch, loss=loss)
        for name, field in maps.items()
        for timestep, row in zip(timesteps, field)
        for patch, loss in enumerate(row)
    ]
