"""Processes: what noise does to images over time, and what a network predicts of it, by name.

    diffusion   a timestep 0 .. T - 1, the larger the noisier; alpha and sigma of a schedule; the network predicts the
                noise, and a variance in its second half
    flow        a time 0 .. 1 from noise to image; x_t = t x_0 + (1 - t) noise; the network predicts the velocity
                x_0 - noise, and a second half of its output is ignored

In both, x_0 is the image. Losses, solvers and measurements ask the process; the network knows nothing of it: it gets
the number that the process calls the time.

Sources: DDPM, https://arxiv.org/abs/2006.11239; flow matching, https://arxiv.org/abs/2210.02747; SiT,
https://arxiv.org/abs/2401.08740.
"""

import dataclasses
import typing
from collections.abc import Callable, Mapping
from typing import ClassVar

import jax
import numpy as np

from dydit_jax.diffusion.flow_grids import flow_times
from dydit_jax.diffusion.gaussian import Coefficients, at_steps, coefficients
from dydit_jax.diffusion.losses import stratified_timesteps, stratified_uniform
from dydit_jax.diffusion.paths import FlowPath, Path
from dydit_jax.diffusion.schedules import DiffusionConfig, make_schedule, respace
from dydit_jax.errors import InputError
from dydit_jax.records import read_record
from dydit_jax.registry import Registry

DEFAULT = "diffusion"


class Process(typing.Protocol):
    """What noise does to an image over time: a frozen dataclass, whose fields are the config's section of its name.

    Attributes:
      name: in `PROCESSES`.
      meaningless: what has no meaning for it: key of the config -> value -> why.
    """

    name: ClassVar[str]
    meaningless: ClassVar[Mapping[str, Mapping[str, str]]]

    def time_range(self) -> tuple:
        """Return the lowest and the highest time that the network knows: two np.int32, or two np.float32.

        All times are of that dtype.
        """

    def draw_times(self, key, batch, loss) -> jax.Array:
        """Draw the times of a training batch [B] from a PRNG key, `loss` being the config's section."""

    def levels(self, t) -> tuple[jax.Array, jax.Array]:
        """Return alpha and sigma at times t [B], [B,1,1,1] each: x_t = alpha x_0 + sigma noise."""

    def target(self, x0, noise) -> jax.Array:
        """Return what the network should predict in its first C channels [B,side,side,C]."""

    def posterior(self, t) -> Coefficients | None:
        """Return the coefficients of q(x_{t-1} | x_t, x_0), [B,1,1,1] each; None where there are no steps."""

    def path(self, steps, sampler, eta) -> tuple[Path, np.ndarray]:
        """Return the path of a run, and the times that the network gets on it, [n] or [n+1].

        Args:
          steps, sampler, eta: as in `SamplingConfig`.

        Raises:
          InputError: no such times.
        """


@dataclasses.dataclass(frozen=True)
class Diffusion(DiffusionConfig):
    """The diffusion process of a schedule, in which the network predicts noise and variance.

    Attributes:
      schedule: linear or squared_cosine, a key of `SCHEDULES`.
      train_steps: number of its steps, T.
    """

    name: ClassVar[str] = "diffusion"
    meaningless: ClassVar = {
        "loss.times": {"logit_normal": "timesteps of diffusion are drawn uniformly"},
        "sampling.sampler": {"euler_maruyama": "it is the stochastic equation of a flow"},
    }

    def time_range(self) -> tuple:
        """Return the least noisy timestep and the noisiest."""
        return np.int32(0), np.int32(self.train_steps - 1)

    def draw_times(self, key, batch, loss) -> jax.Array:
        """Draw timesteps, int32 [B], stratified."""
        return stratified_timesteps(key, batch, self.train_steps)

    def levels(self, t) -> tuple[jax.Array, jax.Array]:
        """Return alpha and sigma of the schedule at timesteps t [B]."""
        c = self.posterior(t)
        return c.sqrt_alpha_cumprod, c.sqrt_one_minus_alpha_cumprod

    def target(self, x0, noise) -> jax.Array:
        """Return the noise."""
        return noise

    def posterior(self, t) -> Coefficients:
        """Return all that the schedule says of timesteps t [B]."""
        return at_steps(coefficients(make_schedule(self)), t)

    def path(self, steps, sampler, eta) -> tuple[Path, np.ndarray]:
        """Return the path over timesteps of the schedule, see `grids`."""
        schedule = respace(make_schedule(self), steps)
        alphas_cumprod = np.append(schedule.alphas_cumprod[::-1], 1.0)
        path = Path(np.sqrt(alphas_cumprod), np.sqrt(1.0 - alphas_cumprod), eta)
        return path, schedule.timesteps[::-1].astype(np.int32)


@dataclasses.dataclass(frozen=True)
class Flow:
    """Flow matching on the straight line from noise, t = 0, to the image, t = 1; the network predicts the velocity."""

    name: ClassVar[str] = "flow"
    meaningless: ClassVar = {
        "loss.terms": {"vb": "a flow has no variance to learn"},
        "loss.weighting": {"min_snr": "it is defined for the prediction of noise"},
        "sampling.sampler": {"ddpm": "it needs the learned variance of a diffusion"},
    }

    def time_range(self) -> tuple:
        """Return the times of noise and image."""
        return np.float32(0), np.float32(1)

    def draw_times(self, key, batch, loss) -> jax.Array:
        """Draw times, float32 [B], stratified, uniform or logit-normal."""
        quantiles = stratified_uniform(key, batch)
        if loss.times == "uniform":
            return quantiles
        mean, deviation = loss.logit_normal
        return jax.nn.sigmoid(mean + deviation * jax.scipy.special.ndtri(quantiles))

    def levels(self, t) -> tuple[jax.Array, jax.Array]:
        """Return t and 1 - t."""
        t = t[:, None, None, None]
        return t, 1 - t

    def target(self, x0, noise) -> jax.Array:
        """Return the velocity dx/dt."""
        return x0 - noise

    def posterior(self, t) -> None:
        """Return None."""

    def path(self, steps, sampler, eta) -> tuple[Path, np.ndarray]:
        """Return the path over times, see `flow_grids`; the image itself is the last of them."""
        times = flow_times(steps, sampler)
        return FlowPath(times, 1 - times, eta), times.astype(np.float32)


PROCESSES = Registry("process", Process, {"diffusion": Diffusion, "flow": Flow})


def register_process(name: str) -> Callable:
    """Return a decorator that adds a `Process` of one's own for `process.name`; see `Registry.register`."""
    return PROCESSES.register(name)


# --- In configs and checkpoints ------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class ProcessConfig:
    """Which process.

    Attributes:
      name: diffusion or flow, a key of `PROCESSES`. Its settings stand in the section of that name.
    """

    name: str = DEFAULT

    def __post_init__(self):
        PROCESSES.require("process.name", self.name)


def read_process(sections: Mapping) -> Process:
    """Read the process of a config, or of what a checkpoint says of itself; one that says nothing is a diffusion.

    Raises:
      InputError: an unknown process, or settings that it does not have.
    """
    name = read_record(ProcessConfig, sections.get("process") or {}, "process").name
    return read_record(PROCESSES[name], sections.get(name) or {}, name)


def process_sections(process: Process) -> dict:
    """Return the sections that `read_process` reads, as plain dicts."""
    settings = dataclasses.asdict(process)
    return {"process": {"name": process.name}} | ({process.name: settings} if settings else {})


def require_meaning(process: Process, key: str, value: str, known) -> None:
    """Raise where a value of the config has no meaning for a process.

    Args:
      process: the process.
      key: of the config.
      value: one of those that are known.
      known: all of them.

    Raises:
      InputError: with the reason and what has a meaning.
    """
    reason = process.meaningless.get(key, {}).get(value)
    if reason is not None:
        rest = ", ".join(sorted(meaningful(process, key, known)))
        raise InputError(
            f"{key} {value!r} has no meaning for the process {process.name}: {reason}. Take one of: {rest}."
        )


def meaningful(process: Process, key: str, known) -> list[str]:
    """Return those of the known values of a key that have a meaning for a process, or for a class of it."""
    return [value for value in known if value not in process.meaningless.get(key, {})]


# --- What follows from any process ---------------------------------------------------------------


def perturb(process: Process, x0, noise, t):
    """Return x_t [B,side,side,C] for images, noise of the same shape and times [B]."""
    alpha, sigma = process.levels(t)
    return alpha * x0 + sigma * noise


def is_discrete(process: Process) -> bool:
    """Return whether times are whole numbers."""
    return bool(np.issubdtype(process.time_range()[0].dtype, np.integer))


def spread_times(process: Process, count: int) -> np.ndarray:
    """Return that many times, spread evenly, ascending; fewer where there are not so many."""
    low, high = process.time_range()
    times = np.linspace(low, high, count)
    return np.unique((times.round() if is_discrete(process) else times).astype(low.dtype))


def noise_first(process: Process, times: np.ndarray) -> np.ndarray:
    """Return the indices that bring ascending times into the order from noise to image."""
    alpha, _ = process.levels(np.array(process.time_range()))
    return np.arange(len(times))[:: 1 if alpha[1] > alpha[0] else -1]


def time_after(process: Process, part: int, parts: int):
    """Return the time at the end of the first `part` of equal parts of all times, a numpy scalar."""
    low, high = process.time_range()
    if is_discrete(process):
        return low.dtype.type((int(high) + 1) * part // parts)
    return low.dtype.type(low + (high - low) * part / parts)


def require_time(process: Process, where: str, time) -> None:
    """Raise unless the network knows a time.

    Raises:
      InputError: with what came and the range.
    """
    low, high = process.time_range()
    if not low <= time <= high or (is_discrete(process) and int(time) != time):
        kind = "a whole number from" if is_discrete(process) else "from"
        raise InputError(f"{where} must be {kind} {low} to {high}, not {time}; the process is {process.name}.")


def format_time(time) -> str:
    """Return a time for labels and tables: a whole number as it is, a real one with few digits."""
    return str(int(time)) if isinstance(time, (int, np.integer)) else f"{time:.4g}"
