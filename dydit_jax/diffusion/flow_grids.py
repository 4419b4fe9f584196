"""Which times of a flow a sampling run evaluates the network at, by name; 0 is noise, 1 the image.

    "10", "uniform:10"     that many steps of the same length, from 0 on
    "quadratic:10"         1 - t is a square of evenly spaced numbers: shorter steps towards the image
    "logsnr:10"            evenly in log(t / (1 - t)), between 0.001 and 0.999
    "karras:10"            evenly in ((1 - t) / t)^(1/7), between the same
    "list:0,0.2,0.6"       just these, the noisiest first

Every run ends at 1. Stochastic equations of flows have a drift that grows beyond bounds there: for
`euler_maruyama` a plain number spaces the times from 0 to 0.96, and the last step has the length 0.04.

Sources: SiT, https://arxiv.org/abs/2401.08740, and its sampling code (uniform, the last step);
https://arxiv.org/abs/2010.02502 (quadratic); https://arxiv.org/abs/2206.00364, equation 5 (Karras).
"""

import numpy as np

from dydit_jax.diffusion.grids import KARRAS_RHO
from dydit_jax.errors import InputError

LAST_STEP = {"euler_maruyama": 0.04}
NEAREST = 1e-3  # to noise and image that grids in the log-SNR go; in both it is infinite
MOST_STEPS = 100_000
EXAMPLES = "250, uniform:10, {}:10 or list:0,0.2,0.6"


def flow_times(spacing: str, sampler: str = "") -> np.ndarray:
    """Return the times of a run and its end, 1, ascending [n+1], float64.

    Args:
      spacing: see above.
      sampler: that will run on them.

    Raises:
      InputError: no such grid.
    """
    name, colon, numbers = spacing.partition(":")
    if name == "list" and colon:
        times = _listed(numbers, spacing)
    elif colon and name in GRIDS:
        times = GRIDS[name](_count(numbers, spacing))
    else:
        count, last = _count(spacing, spacing), LAST_STEP.get(sampler)
        times = _uniform(count) if last is None else np.linspace(0, 1 - last, count)
    return np.append(times, 1.0)


def _count(text: str, spacing: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) < 10 and 0 < int(text) <= MOST_STEPS):
        raise InputError(
            f"Unknown spacing {spacing!r} for the process flow; write a number of steps, or a grid: "
            f"{EXAMPLES.format('|'.join(GRIDS))}."
        )
    return int(text)


def _listed(text: str, spacing: str) -> np.ndarray:
    try:
        times = np.array([float(word) for word in text.split(",")])
    except ValueError as error:
        raise InputError(f"Times of {spacing!r} must be numbers with commas between them.") from error
    if not ((times >= 0) & (times < 1)).all():
        wrong = next(time for time in times if not 0 <= time < 1)
        raise InputError(f"Times of {spacing!r} must be from 0 to below 1, the image itself, not {wrong:g}.")
    wrong = np.flatnonzero(np.diff(times) <= 0)
    if wrong.size:
        first, second = times[wrong[0] : wrong[0] + 2]
        raise InputError(f"Times of {spacing!r} must ascend from noise to image: {second:g} follows {first:g}.")
    return times


# --- Named grids: count -> times, ascending -------------------------------------------------------


def _uniform(count: int) -> np.ndarray:
    return np.arange(count) / count


def _quadratic(count: int) -> np.ndarray:
    return 1 - (1 - _uniform(count)) ** 2


def _logsnr(count: int) -> np.ndarray:
    end = np.log(NEAREST / (1 - NEAREST))
    return 1 / (1 + np.exp(-np.linspace(end, -end, count)))


def _karras(count: int) -> np.ndarray:
    high = ((1 - NEAREST) / NEAREST) ** (1 / KARRAS_RHO)
    return 1 / (1 + np.linspace(high, 1 / high, count) ** KARRAS_RHO)


GRIDS = dict(uniform=_uniform, quadratic=_quadratic, logsnr=_logsnr, karras=_karras)
