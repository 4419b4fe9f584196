"""Pictures of every kind are read, cropped as ADM crops them, and named when they can't be."""

import io
import os
import struct
import zlib

import numpy as np
import pytest
from conftest import GOLDEN
from etils import epath
from PIL import EpsImagePlugin, Image

from dydit_jax.data.images import MAX_BYTES, center_crop, decode_image, read_picture
from dydit_jax.errors import InputError


def content(image: Image.Image, **settings) -> bytes:
    file = io.BytesIO()
    image.save(file, **settings)
    return file.getvalue()


def gradient(width: int = 20, height: int = 16) -> np.ndarray:
    return np.arange(width * height, dtype=np.uint8).reshape(height, width)


@pytest.mark.parametrize("case", range(4))
def test_crop_equals_the_original(case):
    with np.load(GOLDEN / "center_crop.npz") as golden:
        image, side, expected = (golden[f"case{case}/{name}"] for name in ("in", "size", "out"))
    np.testing.assert_array_equal(center_crop(Image.fromarray(image), int(side)), expected)


def test_every_kind_of_picture_becomes_rgb():
    grey = Image.fromarray(gradient())
    for kind in ("L", "RGB", "RGBA", "P", "1", "LA"):
        image = decode_image(content(grey.convert(kind), format="PNG"), kind)
        assert image.mode == "RGB" and image.size == (20, 16)
    assert decode_image(content(grey.convert("CMYK"), format="JPEG"), "cmyk").mode == "RGB"
    frames = [Image.fromarray(np.full((8, 8), level, np.uint8)) for level in (0, 255)]
    moving = content(frames[0], format="GIF", save_all=True, append_images=frames[1:])
    assert np.asarray(decode_image(moving, "gif")).max() == 0  # the first frame
    deep = Image.fromarray(gradient().astype(np.uint16) * 257)
    np.testing.assert_array_equal(np.asarray(decode_image(content(deep, format="PNG"), "deep"))[..., 0], gradient())


@pytest.mark.parametrize("wrong", [b"", b"no picture", "truncated"])
def test_unreadable_pictures_are_named(wrong):
    if wrong == "truncated":
        wrong = content(Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64), np.uint8)), format="JPEG")[
            :900
        ]
    with pytest.raises(InputError, match=r"n01/cat\.jpg is not a readable picture"):
        decode_image(wrong, "n01/cat.jpg")


# --- Grey of every depth -------------------------------------------------------------------------


def png(bits: int, rows: list[bytes], width: int = 4) -> bytes:
    """Return a grey PNG of rows that are packed already."""
    chunk = lambda name, data: struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, len(rows), bits, 0, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows)))
    return b"\x89PNG\r\n\x1a\n" + header + data + chunk(b"IEND", b"")


def tiff(bits: int, sample_format: int, photometric: int, pixels: bytes) -> bytes:
    """Return a grey TIFF of 4 x 1 pixels; formats are 1 unsigned, 2 signed, 3 float, photometric 0 has white at 0."""
    tags = {256: 4, 257: 1, 258: bits, 259: 1, 262: photometric, 273: 8, 277: 1, 278: 1, 279: len(pixels)}
    tags[339] = sample_format
    entries = [struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(tags.items())]
    directory = struct.pack("<H", len(entries)) + b"".join(entries) + struct.pack("<I", 0)
    return b"II*\0" + struct.pack("<I", 8 + len(pixels)) + pixels + directory


RAMP = np.array([0, 85, 170, 255])
THIRDS = np.arange(4) / 3
GREYS = {
    "png 2": png(2, [bytes([0b00_01_10_11])]),
    "png 4": png(4, [bytes([0x05, 0xAF])]),
    "png 8": png(8, [bytes([0, 85, 170, 255])]),
    "png 16": png(16, [struct.pack(">4H", 0, 0x5555, 0xAAAA, 0xFFFF)]),
    "tiff 12": tiff(12, 1, 1, bytes([0x00, 0x05, 0x55, 0xAA, 0xAF, 0xFF])),
    "tiff 16": tiff(16, 1, 1, struct.pack("<4H", 0, 0x5555, 0xAAAA, 0xFFFF)),
    "tiff 16, white at 0": tiff(16, 1, 0, struct.pack("<4H", 0xFFFF, 0xAAAA, 0x5555, 0)),
    "tiff 16 signed": tiff(16, 2, 1, (THIRDS * 0x7FFF).round().astype("<i2").tobytes()),
    "tiff 32": tiff(32, 1, 1, struct.pack("<4I", 0, 0x55555555, 0xAAAAAAAA, 0xFFFFFFFF)),
    "tiff 32 signed": tiff(32, 2, 1, (THIRDS * 0x7FFFFFFF).round().astype("<i4").tobytes()),
    "tiff float": tiff(32, 3, 1, THIRDS.astype("<f4").tobytes()),
}


@pytest.mark.parametrize("kind", GREYS)
def test_grey_is_scaled_by_the_depth_of_its_file(kind):
    pixels = np.asarray(decode_image(GREYS[kind], kind))
    np.testing.assert_array_equal(pixels, np.broadcast_to(RAMP[None, :, None], (1, 4, 3)))


def test_one_bit_is_black_or_white():
    np.testing.assert_array_equal(np.asarray(decode_image(png(1, [b"\x50"]), "1"))[0, :, 0], [0, 255, 0, 255])


@pytest.mark.parametrize("levels", [[0, 1, 2, 255], [-0.5, 0, 0, 1], [0, 0, 0, np.nan]])
def test_floats_whose_white_is_unknown_are_refused(levels):
    with pytest.raises(InputError, match="grey levels from .* to .*, not from 0 to 1"):
        decode_image(tiff(32, 3, 1, np.array(levels, "<f4").tobytes()), "float")
    with pytest.raises(InputError, match="grey levels from -1 to 9, not from 0 to 32767"):
        decode_image(tiff(16, 2, 1, struct.pack("<4h", -1, 0, 3, 9)), "signed")


# --- Pictures from strangers ---------------------------------------------------------------------


def test_only_the_named_formats_are_read(monkeypatch):
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: pytest.fail("Ghostscript was called."))
    program = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n%%EndComments\n"
    for wrong in (
        program,
        content(Image.new("L", (4, 4)), format="PPM"),
        content(Image.new("L", (4, 4)), format="TGA"),
    ):
        with pytest.raises(InputError, match=r"of no kind that is read \(BMP, GIF, JPEG, PNG, TIFF, WEBP\)"):
            decode_image(wrong, "picture.png")
    several = content(Image.new("RGB", (4, 4)), format="MPO", save_all=True, append_images=[Image.new("RGB", (4, 4))])
    assert decode_image(several, "phone.jpg").size == (4, 4)


@pytest.mark.parametrize("width, height", [(30_000, 10_000), (1, 101), (5000, 10)])
def test_pictures_that_would_fill_the_memory_are_refused(width, height, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # some programs do
    bomb = png(8, [b""], width).replace(struct.pack(">II", width, 1), struct.pack(">II", width, height))
    with pytest.raises(InputError, match=f"{width} x {height} pixels; at most 178956970 and 1 to 100"):
        decode_image(bomb[:29] + struct.pack(">I", zlib.crc32(bomb[12:29])) + bomb[33:], "bomb.png")


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("format", ["BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP"])
def test_damaged_pictures_raise_nothing_but_our_error(format):
    generator = np.random.default_rng(0)
    good = content(Image.fromarray(generator.integers(0, 256, (9, 7, 3), np.uint8)), format=format)
    for _ in range(200):
        damaged = bytearray(good)
        for place in generator.integers(0, len(good), generator.integers(1, 6)):
            damaged[place] = generator.integers(256)
        try:
            assert decode_image(bytes(damaged[: generator.integers(1, 2 * len(good))]), "x").mode == "RGB"
        except InputError as error:
            assert "x is not a readable picture: " in str(error)


@pytest.mark.parametrize(
    "kind, reason",
    [
        ("dangling link", "No such file"),
        ("folder", "a folder"),
        ("pipe", "no ordinary file"),
        ("device", "no ordinary file"),
        ("sparse", f"more than {MAX_BYTES}"),
    ],
)
def test_what_the_system_cannot_open_is_an_unreadable_picture(tmp_path, kind, reason):
    path = tmp_path / "7.jpg"
    make = {
        "dangling link": lambda: path.symlink_to("nowhere"),
        "folder": path.mkdir,
        "pipe": lambda: os.mkfifo(path),
        "device": lambda: path.symlink_to("/dev/zero"),
        "sparse": lambda: (path.write_bytes(b""), os.truncate(path, MAX_BYTES + 1)),
    }
    make[kind]()
    with pytest.raises(InputError, match=rf"7\.jpg is not a readable picture: .*{reason}"):
        read_picture(epath.Path(path))
