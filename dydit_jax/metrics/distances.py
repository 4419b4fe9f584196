"""Distances between sets of features, in float64 on the host.

Source: Fréchet Inception distance, https://arxiv.org/abs/1706.08500, equation 6.
"""

import numpy as np
import scipy.linalg


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
