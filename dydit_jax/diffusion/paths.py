"""The times of a sampling run, as solvers see them: how much signal and noise, and in what the run is a straight line.

Every x_t is alpha x_0 + sigma noise. What a process decides beside these two: which quantity its network predicts, and
in which coordinate a step along that prediction is exact where the prediction does not change.
"""

import dataclasses

import numpy as np

from dydit_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Path:
    """The times of a run, from the most noise to the least, and where it ends; the network predicts the noise.

    Attributes:
      alpha, sigma: of each time [n+1]; the last sigma is 0 where the run ends in the image.
      eta: share of DDPM's noise that a step adds, for solvers with a choice.
    """

    alpha: np.ndarray
    sigma: np.ndarray
    eta: float = 0.0

    @property
    def steps(self) -> int:
        """Number of steps n from a time to the next."""
        return len(self.alpha) - 1

    @property
    def log_snr(self) -> np.ndarray:
        """Half the logarithm of the signal-to-noise ratio, log(alpha / sigma) [n+1]; infinite in image and noise."""
        with np.errstate(divide="ignore"):
            return np.log(self.alpha) - np.log(self.sigma)

    @property
    def noise_ratio(self) -> np.ndarray:
        """Ratio sigma / alpha [n+1]; in it, x / alpha moves along the noise."""
        with np.errstate(divide="ignore"):
            return self.sigma / self.alpha

    @property
    def scale(self) -> np.ndarray:
        """What x is divided by [n+1], so that it moves in `coordinate` along `slope_estimate`."""
        return self.alpha

    @property
    def coordinate(self) -> np.ndarray:
        """The variable of the run's differential equation [n+1]."""
        return self.noise_ratio

    @property
    def x0_from_output(self) -> tuple[np.ndarray, np.ndarray]:
        """The a and b, [n+1] each, of x_0 = a x_t - b output."""
        return 1 / self.alpha, self.noise_ratio

    @property
    def starts_in_noise(self) -> bool:
        """Whether nothing of the image is left at the first time: an estimate from there fits no higher order."""
        return bool(self.alpha[0] == 0)

    def require_steps(self, least: int) -> None:
        """Raise where a solver would not reach its order.

        Raises:
          InputError: fewer steps than that.
        """
        if self.steps < least:
            raise InputError(
                f"This sampler needs at least {least} steps, not {self.steps}; take more, or sampler ddim."
            )

    def ends_in_image(self, i: int) -> bool:
        """Return whether the step from time i ends without noise."""
        return self.sigma[i + 1] == 0

    def can_evaluate(self, i: int) -> bool:
        """Return whether the network knows time i: one of noise was never trained on the image itself."""
        return self.sigma[i] > 0

    def noise_estimate(self, i: int) -> tuple[float, float]:
        """Return `Row.estimate` of the noise at time i."""
        return 1 / self.sigma[i], -self.alpha[i] / self.sigma[i]

    def slope_estimate(self, i: int) -> tuple[float, float] | None:
        """Return `Row.estimate` of the slope d(x / scale) / d(coordinate) at time i."""
        return self.noise_estimate(i)


class FlowPath(Path):
    """A straight line from noise to the image, x_t = t x_0 + (1 - t) noise; the network predicts x_0 - noise.

    The time t is alpha, sigma is 1 - t, and dx/dt is the prediction itself.
    """

    @property
    def scale(self) -> np.ndarray:
        """1: x itself moves [n+1]."""
        return np.ones_like(self.alpha)

    @property
    def coordinate(self) -> np.ndarray:
        """The time [n+1]."""
        return self.alpha

    @property
    def x0_from_output(self) -> tuple[np.ndarray, np.ndarray]:
        """The a and b, [n+1] each, of x_0 = a x_t - b output."""
        return np.ones_like(self.alpha), -self.sigma

    def can_evaluate(self, i: int) -> bool:
        """Return True: a velocity has a meaning in the image, too."""
        return True

    def slope_estimate(self, i: int) -> None:
        """Return None: the slope is the network's output."""
