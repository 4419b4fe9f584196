"""How far a prediction is from the truth, per image, and what a training step draws at random: functions of arrays.

Sources: Improved DDPM, https://arxiv.org/abs/2102.09672, section 3.1 (variational bound); the training code of DyDiT,
https://arxiv.org/abs/2410.03456 (strata).
"""

import math

import jax
import jax.numpy as jnp

from dydit_jax.diffusion.gaussian import Coefficients, predict_previous

STRATA = 4
MIN_PROBABILITY = 1e-12  # of a bin in the discretised likelihood


# --- Random draws of a training batch ------------------------------------------------------------


def stratified_timesteps(key, batch: int, train_steps: int):
    """Draw timesteps int32 [B], neighbours from different quarters of 0 .. train_steps - 1, all equally likely.

    Every batch then sees easy and hard timesteps alike, which steadies the ratio of MACs. Example i is of quarter
    i mod 4, as in the published training; where 4 does not divide the batch, the quarters are shifted by a random
    number, since some would be seen more often than others, and a batch of one would know a single quarter.
    """
    key, quarter = _quarters(key, batch)
    # Where 4 does not divide the timesteps either, each counts as four places, which two quarters may share.
    places = 1 if train_steps % STRATA == 0 else STRATA
    width = train_steps * places // STRATA
    low = quarter * width
    return jax.random.randint(key, (batch,), low, low + width, jnp.int32) // places


def stratified_uniform(key, batch: int):
    """Draw numbers from 0 to 1, float32 [B], uniform over all and neighbours from different quarters, as above."""
    key, quarter = _quarters(key, batch)
    return (quarter + jax.random.uniform(key, (batch,))) / STRATA


def _quarters(key, batch: int) -> tuple:
    """Return a key for what else is drawn, and the quarter 0 .. 3 of each example, int32 [B]."""
    quarter = jnp.arange(batch, dtype=jnp.int32)
    if batch % STRATA:
        shift_key, key = jax.random.split(key)
        quarter += jax.random.randint(shift_key, (), 0, STRATA, jnp.int32)
    return key, quarter % STRATA


def drop_labels(key, labels, *, null_label: int, probability: float):
    """Replace each of labels [B] by `null_label` with the given probability."""
    return jnp.where(jax.random.bernoulli(key, probability, labels.shape), null_label, labels)


# --- Denoising -----------------------------------------------------------------------------------


def denoising_error(output, target):
    """Return the mean squared error [B] of the first C channels of the output [B,side,side,C or 2C]."""
    return _mean_per_image((target - output[..., : target.shape[-1]]) ** 2)


def variational_bound(output, x0, xt, c: Coefficients):
    """Return the variational bound of each image, [B], in bits per dimension.

    Its gradient reaches the variance channels only: the noise channels answer to the squared error.

    Args:
      output: [B,side,side,2C].
      x0, xt: x_0 and x_t, [B,side,side,C].
      c: coefficients of each image's step, [B,1,1,1].
    """
    noise, variance = jnp.split(output, 2, axis=-1)
    frozen = jnp.concatenate([jax.lax.stop_gradient(noise), variance], axis=-1)
    mean, log_variance = predict_previous(frozen, xt, c)
    true_mean = c.posterior_mean_coef_x0 * x0 + c.posterior_mean_coef_xt * xt
    divergence = _gaussian_divergence(true_mean, c.log_variance_low, mean, log_variance)
    likelihood = _discretised_log_likelihood(x0, mean, 0.5 * log_variance)
    nats = jnp.where(c.step == 0, -likelihood, divergence)
    return _mean_per_image(nats) / math.log(2.0)


def _mean_per_image(x):
    return x.mean(axis=tuple(range(1, x.ndim)))


def _gaussian_divergence(mean, log_variance, other_mean, other_log_variance):
    """KL divergence of two Gaussians per element, in nats."""
    ratio = jnp.exp(log_variance - other_log_variance)
    shift = (mean - other_mean) ** 2 * jnp.exp(-other_log_variance)
    return 0.5 * (other_log_variance - log_variance + ratio + shift - 1.0)


def _discretised_log_likelihood(x, mean, log_deviation):
    """Log-probability of the 1/127.5-wide bin around x in [-1, 1]; the outer bins are open.

    The normal distribution function is the tanh approximation that the published training used:
    (1 + tanh(u)) / 2 = sigmoid(2 u).
    """
    centred, precision = x - mean, jnp.exp(-log_deviation)
    above = _tanh_argument(precision * (centred + 1.0 / 255.0))
    below = _tanh_argument(precision * (centred - 1.0 / 255.0))
    # log((tanh a - tanh b) / 2) by sinh(a - b) / (cosh a cosh b): the plain difference of two float32 values near 1
    # loses four digits at t = 0, and the gradient three.
    inside = _log_sinh(above - below) - _log_cosh(above) - _log_cosh(below) - math.log(2.0)
    log_likelihood = jnp.where(
        x < -0.999, _log_sigmoid(2 * above), jnp.where(x > 0.999, _log_sigmoid(-2 * below), inside)
    )
    return jnp.maximum(log_likelihood, math.log(MIN_PROBABILITY))


def _tanh_argument(x):
    return math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)


def _log_sigmoid(x):
    return jnp.minimum(x, 0) - _log_one_plus_exp(-jnp.abs(x))


def _log_cosh(x):
    return jnp.abs(x) + _log_one_plus_exp(-2 * jnp.abs(x)) - math.log(2.0)


def _log_one_plus_exp(x):
    """Logarithm of 1 + exp(x) of a negative x, within 1e-7; log1p is far slower on a CPU."""
    return jnp.log(1 + jnp.exp(x))


def _log_sinh(x):
    """Logarithm of sinh of a positive x."""
    return x + jnp.log(-jnp.expm1(-2 * x)) - math.log(2.0)
