"""What a prediction says about x_0 and x_{t-1}: the arithmetic that samplers and losses share.

A network predicts 2C channels: the noise in x_t, and v in [-1, 1], the place of the log-variance between its bounds.

Source: Improved DDPM, https://arxiv.org/abs/2102.09672, equation 15.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from dydit_jax.diffusion.schedules import Schedule


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Coefficients:
    """Everything that depends on the step alone; [T] as a table, [] or [B,1,1,1] at a step.

    Float32 but for `step`, the int32 index into the schedule (0 is the least noise), and `timestep`, the number that
    the network is told.
    """

    step: jax.Array
    timestep: jax.Array
    alpha_cumprod: jax.Array
    alpha_cumprod_prev: jax.Array
    sqrt_alpha_cumprod: jax.Array
    sqrt_one_minus_alpha_cumprod: jax.Array
    recip_sqrt_alpha_cumprod: jax.Array
    noise_signal_ratio: jax.Array
    posterior_mean_coef_x0: jax.Array
    posterior_mean_coef_xt: jax.Array
    log_variance_low: jax.Array
    log_variance_high: jax.Array

    @property
    def is_final(self):
        """1.0 at step 0, whose result is the image, else 0.0."""
        return (self.step == 0).astype(jnp.float32)


def coefficients(schedule: Schedule) -> Coefficients:
    """Tabulate a schedule, [T] each, computed in float64 and stored in float32."""
    alphas_cumprod = schedule.alphas_cumprod
    table = dict(
        alpha_cumprod=alphas_cumprod,
        alpha_cumprod_prev=schedule.alphas_cumprod_prev,
        sqrt_alpha_cumprod=np.sqrt(alphas_cumprod),
        sqrt_one_minus_alpha_cumprod=np.sqrt(1.0 - alphas_cumprod),
        recip_sqrt_alpha_cumprod=np.sqrt(1.0 / alphas_cumprod),
        noise_signal_ratio=np.sqrt(1.0 / alphas_cumprod - 1.0),
        posterior_mean_coef_x0=schedule.posterior_mean_coef_x0,
        posterior_mean_coef_xt=schedule.posterior_mean_coef_xt,
        log_variance_low=schedule.posterior_log_variance,
        log_variance_high=np.log(schedule.betas),
    )
    table = {name: column.astype(np.float32) for name, column in table.items()}
    steps = np.arange(len(schedule), dtype=np.int32)
    return Coefficients(step=steps, timestep=schedule.timesteps.astype(np.int32), **table)


def at_steps(table: Coefficients, steps) -> Coefficients:
    """Return the rows of steps [B] as [B,1,1,1], to broadcast over images."""
    return jax.tree.map(lambda column: jnp.asarray(column)[steps][:, None, None, None], table)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prediction:
    """A network's output in words, each [B,side,side,C]."""

    noise: jax.Array
    x0: jax.Array
    mean: jax.Array
    log_variance: jax.Array


def interpret(output, xt, c: Coefficients, clip: float | None) -> Prediction:
    """Turn a network's output at x_t into x_0 and the Gaussian of x_{t-1}.

    Args:
      output: [B,side,side,2C], noise then v.
      xt: x_t [B,side,side,C].
      c: the step's coefficients.
      clip: bound on |x_0|, or None; where it binds, the noise is the one that fits the clipped x_0.

    Returns:
      The prediction; its mean is that of q(x_{t-1} | x_t, x_0).
    """
    noise, v = jnp.split(output, 2, axis=-1)
    x0 = c.recip_sqrt_alpha_cumprod * xt - c.noise_signal_ratio * noise
    if clip is not None:
        x0 = jnp.clip(x0, -clip, clip)
        noise = (c.recip_sqrt_alpha_cumprod * xt - x0) / c.noise_signal_ratio
    share = (v + 1.0) / 2.0
    return Prediction(
        noise=noise,
        x0=x0,
        mean=c.posterior_mean_coef_x0 * x0 + c.posterior_mean_coef_xt * xt,
        log_variance=share * c.log_variance_high + (1.0 - share) * c.log_variance_low,
    )


def diffuse(x0, noise, c: Coefficients):
    """Return x_t, a draw of q(x_t | x_0) with the given noise, equation 4 of DDPM."""
    return c.sqrt_alpha_cumprod * x0 + c.sqrt_one_minus_alpha_cumprod * noise
