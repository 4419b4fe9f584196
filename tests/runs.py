"""Sampling runs of tests: one call with everything that differs between them."""

import dataclasses

from dydit_jax.diffusion.process import Diffusion, Flow, meaningful
from dydit_jax.diffusion.samplers import SamplingConfig
from dydit_jax.diffusion.solvers import SOLVERS
from dydit_jax.sampling.generate import Samples, SamplingRun

SAMPLING = SamplingConfig(sampler="ddpm", steps="6", guidance=2.0)
DIFFUSION_SOLVERS, FLOW_SOLVERS = (meaningful(process, "sampling.sampler", SOLVERS) for process in (Diffusion, Flow))


def make_run(model, params, *, sampling=SAMPLING, process=None, mesh=None) -> SamplingRun:
    """Return what batches of these settings share."""
    return SamplingRun(model, params, sampling=sampling, process=process or Diffusion(), mesh=mesh)


def draw(model, params, labels, *, mode="fast", segments=2, execution=None, usage=None, **settings) -> Samples:
    """Draw images; in the mode `fast` by a plan of so many segments, with an execution and a usage of tokens."""
    own = {name: settings.pop(name) for name in ("sampling", "process", "mesh") if name in settings}
    run = make_run(model, params, **own)
    if mode == "fast":
        plan = run.plan(segments)
        settings["plan"] = dataclasses.replace(plan, execution=execution or plan.execution, usage=usage)
    return run.draw(labels, mode=mode, **settings)
