"""What is drawn at random for each image: a function of the seed and the image's index, whatever batch it is in."""

import functools
import math

import jax
import jax.numpy as jnp

from dydit_jax.runtime.seeds import make_key


def image_keys(seed, indices):
    """Return one PRNG key per image, for indices [B] and what `make_key` takes."""
    return jax.vmap(functools.partial(jax.random.fold_in, make_key(seed)))(indices)


def uniform_labels(seed: int, indices, classes: int):
    """Draw a label int32 [B] for each image, a function of seed and index alone."""
    draw = lambda key: jax.random.randint(jax.random.fold_in(key, 2), (), 0, classes, jnp.int32)
    return jax.vmap(draw)(image_keys(seed, indices))


def first_noise(keys, shape):
    """Draw the noise that sampling starts from, float32 [B,*shape], for the images' keys [B]."""
    return _normal(jax.vmap(lambda key: jax.random.fold_in(key, 0))(keys), shape)


def step_noise(keys, step, shape):
    """Draw the noise of a step of the schedule, float32 [B,*shape], for the images' keys [B]."""
    return _normal(jax.vmap(lambda key: jax.random.fold_in(jax.random.fold_in(key, 1), step))(keys), shape)


def _normal(keys, shape):
    flat = jax.vmap(lambda key: jax.random.normal(key, math.prod(shape), jnp.float32))(keys)
    # The barrier keeps the draw from being made in the layout of images, whose few channels fill few of a TPU's lanes.
    return jax.lax.optimization_barrier(flat).reshape(-1, *shape)
