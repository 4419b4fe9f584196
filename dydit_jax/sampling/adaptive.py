"""The equation of a flow by a solver that chooses its own steps, for comparisons: diffrax, the extra `ode`.

How many evaluations of the network that takes is not known beforehand, so there is no table and no plan, and the mode
`fast` is not for it. Every image has its own steps: it does not depend on the batch that it is in.

Source: the method of Dormand and Prince of order 5, which SiT samples with, https://arxiv.org/abs/2401.08740.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from dydit_jax.diffusion.process import Flow
from dydit_jax.diffusion.samplers import SamplingConfig
from dydit_jax.errors import InputError, require_known
from dydit_jax.models.dit import MODES, Model
from dydit_jax.records import require_range
from dydit_jax.runtime.settings import own_settings
from dydit_jax.sampling.generate import SamplingRun, checked_labels
from dydit_jax.sampling.guidance import condition_scale, evaluations_of, guide
from dydit_jax.sampling.noise import first_noise, image_keys

MOST_STEPS = 10_000


@dataclasses.dataclass(frozen=True)
class AdaptiveSamples:
    """The result of `draw_adaptively`.

    Attributes:
      images: [B,side,side,C].
      steps: that were tried for each image, the rejected ones included, int [B]; each is six evaluations of the
        network, or twelve with guidance in two passes.
    """

    images: np.ndarray
    steps: np.ndarray


@own_settings()
def draw_adaptively(
    run: SamplingRun,
    labels,
    *,
    seed: int = 0,
    indices=None,
    mode: str = "gated",
    rtol: float = 1e-3,
    atol: float = 1e-6,
) -> AdaptiveSamples:
    """Draw one batch of images on one device, from the noise that `SamplingRun.draw` starts from.

    Args:
      run: whose model and guidance count; its sampler and steps play no part.
      labels: [B], 0 .. classes; `classes` itself stands for "no class".
      seed, indices: as for `SamplingRun.draw`.
      mode: "gated" or "complete".
      rtol, atol: a step's error may be atol + rtol |x|, root mean square over an image.

    Raises:
      InputError: labels out of range, another process, settings that belong to a table of steps, or no diffrax.
    """
    require_known("mode", mode, MODES)
    require_range("rtol", rtol, low=1e-7, high=1.0)
    require_range("atol", atol, low=1e-9, high=1.0)
    _require_flow(run)
    labels = jnp.asarray(checked_labels(labels, run.model.config.classes))
    indices = jnp.arange(len(labels)) if indices is None else jnp.asarray(indices)
    config = run.model.config
    first = first_noise(image_keys(seed, indices), (config.side, config.side, config.channels))
    settings = dict(model=run.model, mode=mode, sampling=run.sampling, rtol=rtol, atol=atol)
    images, steps = _solve_all(run.params, first, labels, **settings)
    return AdaptiveSamples(np.asarray(images), np.asarray(steps))


def _require_flow(run: SamplingRun) -> None:
    sampling = run.sampling
    if not isinstance(run.process, Flow):
        raise InputError(
            f"The adaptive solver needs the process flow, which has a time between any two; this is a "
            f"{run.process.name}."
        )
    if sampling.clip is not None or sampling.guidance_interval or sampling.guidance_scales:
        raise InputError(
            "The adaptive solver knows a constant scale of guidance alone; leave out sampling.clip, "
            "guidance_interval and guidance_scales."
        )
    try:
        import diffrax  # noqa: F401
    except ImportError as error:
        raise InputError("The adaptive solver needs diffrax; install it with pip install '.[ode]'.") from error


@functools.partial(jax.jit, static_argnames=("model", "mode", "sampling", "rtol", "atol"))
def _solve_all(params, first, labels, *, model: Model, mode: str, sampling: SamplingConfig, rtol: float, atol: float):
    """Solve from noise [B,side,side,C] at time 0 to the images at 1; returns them and the steps of each [B]."""
    import diffrax

    beta = condition_scale(sampling.guidance, 1, config=model.config)
    network = functools.partial(model.apply, params, mode=mode, beta=beta)
    twice = evaluations_of(model.config, np.array(sampling.guidance)) == 2
    settings = dict(
        scale=sampling.guidance if twice else None, guided_channels=sampling.guided_channels, config=model.config
    )

    def velocity(t, x, label):
        output, _ = guide(network, x[None], t, label[None], **settings)
        return output[0, ..., : model.config.channels]

    def solve(x, label):
        controller = diffrax.PIDController(rtol, atol)
        term, until = diffrax.ODETerm(velocity), diffrax.SaveAt(t1=True)
        solver = dict(solver=diffrax.Dopri5(), stepsize_controller=controller, max_steps=MOST_STEPS)
        found = diffrax.diffeqsolve(term, t0=0.0, t1=1.0, dt0=None, y0=x, args=label, saveat=until, **solver)
        return found.ys[0], found.stats["num_steps"]

    return jax.vmap(solve)(first, labels)
