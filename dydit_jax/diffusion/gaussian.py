"""What a prediction says about x_{t-1}: the arithmetic of the variational bound.

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
    the network gets.
    """

    step: jax.Array
    timestep: jax.Array
    alpha_cumprod: jax.Array
    sqrt_alpha_cumprod: jax.Array
    sqrt_one_minus_alpha_cumprod: jax.Array
    recip_sqrt_alpha_cumprod: jax.Array
    noise_signal_ratio: jax.Array
    posterior_mean_coef_x0: jax.Array
    posterior_mean_coef_xt: jax.Array
    log_variance_low: jax.Array
    log_variance_high: jax.Array


def coefficients(schedule: Schedule) -> Coefficients:
    """Tabulate a schedule, [T] each, computed in float64 and stored in float32."""
    alphas_cumprod = schedule.alphas_cumprod
    table = dict(
        alpha_cumprod=alphas_cumprod,
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


def predict_previous(output, xt, c: Coefficients) -> tuple:
    """Return mean and log-variance [B,side,side,C] of x_{t-1} given x_t, as the network sees it.

    Args:
      output: [B,side,side,2C], noise then v.
      xt: x_t [B,side,side,C].
      c: the step's coefficients.
    """
    noise, v = jnp.split(output, 2, axis=-1)
    x0 = c.recip_sqrt_alpha_cumprod * xt - c.noise_signal_ratio * noise
    share = (v + 1.0) / 2.0
    mean = c.posterior_mean_coef_x0 * x0 + c.posterior_mean_coef_xt * xt
    return mean, share * c.log_variance_high + (1.0 - share) * c.log_variance_low
