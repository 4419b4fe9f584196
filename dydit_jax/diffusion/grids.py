"""Which timesteps of a training schedule a sampling run evaluates the network at, by name.

    "250"               that many, evenly, first and last included
    "10,20,30"          the schedule in equal sections, one per number, each keeps that number
    "ddim50"            every i-th from 0 on, with the smallest i that gives 50
    "trailing:20"       every T / 20 down from the noisiest
    "leading:20"        every (T // 20)-th from 0 on, up to the 20th
    "logsnr:10"         evenly in the logarithm of the signal-to-noise ratio
    "quadratic:10"      evenly in the square root of the timestep
    "karras:10"         evenly in (sigma / alpha)^(1/7)
    "list:999,600,0"    just these, the noisiest first

The named grids are computed as real numbers and rounded to the nearest timestep, halves to the even one. Where several
would be the same, the noisiest keeps it and the others take the next lower ones, or near 0 the next free ones.

Sources: Improved DDPM, https://arxiv.org/abs/2102.09672, section 4 (sections); DDIM, https://arxiv.org/abs/2010.02502
(strides, quadratic); https://arxiv.org/abs/2305.08891 (trailing and leading); https://arxiv.org/abs/2206.00364,
equation 5 (Karras).
"""

import numpy as np

from dydit_jax.errors import InputError

KARRAS_RHO = 7.0
EXAMPLES = "250, 10,20,30, ddim50, {}:10 or list:999,600,300,0"


def kept_timesteps(spacing: str, alphas_cumprod: np.ndarray) -> np.ndarray:
    """Return the timesteps of a run, ascending, int64.

    Args:
      spacing: see above.
      alphas_cumprod: of the training schedule [T].

    Raises:
      InputError: no such grid of T timesteps.
    """
    total, (name, colon, numbers) = len(alphas_cumprod), spacing.partition(":")
    if name == "list" and colon:
        return _listed(numbers, spacing, total)
    if name in GRIDS and colon:
        return _named(name, _one_number(numbers, spacing), alphas_cumprod)
    if spacing.startswith("ddim"):
        return _strided(spacing, total)
    return _sectioned(spacing, total)


def _numbers(text: str, spacing: str, least: int = 1) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdecimal() and len(part) < 10 and int(part) >= least for part in parts):
        raise InputError(
            f"Unknown spacing {spacing!r}; write a number of steps, or a grid: {EXAMPLES.format('|'.join(GRIDS))}."
        )
    return [int(part) for part in parts]


def _one_number(text: str, spacing: str) -> int:
    count, *others = _numbers(text, spacing)
    if others:
        raise InputError(f"Spacing {spacing!r} has several numbers; this grid takes one.")
    return count


def _listed(text: str, spacing: str, total: int) -> np.ndarray:
    timesteps = np.array(_numbers(text, spacing, least=0))
    if timesteps.max() >= total:
        raise InputError(f"Timesteps of {spacing!r} must be from 0 to {total - 1}, not {timesteps.max()}.")
    wrong = np.flatnonzero(np.diff(timesteps) >= 0)
    if wrong.size:
        first, second = timesteps[wrong[0] : wrong[0] + 2]
        raise InputError(f"Timesteps of {spacing!r} must descend from the noisiest: {second} follows {first}.")
    return timesteps[::-1]


def _named(name: str, count: int, alphas_cumprod: np.ndarray) -> np.ndarray:
    total = len(alphas_cumprod)
    if count > total:
        raise InputError(f"The grid {name}:{count} has more timesteps than the {total} of the schedule.")
    index = np.arange(count)
    free = np.rint(GRIDS[name](count, alphas_cumprod)).astype(np.int64) - index  # distinct where this never falls
    return np.maximum(np.minimum.accumulate(free[::-1])[::-1], 0) + index


def _strided(spacing: str, total: int) -> np.ndarray:
    count, *others = _numbers(spacing.removeprefix("ddim"), spacing)
    if others:
        raise InputError(f"Spacing {spacing!r} has sections; ddim takes one number, as in 'ddim{count}'.")
    for stride in range(1, total + 1):
        if len(range(0, total, stride)) == count:
            return np.arange(0, total, stride)
    raise InputError(f"No whole stride keeps {count} of {total} steps ({spacing!r}); try {count - 1} or '{count}'.")


def _sectioned(spacing: str, total: int) -> np.ndarray:
    counts = _numbers(spacing, spacing)
    kept, start = [], 0
    for section, count in enumerate(counts):
        # The first sections take the remainder of the division.
        size = total // len(counts) + (section < total % len(counts))
        if count > size:
            raise InputError(f"Spacing {spacing!r} wants {count} steps of a section of {size}.")
        strides = np.full(count - 1, (size - 1) / max(1, count - 1))
        # The published rule adds stride to stride. At 278 of the 1000 counts its rounding errors decide which side of a
        # half a number falls on: a product would keep other timesteps.
        kept.append(start + np.rint(np.append(0.0, np.cumsum(strides))).astype(np.int64))
        start += size
    return np.concatenate(kept)


# --- Named grids: (count, alphas_cumprod) -> real timesteps, ascending -----------------------------


def _trailing(count: int, alphas_cumprod: np.ndarray) -> np.ndarray:
    total = len(alphas_cumprod)
    return np.rint(total - total / count * np.arange(count))[::-1] - 1


def _leading(count: int, alphas_cumprod: np.ndarray) -> np.ndarray:
    return np.arange(count) * (len(alphas_cumprod) // count)


def _logsnr(count: int, alphas_cumprod: np.ndarray) -> np.ndarray:
    noise = _log_noise_ratio(alphas_cumprod)
    return _at(np.linspace(noise[0], noise[-1], count) if count > 1 else noise[-1:], noise)


def _quadratic(count: int, alphas_cumprod: np.ndarray) -> np.ndarray:
    last = len(alphas_cumprod) - 1
    return last * np.linspace(0, 1, count) ** 2 if count > 1 else np.array([last])


def _karras(count: int, alphas_cumprod: np.ndarray) -> np.ndarray:
    noise = _log_noise_ratio(alphas_cumprod)
    low, high = np.exp(noise[[0, -1]] / KARRAS_RHO)
    return _at(KARRAS_RHO * np.log(np.linspace(low, high, count) if count > 1 else [high]), noise)


def _log_noise_ratio(alphas_cumprod: np.ndarray) -> np.ndarray:
    """Return log(sigma / alpha) of every timestep, ascending [T]: half the log-SNR with its sign changed."""
    return 0.5 * (np.log1p(-alphas_cumprod) - np.log(alphas_cumprod))


def _at(wanted: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """Return the real timesteps at which log(sigma / alpha) has these values."""
    return np.interp(wanted, noise, np.arange(len(noise)))


GRIDS = dict(trailing=_trailing, leading=_leading, logsnr=_logsnr, quadratic=_quadratic, karras=_karras)
