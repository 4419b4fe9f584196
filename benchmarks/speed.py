"""Measure complete, gated and fast sampling in one run, on request beside PyTorch.

    python benchmarks/speed.py --checkpoint assets/digits_dydit.safetensors --batch_size 100 --out digits.json
    python benchmarks/speed.py --model B/2 --profile 65,65,65 --batch_size 4 --steps 32 --peers --out b2_65.json

The contestants take turns, so that whatever else the machine does meets all of them: on a CPU after every segment of
the schedule, on an accelerator, which is in the middle of the next one by then, after every run. Medians are reported.
The ideal speed-up is the ratio of MACs, the efficiency is the measured speed-up over the ideal one. The first call
includes compilation. Peers are diffusers' DiT of the same size, eager and compiled: eight forward passes, of which each
does the same work.
"""

import concurrent.futures
import functools
import json
import resource
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from etils import epath
from machines import processor
from profiles import profiled_params
from torch_peer import make_network
from turns import side_by_side

from dydit_jax.diffusion.process import Diffusion
from dydit_jax.diffusion.samplers import SamplingConfig
from dydit_jax.fast.execution.registry import default_execution, layer_executions
from dydit_jax.fast.narrow import narrow
from dydit_jax.fast.usage import LEAST_MARGIN
from dydit_jax.loading import load_checkpoint
from dydit_jax.models.config import published_config
from dydit_jax.models.dit import Layer, Model
from dydit_jax.models.precision import resolve_precision
from dydit_jax.runtime.aot import compile_for
from dydit_jax.runtime.console import run
from dydit_jax.sampling.generate import MODES, SamplingRun
from dydit_jax.sampling.segment import bind_network
from dydit_jax.sampling.table import make_table

CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Weights to sample; or give --model.")
MODEL = flags.DEFINE_string("model", None, "A published size with random weights: S/2, B/2, L/2, XL/2.")
PROFILE = flags.DEFINE_list("profile", ["65", "65", "65"], "With --model: per cent of heads, groups and tokens on.")
STEPS = flags.DEFINE_string("steps", "32", "With --model: steps of the DDPM run.")
GUIDANCE = flags.DEFINE_float("guidance", 1.0, "With --model: scale of guidance; 1 is none.")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 4, "Images at once.")
SEGMENTS = flags.DEFINE_integer("segments", None, "Programs that fast cuts the schedule into; decides by itself.")
ROUNDS = flags.DEFINE_integer("rounds", 5, "Timed calls of each contestant.", lower_bound=1)
PRECISION = flags.DEFINE_string("precision", "auto", "auto, bfloat16, float32 or highest.")
PEERS = flags.DEFINE_bool("peers", False, "Also time diffusers' DiT in PyTorch.")
ONE_PASS = flags.DEFINE_bool("one_pass", True, "Also compare single passes in float32 and bfloat16: more compiling.")
OUT = flags.DEFINE_string("out", None, "File for the results.", required=True)

PEER_PASSES = 8


def main():
    model, params, run_settings = _subject()
    labels = np.arange(BATCH_SIZE.value) % model.config.classes
    images = np.arange(BATCH_SIZE.value)
    # As in a job, which makes it once for all batches. `fast` has its own: a turn must not undo its narrowing.
    narrowed, whole = (SamplingRun(model, params, **run_settings) for _ in range(2))
    plan = whole.plan(SEGMENTS.value)
    steps = len(plan.heads)

    def draw(mode: str, report=None, *, plan=None, indices=images):
        settings = dict(indices=indices, mode=mode, plan=plan)
        if report is not None and model.platform == "cpu":
            settings |= dict(report=lambda count: report(count / steps))
        return (narrowed if plan else whole).draw(labels, **settings)

    first, peak, samples = {}, {}, {}
    # A job calibrates on a few images and draws many others.
    calibration, first["gated"] = _timed(lambda: draw("gated", indices=images + BATCH_SIZE.value))
    _log("plan", plan.summary())
    plan = plan.with_usage(calibration.usage.without_max_rows())
    contestants = dict(
        complete=functools.partial(draw, "complete"),
        gated=functools.partial(draw, "gated"),
        fast=functools.partial(draw, "fast", plan=plan),
    )
    if PEERS.value:
        contestants |= _peers(model, BATCH_SIZE.value * int(plan.evaluations.max()))
    for name, contestant in contestants.items():
        if name not in first:
            _, first[name] = _timed(contestant)
        peak[name] = _peak_gib()
        _log(name, f"first call {first[name]:.1f} s")
    seconds = {name: [] for name in contestants}  # per step, or per pass of a peer
    measured = dict(samples=samples, seconds=seconds, first=first, peak=peak)
    for _ in range(ROUNDS.value):
        found, taken = side_by_side(contestants)
        samples |= found
        for name in contestants:
            seconds[name].append(taken[name] / (steps if name in MODES else PEER_PASSES))
            _log(name, f"{1e3 * seconds[name][-1]:.2f} ms per step")
        _write(_report(model, plan, **measured))  # for a run that is cut off
    one_pass = _one_pass(model, params, plan, run_settings) if ONE_PASS.value else None
    report = _report(model, plan, **measured, one_pass=one_pass)
    _write(report)
    sys.stdout.write(json.dumps(report, indent=2) + "\n")


def _report(model: Model, plan, *, samples: dict, seconds: dict, first: dict, peak: dict, one_pass=None) -> dict:
    """Gather what was measured up to now, by contestant: their last results, all timed calls, first calls, memory."""
    median = {name: float(np.median(taken)) for name, taken in seconds.items()}
    macs = {mode: samples[mode].mean_macs for mode in ("complete", "fast")}
    ideal = macs["complete"] / macs["fast"]
    scale = np.abs(samples["gated"].images).max()
    routed = {mode: samples[mode].routing.tokens for mode in ("gated", "fast")}  # [S,L,N], means over the images
    return dict(
        command="python " + " ".join(sys.argv),
        machine=f"{processor()}, {jax.local_device_count()} x {jax.devices()[0].device_kind}",
        date=time.strftime("%Y-%m-%d"),
        precision=model.dtype.name,
        batch_size=BATCH_SIZE.value,
        steps=len(plan.heads),
        rounds=len(seconds["fast"]),
        plan=plan.summary(),
        execution=plan.execution,
        open_shares={
            name: float(np.mean(getattr(samples["fast"].routing, name))) for name in ("heads", "groups", "tokens")
        },
        seconds_per_step=median,
        spread_of_seconds_per_step={name: [min(taken), max(taken)] for name, taken in seconds.items()},
        first_call_seconds=first,
        peak_gib_so_far=peak,
        giga_macs_per_pass={mode: count / 1e9 for mode, count in macs.items()},
        giga_macs_executed_by_fast=samples["fast"].mean_executed_macs / 1e9,
        padding=plan.padding,
        ideal_speedup=ideal,
        speedup_over={name: median[name] / median["fast"] for name in seconds if name != "fast"},
        efficiency=median["complete"] / median["fast"] / ideal,
        layers_on_all_rows=int(samples["fast"].overflow_count.sum()),
        # One that differs, for a logit next to the threshold, makes the rest of an image's run differ.
        token_gates_unlike_gated_per_million=1e6 * float(np.abs(routed["fast"] - routed["gated"]).mean()),
        largest_difference_to_gated=float(np.abs(samples["fast"].images - samples["gated"].images).max() / scale),
        one_pass=one_pass,
    )


def _write(report: dict) -> None:
    path = epath.Path(OUT.value)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=2) + "\n")


def _log(name: str, what: str) -> None:
    sys.stderr.write(f"{name}: {what}\n")


def _peak_gib() -> dict:
    """Return the most memory used so far, by the process, and on the accelerator, where there is one."""
    found = dict(process=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
    on_device = jax.local_devices()[0].memory_stats()
    return found | (dict(device=on_device["peak_bytes_in_use"] / 2**30) if on_device else {})


def _timed(function):
    began = time.perf_counter()
    result = function()
    return result, time.perf_counter() - began


def _subject():
    """Return the model, its weights and the settings of the run."""
    dtype, matmul_precision = resolve_precision(PRECISION.value)
    if (CHECKPOINT.value is None) == (MODEL.value is None):
        raise SystemExit("Give one of --checkpoint and --model.")
    if CHECKPOINT.value:
        weights = load_checkpoint(CHECKPOINT.value)
        settings = dict(sampling=weights.sampling, process=weights.process)
        return Model(weights.model, dtype, matmul_precision), jax.device_put(weights.params), settings
    model = Model(published_config(MODEL.value, side=32, routers="free"), dtype, matmul_precision)
    # Clipping keeps the images of a random network in the range of real ones.
    sampling = SamplingConfig(sampler="ddpm", steps=STEPS.value, guidance=GUIDANCE.value, clip=1.0)
    settings = dict(sampling=sampling, process=Diffusion())
    shares = tuple(int(per_cent) / 100 for per_cent in PROFILE.value)
    return model, profiled_params(model, make_table(**settings).timestep, shares), settings


def _one_pass(model: Model, params, plan, run_settings) -> dict:
    """Compare fast and gated on the same input, in float32 and in bfloat16: outputs, and gates that differ."""
    table, config, found = make_table(**run_settings), model.config, {}
    segments = plan.segments[:: max(1, len(plan.segments) // 2)]
    x = jax.random.normal(jax.random.key(1), (BATCH_SIZE.value, config.side, config.side, config.channels))
    labels = jnp.arange(BATCH_SIZE.value) % config.classes
    for dtype in (jnp.dtype("float32"), jnp.dtype("bfloat16")):
        of_dtype = Model(config, dtype)
        gated = jax.jit(lambda p, t, model=of_dtype: model.apply(p, x, t, labels, mode="gated"))
        times = [jnp.full(BATCH_SIZE.value, table.timestep[segment.start]) for segment in segments]
        expected = [gated(params, t) for t in times]
        layers = [narrow(params["blocks"], heads=s.heads, groups=s.groups, dtype=dtype) for s in segments]
        passes = [_fast_pass(of_dtype, s, routing.tokens, x, labels) for s, (_, routing) in zip(segments, expected)]
        with concurrent.futures.ThreadPoolExecutor() as pool:
            lowered = [jax.jit(fast).lower(params, *rest) for fast, *rest in zip(passes, layers, times)]
            compiled = list(pool.map(functools.partial(compile_for, model.platform), lowered))
        differences, flips, decisions = [], 0, 0
        for fast, narrowed, t, (wanted, routing) in zip(compiled, layers, times, expected):
            output, tokens = fast(params, narrowed, t)
            differences.append(float(jnp.abs(output - wanted).max() / jnp.abs(wanted).max()))
            flips += int((tokens != routing.tokens).sum())
            decisions += tokens.size
        per_million = 1e6 * flips / decisions
        found[dtype.name] = dict(difference=max(differences), flips_per_million=per_million, decisions=decisions)
    return found


def _fast_pass(model: Model, segment, open_tokens, x, labels):
    """Return (params, blocks, t) -> output and token gates of the first step of a segment, as `fast` computes them.

    Capacities have their margin over the open tokens [B,L,N] of `gated`.
    """
    config, execution = model.config, default_execution(model)
    margin = LEAST_MARGIN if execution.may_overflow else 0
    shares = np.minimum(1, margin + np.asarray(execution.rows_needed(open_tokens)))[None]  # [1,L]
    executions = layer_executions(execution, config, shares, images=len(x))
    heads, groups = jax.tree.map(lambda gate: gate[:1].astype(np.float32), (segment.head_gates, segment.group_gates))

    def fast(params, blocks, t):
        layers = [Layer(block, None, None, own) for block, own in zip(blocks, executions)]
        return bind_network(model, params, layers, heads, groups)(x, t, labels)

    return fast


def _peers(model: Model, images: int) -> dict:
    """Return diffusers' static DiT of the same size as two contestants."""
    import torch

    config = model.config
    network = make_network(config).eval()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    network.to(device, getattr(torch, model.dtype.name))
    x = torch.randn(
        images, config.channels, config.side, config.side, device=device, dtype=next(network.parameters()).dtype
    )
    t, labels = torch.full((images,), 500, device=device), torch.arange(images, device=device) % config.classes

    def repeat(network):
        def go(report=None):
            with torch.inference_mode():
                for _ in range(PEER_PASSES):
                    network(x, t, labels)
                    if report is not None and device == "cpu":
                        report(1 / PEER_PASSES)
                if device == "cuda":
                    torch.cuda.synchronize()

        return go

    return dict(torch_eager=repeat(network), torch_compiled=repeat(torch.compile(network)))


if __name__ == "__main__":
    run(main)
