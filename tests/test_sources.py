"""Batches are a function of seed and step."""

import itertools
import json
import sys

import numpy as np
import pytest

from dydit_jax.data.batches import batches
from dydit_jax.data.image_sets import open_images
from dydit_jax.data.prepared import _known_builder
from dydit_jax.data.sources import DataConfig, digits, open_source
from dydit_jax.errors import InputError
from dydit_jax.models.config import DiTConfig

MODEL = DiTConfig(depth=1, width=32, heads=2, patch=2, side=8, channels=1, classes=10)


def take(start, count, **fields):
    config = DataConfig(**dict(dict(name="digits", batch_size=16), **fields))
    return list(itertools.islice(batches(open_source(config, MODEL), config, start=start), count))


@pytest.fixture
def packed(tmp_path):
    """A folder of packed moments with small variances: means 1 for images, 2 for their mirror images."""
    moments = np.zeros((40, 2, 8, 8, 2), np.float16)
    moments[:, 0, ..., 0], moments[:, 1, ..., 0], moments[..., 1] = 1, 2, -12
    np.save(tmp_path / "moments.npy", moments)
    np.save(tmp_path / "labels.npy", np.arange(40) % 10)
    return str(tmp_path)


@pytest.mark.parametrize("name", ["digits", "latents", "synthetic"])
def test_starting_later_gives_the_later_batches(name, packed):
    for threads in (0, 2):
        all_of_them = take(0, 6, name=name, path=packed)
        later = take(4, 2, name=name, path=packed, threads=threads)
        for a, b in zip(all_of_them[4:], later, strict=True):
            np.testing.assert_array_equal(a["image"], b["image"])
            np.testing.assert_array_equal(a["label"], b["label"])


def test_every_epoch_holds_every_image_once_in_a_new_order():
    images, _ = digits("train")
    epochs = take(0, 2, batch_size=len(images))
    sums = [epoch["image"].sum(axis=(1, 2, 3)) for epoch in epochs]
    np.testing.assert_allclose(np.sort(sums[0]), np.sort(sums[1]))
    assert (sums[0] != sums[1]).any()


def test_seed_changes_the_order():
    assert (take(0, 1)[0]["image"] != take(0, 1, seed=1)[0]["image"]).any()


def test_digits_are_scaled_and_split():
    (train, train_labels), (test, _) = digits("train"), digits("test")
    assert train.shape == (1437, 8, 8, 1) and test.shape == (360, 8, 8, 1)
    assert train.min() == -1.0 and train.max() == 1.0
    assert np.bincount(train_labels).min() > 100


def test_unknown_dataset_lists_the_known_ones():
    with pytest.raises(InputError, match="'imagenett'; known: "):
        DataConfig(name="imagenett", batch_size=1)


def test_latents_are_drawn_anew_from_both_flips(packed):
    batches_of_two_epochs = take(0, 2, name="latents", path=packed, batch_size=40)
    means = [batch["image"].mean(axis=(1, 2, 3)) / 0.18215 for batch in batches_of_two_epochs]
    for epoch in means:
        flipped = epoch > 1.5
        assert 8 < flipped.sum() < 32
        np.testing.assert_allclose(epoch, np.where(flipped, 2, 1), atol=0.01)
    first = np.sort(batches_of_two_epochs[0]["image"].ravel())
    assert (first != np.sort(batches_of_two_epochs[1]["image"].ravel())).any()


def test_latents_without_flips_are_those_of_the_pictures_alone(packed):
    [batch] = take(0, 1, name="latents", path=packed, batch_size=40, flip=False)
    np.testing.assert_allclose(batch["image"].mean(axis=(1, 2, 3)) / 0.18215, 1, atol=0.01)


def test_latents_that_do_not_fit_are_refused(packed, tmp_path):
    with pytest.raises(InputError, match="needs data.path, a folder with moments.npy and labels.npy, not ''"):
        take(0, 1, name="latents")
    with pytest.raises(InputError, match="mount gs://bucket/latents as a folder"):
        take(0, 1, name="latents", path="gs://bucket/latents")
    np.save(tmp_path / "labels.npy", np.arange(39))
    with pytest.raises(InputError, match="39 labels"):
        take(0, 1, name="latents", path=packed)


@pytest.mark.parametrize(
    "info, message",
    [
        ("[]", "info.json holds list, not a mapping"),
        ('{"classes": 5}', "info.json: info.classes must be a tuple, not 5"),
        ('{"classes": ["a", 5]}', r"info.json: info.classes\[1\] must be of type str, not 5"),
        ('{"autoencoder": 5}', "info.json: info.autoencoder must be of type str, not 5"),
        ('{"scale": 5}', "info.json: info.scale must be a tuple, not 5"),
    ],
)
def test_info_of_a_stranger_is_one_line_that_names_the_file(packed, tmp_path, info, message):
    (tmp_path / "info.json").write_text(info)
    with pytest.raises(InputError, match=message):
        take(0, 1, name="latents", path=packed)


@pytest.mark.parametrize(
    "labels, message",
    [
        ([*range(9), -1], "labels.npy has label -1; labels are whole numbers from 0 to 9"),
        ([*range(9), 10], "labels.npy has label 10; labels are whole numbers from 0 to 9"),
        ([*range(9), 1.7], "labels.npy has label 1.7; labels are whole numbers from 0 to 9"),
        ([*range(9), np.nan], "labels.npy has label nan; labels are whole numbers from 0 to 9"),
        ([str(label) for label in range(10)], "has 40 labels of type <U1; whole numbers are needed"),
    ],
)
def test_labels_outside_the_range_are_refused(packed, tmp_path, labels, message):
    np.save(tmp_path / "labels.npy", np.array(labels * 4))
    with pytest.raises(InputError, match=message):
        take(0, 1, name="latents", path=packed)


@pytest.mark.parametrize("dtype", ["<U3", "complex64", "datetime64[s]", "int16", "bool"])
def test_moments_that_are_no_floats_are_refused(packed, tmp_path, dtype):
    np.save(tmp_path / "moments.npy", np.zeros((40, 2, 8, 8, 2), dtype))
    with pytest.raises(InputError, match=r"moments.npy holds .*, not floats; save it again"):
        take(0, 1, name="latents", path=packed)


def test_latents_of_a_wide_variance_are_as_wide_as_the_encoder_makes_them(packed, tmp_path):
    drawn = {}
    for log_variance in (20, 200):
        moments = np.zeros((40, 2, 8, 8, 2), np.float32)
        moments[..., 1] = log_variance
        np.save(tmp_path / "moments.npy", moments)
        drawn[log_variance] = take(0, 1, name="latents", path=packed)[0]["image"]
    assert np.isfinite(drawn[200]).all()
    np.testing.assert_array_equal(drawn[200], drawn[20])


@pytest.mark.parametrize("name", ["labels.npy", "moments.npy"])
def test_latents_that_are_no_arrays_are_refused(packed, tmp_path, name):
    whole = (tmp_path / name).read_bytes()
    for wrong in (b"", b"1\n2\n3\n", b"\x00\xff" * 99, whole[: len(whole) - 1]):
        (tmp_path / name).write_bytes(wrong)
        with pytest.raises(InputError, match=rf"{name} is missing, cut short or no \.npy file of numbers"):
            take(0, 1, name="latents", path=packed)


@pytest.mark.parametrize(
    "name, value, allowed",
    [
        ("batch_size", 10**9, "from 1 to 1048576, not 1000000000"),
        ("batch_size", 0, "from 1 to 1048576, not 0"),
        ("threads", 10**5, "from 0 to 1024, not 100000"),
        ("threads", -1, "from 0 to 1024, not -1"),
        ("max_bad", -1, "at least 0, not -1"),
    ],
)
def test_absurd_settings_are_refused_at_once(name, value, allowed):
    with pytest.raises(InputError, match=rf"data\.{name} must be {allowed}"):
        DataConfig(**{"name": "digits", "batch_size": 1, name: value})


STRANGE = dict(pythonClassName="strange_notes.Notes", jsonFeature=dict(json="{}"))
OWN = "tensorflow_datasets.core.features.features_dict.FeaturesDict"


@pytest.mark.parametrize(
    "info, features",
    [
        ({}, STRANGE),
        ({}, dict(python_class_name="strange_notes.Notes")),
        ({}, dict(type="strange_notes.Notes", content={})),
        ({}, dict(pythonClassName=OWN, featuresDict=dict(features=dict(image=STRANGE)))),
        ({}, dict(pythonClassName=OWN, jsonFeature=dict(json=json.dumps(dict(image=STRANGE))))),
        (dict(features=STRANGE), None),
    ],
)
def test_datasets_that_name_classes_of_their_own_run_nothing(tmp_path, monkeypatch, info, features):
    (tmp_path / "strange_notes.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    described = dict(name="flowers", version="1.0.0", fileFormat="array_record", **info)
    (tmp_path / "dataset_info.json").write_text(json.dumps(described))
    if features is not None:
        (tmp_path / "features.json").write_text(json.dumps(features))
    with pytest.raises(InputError, match=r".json names the class 'strange_notes.Notes' .*Prepare the dataset again"):
        open_images(f"tfds:{tmp_path}/train")
    assert "strange_notes" not in sys.modules


def test_names_mean_datasets_that_tensorflow_datasets_has_code_for(tmp_path, monkeypatch):
    folder = tmp_path / "flowers" / "1.0.0"
    folder.mkdir(parents=True)
    (tmp_path / "strange_notes.py").write_text("")
    (folder / "dataset_info.json").write_text(json.dumps(dict(name="flowers", version="1.0.0", splits=[])))
    (folder / "features.json").write_text(json.dumps(STRANGE))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("tensorflow_datasets.core.constants.DATA_DIR", str(tmp_path))
    for name in ("flowers", "flowers:1.0.0"):
        with pytest.raises(InputError, match="Dataset flowers not found"):
            open_images(f"tfds:{name}/train")
    assert "strange_notes" not in sys.modules
    assert _known_builder("mnist:3.0.1").info.full_name == "mnist/3.0.1"


@pytest.mark.parametrize("name", ["flowers/data_dir=data", "huggingface:flowers", "../flowers"])
def test_names_that_lead_elsewhere_are_refused(name):
    with pytest.raises(InputError, match=r"no name of the form dataset\[/config\]\[:version\]"):
        open_images(f"tfds:{name}/train")
