"""Images as files that people look at: single ones and grids."""

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


def read_image(path) -> np.ndarray:
    """Read a picture, from any kind of path, as uint8 [height,width,channels]."""
    with epath.Path(path).open("rb") as file, Image.open(file) as picture:
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
