"""Noise schedules: betas, what follows from them, and the shorter schedule of a sampling run.

Everything is float64 numpy, computed once on the host; solvers and losses read float32 copies by index. Index 0 is
the least noise.

Sources: DDPM, https://arxiv.org/abs/2006.11239 (equations 4, 7 and section 4); Improved DDPM,
https://arxiv.org/abs/2102.09672 (equation 17 for the cosine).
"""

import dataclasses

import numpy as np

from dydit_jax.diffusion.grids import kept_timesteps
from dydit_jax.errors import InputError, require_known
from dydit_jax.records import require_range

LINEAR_BETAS = (1e-4, 0.02)  # over 1000 steps; scaled for other lengths
COSINE_OFFSET = 0.008
MAX_BETA = 0.999


@dataclasses.dataclass(frozen=True)
class DiffusionConfig:
    """The schedule that a model was trained on.

    Attributes:
      schedule: linear or squared_cosine, a key of `SCHEDULES`.
      train_steps: number of its steps, T.
    """

    schedule: str = "linear"
    train_steps: int = 1000

    def __post_init__(self):
        require_known("schedule", self.schedule, SCHEDULES)
        require_range("diffusion.train_steps", self.train_steps, low=4, high=1_000_000)


@dataclasses.dataclass(frozen=True)
class Schedule:
    """A diffusion process of T steps; every array is [T].

    Attributes:
      betas: variance added by each step, float64, in (0, 1).
      timesteps: the number that the network gets at each step: 0 .. train_steps - 1, int64, ascending.
    """

    betas: np.ndarray
    timesteps: np.ndarray

    def __len__(self) -> int:
        return len(self.betas)

    @property
    def alphas_cumprod(self) -> np.ndarray:
        """Share of the data's variance that is left after each step."""
        return np.cumprod(1.0 - self.betas)

    @property
    def alphas_cumprod_prev(self) -> np.ndarray:
        """Share that is left before each step: 1 before the first."""
        return np.append(1.0, self.alphas_cumprod[:-1])

    @property
    def posterior_variance(self) -> np.ndarray:
        """Variance of q(x_{t-1} | x_t, x_0), equation 7 of DDPM."""
        return self.betas * (1.0 - self.alphas_cumprod_prev) / (1.0 - self.alphas_cumprod)

    @property
    def posterior_log_variance(self) -> np.ndarray:
        """Its logarithm; the first entry, log 0, is replaced by the second."""
        variance = self.posterior_variance
        return np.log(np.append(variance[1 if len(variance) > 1 else 0], variance[1:]))

    @property
    def posterior_mean_coef_x0(self) -> np.ndarray:
        """Weight of x_0 in the mean of q(x_{t-1} | x_t, x_0)."""
        return self.betas * np.sqrt(self.alphas_cumprod_prev) / (1.0 - self.alphas_cumprod)

    @property
    def posterior_mean_coef_xt(self) -> np.ndarray:
        """Weight of x_t in the mean of q(x_{t-1} | x_t, x_0)."""
        return (1.0 - self.alphas_cumprod_prev) * np.sqrt(1.0 - self.betas) / (1.0 - self.alphas_cumprod)


def linear_betas(steps: int) -> np.ndarray:
    """Make betas that grow linearly from 1e-4 to 0.02, scaled so that any number of steps ends equally noisy."""
    low, high = LINEAR_BETAS
    return np.linspace(low * 1000 / steps, high * 1000 / steps, steps, dtype=np.float64)


def squared_cosine_betas(steps: int) -> np.ndarray:
    """Make betas under which alphas_cumprod follows a squared cosine, capped at 0.999."""
    left = np.cos((np.arange(steps + 1) / steps + COSINE_OFFSET) / (1 + COSINE_OFFSET) * np.pi / 2) ** 2
    return np.minimum(1.0 - left[1:] / left[:-1], MAX_BETA)


SCHEDULES = {"linear": linear_betas, "squared_cosine": squared_cosine_betas}


def make_schedule(config: DiffusionConfig) -> Schedule:
    """Make a training schedule.

    Raises:
      InputError: betas outside (0, 1).
    """
    steps = config.train_steps
    betas = SCHEDULES[config.schedule](steps)
    if not (betas.min() > 0 and betas.max() < 1):
        raise InputError(f"A {config.schedule} schedule of {steps} steps has betas outside (0, 1); take more steps.")
    return Schedule(betas, np.arange(steps))


def respace(schedule: Schedule, spacing: str) -> Schedule:
    """Keep some timesteps of a schedule, with betas that leave alphas_cumprod as it was there.

    Args:
      schedule: a training schedule of T steps.
      spacing: how many and which, see `grids`.

    Returns:
      The shorter schedule.

    Raises:
      InputError: no such spacing of T steps.
    """
    kept = kept_timesteps(spacing, schedule.alphas_cumprod)
    alphas_cumprod = schedule.alphas_cumprod[kept]
    betas = 1.0 - alphas_cumprod / np.append(1.0, alphas_cumprod[:-1])
    return Schedule(betas, schedule.timesteps[kept])
