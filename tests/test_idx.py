"""IDX files are read exactly, and whatever is wrong with them is said in one sentence."""

import gzip
import shutil

import numpy as np
import pytest

from dydit_jax.data.batches import batches
from dydit_jax.data.idx import read_idx, read_idx_split
from dydit_jax.data.sources import DataConfig, open_source
from dydit_jax.errors import InputError
from dydit_jax.models.config import DiTConfig

MODEL = DiTConfig(depth=1, width=32, heads=2, patch=2, side=8, channels=1, classes=4)
TRAIN_IMAGES, TRAIN_LABELS = "train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"


def encode(array: np.ndarray) -> bytes:
    """Return an array in the IDX format, the header written out by hand."""
    header = b"\x00\x00\x08" + bytes([array.ndim])
    return header + b"".join(length.to_bytes(4, "big") for length in array.shape) + array.tobytes()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with both splits, the pictures of the training split and its labels."""
    folder, generator = tmp_path_factory.mktemp("idx"), np.random.default_rng(0)
    images = generator.integers(0, 256, (12, 8, 8), np.uint8)
    labels = np.arange(12, dtype=np.uint8) % 4
    for name, array in (
        (TRAIN_IMAGES, images),
        (TRAIN_LABELS, labels),
        ("t10k-images-idx3-ubyte.gz", images[:5]),
        ("t10k-labels-idx1-ubyte.gz", labels[:5]),
    ):
        (folder / name).write_bytes(gzip.compress(encode(array)))
    return folder, images, labels


@pytest.fixture
def folder(made, tmp_path):
    """A copy of the folder that a test may damage."""
    return shutil.copytree(made[0], tmp_path / "set")


def open_idx(folder, model=MODEL, **fields):
    return open_source(DataConfig(name="idx", path=str(folder), batch_size=4, **fields), model)


def test_both_splits_are_read_to_the_last_bit(made):
    folder, images, labels = made
    for split, count in (("train", 12), ("test", 5)):
        read_images, read_labels = read_idx_split(folder, split)
        np.testing.assert_array_equal(read_images, images[:count])
        np.testing.assert_array_equal(read_labels, labels[:count])


def test_files_of_emnist_are_found_by_the_end_of_their_names(folder):
    for file in list(folder.iterdir()):
        file.rename(folder / f"emnist-letters-{file.name.replace('t10k', 'test')}")
    assert len(read_idx_split(folder, "train")[1]) == 12 and len(read_idx_split(folder, "test")[1]) == 5


def test_examples_are_the_pictures_between_minus_one_and_one(made):
    folder, images, labels = made
    source = open_idx(folder, flip=False)
    batch = next(batches(source, DataConfig(name="idx", path=str(folder), batch_size=12, flip=False), start=0))
    order = np.argsort([image.tobytes() for image in images])
    drawn = np.round((batch["image"][..., 0] + 1) * 127.5).astype(np.uint8)
    drawn_order = np.argsort([image.tobytes() for image in drawn])
    np.testing.assert_array_equal(drawn[drawn_order], images[order])
    np.testing.assert_array_equal(batch["label"][drawn_order], labels[order])
    assert batch["image"].shape == (12, 8, 8, 1) and batch["image"].dtype == np.float32


def test_a_model_of_another_shape_is_refused(made):
    with pytest.raises(InputError, match=r"images \(8, 8, 1\) and 4 classes; the model is made for \(16, 16, 1\)"):
        open_idx(made[0], DiTConfig(depth=1, width=32, heads=2, patch=2, side=16, channels=1, classes=4))


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda file: file.unlink(), "must have one file .*train-images-idx3-ubyte.gz, and has none"),
        (lambda file: file.write_bytes(b"<html>not found</html>"), "is no gzip file, or damaged"),
        (lambda file: file.write_bytes(file.read_bytes()[:-20]), "is no gzip file, or damaged"),
        (lambda file: file.write_bytes(gzip.compress(b"\x00\x00\x0d\x03" + bytes(12))), "begins with 00000d03"),
        (lambda file: file.write_bytes(gzip.compress(b"")), "begins with , not with the magic number 00000803"),
        (lambda file: file.write_bytes(gzip.compress(b"\x00\x00\x08\x03\x00")), "ends within its header"),
        (lambda file: file.write_bytes(gzip.compress(b"\x00\x00\x08\x03" + b"\xff" * 12)), "its header claims"),
        (
            lambda file: file.write_bytes(gzip.compress(encode(np.zeros((12, 8, 8), np.uint8))[:-1])),
            "holds 767 of the 768 bytes",
        ),
        (
            lambda file: file.write_bytes(gzip.compress(encode(np.zeros((12, 8, 8), np.uint8)) + b"\x00")),
            "holds more than the 768 bytes",
        ),
        (
            lambda file: file.write_bytes(gzip.compress(encode(np.zeros((11, 8, 8), np.uint8)))),
            "holds 11 pictures and train-labels-idx1-ubyte.gz 12 labels",
        ),
        (lambda file: shutil.copy(file, file.with_name(f"copy-{file.name}")), "and has copy-train-images"),
    ],
)
def test_damaged_files_are_named_with_where_to_get_them(folder, damage, message):
    damage(folder / TRAIN_IMAGES)
    with pytest.raises(InputError, match=message) as error:
        open_idx(folder)
    assert "apt-get install dataset-fashion-mnist" in str(error.value) and str(folder) in str(error.value)


@pytest.mark.parametrize("path", ["", "/nowhere"])
def test_a_missing_folder_is_named(path):
    with pytest.raises(InputError, match="apt-get install dataset-fashion-mnist"):
        open_idx(path)


def test_a_single_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match="There is no file"):
        read_idx(tmp_path / "nothing.gz", axes=1)
