"""Batches are a function of seed and step."""

import itertools

import numpy as np
import pytest

from dydit_jax.data.sources import SOURCES, DataConfig, batches, digits
from dydit_jax.errors import InputError
from dydit_jax.models.dit import DiTConfig

MODEL = DiTConfig(depth=1, width=32, heads=2, patch=2, side=8, channels=1, classes=10)


def take(start, count, **fields):
    config = DataConfig(**dict(dict(name="digits", batch_size=16), **fields))
    return list(itertools.islice(batches(config, MODEL, start=start), count))


@pytest.mark.parametrize("name", list(SOURCES))
def test_starting_later_gives_the_later_batches(name):
    for threads in (0, 2):
        all_of_them, later = take(0, 6, name=name), take(4, 2, name=name, threads=threads)
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
