"""Time how long the programs of a fast run take to compile, and to be there again on a second start.

    python benchmarks/compile.py --model XL/2 --steps 250 --batch_size 2 --out docs/speed/compile_xl2.json

The plan is that of a profile (`profiles.py`), with token shares that spread by one per cent; nothing is run and no
weights are made. Each start is a process of its own; the first finds the cache of programs empty, the second full. It
reports after how many seconds each program is there. A run starts as soon as the first one is, and the others are
compiled meanwhile.

    python benchmarks/compile.py --constants --model S/2 --steps ddim20 --batch_size 8

measures the constants by which a job chooses its segments, `fast.segmentation.PLATFORMS`, and prints them: seconds to
compile a block, in the program that leaves nothing out and in one that is narrowed, and the MACs per second of both. A
batch is drawn twice with each; what the first took longer was compiling. On a CPU the seconds are those of one core.
"""

import functools
import json
import os
import resource
import subprocess
import sys
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from etils import epath
from profiles import profiled_params, swinging_logits

from dydit_jax.diffusion.process import Diffusion
from dydit_jax.diffusion.samplers import Sampler, SamplingConfig
from dydit_jax.fast.execution.registry import default_execution, layer_executions
from dydit_jax.fast.narrow import narrow
from dydit_jax.fast.plan import make_plan
from dydit_jax.fast.usage import TokenUsage
from dydit_jax.models.config import published_config
from dydit_jax.models.dit import Model
from dydit_jax.runtime.aot import compiled_ahead, describe_call
from dydit_jax.runtime.console import run
from dydit_jax.sampling.generate import SamplingRun
from dydit_jax.sampling.segment import SegmentProgram, SegmentSettings, run_segment, segment_inputs
from dydit_jax.sampling.table import make_table

MODEL = flags.DEFINE_string("model", "XL/2", "A published size.")
PROFILE = flags.DEFINE_list("profile", ["65", "65", "65"], "Per cent of heads, groups and tokens on.")
STEPS = flags.DEFINE_string("steps", "250", "Steps of the DDPM run.")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 2, "Images at once.")
SEGMENTS = flags.DEFINE_integer("segments", None, "Programs that the schedule is cut into; decides by itself.")
ONE_START = flags.DEFINE_bool("one_start", False, "Compile in this process and print the seconds; for this program.")
CONSTANTS = flags.DEFINE_bool("constants", False, "Measure and print the constants of this platform instead.")
OUT = flags.DEFINE_string("out", None, "File for the results; without, they are printed alone.")

SHARE_DEVIATION = 0.01


def main():
    if ONE_START.value:
        sys.stdout.write(json.dumps(constants() if CONSTANTS.value else start()))
        return
    with tempfile.TemporaryDirectory() as cache:
        starts = [_start_of_its_own(cache) for _ in range(1 if CONSTANTS.value else 2)]
    report = dict(
        command="python " + " ".join(sys.argv),
        machine=f"{os.cpu_count()} cores, {jax.devices()[0].device_kind}",
        date=time.strftime("%Y-%m-%d"),
        **(starts[0] if CONSTANTS.value else dict(first_start=starts[0], second_start=starts[1])),
    )
    if OUT.value:
        path = epath.Path(OUT.value)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report, indent=2) + "\n")
    sys.stdout.write(json.dumps(report, indent=2) + "\n")


def _start_of_its_own(cache: str) -> dict:
    environment = dict(os.environ, JAX_COMPILATION_CACHE_DIR=cache)
    done = subprocess.run(
        [sys.executable, *sys.argv, "--one_start"], env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout)


def constants() -> dict:
    """Return the fields of a `Platform` as this one has them."""
    model = Model(published_config(MODEL.value, side=32, routers="free"))
    sampling, process = SamplingConfig(sampler="ddim", steps=STEPS.value, clip=1.0), Diffusion()
    shares = tuple(int(per_cent) / 100 for per_cent in PROFILE.value)
    params = profiled_params(model, make_table(sampling, process).timestep, shares)
    sampler = SamplingRun(model, params, sampling=sampling, process=process)
    clock = time.process_time if model.platform == "cpu" else time.perf_counter
    labels = np.arange(BATCH_SIZE.value) % model.config.classes

    def draw(plan):
        began = clock()
        samples = sampler.draw(labels, plan=plan)
        return clock() - began, samples

    sampler.draw(labels, mode="complete")  # compiles what all modes share
    compiling, speeds = [], []
    for plan in (sampler.plan(0), sampler.plan(1)):
        first, _ = draw(plan)
        second, samples = draw(plan)
        macs = len(labels) * float(samples.evaluations @ samples.executed_macs)
        compiling.append((first - second) / model.config.depth)
        speeds.append(macs / second)
    return dict(
        whole_seconds=compiling[0],
        narrowed_seconds=compiling[1],
        macs_per_second=speeds[0],
        half_speed_width=model.config.width * (speeds[0] / speeds[1] - 1),
    )


def start() -> dict:
    """Compile all programs of the run; return when each was there."""
    model = Model(published_config(MODEL.value, side=32, routers="free"))
    config, shares = model.config, [int(per_cent) / 100 for per_cent in PROFILE.value]
    sampling = SamplingConfig(sampler="ddpm", steps=STEPS.value)
    table = make_table(sampling, Diffusion())
    sampler = Sampler(table.form)
    generator, steps = np.random.default_rng(0), len(table)
    units = (config.depth, config.heads)
    gates = [swinging_logits(generator, steps, units, share) > 0 for share in shares[:2]]
    execution = default_execution(model)
    plan = make_plan(*gates, config.macs, execution=execution.name, segments=SEGMENTS.value)
    mean = np.clip(generator.normal(shares[2], SHARE_DEVIATION, (steps, config.depth)), 0, 1)
    usage = TokenUsage(mean, np.full_like(mean, SHARE_DEVIATION), np.zeros_like(mean), BATCH_SIZE.value)
    required = execution.required_shares(usage, BATCH_SIZE.value)
    params = model.abstract_params()
    noise = jax.ShapeDtypeStruct((BATCH_SIZE.value, config.side, config.side, config.channels), jnp.float32)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), BATCH_SIZE.value))
    labels = jax.ShapeDtypeStruct((BATCH_SIZE.value,), jnp.int32)
    without_blocks = {name: part for name, part in params.items() if name != "blocks"}
    images = dict(labels=labels, keys=keys, counted=jax.ShapeDtypeStruct((BATCH_SIZE.value,), jnp.float32))
    rest = dict(images, params=without_blocks, state=jax.eval_shape(sampler.init, noise), table=table)
    began, calls = time.perf_counter(), []
    for segment in plan.segments:
        kept = dict(heads=segment.heads, groups=segment.groups)
        blocks = jax.eval_shape(functools.partial(narrow, **kept, dtype=model.dtype), params["blocks"])
        steps = slice(segment.start, segment.stop)
        executions = layer_executions(execution, config, required[steps], images=BATCH_SIZE.value)
        program = SegmentProgram(segment, executions, BATCH_SIZE.value)
        settings = SegmentSettings(model, sampler, sampling.guided_channels, 1, executions, mesh=None)
        inputs = segment_inputs(program, blocks=blocks, **rest)
        calls.append(describe_call(run_segment, (inputs,), dict(settings=settings)))
    seconds = []
    with compiled_ahead(calls) as programs:
        for program in programs:
            program.result()
            seconds.append(time.perf_counter() - began)
    return dict(
        plan=plan.summary(),
        padding=plan.padding,
        seconds_until_the_first=seconds[0],
        seconds_until_all=seconds[-1],
        seconds_until_each=seconds,
        peak_process_gib=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    )


if __name__ == "__main__":
    run(main)
