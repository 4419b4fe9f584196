"""Numbers that compare sets of features: Fréchet distance, Inception score, precision and recall.

Computations that are sensitive to rounding run in float64 on the host; the many distances of precision and recall run
on the device.

Source of the Fréchet Inception distance: https://arxiv.org/abs/1706.08500, equation 6.
"""

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
import scipy.special

from dydit_jax.errors import InputError
from dydit_jax.runtime.progress import Progress

NEIGHBOURS = 3  # k of precision and recall in the field's figures


def moments(features, *, block: int = 4096) -> tuple[np.ndarray, np.ndarray]:
    """Return mean [d] and covariance [d,d] of features [n,d], float64; `block` rows at a time are float64 too."""
    chex.assert_rank(features, 2)
    mean = np.mean(features, axis=0, dtype=np.float64)
    total = np.zeros((len(mean), len(mean)))
    for part in _blocks(features, block):
        centred = part - mean
        total += centred.T @ centred
    return mean, total / (len(features) - 1)


def frechet_distance(mean, covariance, other_mean, other_covariance) -> float:
    """Return the Fréchet distance of two Gaussians.

    The trace of the root of a product of covariances A B is the sum of the roots of the eigenvalues of the symmetric
    sqrt(A) B sqrt(A): no matrix root of a non-symmetric product, and rank-deficient covariances need no special care.

    Args:
      mean, other_mean: [d].
      covariance, other_covariance: [d,d], symmetric.
    """
    size = len(mean)
    chex.assert_shape([np.asarray(mean), np.asarray(other_mean)], (size,))
    chex.assert_shape([covariance, other_covariance], (size, size))
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
    chex.assert_rank(logits, 2)
    scores = []
    for first in range(0, len(logits), split):
        chances = scipy.special.softmax(np.asarray(logits[first : first + split], np.float64), axis=-1)
        overall = chances.mean(0, keepdims=True)
        divergence = scipy.special.xlogy(chances, chances) - scipy.special.xlogy(chances, overall)
        scores.append(np.exp(divergence.sum(-1).mean()))
    return float(np.mean(scores))


def precision_recall(
    reference, samples, *, neighbours: int = NEIGHBOURS, block: int = 2500
) -> tuple[float | None, float | None]:
    """Return precision and recall of samples: the shares that lie in the other set's manifold.

    A point is in a manifold if it is no farther from one of its points than that point's k-th nearest neighbour.

    Args:
      reference, samples: features [n,d] and [m,d], float32.
      neighbours: k.
      block: points on each side whose distances are in memory at once.

    Returns:
      Both in [0, 1]. Precision is None if the reference has fewer than k + 1 points, recall if the samples have: the
      k-th neighbour is then infinitely far, and everything would lie inside.

    Raises:
      InputError: features that are not finite: a single NaN would put every point outside.

    Source: https://arxiv.org/abs/1904.06991.
    """
    chex.assert_rank([reference, samples], 2)
    chex.assert_equal_shape_suffix([reference, samples], 1)
    for name, points in (("reference", reference), ("samples", samples)):
        wrong = np.flatnonzero(~np.isfinite(points).all(1))
        if wrong.size:
            raise InputError(f"Point {wrong[0]} of the {name} has features that are not finite; compute them again.")
    # Distances do not change, but their squares are differences of smaller numbers.
    centre = np.mean(reference, axis=0, dtype=np.float64).astype(np.float32)
    blocks = sum(-(-len(points) // block) for points in (reference, samples))

    def share(points, manifold):
        if len(manifold) <= neighbours:
            return None
        radii = squared_radii(manifold, neighbours=neighbours, **settings)
        return _share_inside(points, manifold, radii, **settings)

    with Progress(blocks**2, "block", "precision and recall") as progress:
        settings = dict(centre=centre, block=block, report=progress.advance)
        return share(samples, reference), share(reference, samples)


def squared_radii(
    points: np.ndarray,
    *,
    neighbours: int,
    centre=0.0,
    block: int = 2500,
    report: Callable[[int], None] = lambda pairs: None,
) -> np.ndarray:
    """Return the squared distance [n] of each point to its k-th nearest other point; infinite if n <= k.

    Args:
      points: [n,d].
      neighbours: k.
      centre: that points are measured from [d].
      block: points on each side whose distances are in memory at once.
      report: called with the number of pairs of blocks done since its last call.
    """
    radii = []
    for part in _blocks(points, block):
        nearest = np.full((len(part), neighbours + 1), np.inf, np.float32)  # itself is the nearest
        for others in _blocks(points, block):
            nearest = jax.block_until_ready(_nearest(part, others, centre, nearest))
            report(1)
        radii.append(np.asarray(nearest[:, -1]))
    return np.concatenate(radii)


def _share_inside(points: np.ndarray, manifold: np.ndarray, radii: np.ndarray, *, centre, block: int, report) -> float:
    inside = []
    for part in _blocks(points, block):
        found = np.zeros(len(part), bool)
        for others, reach in zip(_blocks(manifold, block), _blocks(radii, block)):
            found |= np.asarray(_any_inside(part, others, centre, reach))
            report(1)
        inside.append(found)
    return float(np.concatenate(inside).mean())


def _blocks(rows: np.ndarray, block: int) -> list[np.ndarray]:
    return [rows[first : first + block] for first in range(0, len(rows), block)]


@jax.jit
def _nearest(points, others, centre, nearest):
    """Return the smallest distances so far [n,k+1], ascending, with those to other points [m,d] taken in."""
    both = jnp.concatenate([nearest, _squared_distances(points, others, centre)], axis=1)
    return -jax.lax.top_k(-both, nearest.shape[1])[0]


@jax.jit
def _any_inside(points, others, centre, radii):
    """Return whether each of points [n,d] is within the radius [m] of any other."""
    return (_squared_distances(points, others, centre) <= radii).any(1)


def _squared_distances(points, others, centre):
    """Return [n,m] for [n,d] and [m,d]."""
    points, others = points - centre, others - centre
    product = jnp.dot(points, others.T, precision="highest")
    squares = (points**2).sum(1)[:, None] + (others**2).sum(1) - 2 * product
    return jnp.maximum(squares, 0)
