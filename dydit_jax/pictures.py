"""Images and routing as files that people look at: grids, folders, and what was on over the timesteps."""

import numpy as np
from etils import epath
from PIL import Image

MIN_GRID_CELL = 32  # small images are enlarged to about this many pixels a side


def image_of(pixels: np.ndarray) -> Image.Image:
    """Turn uint8 pixels [side,side,1 or 3] into a picture."""
    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)


def save_image(path, image: Image.Image) -> None:
    """Write a picture as PNG, on any kind of path."""
    with epath.Path(path).open("wb") as file:
        image.save(file, format="PNG")


def draw_grid(pixels: np.ndarray, columns: int) -> Image.Image:
    """Set uint8 images [B,side,side,1 or 3] row by row into one picture, with a thin line between them."""
    count, side, _, channels = pixels.shape
    zoom = max(1, -(-MIN_GRID_CELL // side))
    pixels = pixels.repeat(zoom, 1).repeat(zoom, 2)
    cell, rows = side * zoom + 1, -(-count // columns)
    canvas = np.full((rows * cell + 1, columns * cell + 1, channels), 128, np.uint8)
    for index, picture in enumerate(pixels):
        top, left = (index // columns) * cell + 1, (index % columns) * cell + 1
        canvas[top : top + cell - 1, left : left + cell - 1] = picture
    return image_of(canvas)


def draw_routing(samples, macs):
    """Draw what was on while images were made: heads, groups, tokens and MACs over the timesteps.

    Args:
      samples: a `generate.Samples`.
      macs: the model's `ModelMacs`.

    Returns:
      A figure, readable in grey.
    """
    from matplotlib.figure import Figure

    routing, timesteps = samples.routing, np.asarray(samples.timesteps)
    figure = Figure(figsize=(12, 9), layout="constrained")
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
        mesh = axis.pcolormesh(edges, np.arange(layers * units + 1), field, cmap="gray_r", vmin=0, vmax=1)
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
    shown = np.unique(np.linspace(0, len(timesteps) - 1, 9).round().astype(int))
    axes[3].set_xticks(shown, [str(timesteps[step]) for step in shown])
    axes[3].set_xlabel("timestep: noise on the left, image on the right")
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
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 7), layout="constrained")
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
    axes[1].set_xlabel("timestep: noise on the left, image on the right; vertical lines cut segments")
    shown = np.unique(np.linspace(0, steps - 1, 9).round().astype(int))
    axes[1].set_xticks(shown, [str(timesteps[step]) for step in shown])
    figure.suptitle(f"{plan.in_words()}; black: on, light grey: kept but off, white: left out", fontsize=10)
    return figure


def save_figure(path, figure) -> None:
    """Write a figure as PNG, on any kind of path."""
    with epath.Path(path).open("wb") as file:
        figure.savefig(file, format="png", dpi=110)
