"""Settings of JAX that decide numbers: this package's own, whatever the environment or the caller has set."""

import contextlib

import jax

from dydit_jax.runtime.seeds import KEY_IMPLEMENTATION


@contextlib.contextmanager
def own_settings():
    """Give this thread the settings that published numbers were made with; as a decorator, for the time of a call.

    Other threads keep what is set outside: a thread that traces or compiles needs them too.
    """
    with (
        jax.default_prng_impl(KEY_IMPLEMENTATION),
        jax.threefry_partitionable(True),
        jax.enable_x64(False),
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
        jax.default_matmul_precision(None),
    ):
        yield
