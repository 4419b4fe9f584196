"""Pictures of every kind are read, cropped as ADM crops them, and named when they can't be."""

import io

import numpy as np
import pytest
from conftest import GOLDEN
from PIL import Image

from dydit_jax.data.images import center_crop, decode_image
from dydit_jax.data.sources import DataConfig, batches, list_class_folders, open_source
from dydit_jax.errors import InputError
from dydit_jax.models.dit import DiTConfig


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


# --- Folders -------------------------------------------------------------------------------------

MODEL = DiTConfig(depth=1, width=32, heads=2, patch=2, side=8, channels=3, classes=2)


@pytest.fixture
def folder(tmp_path):
    """Two classes of four pictures, each of one grey level but for a white left half."""
    for label, name in enumerate(("ants", "bees")):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for number in range(4):
            pixels = np.full((12, 10, 3), 10 * (4 * label + number), np.uint8)
            pixels[:, :5] = 255
            Image.fromarray(pixels).save(tmp_path / "pictures" / name / f"{number}.png")
    return tmp_path / "pictures"


def opened(folder, **settings):
    config = DataConfig(name="images", path=str(folder), batch_size=8, **settings)
    return open_source(config, MODEL), config


def test_folder_gives_every_picture_once_an_epoch_mirrored_at_random(folder):
    source, config = opened(folder)
    run = batches(source, config, start=0)
    mirrored = []
    for _ in range(4):
        batch = next(run)
        levels = batch["image"].min(axis=(1, 2, 3))
        np.testing.assert_allclose(np.sort(levels), np.arange(8) * 10 / 127.5 - 1, atol=0.02)  # bicubic
        np.testing.assert_array_equal(batch["label"], (levels * 127.5 + 127.5 > 35).astype(int))
        mirrored += (batch["image"][:, 0, -1, 0] == 1).tolist()
    assert 4 < sum(mirrored) < 28 and source.fingerprint.startswith("images 8 ")


def test_unreadable_pictures_are_replaced_counted_and_limited(folder, caplog):
    (folder / "ants" / "1.png").write_bytes(b"")
    source, _ = opened(folder)
    np.testing.assert_array_equal(source[1]["pixels"], source[2]["pixels"])
    assert source[1]["label"] == 0 and caplog.text.count("1.png is not a readable picture: empty") == 1
    strict, _ = opened(folder, max_bad=0)
    with pytest.raises(InputError, match="1 pictures can't be read, the last of them .*1.png; data.max_bad allows 0"):
        strict[1]


def test_wrong_folders_are_refused(folder, tmp_path):
    with pytest.raises(InputError, match="needs data.path"):
        opened(tmp_path / "nowhere")
    with pytest.raises(InputError, match="has no sub-folders"):
        list_class_folders(folder / "ants")
    (folder / "cats").mkdir()
    with pytest.raises(InputError, match="cats has no pictures"):
        opened(folder)
    (folder / "cats" / "inside").mkdir()
    with pytest.raises(InputError, match="cats has folders inside"):
        opened(folder)


def test_batches_of_several_processes_are_parts_of_the_one(folder):
    source, config = opened(folder)
    whole = next(batches(source, config, start=3))
    for rows in (np.arange(4), np.arange(4, 8), np.array([1, 5])):
        part = next(batches(source, config, start=3, rows=rows))
        np.testing.assert_array_equal(part["image"], whole["image"][rows])
        np.testing.assert_array_equal(part["label"], whole["label"][rows])
