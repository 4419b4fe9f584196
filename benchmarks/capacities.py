"""How many places the tokens of real images need, and how often those that a calibration asks for are too few.

    python benchmarks/capacities.py --out docs/speed/capacities.json

Jobs of the digits model, as `sample.py` runs them on an accelerator: calibrated on a few images, then batch after
batch; one that had to compute a segment again leaves the next one more places. With places of each image's own
(`one_hot`), or of all together (`fixed`, and so in kernels). No times: sizes and counts are the same on any device.
With `--model XL/2 --batches 0` only how much images of random weights differ, with 65 % of the tokens on, which
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

from dydit_jax.diffusion.samplers import SamplingConfig
from dydit_jax.diffusion.schedules import DiffusionConfig
from dydit_jax.fast.plan import Plan
from dydit_jax.fast.tokens import packed_together
from dydit_jax.loading import load_checkpoint
from dydit_jax.models.dit import Model, published_config
from dydit_jax.runtime.console import run
from dydit_jax.sampling.generate import generate, plan_sampling, programs_of, steps_of

CHECKPOINT = flags.DEFINE_string("checkpoint", "assets/digits_dydit.safetensors", "Weights to sample.")
MODEL = flags.DEFINE_string("model", None, "Instead of those: a published size, with random weights.")
STEPS = flags.DEFINE_string("steps", "10", "With --model: steps of the DDPM run.")
CALIBRATION = flags.DEFINE_integer("calibration", 8, "Images of the calibration.")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 32, "Images of a batch.")
BATCHES = flags.DEFINE_integer("batches", 4, "Of a job.")
JOBS = flags.DEFINE_integer("jobs", 5, "Each with other noise.")
FORMS = flags.DEFINE_list("forms", ["fixed", "one_hot"], "How tokens are packed, see `fast/tokens.py`.")
PROFILE = (0.65, 0.65, 0.65)  # of heads, groups and tokens that are on
OUT = flags.DEFINE_string("out", None, "File for the results.", required=True)


def main():
    model, params, settings = _contestant()
    plan = plan_sampling(model, params, **settings)
    found, deviations = {form: [] for form in FORMS.value}, []
    for seed in range(JOBS.value):
        few = np.arange(CALIBRATION.value)
        seen = generate(model, params, few % model.config.classes, seed=seed, mode="gated", **settings).shares
        deviations.append(float(seen.deviation[seen.mean < 1].mean()))
        for form, jobs in found.items():
            calibrated = dataclasses.replace(plan.calibrated(seen), form=form)
            jobs.append(_job(model, params, calibrated, settings, seed))
            sys.stderr.write(f"job {seed}, {form}: {jobs[-1]}\n")
    report = dict(
        command="python " + " ".join(sys.argv),
        date=time.strftime("%Y-%m-%d"),
        plan=plan.in_words(),
        deviation=np.mean(deviations),  # between images, of layers that have any token off
        by_batch={
            form: {name: np.mean([job[name] for job in jobs], 0).tolist() for name in jobs[0]}
            for form, jobs in found.items()
        },
    )
    path = epath.Path(OUT.value)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=2) + "\n")
    sys.stdout.write(json.dumps(report, indent=2) + "\n")


def _contestant() -> tuple:
    """Return the model, its weights, and the sampler and diffusion that it runs with."""
    if MODEL.value is None:
        weights = load_checkpoint(CHECKPOINT.value)
        settings = dict(sampling=weights.sampling, diffusion=weights.diffusion)
        return Model(weights.model, jnp.dtype("float32")), jax.device_put(weights.params), settings
    model = Model(published_config(MODEL.value, side=32, routers="free"), jnp.dtype("float32"))
    settings = dict(sampling=SamplingConfig(sampler="ddpm", steps=STEPS.value), diffusion=DiffusionConfig())
    return model, profiled_params(model, steps_of(**settings).timestep, PROFILE), settings


def _job(model: Model, params, plan: Plan, settings: dict, seed: int) -> dict:
    """Return, one number per batch: shares of tokens on and of places, both of layers with any off; segments redone."""
    record = dict(tokens_on=[], places=[], segments_computed_again=[])
    for batch in range(BATCHES.value):
        indices = CALIBRATION.value + batch * BATCH_SIZE.value + np.arange(BATCH_SIZE.value)
        samples = generate(
            model,
            params,
            indices % model.config.classes,
            seed=seed,
            indices=indices,
            mode="fast",
            plan=plan,
            **settings,
        )
        places = _places(model, params, plan, settings)
        routed = samples.shares.mean < 1
        record["tokens_on"].append(float(samples.shares.mean[routed].mean()))
        record["places"].append(float(places[routed].mean()))
        again = [samples.over[segment.start : segment.stop].any() for segment in plan.segments]
        record["segments_computed_again"].append(float(np.mean(again)))
        if samples.over.any():
            plan = plan.widened(samples.shares)
    return record


def _places(model: Model, params, plan: Plan, settings: dict) -> np.ndarray:
    """Return the share of all places that a plan has for tokens, [S,L]."""
    _, _, programs = programs_of(model, params, steps_of(**settings), "fast", plan, BATCH_SIZE.value, runs=1)
    everything = model.config.tokens * packed_together(plan.form, BATCH_SIZE.value)
    by_step = [[program.capacities] * len(program.segment) for program in programs]
    return np.array([[min(1, layer[-1] / everything) for layer in step] for segment in by_step for step in segment])


if __name__ == "__main__":
    run(main)
