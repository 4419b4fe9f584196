"""Folders of pictures: what counts, what is passed over, and what stands in for an unreadable picture."""

import dataclasses
import os
import unicodedata

import numpy as np
import pytest
from PIL import Image

from dydit_jax.data.batches import batches
from dydit_jax.data.folders import list_class_folders, list_pictures
from dydit_jax.data.image_sets import open_images
from dydit_jax.data.images import SUFFIXES
from dydit_jax.data.sources import DataConfig, open_source
from dydit_jax.errors import InputError
from dydit_jax.models.config import DiTConfig

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


def test_flips_can_be_left_out(folder):
    source, config = opened(folder, flip=False)
    run = batches(source, config, start=0)
    for _ in range(4):
        image = next(run)["image"]
        assert (image[:, :, 0] == 1).all() and (image[:, :, -1] < 1).all()  # white on the left, as in the files


def test_flips_are_the_same_as_ever(folder):
    """Runs of before the setting go on with the same pictures: one draw decides."""
    source, _ = opened(folder)
    for seed in range(8):
        image = source.draw(source[0], np.random.default_rng(seed))["image"]
        assert (image[0, 0, 0] == 1) == (np.random.default_rng(seed).integers(2) == 0)


def test_models_of_one_channel_read_pictures_in_grey(folder):
    Image.new("RGB", (9, 9), (255, 0, 0)).save(folder / "ants" / "0.png")
    Image.new("L", (9, 9), 77).save(folder / "ants" / "1.png")
    config = DataConfig(name="images", path=str(folder), batch_size=8)
    source = open_source(config, dataclasses.replace(MODEL, channels=1))
    assert source[0]["pixels"].shape == (8, 8, 1)
    assert (source[0]["pixels"] == 76).all() and (source[1]["pixels"] == 77).all()  # red is 0.299 of white
    assert next(batches(source, config, start=0))["image"].shape == (8, 8, 8, 1)
    with pytest.raises(InputError, match=r"images \(8, 8, 3\) and 2 classes; the model is made for \(8, 8, 4\)"):
        open_source(config, dataclasses.replace(MODEL, channels=4))


def test_unreadable_pictures_are_replaced_counted_and_limited(folder, caplog):
    (folder / "ants" / "1.png").write_bytes(b"")
    source, _ = opened(folder)
    np.testing.assert_array_equal(source[1]["pixels"], source[2]["pixels"])
    assert source[1]["label"] == 0 and caplog.text.count("1.png is not a readable picture: empty") == 1
    strict, _ = opened(folder, max_bad=0)
    with pytest.raises(InputError, match="1 pictures can't be read, the last of them .*1.png; data.max_bad allows 0"):
        strict[1]


def test_what_cannot_be_opened_counts_as_unreadable(folder, caplog):
    (folder / "ants" / "7.jpg").mkdir()
    (folder / "bees" / "8.jpg").symlink_to("nowhere")
    source, _ = opened(folder, max_bad=2)
    assert len(source) == 10
    rows = [source[index] for index in range(10)]
    np.testing.assert_array_equal(rows[4]["pixels"], rows[5]["pixels"])  # in place of 7.jpg
    np.testing.assert_array_equal(rows[9]["pixels"], rows[0]["pixels"])  # in place of 8.jpg, the last one
    assert [int(row["label"]) for row in rows] == [0] * 4 + [1] * 5 + [0]
    assert "7.jpg is not a readable picture: a folder" in caplog.text and "2 so far" in caplog.text
    strict, _ = opened(folder, max_bad=1)
    with pytest.raises(InputError, match="2 pictures can't be read, the last of them .*8.jpg; data.max_bad allows 1"):
        [strict[index] for index in range(10)]


def test_what_systems_leave_is_no_class_and_the_rest_is_named(folder, caplog):
    caplog.set_level("INFO")
    expected, labels = list_class_folders(folder)
    picture = (folder / "ants" / "0.png").read_bytes()
    for name in (".ipynb_checkpoints", "__MACOSX", "@eaDir", ".cache", "lost+found"):
        (folder / name).mkdir()
        (folder / name / "0.png").write_bytes(picture)
    (folder / "ants" / ".ipynb_checkpoints").mkdir()
    for name in ("ants/._0.png", "ants/Thumbs.db", "ants/.DS_Store", "bees/x.avif", "stray.png", "README.md"):
        (folder / name).write_bytes(picture)
    found, found_labels = list_class_folders(folder)
    assert found == expected and found_labels.tolist() == labels.tolist()
    assert f"{folder}: 9 entries of the system's are ignored (" in caplog.text
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 1 and "3 entries are ignored" in warnings[0]
    assert all(name in warnings[0] for name in ("bees/x.avif", "stray.png", "README.md"))
    assert opened(folder)[0].fingerprint.startswith("images 8 ")


def test_every_suffix_counts_in_training_and_evaluation_alike(tmp_path):
    for number, suffix in enumerate(SUFFIXES):
        (tmp_path / "one").mkdir(exist_ok=True)
        (tmp_path / "one" / f"{number}{suffix.upper()}").write_bytes(b"")
    files, _ = list_class_folders(tmp_path)
    assert len(files) == len(SUFFIXES) and sorted(files) == list_pictures(tmp_path / "one")


def test_names_that_are_no_unicode_are_read(folder):
    (folder / "ants" / "0.png").rename(folder / "ants" / os.fsdecode(b"\xff.png"))
    source, _ = opened(folder)
    levels = sorted(int(source[index]["pixels"].min()) for index in range(8))
    np.testing.assert_allclose(levels, np.arange(8) * 10, atol=2.5)  # bicubic
    assert open_images(folder / "ants").count == 4


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_classes_have_the_same_numbers_however_accents_are_encoded(folder, form):
    (folder / "ants").rename(folder / unicodedata.normalize(form, "ébène"))  # é is one letter after z, or e and another
    (folder / "bees").rename(folder / "zebra")
    source, _ = opened(folder)
    assert source.class_names == ("zebra", "ébène") and source.labels.tolist() == [0] * 4 + [1] * 4


def test_class_folders_of_one_name_are_refused(folder):
    for form, name in (("NFC", "ants"), ("NFD", "bees")):
        (folder / name).rename(folder / unicodedata.normalize(form, "é"))
    with pytest.raises(InputError, match="names differ in unseen letters alone; merge or rename them"):
        opened(folder)


def test_strays_beside_folders_of_pictures_are_not_taken_for_the_set(folder):
    (folder / "stray.png").write_bytes((folder / "ants" / "0.png").read_bytes())
    with pytest.raises(InputError, match=r"2 folders of pictures \(ants, bees\) and 1 pictures beside them"):
        open_images(folder)
    (folder / "ants" / "notes").mkdir()  # without pictures
    assert open_images(folder / "ants").count == 4


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
