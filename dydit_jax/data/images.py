"""Reading pictures of any kind, and the crop that the published models were trained with.

Training, evaluation and preparation all read here, so that they accept the same kinds of picture. Files may come from
strangers: whatever can't be read ends in one error that names it.

Source of the crop: ADM, https://arxiv.org/abs/2105.05233, its data loader, which DiT took over.
"""

import io
import pathlib
import stat

import numpy as np
from PIL import Image, UnidentifiedImageError

from dydit_jax.errors import InputError
from dydit_jax.runtime.files import is_local

# Names that are taken for pictures; what kind one is, its content says.
SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
# Pillow knows some forty more, among them EPS, which it hands to Ghostscript.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
MAX_BYTES = 2**28  # of a file
MAX_PIXELS = 178_956_970  # where Pillow stops too, unless somebody has changed its setting
MAX_ASPECT = 100  # a picture of 100,000 x 1 pixels would be enlarged to gigabytes before it is cropped
BITS_PER_SAMPLE, PHOTOMETRIC, SAMPLE_FORMAT = 258, 262, 339  # tags of TIFF
WHITE_IS_ZERO, SIGNED = 0, 2  # values of the last two


def read_picture(path) -> bytes:
    """Read a picture's file; links are followed.

    Args:
      path: of this machine or a bucket.

    Raises:
      InputError: can't be opened, larger than `MAX_BYTES`, or no ordinary file: a FIFO would be waited for and some
        devices never end.
    """
    try:
        if is_local(path):
            status = pathlib.Path(path).stat()
            if not stat.S_ISREG(status.st_mode):
                raise OSError("a folder" if stat.S_ISDIR(status.st_mode) else "no ordinary file but a device or pipe")
            if status.st_size > MAX_BYTES:
                raise OSError(f"{status.st_size} bytes, more than {MAX_BYTES}")
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} is not a readable picture: {error.strerror or error}.") from error


def decode_image(content: bytes, name: str) -> Image.Image:
    """Read a picture as RGB: CMYK, grey of any depth and palette ones are converted, of animated ones the first frame.

    Args:
      content: the file's bytes.
      name: for the message.

    Raises:
      InputError: not a picture of `FORMATS`, empty, truncated, of more than `MAX_PIXELS`, or narrower than 1 to
        `MAX_ASPECT`.
    """
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS or max(image.size) > MAX_ASPECT * min(image.size):
                raise ValueError(
                    f"{image.width} x {image.height} pixels; at most {MAX_PIXELS} and 1 to {MAX_ASPECT} are read"
                )
            image.load()
            if image.mode.startswith(("I", "F")):  # Pillow's own conversion would cut them off at 255
                image = Image.fromarray(_grey_levels(image))
            return image.convert("RGB")
    except UnidentifiedImageError as error:
        kind = f"of no kind that is read ({', '.join(FORMATS)})" if content else "empty"
        raise InputError(f"{name} is not a readable picture: {kind}.") from error
    except Exception as error:  # noqa: BLE001 (what a damaged file can make Pillow raise has no end)
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{name} is not a readable picture: {reason}.") from error


def _grey_levels(image: Image.Image) -> np.ndarray:
    """Return grey of more than 8 bits as uint8 [height,width], scaled by the depth that the file states."""
    levels = np.asarray(image)
    tags = getattr(image, "tag_v2", {})  # of a TIFF; a PNG of this kind has 16 bits
    bits, signed = tags.get(BITS_PER_SAMPLE, (16,))[0], tags.get(SAMPLE_FORMAT, (1,))[0] == SIGNED
    if levels.dtype == np.int32 and bits == 32 and not signed:
        levels = levels.view(np.uint32)
    white = 1 if levels.dtype.kind == "f" else 2 ** (bits - int(signed)) - 1
    low, high = levels.min(), levels.max()
    if not (low >= 0 and high <= white):  # also false for NaN
        raise ValueError(f"grey levels from {low} to {high}, not from 0 to {white}")
    grey = levels / np.float64(white)
    return np.round(255 * (1 - grey if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO else grey)).astype(np.uint8)


def center_crop(image: Image.Image, side: int) -> np.ndarray:
    """Shrink a picture until its shorter side fits and cut out the middle, as ADM does.

    Halved by box filter while at least twice as large, then resized bicubically, then cut.

    Args:
      image: RGB or grey, any size.
      side: of the result, in pixels.

    Returns:
      uint8 [side,side,3], or [side,side] of a grey one.
    """
    while min(image.size) >= 2 * side:
        image = image.resize((image.width // 2, image.height // 2), resample=Image.Resampling.BOX)
    scale = side / min(image.size)
    size = tuple(round(length * scale) for length in image.size)
    pixels = np.asarray(image.resize(size, resample=Image.Resampling.BICUBIC))
    top, left = (pixels.shape[0] - side) // 2, (pixels.shape[1] - side) // 2
    return pixels[top : top + side, left : left + side]
