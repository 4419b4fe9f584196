"""Routers that learn less, beside which the study holds what is learnt: docs/extend.md says how they come in.

    model.time_router    open      all heads, or groups: this part of the routing is off
                         constant  the same half at every timestep
                         rising    from a quarter at the noise to three quarters at the image
    model.token_router   all       all tokens: this part is off
                         random    any tokens, of a number that model.token_capacity fixes

The schedules open half of the units on average, so that heads and groups together cost half of attention and MLP, as at
lambda 0.5, where all tokens pass.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from dydit_jax import register_time_router, register_token_router
from dydit_jax.models.routing import TOKEN_ROUTER_BIAS

TRAIN_STEPS = 1000  # of the schedule: timesteps are below it
TURNS = 30.0  # standard deviation of a token's phase: of so many turns the fraction is as good as uniform
SPREAD = 30.0  # of the random logits: as far apart as learnt ones, in the noise that training adds


class Schedule(nnx.Module):
    """Opens the first units of each layer, whose number rises in a straight line over the timesteps; learns nothing.

    Attributes:
      at_noise, at_image: the shares that are open at its ends.
    """

    at_noise = at_image = 1.0

    def __init__(self, *, layers: int, width: int, units: int, layout: str, rngs: nnx.Rngs):
        self.layers, self.units = layers, units

    def __call__(self, t, embedding, noise):
        """Return gates [B,L,units] for timesteps t [B]; never without a unit, as both layouts allow."""
        share = self.at_image + (self.at_noise - self.at_image) * t / (TRAIN_STEPS - 1)
        count = jnp.maximum(1, jnp.round(share * self.units))
        gates = (jnp.arange(self.units) < count[:, None]).astype(jnp.float32)  # [B,units]
        return jnp.broadcast_to(gates[:, None], (len(t), self.layers, self.units))

    @staticmethod
    def macs(*, width: int, units: int, layout: str) -> int:
        """Return 0: a look-up."""
        return 0


@register_time_router("open")
class Open(Schedule):
    """Opens all units."""


@register_time_router("constant")
class Constant(Schedule):
    """Opens the same half of the units at every timestep."""

    at_noise = at_image = 0.5


@register_time_router("rising")
class Rising(Schedule):
    """Opens more units the nearer the image is, as models learn to."""

    at_noise, at_image = 0.25, 0.75


@register_token_router("all")
class AllTokens(nnx.Module):
    """Opens all tokens."""

    def __init__(self, *, width: int, dtype, platform: str, rngs: nnx.Rngs):
        pass

    def __call__(self, x):
        """Return logits [B,N] of tokens x [B,N,D], far above the threshold."""
        return jnp.full(x.shape[:2], TOKEN_ROUTER_BIAS)

    @staticmethod
    def macs(*, width: int) -> int:
        """Return 0."""
        return 0


@register_token_router("random")
class RandomTokens(nnx.Module):
    """Opens any tokens, drawn again in each image and step; learns nothing.

    A router has no generator: what is drawn is the fraction of a phase of many turns along one direction of the token's
    content. That is as good as uniform and has nothing to do with what the content means.
    """

    def __init__(self, *, width: int, dtype, platform: str, rngs: nnx.Rngs):
        self.width = width

    def __call__(self, x):
        """Return logits [B,N] of tokens x [B,N,D], all above the threshold: only their order says something."""
        x = jax.lax.stop_gradient(x.astype(jnp.float32))
        direction = jax.random.normal(jax.random.key(0), (self.width,))
        phase = TURNS * jnp.dot(x, direction, precision="highest") / jnp.linalg.norm(x, axis=-1)
        return TOKEN_ROUTER_BIAS + SPREAD * (phase - jnp.floor(phase) - 0.5)

    @staticmethod
    def macs(*, width: int) -> int:
        """Return 0: a generator would not look at the token."""
        return 0
