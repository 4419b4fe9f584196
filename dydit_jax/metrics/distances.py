"""Numbers that compare sets of features: Fréchet distance, Inception score, precision and recall.

What is sensitive to rounding runs in float64 on the host, the many distances of precision and recall on the device.

Source of the Fréchet Inception distance: https://arxiv.org/abs/1706.08500, equation 6.
"""

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
import scipy.special


def moments(features) -> tuple[np.ndarray, np.ndarray]:
    """Return mean [d] and covariance [d,d] of features [n,d], float64."""
    features = np.asarray(features, np.float64)
    return features.mean(0), np.cov(features, rowvar=False)


def frechet_distance(mean, covariance, other_mean, other_covariance) -> float:
    """Return the Fréchet distance of two Gaussians.

    The trace of the root of a product of covariances A B is the sum of the roots of the eigenvalues of the symmetric
    sqrt(A) B sqrt(A): no matrix root of a non-symmetric product, and rank-deficient covariances need no special care.

    Args:
      mean, other_mean: [d].
      covariance, other_covariance: [d,d], symmetric.
    """
    values, vectors = scipy.linalg.eigh(covariance)
    root = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    product = scipy.linalg.eigvalsh(root @ other_covariance @ root)
    shift = np.sum((np.asarray(mean) - other_mean) ** 2)
    overlap = np.sqrt(np.clip(product, 0, None)).sum()
    return float(shift + np.trace(covariance) + np.trace(other_covariance) - 2 * overlap)


def inception_score(logits, *, split: int = 5000) -> float:
    """Return the Inception score: exp of the mean divergence of each image's classes from those of all.

    The mean over consecutive parts of `split` images in the order of the file, a shorter last one counting alike, as
    the field's evaluator does: the score depends on the order of the images.

    Args:
      logits: [n,classes], without the classifier's bias.
      split: images of a part.

    Source: https://arxiv.org/abs/1606.03498.
    """
    scores = []
    for first in range(0, len(logits), split):
        chances = scipy.special.softmax(np.asarray(logits[first : first + split], np.float64), axis=-1)
        overall = chances.mean(0, keepdims=True)
        divergence = scipy.special.xlogy(chances, chances) - scipy.special.xlogy(chances, overall)
        scores.append(np.exp(divergence.sum(-1).mean()))
    return float(np.mean(scores))


def precision_recall(reference, samples, *, neighbours: int = 3, block: int = 1000) -> tuple[float, float]:
    """Return precision and recall of samples: the shares that lie in the other set's manifold.

    A point is in a manifold if it is no farther from one of its points than that point's k-th nearest neighbour.

    Args:
      reference, samples: features [n,d] and [m,d].
      neighbours: k.
      block: points whose distances to all others are in memory at once.

    Source: https://arxiv.org/abs/1904.06991.
    """
    # Distances do not change, but their squares are differences of smaller numbers.
    centre = np.mean(reference, axis=0, dtype=np.float64)
    reference, samples = (np.asarray(points - centre, np.float32) for points in (reference, samples))
    reference_radii, sample_radii = (
        squared_radii(points, neighbours=neighbours, block=block) for points in (reference, samples)
    )
    precision = _share_inside(samples, reference, reference_radii, block)
    return precision, _share_inside(reference, samples, sample_radii, block)


def squared_radii(points: np.ndarray, *, neighbours: int, block: int = 1000) -> np.ndarray:
    """Return the squared distance [n] of each point [n,d] to its k-th nearest other point."""
    nearest = lambda distances: -jax.lax.top_k(-distances, neighbours + 1)[0][:, -1]  # itself is the nearest
    return np.concatenate([nearest(_squared_distances(part, points)) for part in _blocks(points, block)])


def _share_inside(points: np.ndarray, manifold: np.ndarray, radii: np.ndarray, block: int) -> float:
    inside = [(_squared_distances(part, manifold) <= radii).any(1) for part in _blocks(points, block)]
    return float(np.concatenate(inside).mean())


def _blocks(points: np.ndarray, block: int) -> list[np.ndarray]:
    return [points[first : first + block] for first in range(0, len(points), block)]


@jax.jit
def _squared_distances(points, others):
    """Return [n,m] for [n,d] and [m,d]."""
    product = jnp.dot(points, others.T, precision="highest")
    squares = (points**2).sum(1)[:, None] + (others**2).sum(1) - 2 * product
    return jnp.maximum(squares, 0)
