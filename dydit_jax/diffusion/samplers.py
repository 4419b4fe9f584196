"""Samplers: ways from noise to images, each an `(init, step)` pair, like an optimiser in optax.

`init(noise)` makes a state, `step(state, output, c, noise)` moves it by one step of the schedule, given the network's
output at the state's `xt`. A sampler knows no network and no loop, and its state survives being handed from one
compiled program to the next.

Sources: DDPM, https://arxiv.org/abs/2006.11239; learned variance, https://arxiv.org/abs/2102.09672; DDIM,
https://arxiv.org/abs/2010.02502, equations 12 and 16.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dydit_jax.diffusion.gaussian import Coefficients, interpret
from dydit_jax.errors import InputError, require_known
from dydit_jax.records import require_range

GUIDED_CHANNELS = ("first_three", "all")


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How images are drawn.

    Attributes:
      sampler: ddpm or ddim, a key of `SAMPLERS`.
      steps: timesteps that are kept: 250, ddim50, or sections such as 10,20,30; see `schedules.respace`.
      eta: share of DDPM's noise in DDIM, 0 .. 1; DDPM has no such choice and wants 0.
      clip: bound on the estimate of |x_0|, or None. Images in pixels are bounded, latents are not.
      guidance: scale of classifier-free guidance; 1 is none, and then the network runs once per step, not twice.
      guided_channels: first_three (as the published models do) or all.
      autoencoder: whose decoder turns latents into images, a file or a published name; empty for models in pixels.
    """

    sampler: str = "ddpm"
    steps: str = "250"
    eta: float = 0.0
    clip: float | None = None
    guidance: float = 1.0
    guided_channels: str = "first_three"
    autoencoder: str = ""

    def __post_init__(self):
        require_known("sampler", self.sampler, SAMPLERS)
        require_known("sampling.guided_channels", self.guided_channels, GUIDED_CHANNELS)
        require_range("sampling.eta", self.eta, low=0.0, high=1.0)
        require_range("sampling.guidance", self.guidance, low=0.0)
        if self.clip is not None:
            require_range("sampling.clip", self.clip, low=0.0)
        if self.sampler == "ddpm" and self.eta:
            raise InputError(f"sampling.eta belongs to ddim; ddpm has none, so {self.eta} can't be honoured.")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplerState:
    """Where a sampling run stands.

    Attributes:
      xt: x_t, where the network is asked next [B,side,side,C].
      x0: the latest estimate of x_0 [B,side,side,C].
    """

    xt: jax.Array
    x0: jax.Array


class Sampler(NamedTuple):
    """`init(noise) -> state` and `step(state, output, coefficients, noise) -> state`."""

    init: Callable
    step: Callable


def _init(noise) -> SamplerState:
    return SamplerState(xt=noise, x0=jnp.zeros_like(noise))


def ddpm(*, clip: float | None) -> Sampler:
    """Ancestral sampling with the learned variance."""

    def step(state, output, c, noise):
        prediction = interpret(output, state.xt, c, clip)
        # The last step ends on the mean: there is no x_{-1} to be uncertain of.
        noise = (1.0 - c.is_final) * jnp.exp(0.5 * prediction.log_variance) * noise
        return SamplerState(prediction.mean + noise, prediction.x0)

    return Sampler(_init, step)


def ddim(*, eta: float, clip: float | None) -> Sampler:
    """Implicit sampling: deterministic at eta 0, DDPM's posterior noise at eta 1."""

    def step(state, output, c, noise):
        prediction = interpret(output, state.xt, c, clip)
        before, after = c.alpha_cumprod_prev, c.alpha_cumprod
        deviation = eta * jnp.sqrt((1 - before) / (1 - after) * (1 - after / before))
        mean = jnp.sqrt(before) * prediction.x0 + jnp.sqrt(1 - before - deviation**2) * prediction.noise
        return SamplerState(mean + (1.0 - c.is_final) * deviation * noise, prediction.x0)

    return Sampler(_init, step)


def run_sampler(sampler: Sampler, state: SamplerState, steps: Coefficients, extra=None, *, predict, noise_at):
    """Move a state through consecutive steps inside one compiled program.

    Args:
      sampler: the pair.
      state: where to start.
      steps: rows of the coefficients in the order to run, usually descending, [S] each.
      extra: anything else that differs from step to step and that `predict` wants, [S,...] each.
      predict: (x_t, coefficients, extra) of a step -> (output, anything to keep).
      noise_at: step index [] -> noise [B,side,side,C].

    Returns:
      The state after the last of the steps, and what `predict` kept, stacked [S,...].
    """

    def body(state, row):
        c, extra = row
        output, kept = predict(state.xt, c, extra)
        return sampler.step(state, output, c, noise_at(c.step)), kept

    return jax.lax.scan(body, state, (steps, extra))


SAMPLERS = {
    "ddpm": lambda config: ddpm(clip=config.clip),
    "ddim": lambda config: ddim(eta=config.eta, clip=config.clip),
}


def make_sampler(config: SamplingConfig) -> Sampler:
    """Make the sampler that a configuration names."""
    return SAMPLERS[config.sampler](config)
