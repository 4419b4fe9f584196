"""Sampling runs of tests: one call with everything that differs between them."""

import dataclasses

from dydit_jax.diffusion.samplers import SamplingConfig
from dydit_jax.diffusion.schedules import DiffusionConfig
from dydit_jax.sampling.generate import Samples, SamplingRun

SAMPLING = SamplingConfig(sampler="ddpm", steps="6", guidance=2.0)


def make_run(model, params, *, sampling=SAMPLING, diffusion=None, mesh=None) -> SamplingRun:
    """Return what batches of these settings share."""
    return SamplingRun(model, params, sampling=sampling, diffusion=diffusion or DiffusionConfig(), mesh=mesh)


def draw(model, params, labels, *, mode="fast", segments=2, execution=None, usage=None, **settings) -> Samples:
    """Draw images; in the mode `fast` by a plan of so many segments, with an execution and a usage of tokens."""
    own = {name: settings.pop(name) for name in ("sampling", "diffusion", "mesh") if name in settings}
    run = make_run(model, params, **own)
    if mode == "fast":
        plan = run.plan(segments)
        settings["plan"] = dataclasses.replace(plan, execution=execution or plan.execution, usage=usage)
    return run.draw(labels, mode=mode, **settings)
