"""The judge of clothes measures what plain loops measure, and learns."""

import gzip
import pathlib

import numpy as np
import pytest
from conftest import ROOT
from test_idx import encode

FOLDER = pathlib.Path("/usr/share/datasets/fashion-mnist")


@pytest.fixture
def fashion_judge(monkeypatch):
    """Return the module under test, which is no part of the package."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import fashion_judge

    return fashion_judge


@pytest.fixture
def folder(tmp_path):
    """Noise in place of clothes: 40 training pictures and 20 for the test, as many of each class."""
    generator = np.random.default_rng(0)
    for split, count in (("train", 40), ("t10k", 20)):
        images = generator.integers(0, 256, (count, 28, 28), np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            (tmp_path / f"{split}-{kind}-ubyte.gz").write_bytes(gzip.compress(encode(array)))
    return tmp_path


def share_near(points, manifold) -> float:
    """Return the share of points that are no farther from one of a set than that one's third neighbour."""
    distance = lambda a, b: np.sqrt(np.sum((np.float64(a) - b) ** 2))
    radii = [sorted(distance(a, b) for b in manifold)[3] for a in manifold]
    return np.mean([any(distance(a, b) <= r for b, r in zip(manifold, radii)) for a in points])


def test_measures_are_those_of_plain_loops(fashion_judge, folder):
    judge = fashion_judge.FashionJudge(folder)
    reference, _ = fashion_judge.real_pictures(folder, "train")
    images, labels = fashion_judge.real_pictures(folder, "test")
    images = 0.8 * images
    real, drawn = judge.features(reference), judge.features(images)
    found = judge.measure(images, labels)

    kernel, bias = (np.asarray(part[...]) for part in (judge._network.head.kernel, judge._network.head.bias))
    right = [
        int(np.argmax([sum(row * column) + b for column, b in zip(kernel.T, bias)])) == label
        for row, label in zip(drawn, labels)
    ]
    assert found["accuracy"] == np.mean(right)
    covariances = np.cov(real.T), np.cov(drawn.T)
    roots = np.sqrt(np.clip(np.linalg.eigvals(covariances[0] @ covariances[1]).real, 0, None)).sum()
    distance = np.sum((real.mean(0) - drawn.mean(0)) ** 2) + np.trace(sum(covariances)) - 2 * roots
    assert found["distance"] == pytest.approx(distance, rel=1e-3)  # the roots of eigenvalues that are rounding alone
    assert found["precision"] == share_near(drawn, real) and found["recall"] == share_near(real, drawn)
    assert judge.measure(reference, np.arange(40) % 10)["distance"] == pytest.approx(0, abs=1e-6)
    assert judge.measure(reference, np.arange(40) % 10)["recall"] == 1


def test_the_reference_is_the_last_of_each_class(fashion_judge):
    labels = np.arange(50) % 10
    (images, kept), (last, last_labels) = fashion_judge.split_classes(np.arange(50), labels, 2)
    assert images.tolist() == list(range(30)) and last.tolist() == list(range(30, 50))
    assert kept.tolist() == labels[:30].tolist() and last_labels.tolist() == labels[30:].tolist()


def test_pictures_vary_by_a_pixel_and_mirroring(fashion_judge):
    import jax

    image = np.full((1, 28, 28, 1), -1.0, np.float32)
    image[0, 10:14, 5:20, 0] = np.random.default_rng(0).random((4, 15))
    possible = {
        np.roll(turned, (down, right), (0, 1)).tobytes(): (down, right, mirrored)
        for mirrored, turned in enumerate((image[0], image[0, :, ::-1]))
        for down in range(-1, 2)
        for right in range(-1, 2)
    }
    varied = np.asarray(fashion_judge._varied(np.repeat(image, 200, 0), jax.random.key(0)))
    assert {possible[one.tobytes()] for one in varied} == set(possible.values())


@pytest.mark.slow
def test_training_learns_what_is_easy(fashion_judge, monkeypatch):
    monkeypatch.setattr(fashion_judge, "BATCH", 8)
    labels = (np.arange(64) % 2).astype(np.int32)
    images = np.where(labels[:, None, None, None] == 1, 0.5, -0.5) * np.ones((64, 28, 28, 1), np.float32)
    network = fashion_judge.train(images, labels, epochs=3)
    assert (np.argmax(network(images[:8]), -1) == labels[:8]).all()


def test_the_kept_weights_are_small_and_whole(fashion_judge):
    from dydit_jax.checkpoints.arrays import read_arrays

    arrays, _ = read_arrays(fashion_judge.WEIGHTS, fashion_judge.FORMAT)
    assert {array.dtype for array in arrays.values()} == {np.dtype(np.float16)} and len(arrays) == 24
    assert fashion_judge.WEIGHTS.stat().length < 600_000


@pytest.mark.slow
@pytest.mark.skipif(not FOLDER.is_dir(), reason="The pictures are not there.")
def test_real_clothes_are_recognised(fashion_judge):
    images, labels = fashion_judge.real_pictures(FOLDER, "test")
    assert fashion_judge.FashionJudge(FOLDER).measure(images, labels)["accuracy"] >= 0.92
