"""The Fréchet distance is the official evaluator's."""

import numpy as np
import pytest
from conftest import GOLDEN

from dydit_jax.errors import InputError
from dydit_jax.metrics.distances import frechet_distance, inception_score, moments, precision_recall, squared_radii


def test_distance_equals_the_official_evaluator():
    reference = np.load(GOLDEN / "evaluation.npz")
    ours = frechet_distance(*moments(reference["sample_features"]), *moments(reference["reference_features"]))
    assert ours == pytest.approx(float(reference["fid"]), rel=1e-6)


def test_identical_sets_are_at_distance_zero():
    features = np.random.default_rng(0).standard_normal((100, 16))
    assert frechet_distance(*moments(features), *moments(features)) == pytest.approx(0.0, abs=1e-9)


def test_rank_deficient_covariances_work():
    generator = np.random.default_rng(0)
    few, many = generator.standard_normal((10, 32)), 1 + generator.standard_normal((500, 32))
    distance = frechet_distance(*moments(few), *moments(many))
    assert np.isfinite(distance)
    # The roots of 22 eigenvalues that are zero but for rounding, 1e-17, differ by 1.2e-9 of the distance.
    assert distance == pytest.approx(frechet_distance(*moments(many), *moments(few)), rel=1e-8)


def test_sets_of_other_features_are_not_compared():
    few, many = np.ones((10, 16), np.float32), np.ones((10, 32), np.float32)
    with pytest.raises(AssertionError, match="shape"):
        precision_recall(few, many)
    with pytest.raises(AssertionError, match="shape"):
        frechet_distance(*moments(few), *moments(many))
    with pytest.raises(AssertionError, match="rank"):
        moments(few[0])


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_features_that_are_not_finite_are_refused(wrong):
    good = np.random.default_rng(0).standard_normal((50, 16)).astype(np.float32)
    bad = good.copy()
    bad[7, 3] = wrong
    with pytest.raises(InputError, match="Point 7 of the reference has features that are not finite"):
        precision_recall(bad, good)
    with pytest.raises(InputError, match="Point 7 of the samples has features that are not finite"):
        precision_recall(good, bad)


def test_distance_of_known_gaussians():
    assert frechet_distance([0, 0], np.diag([1, 4]), [3, 4], np.diag([4, 4])) == pytest.approx(25 + 1)


def test_precision_and_recall_equal_the_official_evaluator():
    reference = np.load(GOLDEN / "evaluation.npz")
    ours, theirs = reference["sample_features"], reference["reference_features"]
    precision, recall = precision_recall(theirs, ours, block=100)
    assert precision == pytest.approx(float(reference["precision"])) and recall == pytest.approx(
        float(reference["recall"])
    )


@pytest.mark.parametrize("count, recall", [(3, None), (4, 0.0)])
def test_fewer_than_four_images_are_no_manifold(count, recall):
    generator = np.random.default_rng(0)
    many, few = (generator.standard_normal((n, 16)).astype(np.float32) for n in (50, count))
    far = few + 1000  # deviations away from all of the others
    assert precision_recall(many, far) == (0.0, recall)
    assert precision_recall(far, many) == (recall, 0.0)
    assert precision_recall(few[:3], few[:3]) == (None, None)


def test_radii_equal_the_official_evaluator():
    reference = np.load(GOLDEN / "evaluation.npz")
    for side in ("reference", "sample"):
        radii = squared_radii(reference[f"{side}_features"], neighbours=3)
        np.testing.assert_allclose(radii, reference[f"{side}_radii"], rtol=1e-5)


def test_inception_score_equals_the_official_evaluator():
    reference = np.load(GOLDEN / "evaluation.npz")
    score = inception_score(reference["logits"], split=500)
    assert score == pytest.approx(float(reference["inception_score_split500"]), rel=1e-6)


def test_inception_score_of_certain_classes_is_their_number():
    logits = 1e4 * np.eye(8)[np.arange(80) % 8]  # chances of exactly zero
    assert inception_score(logits, split=40) == pytest.approx(8.0)
