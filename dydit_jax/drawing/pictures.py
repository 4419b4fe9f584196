"""Images as files that people look at: single ones and grids."""

import numpy as np
from etils import epath
from PIL import Image

from dydit_jax.errors import InputError, StopError
from dydit_jax.runtime.files import write_atomically

MIN_GRID_CELL = 32  # small images are enlarged to about this many pixels a side


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
