"""The terms of the loss by name, and the section of the config that chooses them.

A term is a function of `LossInputs`: one pass of the network over the examples of a step. The loss is the sum of the
terms of all passes, each averaged over the images and times its weight.

Sources: DyDiT, https://arxiv.org/abs/2410.03456, section 3.4 (budget), and its training code (ramp, weight); min-SNR,
https://arxiv.org/abs/2303.09556; logit-normal times, https://arxiv.org/abs/2403.03206.
"""

import dataclasses
import typing
from collections.abc import Callable

import jax
import jax.numpy as jnp

from dydit_jax.diffusion.gaussian import Coefficients
from dydit_jax.diffusion.losses import denoising_error, variational_bound
from dydit_jax.errors import InputError, require_known
from dydit_jax.records import require_range
from dydit_jax.registry import Registry, require_array

WEIGHTINGS = ("none", "min_snr")
MOST_SNR = 5.0
TIMES = ("uniform", "logit_normal")
MOST_STEPS = 2**31 - 1  # of a training: they are counted in int32
LEAST_DEVIATION = 1e-3  # of logit-normal times: 0 times an infinite quantile is no number


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """The terms of the loss, and the budget.

    Attributes:
      terms: keys of `LOSS_TERMS`.
      weights: one number for each term; empty for 1 throughout.
      weighting: of each image's squared error: none, or min_snr, by its signal-to-noise ratio up to 5. That leaves next
        to nothing for t = 0, where such a model should not be sampled: sampling.steps of "trailing:30" end before it.
      times: how the times of a flow are drawn: uniform, or logit_normal, more often in the middle.
      logit_normal: mean and standard deviation of log(t / (1 - t)) for the latter.
      label_dropout: probability with which a label becomes "no class".
      guidance_free: train guidance in one pass: the network is conditioned on beta = 1 / scale, drawn from 0 to 1, and
        learns the prediction that guidance of this scale makes of two passes. Needs model.guidance_free.
      complete_steps: for how many steps the complete pass is trained beside the gated one; -1 throughout. Without
        routers the only pass is the complete one, and this and the budget play no part.
      budget: lambda, the ratio of MACs that training aims at.
      budget_weight: weight of (ratio - target)^2.
      budget_hold_steps: steps at the start during which the target stays 1.
      budget_warmup_steps: step at which the target's way from 1 to the budget ends.
    """

    terms: tuple[str, ...] = ("mse", "vb", "budget")
    weights: tuple[float, ...] = ()
    weighting: str = "none"
    times: str = "uniform"
    logit_normal: tuple[float, float] = (0.0, 1.0)
    label_dropout: float = 0.1
    guidance_free: bool = False
    complete_steps: int = -1
    budget: float = 0.5
    budget_weight: float = 2.0
    budget_hold_steps: int = 100
    budget_warmup_steps: int = 1000

    def __post_init__(self):
        for name in self.terms:
            LOSS_TERMS.require("loss.terms", name)
        if not self.terms or len(set(self.terms)) < len(self.terms):
            raise InputError(f"loss.terms must name one term or more, each of them once, not {self.terms}.")
        if len(self.weights) not in (0, len(self.terms)):
            raise InputError(
                f"loss.weights must have one number for each of the {len(self.terms)} terms, or none, not "
                f"{len(self.weights)}."
            )
        require_known("loss.weighting", self.weighting, WEIGHTINGS)
        require_known("loss.times", self.times, TIMES)
        require_range("loss.logit_normal[1]", self.logit_normal[1], LEAST_DEVIATION)
        require_range("loss.label_dropout", self.label_dropout, 0.0, 1.0)
        require_range("loss.complete_steps", self.complete_steps, -1, MOST_STEPS)
        require_range("loss.budget", self.budget, 0.0, 1.0)
        require_range("loss.budget_weight", self.budget_weight, 0.0)
        require_range("loss.budget_hold_steps", self.budget_hold_steps, 0, MOST_STEPS)
        require_range("loss.budget_warmup_steps", self.budget_warmup_steps, 1, MOST_STEPS)

    @property
    def weighted_terms(self) -> dict[str, float]:
        """Weights of the terms by name."""
        return dict(zip(self.terms, self.weights or (1.0,) * len(self.terms)))


@dataclasses.dataclass(frozen=True)
class LossInputs:
    """What a term may look at: one pass of the network over the examples of a step.

    Attributes:
      mode: "gated" or "complete".
      output: prediction of the network [B,side,side,2C]: what the process wants first, then variance, if any.
      x0, noise, xt: images, the noise that was added, and the result, [B,side,side,C].
      target: what the process wants predicted, noise or velocity [B,side,side,C].
      alpha, sigma: of the image's time, x_t = alpha x_0 + sigma noise [B,1,1,1].
      labels: [B], some of them "no class".
      coefficients: of each image's timestep, [B,1,1,1]; None where the process is no diffusion.
      routing: `Routing` of the pass: gates of heads [B,L,H], groups [B,L,G] and tokens [B,L,N], all 1 where the mode is
        "complete".
      ratio: share of the MACs of attention and MLP that these gates leave open [B].
      step: number of the training step.
      config: of the loss.
    """

    mode: str
    output: jax.Array
    x0: jax.Array
    noise: jax.Array
    xt: jax.Array
    target: jax.Array
    alpha: jax.Array
    sigma: jax.Array
    labels: jax.Array
    coefficients: Coefficients | None
    routing: typing.Any
    ratio: jax.Array
    step: jax.Array
    config: LossConfig


class LossTerm(typing.Protocol):
    """A term of the loss: a function."""

    def __call__(self, inputs: LossInputs) -> jax.Array | None:
        """Return the term of each image [B], or of all as a scalar, float32; None where this pass has no such term."""


def mse(inputs: LossInputs) -> jax.Array:
    """Return the squared error of the prediction, of each image, with its weight."""
    error = denoising_error(inputs.output, inputs.target)
    if inputs.config.weighting == "none":
        return error
    snr = jnp.square(inputs.alpha / inputs.sigma)[:, 0, 0, 0]
    return jnp.minimum(snr, MOST_SNR) / snr * error


def vb(inputs: LossInputs) -> jax.Array:
    """Return the variational bound of each image, which teaches the variance alone."""
    return variational_bound(inputs.output, inputs.x0, inputs.xt, inputs.coefficients)


def budget(inputs: LossInputs) -> jax.Array | None:
    """Return the penalty for a mean ratio of MACs away from the target, of a gated pass."""
    if inputs.mode != "gated":
        return None
    target = budget_target(inputs.step, inputs.config)
    return budget_penalty(inputs.ratio, target, weight=inputs.config.budget_weight)


def budget_target(step, config: LossConfig):
    """Return the ratio of MACs to aim at: 1 at first, then a line, then the budget."""
    ramp = 1.0 - (1.0 - config.budget) * step / config.budget_warmup_steps
    return jnp.where(step < config.budget_hold_steps, 1.0, jnp.maximum(ramp, config.budget))


def budget_penalty(ratio, target, *, weight: float):
    """Return weight * (mean ratio - target)^2 for ratios [B] of a batch."""
    return weight * (ratio.mean() - target) ** 2


LOSS_TERMS = Registry("loss term", LossTerm, {"mse": mse, "vb": vb, "budget": budget})


def register_loss_term(name: str) -> Callable:
    """Return a decorator that adds a `LossTerm` of one's own for `loss.terms`; see `Registry.register`."""
    return LOSS_TERMS.register(name)


def weigh_terms(inputs: LossInputs) -> dict[str, jax.Array]:
    """Return the terms of a pass by name, [B] or scalars, each times its weight.

    Raises:
      InputError: a user's term that returns something else.
    """
    terms = {}
    for name, weight in inputs.config.weighted_terms.items():
        value = LOSS_TERMS[name](inputs)
        if value is not None:
            shape = () if getattr(value, "shape", None) == () else inputs.labels.shape
            returns = "a number for each image [B], a scalar, or None where this pass has no such term"
            require_array(value, shape, "float32", method=f"The loss term {name!r}", returns=returns)
            terms[name] = weight * value
    return terms
