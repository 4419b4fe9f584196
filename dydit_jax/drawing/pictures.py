"""Images as files that people look at: single ones and grids."""

from collections.abc import Sequence

import numpy as np
from etils import epath
from PIL import Image, ImageDraw, ImageFont

from dydit_jax.errors import InputError, StopError
from dydit_jax.runtime.files import write_atomically

MIN_GRID_CELL = 64  # pixels; smaller images are enlarged by a whole factor, pixel by pixel
GRID_PAPER, GRID_INK = "#d3dae1", "#1f2933"  # a paper that white pictures stand out from, and black ones
# Text has this share of a grid's width, with which it can be read on a phone, if it fits its cell.
LABEL_SHARE, LABEL_CELL_SHARE, MIN_LABEL = 1 / 32, 0.4, 12


def to_uint8(images, *, indices=None, what: str = "image") -> np.ndarray:
    """Turn images in [-1, 1] into uint8 by clip(127.5 x + 128, 0, 255), as the published samples were.

    Args:
      images: [B,side,side,1 or 3].
      indices: their numbers [B], for the message; 0 .. B - 1 by default.
      what: they are, for the message.

    Raises:
      InputError: another shape, such as that of latents.
      StopError: NaN or infinity in an image, which would be black or white without a word.
    """
    images = np.asarray(images, np.float32)
    if images.ndim != 4 or images.shape[-1] not in (1, 3):
        raise InputError(
            f"Pictures are made of images [B,side,side,1 or 3], not of {list(images.shape)}; latents are decoded first "
            "(dydit_jax.latents.decode_latents)."
        )
    wrong = np.flatnonzero(~np.isfinite(images).all((1, 2, 3)))
    if wrong.size:
        numbers = wrong if indices is None else np.asarray(indices)[wrong]
        others = f" (and {wrong.size - 1} others of its batch)" if wrong.size > 1 else ""
        raise StopError(
            f"The {what} {numbers[0]}{others} is not finite, so no picture is made of it. Look at the weights; more "
            "sampling steps, --precision=highest or, for models in pixels, sampling.clip=1 may help."
        )
    return np.clip(127.5 * images + 128.0, 0, 255).astype(np.uint8)


def image_of(pixels: np.ndarray) -> Image.Image:
    """Turn uint8 pixels [side,side,1 or 3] into a picture."""
    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)


def save_image(path, image: Image.Image) -> None:
    """Write a picture as PNG, on any kind of path, whole or not at all."""
    with write_atomically(path) as partial, partial.open("wb") as file:
        image.save(file, format="PNG")


def read_image(path) -> np.ndarray:
    """Read a picture, from any kind of path, as uint8 [height,width,channels]."""
    with epath.Path(path).open("rb") as file, Image.open(file, formats=("PNG",)) as picture:
        pixels = np.asarray(picture)
    return pixels.reshape(*pixels.shape[:2], -1)


def label_texts(labels, classes: int) -> tuple[str, ...]:
    """Return labels as they are written on a grid; `classes` itself stands for "no class"."""
    return tuple("none" if label == classes else str(label) for label in labels)


def draw_grid(pixels: np.ndarray, columns: int, labels: Sequence[str] = ()) -> Image.Image:
    """Set images row by row into one picture, with gaps between them.

    Args:
      pixels: uint8 [B,side,side,1 or 3].
      columns: images in a row.
      labels: of the images [B], written above them; a row with the labels of the row above does not repeat them.
    """
    count, side, _, channels = pixels.shape
    zoom = max(1, -(-MIN_GRID_CELL // side))
    cell, gap = side * zoom, max(6, side * zoom // 24)
    width = columns * (cell + gap) + gap
    font = ImageFont.load_default(max(MIN_LABEL, round(min(width * LABEL_SHARE, cell * LABEL_CELL_SHARE))))
    line = round(1.2 * font.size)
    rows = [list(labels[first : first + columns]) for first in range(0, count, columns)]
    labelled = [bool(row) and row != above[: len(row)] for row, above in zip(rows, [[], *rows])]
    height = len(rows) * (cell + gap) + gap + sum(labelled) * line
    canvas = Image.new("L" if channels == 1 else "RGB", (width, height), GRID_PAPER)
    pen, top = ImageDraw.Draw(canvas), gap
    for r, row in enumerate(rows):
        for column, index in enumerate(range(r * columns, min((r + 1) * columns, count))):
            left = gap + column * (cell + gap)
            if labelled[r]:
                place = (left + cell / 2, top + line / 2 - gap / 2)
                pen.text(place, row[column], fill=GRID_INK, font=font, anchor="mm")
            picture = image_of(pixels[index]).resize((cell, cell), Image.Resampling.NEAREST)
            canvas.paste(picture, (left, top + labelled[r] * line))
        top += labelled[r] * line + cell + gap
    return canvas
