"""How many rows the tokens of real images need, and how often those that a calibration asks for are too few.

    python benchmarks/capacities.py --out docs/speed/capacities.json

Jobs of the digits model, as `sample.py` runs them on an accelerator: calibrated on a few images, then batch after
batch; one that redid a segment leaves the next one more rows. With rows of each image's own (`one_hot`), or of all
together (`gather`, and so in kernels). No times: sizes and counts are the same on any device. With
`--model XL/2 --batches 0` only how much images of random weights differ, with 65 % of the tokens open, which
`tpu_cost.py` takes for its own.
"""

import dataclasses
import json
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from etils import epath
from profiles import profiled_params

from dydit_jax.diffusion.process import Diffusion
from dydit_jax.diffusion.samplers import SamplingConfig
from dydit_jax.fast.execution.registry import find_execution
from dydit_jax.fast.plan import Plan
from dydit_jax.loading import load_checkpoint
from dydit_jax.models.config import published_config
from dydit_jax.models.dit import Model
from dydit_jax.runtime.console import run
from dydit_jax.sampling.generate import SamplingRun
from dydit_jax.sampling.table import make_table

CHECKPOINT = flags.DEFINE_string("checkpoint", "assets/digits_dydit.safetensors", "Weights to sample.")
MODEL = flags.DEFINE_string("model", None, "Instead of those: a published size, with random weights.")
STEPS = flags.DEFINE_string("steps", "10", "With --model: steps of the DDPM run.")
CALIBRATION = flags.DEFINE_integer("calibration", 8, "Images of the calibration.")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 32, "Images of a batch.")
BATCHES = flags.DEFINE_integer("batches", 4, "Of a job.")
JOBS = flags.DEFINE_integer("jobs", 5, "Each with other noise.")
EXECUTIONS = flags.DEFINE_list("executions", ["gather", "one_hot"], "How tokens are packed, see `fast/execution`.")
PROFILE = (0.65, 0.65, 0.65)  # of open heads, groups and tokens
OUT = flags.DEFINE_string("out", None, "File for the results.", required=True)


def main():
    subject = _subject()
    plan = subject.plan()
    found, deviations = {name: [] for name in EXECUTIONS.value}, []
    for seed in range(JOBS.value):
        few = np.arange(CALIBRATION.value)
        usage = subject.draw(few % subject.model.config.classes, seed=seed, mode="gated").usage
        deviations.append(float(usage.deviation[usage.mean < 1].mean()))
        for name, jobs in found.items():
            calibrated = dataclasses.replace(plan.with_usage(usage.without_max_rows()), execution=name)
            jobs.append(_job(subject, calibrated, seed))
            sys.stderr.write(f"job {seed}, {name}: {jobs[-1]}\n")
    report = dict(
        command="python " + " ".join(sys.argv),
        date=time.strftime("%Y-%m-%d"),
        plan=plan.summary(),
        deviation=np.mean(deviations),  # between images, of layers that have any closed token
        by_batch={
            execution: {name: np.mean([job[name] for job in jobs], 0).tolist() for name in jobs[0]}
            for execution, jobs in found.items()
        },
    )
    path = epath.Path(OUT.value)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=2) + "\n")
    sys.stdout.write(json.dumps(report, indent=2) + "\n")


def _subject() -> SamplingRun:
    """Return the model and its weights, with the sampler and diffusion that it runs with."""
    if MODEL.value is None:
        weights = load_checkpoint(CHECKPOINT.value)
        model, params = Model(weights.model, jnp.dtype("float32")), jax.device_put(weights.params)
        return SamplingRun(model, params, sampling=weights.sampling, process=weights.process)
    model = Model(published_config(MODEL.value, side=32, routers="free"), jnp.dtype("float32"))
    settings = dict(sampling=SamplingConfig(sampler="ddpm", steps=STEPS.value), process=Diffusion())
    params = profiled_params(model, make_table(**settings).timestep, PROFILE)
    return SamplingRun(model, params, **settings)


def _job(run: SamplingRun, plan: Plan, seed: int) -> dict:
    """Return, per batch: shares of open tokens and of rows, both of layers with any closed; segments redone."""
    record = dict(open_tokens=[], rows=[], segments_redone=[])
    for batch in range(BATCHES.value):
        indices = CALIBRATION.value + batch * BATCH_SIZE.value + np.arange(BATCH_SIZE.value)
        samples = run.draw(indices % run.model.config.classes, seed=seed, indices=indices, plan=plan)
        routed, rows = samples.usage.mean < 1, _rows(run, plan)
        record["open_tokens"].append(float(samples.usage.mean[routed].mean()))
        record["rows"].append(float(rows[routed].mean()))
        redone = [samples.overflow_count[segment.start : segment.stop].any() for segment in plan.segments]
        record["segments_redone"].append(float(np.mean(redone)))
        if samples.overflow_count.any():
            plan = plan.with_usage(samples.usage)
    return record


def _rows(run: SamplingRun, plan: Plan) -> np.ndarray:
    """Return the share of all rows that a plan reserves for tokens, [S,L]."""
    programs, _ = run.programs(BATCH_SIZE.value, plan=plan)
    every = find_execution(plan.execution, run.model.platform).rows(BATCH_SIZE.value, run.model.config.tokens)
    by_step = [
        [own.capacity[-1] for own in program.executions] for program in programs for _ in range(len(program.segment))
    ]
    return np.minimum(1, np.array(by_step) / every)


if __name__ == "__main__":
    run(main)
