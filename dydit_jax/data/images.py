"""Pictures as they lie on disks: read whatever their kind, cropped as the published models were trained.

Source of the crop: ADM, https://arxiv.org/abs/2105.05233, its data loader, which DiT took over.
"""

import io

import numpy as np
from PIL import Image, UnidentifiedImageError

from dydit_jax.errors import InputError


def decode_image(content: bytes, name: str) -> Image.Image:
    """Read a picture as RGB: CMYK, grey, palette and 16-bit ones are converted, of animated ones the first frame.

    Args:
      content: the file's bytes.
      name: for the message.

    Raises:
      InputError: not a picture, empty, or truncated.
    """
    try:
        with Image.open(io.BytesIO(content)) as image:
            image.load()
            if image.mode.startswith(("I", "F")):  # 16 bits; Pillow's own conversion would cut them off at 255
                grey = np.asarray(image, np.float64)
                image = Image.fromarray(np.clip(np.round(grey / 257), 0, 255).astype(np.uint8))
            return image.convert("RGB")
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = "empty" if not content else " ".join(str(error).split())
        raise InputError(f"{name} is not a readable picture: {reason}.") from error


def center_crop(image: Image.Image, side: int) -> np.ndarray:
    """Shrink a picture until its shorter side fits and cut out the middle, as ADM does.

    Halved by box filter while at least twice as large, then resized bicubically, then cut.

    Args:
      image: RGB, any size.
      side: of the result, in pixels.

    Returns:
      uint8 [side,side,3].
    """
    while min(image.size) >= 2 * side:
        image = image.resize((image.width // 2, image.height // 2), resample=Image.Resampling.BOX)
    scale = side / min(image.size)
    size = tuple(round(length * scale) for length in image.size)
    pixels = np.asarray(image.resize(size, resample=Image.Resampling.BICUBIC))
    top, left = (pixels.shape[0] - side) // 2, (pixels.shape[1] - side) // 2
    return pixels[top : top + side, left : left + side]
