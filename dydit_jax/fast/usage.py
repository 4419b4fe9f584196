"""How many tokens were open in a calibration, and how many rows later images will need.

How many tokens are open depends on the image, so a program needs a capacity: the rows that its MLP computes. It is
chosen from the usage that earlier images had, with a margin for those to come.
"""

import dataclasses

import numpy as np

# Capacity margin, in standard errors above the calibrated mean. One overflow reruns a whole segment, so it is wide.
MARGIN_DEVIATIONS = 4
LEAST_MARGIN = 0.02  # of all tokens: a few calibrated images may be alike by chance


@dataclasses.dataclass(frozen=True)
class TokenUsage:
    """Shares of open tokens per step and layer [S,L], 0 .. 1.

    Attributes:
      mean: over all images.
      deviation: standard deviation between the images.
      max_rows: largest share of a pass's rows that was ever needed, see `TokenExecution.rows_needed`.
      images: how many were seen.
    """

    mean: np.ndarray
    deviation: np.ndarray
    max_rows: np.ndarray
    images: int

    def upper_bound(self, images: int) -> np.ndarray:
        """Return the shares [S,L] that so many new images, packed together, will hardly exceed."""
        error = self.deviation * np.sqrt(1 / self.images + 1 / images)
        expected = self.mean + np.maximum(LEAST_MARGIN, MARGIN_DEVIATIONS * error)
        return np.minimum(1, np.maximum(self.max_rows, expected))

    def merge(self, other: "TokenUsage") -> "TokenUsage":
        """Return the usage of these images and others."""
        images = self.images + other.images
        weights = np.array([self.images, other.images])[:, None, None] / images
        means, deviations = np.stack([self.mean, other.mean]), np.stack([self.deviation, other.deviation])
        mean = (weights * means).sum(0)
        # Within each set and between both.
        variance = (weights * (deviations**2 + (means - mean) ** 2)).sum(0)
        return TokenUsage(mean, np.sqrt(variance), np.maximum(self.max_rows, other.max_rows), images)

    def without_max_rows(self) -> "TokenUsage":
        """Return the usage without the largest needs: those of a few images say nothing about a full batch."""
        return dataclasses.replace(self, max_rows=np.zeros_like(self.max_rows))


def measure_usage(mean: np.ndarray, squares: np.ndarray, needed: np.ndarray, images: int) -> TokenUsage:
    """Gather the usage of a run.

    Args:
      mean: share of open tokens, over all images [S,L].
      squares: squared shares, over all images [S,L].
      needed: share of the rows that the fullest pass needed [S,L].
      images: how many.
    """
    variance = np.maximum(0, squares - mean**2)
    unbiased = images / max(1, images - 1)  # both passes of guidance are of the same image
    return TokenUsage(mean, np.sqrt(unbiased * variance), needed, images)
