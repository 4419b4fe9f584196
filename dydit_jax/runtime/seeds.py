"""Seeds and the keys made of them: the same numbers under whatever generator JAX is set to."""

import operator

import jax
import numpy as np

from dydit_jax.errors import InputError

KEY_IMPLEMENTATION = "threefry2x32"
MOST_SEED = 2**64 - 1


def require_seed(where: str, seed) -> int:
    """Return a seed as an int.

    Args:
      where: its name, for the message.
      seed: a whole number from 0 to 2^64 - 1.

    Raises:
      InputError: any other.
    """
    try:
        number = operator.index(seed)
    except TypeError:
        number = -1
    if not 0 <= number <= MOST_SEED:
        raise InputError(f"{where} must be a whole number from 0 to 2^64 - 1, not {seed!r}.")
    return number


def seed_words(seed: int) -> np.ndarray:
    """Split a seed into two words, the high one first, uint32 [2].

    Raises:
      InputError: not a whole number from 0 to 2^64 - 1.
    """
    number = require_seed("The seed", seed)
    return np.array([number >> 32, number & 0xFFFFFFFF], np.uint32)


def make_key(seed):
    """Make a PRNG key; no two seeds have the same.

    `jax.random.key` drops the upper half of a seed unless 64-bit numbers are enabled, and its generator can be set from
    outside; for seeds below 2^32 and JAX's defaults the keys are the same.

    Args:
      seed: from 0 to 2^64 - 1; in a compiled function, which takes no such integers, its `seed_words`.

    Raises:
      InputError: another seed.
    """
    words = seed if isinstance(seed, jax.Array) else seed_words(seed)
    return jax.random.wrap_key_data(words, impl=KEY_IMPLEMENTATION)
