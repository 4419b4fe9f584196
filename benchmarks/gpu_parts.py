"""What the parts of `gpu.py` measure, at its sizes and at tiny ones."""

import dataclasses
import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

import gpu_torch
import gpu_trace
import jax
import numpy as np
from gpu_adapter import GUIDANCE, DiTConfig, Job, Subject, Training, other_kernels, published_config, write_checkpoint
from gpu_results import Session

from dydit_jax.errors import InputError

MODES = ("complete", "gated", "fast")
PASSES = dict(static=("complete",), second_stage=("gated",), first_stage=("gated", "complete"))
EXACT = 1e-4  # of the images' scale, in float32
ROOT = pathlib.Path(__file__).parents[1]
LARGEST_TRACE = 15 * 2**20  # bytes that are kept beside the results


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is measured, and how often.

    Attributes:
      small: of the comparison of all ways to run tokens; in both precisions, "highest" first.
      precisions: of it.
      sampling: of the comparison of `complete` and `fast`; `traced` is one segment of such a run.
      batches, capacity, other: of the rest.
      training: the model, its precision and images of a step; `first_stage_batch` of one with two passes.
      command: images and batch from the command to the file, and its run.
      rounds: timed runs, and groups of `steps_of_a_round` training steps.
      backend: of PyTorch's compiler.
    """

    small: Job
    precisions: tuple[str, ...]
    sampling: Job
    traced: Job
    batches: tuple[int, ...]
    capacity: float
    other: DiTConfig
    training: DiTConfig
    training_batch: int
    first_stage_batch: int
    command: Job
    command_images: int
    decoder: str | None
    rounds: int
    steps_of_a_round: int
    backend: str


def full_sizes() -> Sizes:
    config = published_config("XL/2", side=32, routers="free")
    other = published_config("S/2", side=32, routers="free")
    return Sizes(
        small=Job(dataclasses.replace(other, depth=4), "highest", batch=8, steps=8, segments=2),
        precisions=("highest", "bfloat16"),
        # A quarter of a run of 250 steps, which has 16 segments: equally many steps in each, and equal padding.
        sampling=Job(config, "bfloat16", batch=32, steps=64, segments=4),
        traced=Job(config, "bfloat16", batch=32, steps=16, segments=1),
        batches=(8, 64),
        capacity=0.5,
        other=other,
        training=published_config("XL/2", side=32, routers="first_on"),
        training_batch=64,
        first_stage_batch=32,
        command=Job(config, "bfloat16", batch=32, steps=250, segments=16),
        command_images=128,
        decoder="random",
        rounds=5,
        steps_of_a_round=4,
        backend="inductor",
    )


def dry_sizes() -> Sizes:
    config = DiTConfig(depth=1, width=32, heads=4, patch=2, side=8, channels=3, classes=10, routers="free")
    job = Job(config, "float32", batch=2, steps=2, segments=1)
    return Sizes(
        small=dataclasses.replace(job, precision="highest"),
        precisions=("highest",),
        sampling=job,
        traced=job,
        batches=(1,),
        capacity=0.5,
        other=config,
        training=dataclasses.replace(config, routers="first_on"),
        training_batch=4,
        first_stage_batch=4,
        command=job,
        command_images=2,
        decoder=None,
        rounds=2,
        steps_of_a_round=1,
        backend="eager",
    )


# --- a: is it right? -----------------------------------------------------------------------------


def compare_ways(session: Session, sizes: Sizes) -> None:
    """Compare every way to run tokens with `gated`, in one row per precision."""
    exact = None
    for precision in sizes.precisions:
        subject = Subject(dataclasses.replace(sizes.small, precision=precision))
        gated = subject.draw("gated")
        rounding = None if exact is None else _difference(gated, exact)[0]
        exact = exact or gated
        subject.calibrate(gated)
        for way in subject.ways:
            session.measure(f"{way}, {precision}", _compare, subject, gated, way, rounding)


def _compare(session: Session, name: str, row: dict, subject: Subject, gated, way: str, rounding) -> bool:
    subject.take(way)
    began = time.perf_counter()
    drawn = subject.draw("fast")
    images, gates = _difference(drawn, gated)
    # In bfloat16 a logit next to the threshold falls to either side, and the rest of that image's run differs with it:
    # so far as `gated` in bfloat16 is from itself in float32 is no fault.
    agrees = gates == 0 and images < EXACT if rounding is None else images < 2 * rounding
    row = dict(
        agrees=bool(agrees and np.isfinite(drawn.images).all()),
        largest_difference=images,
        difference_of_gated_to_float32=rounding,
        token_gates_unlike_per_million=gates,
        overflow_count=drawn.overflow_count,
        seconds_with_compiling=time.perf_counter() - began,
        **subject.about,
    )
    session.write(name, row)
    return True


def _difference(drawn, other) -> tuple[float, float]:
    """Return the largest difference of images in units of the largest value, and unlike token gates per million."""
    images = float(np.abs(drawn.images - other.images).max() / np.abs(other.images).max())
    return images, 1e6 * float(np.abs(drawn.tokens - other.tokens).mean())


# --- b: how fast? --------------------------------------------------------------------------------


def time_sampling(session: Session, name: str, row: dict, job: Job, rounds: int) -> bool:
    """Time `complete`, `gated` and `fast` in turns; `gated` also calibrates and judges `fast`."""
    subject, seconds = Subject(job), row.get("all_seconds_per_step", {mode: [] for mode in MODES})
    drawn, programs, first = {}, {}, {}
    for mode in ("gated", "complete", "fast"):
        with gpu_trace.captured_programs() as programs[mode]:
            began = time.perf_counter()
            drawn[mode] = subject.draw(mode)
            first[mode] = time.perf_counter() - began
        if mode == "gated":  # by other images than it is judged by
            subject.calibrate(subject.draw("gated", first=job.batch))
        row |= subject.about | dict(
            first_call_seconds=first,
            programs={mode: [program.cost() for program in found] for mode, found in programs.items()},
        )
        session.write(name, row)
    images, gates = _difference(drawn["fast"], drawn["gated"])
    row |= dict(largest_difference_to_gated=images, token_gates_unlike_gated_per_million=gates)
    row |= dict(
        overflow_count=drawn["fast"].overflow_count, giga_macs_per_pass={mode: drawn[mode].macs / 1e9 for mode in MODES}
    )
    longest = 0.0
    while len(seconds["fast"]) < rounds and session.left > longest:
        began = time.perf_counter()
        for mode in MODES:
            seconds[mode].append(_seconds_of(lambda mode=mode: subject.draw(mode)) / job.steps)
        longest = time.perf_counter() - began
        session.write(name, row | _verdict(seconds, row["giga_macs_per_pass"]) | dict(memory=_memory()))
    return len(seconds["fast"]) >= rounds


def _verdict(seconds: dict, macs: dict) -> dict:
    """Return medians, speed-up and efficiency of what was timed up to now."""
    median = {mode: statistics.median(taken) for mode, taken in seconds.items()}
    speedup, ideal = median["complete"] / median["fast"], macs["complete"] / macs["fast"]
    return dict(
        all_seconds_per_step=seconds,
        seconds_per_step=median,
        speedup=speedup,
        ideal_speedup=ideal,
        efficiency=speedup / ideal,
    )


def _seconds_of(function) -> float:
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def _memory() -> dict:
    """Return the most that this process had on the device, and what it may have, in GiB; nothing where none says."""
    found = jax.local_devices()[0].memory_stats() or {}
    names = dict(peak_gib="peak_bytes_in_use", limit_gib="bytes_limit")
    return {name: found[key] / gpu_trace.GIB for name, key in names.items() if key in found}


# --- c: where does the time go? ------------------------------------------------------------------


def trace_segment(session: Session, name: str, row: dict, job: Job, out: str) -> bool:
    """Trace one segment of `complete` and of `fast`, and say by class of kernel what `fast` loses."""
    subject = Subject(job)
    subject.calibrate(subject.draw("gated"))
    row |= subject.about
    macs, traced = {}, {}
    for mode in ("complete", "fast"):
        with gpu_trace.captured_programs() as programs:
            macs[mode] = subject.draw(mode).macs
        untraced = min(_seconds_of(lambda mode=mode: subject.draw(mode)) for _ in range(2))
        with tempfile.TemporaryDirectory() as folder:
            with gpu_trace.profiled(folder):
                subject.draw(mode)
            path = gpu_trace.find_trace(folder)
            _keep_trace(path, f"{out.removesuffix('.json')}_{mode}.trace.json.gz")
            kernels = gpu_trace.read_kernels(path)
        instructions = {}
        for program in programs:
            instructions |= gpu_trace.read_instructions(program.text())
        traced[mode] = gpu_trace.summed(kernels, instructions, job.steps)
        programs = [program.cost() for program in programs]
        row |= {mode: traced[mode] | dict(untraced_ms_per_step=1e3 * untraced / job.steps, programs=programs)}
        session.write(name, row)
    ideal = macs["complete"] / macs["fast"]
    row |= dict(ideal_speedup=ideal, lost_ms_per_step=gpu_trace.lost(traced["complete"], traced["fast"], ideal))
    session.write(name, row)
    return bool(kernels)


def _keep_trace(path: pathlib.Path, to: str) -> None:
    if path.stat().st_size <= LARGEST_TRACE:
        pathlib.Path(to).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, to)


# --- d: training ---------------------------------------------------------------------------------


def time_training(session: Session, name: str, row: dict, sizes: Sizes, batch: int) -> bool:
    """Time training steps of one kind."""
    config = dataclasses.replace(sizes.training, routers="none") if name == "static" else sizes.training
    training = Training(config, sizes.sampling.precision, batch, PASSES[name])
    row |= dict(
        batch=batch,
        compile_seconds=training.compile_seconds,
        program=gpu_trace.Program(training.compile_seconds, training.compiled).cost(),
    )
    session.write(name, row)
    training.run(1)
    seconds = row.get("all_seconds", [])
    while len(seconds) < sizes.rounds and session.left > 0:
        seconds.append(_seconds_of(lambda: training.run(sizes.steps_of_a_round)) / sizes.steps_of_a_round)
        median = statistics.median(seconds)
        row |= dict(all_seconds=seconds, seconds=median, images_per_second=batch / median, memory=_memory())
        row |= dict(giga_macs_per_image=training.macs / batch / 1e9, **training.utilisation(median))
        session.write(name, row)
    return len(seconds) >= sizes.rounds


# --- g: from command to file ---------------------------------------------------------------------


def time_command(session: Session, name: str, row: dict, checkpoint: str, sizes: Sizes, cache: str) -> bool:
    """Time `sample.py` from the command to the last file, with whatever the cache holds."""
    with tempfile.TemporaryDirectory() as folder:
        out = pathlib.Path(folder) / "out"
        settings = dict(num_images=sizes.command_images, batch_size=sizes.command.batch, checkpoint=checkpoint, out=out)
        command = [sys.executable, str(ROOT / "sample.py"), *(f"--{key}={value}" for key, value in settings.items())]
        surroundings = os.environ | dict(DYDIT_JAX_CACHE=cache, JAX_COMPILATION_CACHE_DIR=f"{cache}/programs")
        surroundings.pop("JAX_PLATFORMS", None)  # this process keeps off the device, the command must not
        began = time.perf_counter()
        try:
            done = subprocess.run(
                command, env=surroundings, capture_output=True, text=True, check=False, timeout=max(1, session.left)
            )
        except subprocess.TimeoutExpired as error:
            raise InputError(f"the command was not through after {error.timeout:.0f} s") from error
        seconds = time.perf_counter() - began
        if done.returncode:
            # With exit code 2 it says itself what is lacking.
            raise (InputError if done.returncode == 2 else RuntimeError)(" ".join(done.stderr.split())[-300:])
        cost = json.loads((out / "cost.json").read_text())
        row |= dict(device=json.loads((out / "manifest.json").read_text())["device"])
    row |= dict(seconds=seconds, images=sizes.command_images, images_per_second=sizes.command_images / seconds)
    session.write(
        name, row | dict(seconds_of_drawing=cost["seconds"], share_of_macs=cost["macs"] / cost["macs_complete"])
    )
    return True


# --- All -----------------------------------------------------------------------------------------


def run_part(letter: str, session: Session, sizes: Sizes, out: str) -> None:
    """Measure what is missing of a part."""
    if letter == "a":
        compare_ways(session, sizes)
    elif letter == "b":
        session.measure("sampling", time_sampling, sizes.sampling, sizes.rounds)
    elif letter == "c":
        session.measure("trace", trace_segment, sizes.traced, out)
    elif letter == "d":
        for stage in ("static", "second_stage"):
            session.measure(stage, time_training, sizes, sizes.training_batch)
    elif letter == "e":
        job = sizes.sampling
        peer = gpu_torch.Peer(job.config, job.batch, GUIDANCE, sizes.training_batch, sizes.backend, sizes.rounds)
        for name in gpu_torch.ROWS:
            session.measure(name, gpu_torch.time_peer, peer)
    elif letter == "f":
        _time_the_rest(session, sizes)
    else:
        _time_commands(session, sizes)


def _time_the_rest(session: Session, sizes: Sizes) -> None:
    job = sizes.sampling
    variants = {f"batch {batch}": dict(batch=batch) for batch in sizes.batches}
    variants["top-k"] = dict(config=dataclasses.replace(job.config, token_capacity=(sizes.capacity,)))
    variants["small model"] = dict(config=sizes.other)
    variants |= {f"execution {way}": dict(way=way) for way in other_kernels(job)}
    for name, fields in variants.items():
        session.measure(name, time_sampling, dataclasses.replace(job, **fields), sizes.rounds)
    session.measure("first_stage", time_training, sizes, sizes.first_stage_batch)


def _time_commands(session: Session, sizes: Sizes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(f"{folder}/model", sizes.command, decoder=sizes.decoder)
        checkpoint, cache = f"{folder}/model", f"{folder}/cache"
        for name in ("cold cache", "warm cache"):
            session.measure(name, time_command, checkpoint, sizes, cache)
