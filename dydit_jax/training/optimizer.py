"""The optimizer: clipping, AdamW, a schedule of the learning rate, and the routers' own learning rate."""

import dataclasses

import jax
import jax.numpy as jnp
import optax

from dydit_jax.diffusion.terms import MOST_STEPS
from dydit_jax.errors import InputError, require_known
from dydit_jax.models.trainable import POSITION_TABLE
from dydit_jax.records import require_range
from dydit_jax.trees import path_name

LEARNING_RATES = ("constant", "cosine")
LAST_SHARE = 0.05  # of the peak, where the cosine ends


# Nobody wants more, and below them a step can't leave float32: squares of gradients and parameters are finite, so both
# are below 2e19, and Adam's step, over its epsilon of 1e-8, is below 2e27 learning rates.
MAX_RATE, MAX_MULTIPLIER, MAX_DECAY = 1e3, 1e6, 1e6
MAX_BETA = 0.999999  # Adam divides by 1 - beta^step, in float32
MAX_NORM = 1e19  # of gradients whose squares are finite


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and what happens to gradients before it.

    Attributes:
      learning_rate: peak of the learning rate, for everything but the routers.
      router_multiplier: the routers' learning rate in units of `learning_rate`. Their biases start far from the
        threshold; a short run needs about 10, the published long runs 1.
      decay: "constant" or "cosine" to 5 % of the peak.
      warmup_steps: steps in which the learning rate grows from 0 to the peak.
      decay_steps: step at which the cosine ends.
      beta1, beta2, weight_decay: AdamW's parameter of this name.
      clip_norm: gradients of a larger global norm are scaled down to it; None does not clip.
      skip_norm: a batch whose norm is not below it is skipped and counted; None skips non-finite ones alone.
    """

    learning_rate: float
    router_multiplier: float = 1.0
    decay: str = "constant"
    warmup_steps: int = 0
    decay_steps: int | None = None
    beta1: float = 0.9
    beta2: float = 0.999
    weight_decay: float = 0.0
    clip_norm: float | None = None
    skip_norm: float | None = None

    def __post_init__(self):
        require_range("optimizer.learning_rate", self.learning_rate, 0.0, MAX_RATE)
        require_range("optimizer.router_multiplier", self.router_multiplier, 0.0, MAX_MULTIPLIER)
        require_range("optimizer.warmup_steps", self.warmup_steps, 0, MOST_STEPS)
        if self.decay_steps is not None:
            require_range("optimizer.decay_steps", self.decay_steps, high=MOST_STEPS)
        require_range("optimizer.beta1", self.beta1, 0.0, MAX_BETA)
        require_range("optimizer.beta2", self.beta2, 0.0, MAX_BETA)
        require_range("optimizer.weight_decay", self.weight_decay, 0.0, MAX_DECAY)
        require_known("optimizer.decay", self.decay, LEARNING_RATES)
        if self.decay == "cosine" and (self.decay_steps is None or self.decay_steps <= self.warmup_steps):
            raise InputError("optimizer.decay 'cosine' needs optimizer.decay_steps above optimizer.warmup_steps.")
        for name in ("clip_norm", "skip_norm"):
            if getattr(self, name) is not None:
                require_range(f"optimizer.{name}", getattr(self, name), 1e-12, MAX_NORM)


def build_learning_rate(config: OptimizerConfig):
    """Make the function from step to the learning rate of everything but the routers."""
    if config.decay == "cosine":
        return optax.warmup_cosine_decay_schedule(
            0.0, config.learning_rate, config.warmup_steps, config.decay_steps, LAST_SHARE * config.learning_rate
        )
    if config.warmup_steps:
        return optax.linear_schedule(0.0, config.learning_rate, config.warmup_steps)
    return optax.constant_schedule(config.learning_rate)


def build_optimizer(config: OptimizerConfig) -> optax.GradientTransformationExtraArgs:
    """Make clipping, AdamW and the routers' own learning rate. Skipping is the trainer's: it keeps the whole state.

    Its `update` also takes `norm`, the gradients' global norm, where that is known.
    """
    return optax.chain(
        optax.identity() if config.clip_norm is None else _clip(config.clip_norm),
        _adamw(config),
        optax.masked(optax.scale(config.router_multiplier), _is_router),
    )


def _clip(limit: float) -> optax.GradientTransformationExtraArgs:
    """Scale gradients of a larger global norm down to it, by a factor: optax's own quotient is a pass of its own."""

    def update(gradients, state, params=None, *, norm=None, **extra):
        norm = optax.tree.norm(gradients) if norm is None else norm
        return optax.tree.scale(limit / jnp.maximum(norm, limit), gradients), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def _adamw(config: OptimizerConfig) -> optax.GradientTransformationExtraArgs:
    """Make AdamW whose weight decay leaves a stored table of positions alone.

    The parts are those of `optax.adamw`. Its own mask would add a level to the state, and so to checkpoints.
    """
    return optax.chain(
        optax.scale_by_adam(b1=config.beta1, b2=config.beta2),
        _decay(config.weight_decay) if config.weight_decay else optax.identity(),
        optax.scale_by_learning_rate(build_learning_rate(config)),
    )


def _decay(weight: float) -> optax.GradientTransformation:
    """Add a share of each trained parameter to its update."""
    decayed = lambda path, update, leaf: update if path_name(path) == POSITION_TABLE else update + weight * leaf

    def update(updates, state, params):
        return jax.tree_util.tree_map_with_path(decayed, updates, params), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _is_router(params):
    """Mark the leaves of the routers."""
    return jax.tree_util.tree_map_with_path(lambda path, _: "_router/" in path_name(path), params)
