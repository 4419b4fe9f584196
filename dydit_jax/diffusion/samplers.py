"""Sampling: how it is set, and the one step that runs the table of every solver.

`init(noise)` makes a state, `step(state, output, row, noise)` moves it by one row of a `SolverTable`, given the
network's output at the state's `xt`. A sampler knows no network and no loop, and its state survives being handed from
one compiled program to the next.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from dydit_jax.diffusion.solvers import SOLVERS, SolverForm, SolverTable
from dydit_jax.errors import InputError, require_known
from dydit_jax.records import require_range

GUIDED_CHANNELS = ("first_three", "all")
MOST_GUIDANCE = 1e6  # nobody wants more, and products with it stay in float32
SEARCHED = "searched"  # the sampler whose weights are in the settings


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How images are drawn.

    Attributes:
      sampler: the solver: ddpm, ddim, dpmpp_2m, dpmpp_3m, sde_dpmpp_2m, unipc, unipc_3, euler, heun, ab4, of a flow
        also euler_maruyama but not ddpm, one of your own, or a file of dydit-search-solver, which
        brings its steps.
      steps: timesteps of the run: 250, ddim50, sections such as 10,20,30, trailing:20, leading:20, logsnr:10,
        quadratic:10, karras:10 or list:999,600,0; of a flow 250, logsnr:10, quadratic:10, karras:10 or list:0,0.2,0.6.
      eta: share of DDPM's noise in DDIM, 0 .. 1; the others have no such choice and want 0.
      clip: bound on the estimate of |x_0|, or None. Images in pixels are bounded, latents are not.
      guidance: scale of classifier-free guidance; 1 is none, and then the network runs once per step, not twice.
      guidance_interval: the lowest and highest timestep with guidance, such as 100,700, or 0.3,1 of a flow; at others
        the network runs once. None guides at all of them.
      guidance_scales: a scale for each evaluation of the network, the most noise first, instead of the two above.
      guided_channels: first_three (as the published models do) or all.
      autoencoder: whose decoder turns latents into images, a file or a published name; empty for models in pixels.
      searched_weights: of the sampler `searched`, from such a file: rows of weights of x and of the estimates of x_0,
        the newest first.
    """

    sampler: str = "ddpm"
    steps: str = "250"
    eta: float = 0.0
    clip: float | None = None
    guidance: float = 1.0
    guidance_interval: tuple[float, float] | None = None
    guidance_scales: tuple[float, ...] | None = None
    guided_channels: str = "first_three"
    autoencoder: str = ""
    searched_weights: tuple[tuple[float, ...], ...] | None = None

    def __post_init__(self):
        if self.sampler != SEARCHED:
            SOLVERS.require("sampler", self.sampler)
        elif self.searched_weights is None:
            raise InputError("The sampler searched needs weights; give the file of dydit-search-solver as the sampler.")
        if self.searched_weights is not None:
            require_rows(self.searched_weights, "sampling.searched_weights")
        require_known("sampling.guided_channels", self.guided_channels, GUIDED_CHANNELS)
        require_range("sampling.eta", self.eta, low=0.0, high=1.0)
        require_range("sampling.guidance", self.guidance, 0.0, MOST_GUIDANCE)
        if self.clip is not None:
            require_range("sampling.clip", self.clip, low=0.0)
        if self.sampler != "ddim" and self.eta:
            raise InputError(f"sampling.eta belongs to ddim; {self.sampler} has none, so {self.eta} can't be honoured.")
        low, high = self.guidance_interval or (0, 0)
        if low > high:
            raise InputError(f"sampling.guidance_interval must be (low, high) with low <= high, not {(low, high)}.")
        if self.guidance_scales is not None and (self.guidance != 1.0 or self.guidance_interval is not None):
            raise InputError(
                "sampling.guidance_scales says all about guidance; set sampling.guidance to 1 and no guidance_interval."
            )
        for scale in self.guidance_scales or ():
            require_range("sampling.guidance_scales", scale, 0.0, MOST_GUIDANCE)

    @property
    def is_guided(self) -> bool:
        """Whether some evaluation of the network may be guided."""
        return any(scale != 1.0 for scale in self.guidance_scales or (self.guidance,))


def require_rows(rows: tuple[tuple[float, ...], ...], where: str) -> None:
    """Raise unless rows hold the weights of x and of no more estimates than there are by then.

    Raises:
      InputError: with the row and what is allowed.
    """
    for number, row in enumerate(rows):
        if not 2 <= len(row) <= number + 2:
            raise InputError(
                f"Row {number} of {where} must have from 2 to {number + 2} numbers, of x and of the estimates so far, "
                f"not {len(row)}."
            )
        if not all(map(math.isfinite, row)):
            raise InputError(f"Row {number} of {where} must have finite numbers, not {row}.")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplerState:
    """Where a sampling run stands.

    Attributes:
      xt: x_t, where the network is evaluated next [B,side,side,C].
      x0: the latest estimate of x_0 [B,side,side,C].
      base: where the step began [B,side,side,C], None for a solver without.
      history: estimates of earlier evaluations, the newest first, K - 1 of [B,side,side,C].
    """

    xt: jax.Array
    x0: jax.Array
    base: jax.Array | None = None
    history: tuple[jax.Array, ...] = ()


@dataclasses.dataclass(frozen=True)
class Sampler:
    """The step of a solver: static, and the same for all tables of a form.

    Attributes:
      form: of the table.
      clip: bound on the estimate of |x_0|, or None.
    """

    form: SolverForm = SolverForm()
    clip: float | None = None

    def init(self, noise) -> SamplerState:
        """Return the state before the first row, for x_T [B,side,side,C]."""
        zeros = jnp.zeros_like(noise)
        base = noise if self.form.base else None
        return SamplerState(xt=noise, x0=zeros, base=base, history=(zeros,) * (self.form.history - 1))

    def step(self, state: SamplerState, output, row: SolverTable, noise) -> SamplerState:
        """Return the state after a row.

        Args:
          state: before it.
          output: of the network at `state.xt` [B,side,side,C or 2C]: what it predicts, and v in [-1, 1], the place of a
            learned log-variance between its bounds, which most solvers ignore.
          row: of the table, its leading axis gone.
          noise: to add [B,side,side,C]; ignored where the form has none.
        """
        channels = state.xt.shape[-1]
        predicted, v = output[..., :channels], output[..., channels:]
        x0 = row.x0_from_xt * state.xt - row.x0_from_output * predicted
        if self.clip is None:
            newest = row.estimate_from_output[0] * state.xt + row.estimate_from_output[1] * predicted
        else:
            x0 = jnp.clip(x0, -self.clip, self.clip)
            newest = row.estimate_from_x0[0] * state.xt + row.estimate_from_x0[1] * x0
        estimates = (newest, *state.history)

        def combine(weights):
            parts = [weights[0] * state.xt, *(w * m for w, m in zip(weights[2:], estimates, strict=True))]
            return sum(parts[1:], parts[0]) + (weights[1] * state.base if self.form.base else 0.0)

        xt = combine(row.weights[0])
        if self.form.noise != "none":
            learned = jnp.exp(row.learned_range * (v + 1.0) / 2.0) if self.form.noise == "learned" else 1.0
            xt = xt + row.noise * learned * noise
        base = combine(row.weights[1]) if self.form.base else None
        return SamplerState(xt, x0, base, estimates[: self.form.history - 1])


def run_sampler(sampler: Sampler, state: SamplerState, rows: SolverTable, extra=None, *, predict, noise_at: Callable):
    """Move a state through consecutive rows of a table inside one compiled program.

    Args:
      sampler: of the table's form.
      state: where to start.
      rows: of the table, in its order.
      extra: anything else that differs from row to row and that `predict` wants, [S,...] each.
      predict: (x_t, row, extra) of a row -> (output, anything to keep).
      noise_at: `row.step` [] -> noise [B,side,side,C].

    Returns:
      The state after the last of the rows, and what `predict` kept, stacked [S,...].
    """

    def body(state, row_and_extra):
        row, extra = row_and_extra
        output, kept = predict(state.xt, row, extra)
        noise = None if sampler.form.noise == "none" else noise_at(row.step)
        return sampler.step(state, output, row, noise), kept

    return jax.lax.scan(body, state, (rows, extra))
