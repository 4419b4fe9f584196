"""Images as they grow, with the tokens that were worked on: an animation, and a strip for where nothing moves.

Above, what the network saw; below, what it took the image for, tinted where tokens skipped MLPs. The tint grows with
the root of the share of MLPs that a token skipped: most skip few, and that should be seen.
"""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dydit_jax.diffusion.process import format_time
from dydit_jax.drawing.figures import TINT, tint_closed
from dydit_jax.drawing.pictures import GRID_INK, GRID_PAPER, LABEL_SHARE, MIN_LABEL, image_of
from dydit_jax.drawing.style import LEFT_OUT, SMALL, in_style, new_figure
from dydit_jax.runtime.files import write_atomically

MOST_COLUMNS = 5  # of an animation: more would be too small on a phone
FRAME_CELL = 112  # pixels: smaller images are enlarged to it by a whole factor
MOST_SHOWN = 4  # images of a strip
FRAME_MILLISECONDS, LAST_MILLISECONDS = 250, 2500


def draw_frames(seen: np.ndarray, taken_for: np.ndarray, tokens: np.ndarray, timesteps) -> list[Image.Image]:
    """Draw the frames of an animation of growing images.

    Args:
      seen: what the network saw, uint8 [S,B,side,side,1 or 3].
      taken_for: what it took the images for, of the same shape.
      tokens: share of a step's blocks whose MLP each token passed [S,B,N].
      timesteps: of the steps [S].

    Returns:
      A picture for each step: rows of up to `MOST_COLUMNS` images, each seen and taken for, below a line of text.
    """
    count, side = seen.shape[1:3]
    columns = min(count, MOST_COLUMNS)
    zoom = max(1, -(-FRAME_CELL // side))
    cell, gap, wide = side * zoom, max(6, side * zoom // 24), max(12, side * zoom // 8)
    width = columns * (cell + gap) + gap
    font = ImageFont.load_default(max(MIN_LABEL, round(1.3 * width * LABEL_SHARE)))
    line, rows = round(1.6 * font.size), -(-count // columns)
    size = width, line + rows * 2 * (cell + gap) + (rows - 1) * wide
    frames = []
    for step, timestep in enumerate(timesteps):
        frame = Image.new("RGB", size, GRID_PAPER)
        words = f"t = {format_time(timestep)}", f"{100 * tokens[step].mean():.0f} % of tokens pass; tinted ones skip"
        pen = ImageDraw.Draw(frame)
        pen.text((gap, line / 2), words[0], fill=GRID_INK, font=font, anchor="lm")
        pen.text((width - gap, line / 2), words[1], fill=GRID_INK, font=font, anchor="rm")
        for index in range(count):
            left = gap + index % columns * (cell + gap)
            top = line + index // columns * (2 * (cell + gap) + wide)
            pair = seen[step, index], _tint(taken_for[step, index], tokens[step, index])
            for number, pixels in enumerate(pair):
                picture = image_of(pixels).resize((cell, cell), Image.Resampling.NEAREST)
                frame.paste(picture, (left, top + number * (cell + gap)))
        frames.append(frame)
    return frames


def save_animation(path, frames: Sequence[Image.Image]) -> None:
    """Write frames as a GIF that runs in a circle and rests on its last frame, whole or not at all."""
    durations = [FRAME_MILLISECONDS] * (len(frames) - 1) + [LAST_MILLISECONDS]
    # One palette for all frames, of the first and the last one: else colours would flicker.
    ends = np.concatenate([np.asarray(frames[0]), np.asarray(frames[-1])])
    palette = Image.fromarray(ends).quantize(256)
    first, *others = (frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames)
    with write_atomically(path) as partial, partial.open("wb") as file:
        first.save(file, format="GIF", save_all=True, append_images=others, duration=durations, loop=0)


@in_style
def draw_strip(taken_for: np.ndarray, tokens: np.ndarray, timesteps):
    """Draw images at a few steps, a row for each of the first ones, tinted where tokens skipped the MLPs.

    Args:
      taken_for: what the network took the images for, uint8 [T,B,side,side,1 or 3].
      tokens: share of a step's blocks whose MLP each token passed [T,B,N].
      timesteps: [T].

    Returns:
      A figure; its title says where tokens pass.
    """
    from matplotlib.patches import Patch

    rows, columns = min(len(taken_for[0]), MOST_SHOWN), len(timesteps)
    figure = new_figure(0.72 * rows + 1.0)
    axes = figure.subplots(rows, columns, squeeze=False)
    for index, line in enumerate(axes):
        for step, axis in enumerate(line):
            open_tokens = tokens[step, index]
            axis.imshow(_tint(taken_for[step, index], open_tokens))
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
            axis.set_xlabel(f"{100 * open_tokens.mean():.0f} %", fontsize=SMALL, labelpad=2)
    for axis, timestep in zip(axes[0], timesteps):
        axis.set_title(f"t = {format_time(timestep)}", loc="center", fontsize=SMALL)
    figure.suptitle(_finding(tokens), x=0.01, ha="left", fontsize=9.5)
    patch = Patch(facecolor=LEFT_OUT, alpha=TINT, label="skips MLPs; below each picture the share that passes")
    figure.legend(handles=[patch], loc="outside lower left", handlelength=1)
    return figure


def _tint(image: np.ndarray, open_tokens: np.ndarray) -> np.ndarray:
    """Tint the tokens [N] of an image [side,side,1 or 3] that skipped MLPs."""
    return tint_closed(image, 1 - np.sqrt(1 - open_tokens))


def _finding(tokens: np.ndarray) -> str:
    """Say how the share of tokens that pass changes from noise to image; tokens [T,B,N]."""
    first, last = (f"{100 * tokens[step].mean():.0f} %" for step in (0, -1))
    if tokens.min() == 1:
        return "Every token passes every MLP, from noise to image"
    return f"{first} of the tokens pass an MLP in noise, {last} at the image"
