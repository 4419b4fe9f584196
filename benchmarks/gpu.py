"""Measure on one GPU all that its numbers in the docs need, in minutes, part after part.

    python benchmarks/gpu.py --out docs/speed/gpu_h200.json
    python benchmarks/gpu.py --parts e,f,g --budget 1200 --out docs/speed/gpu_h200.json
    python benchmarks/gpu.py --parts a,b,c,d,e,f,g --dry --out dry.json     # tiny sizes, on a CPU: is anything broken?

    a  correctness: every way to run tokens against `gated`, gates and images, a small model
    b  XL/2 at 256 px, bfloat16, guidance, batch 32, 65 % on: `complete`, `gated` and `fast` in turns; the efficiency,
       and what compiling takes. 64 steps in 4 segments, which change as those of 250 steps in 16 do
    c  a trace by kernel of one segment of `complete` and `fast`, by classes, and what `fast` loses in each
    d  training steps of XL/2, static and second stage: time, utilisation, memory
    e  PyTorch: diffusers' static DiT, eager and compiled, a step of sampling and of training
    f  as b with batches of 8 and 64, with top-k, with S/2; a step of the first stage
    g  `sample.py` from the command to the last file: images per second on a cold cache and on a warm one

The default is a to d in eight minutes of an H200. Every row is in the file as soon as it is there, and the same command
goes on from it. The budget contains all starts and all compiling; a part that is over its share is ended.
"""

import importlib.metadata
import json
import os
import pathlib
import platform
import signal
import subprocess
import sys
import tempfile
import time

from absl import flags
from gpu_results import FAILED, Budget, Results, Session, run_parts

from dydit_jax.errors import InputError, StopError, require_known
from dydit_jax.runtime.console import run

PARTS = flags.DEFINE_list("parts", ["a", "b", "c", "d"], "Which, in their order.")
BUDGET = flags.DEFINE_float("budget", 480, "Seconds for all of them.", lower_bound=1)
DRY = flags.DEFINE_bool("dry", False, "Tiny sizes, on whatever device there is.")
COMMIT = flags.DEFINE_string("commit", None, "Of the code, where no git says it.")
OUT = flags.DEFINE_string("out", None, "File for the results.", required=True)
# Of the processes that this one starts.
PART = flags.DEFINE_enum("part", None, list("abcdefg"), "Measure this part here and now.")
DEADLINE = flags.DEFINE_float("deadline", None, "When it must end, in seconds since 1970.")

TITLES = dict(
    a="every way to run tokens against gated",
    b="complete and fast",
    c="a segment by kernel",
    d="training steps",
    e="PyTorch",
    f="other batches, top-k, S/2, first stage",
    g="from command to file",
)
# Seconds that each takes on an H200, as far as can be said before it ran; the budget is shared out by them.
WEIGHTS = dict(a=80, b=150, c=110, d=140, e=150, f=500, g=400)
# The command of g needs the whole device.
SURROUNDINGS = dict(g=dict(JAX_PLATFORMS="cpu"))
PACKAGES = ("jax", "jaxlib", "flax", "jax-cuda12-plugin", "jax-cuda13-plugin", "torch", "diffusers")
HERE = pathlib.Path(__file__).parent
# In a process of its own: what has started JAX keeps most of a GPU's memory.
PROBE = """
import json, jax
device = jax.devices()[0]
found = device.memory_stats() or {}
print(json.dumps(dict(platform=device.platform, kind=device.device_kind, bytes_limit=found.get("bytes_limit"))))
"""


def main():
    if PART.value:
        measure_part(PART.value)
        return
    for letter in PARTS.value:
        require_known("part", letter, TITLES)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # the part under way ends too
    budget = Budget(BUDGET.value, WEIGHTS)  # which the probe counts towards
    results = Results(OUT.value)
    results.begin(find_environment())
    todo = {letter: TITLES[letter] for letter in sorted(set(PARTS.value))}
    with tempfile.TemporaryDirectory() as cache:
        failed = run_parts(todo, results, budget, lambda *part: start_part(*part, cache))
    if failed:
        raise StopError(f"Part {', '.join(failed)} failed; the others are in {OUT.value}.")


def start_part(letter: str, seconds: float, cache: str) -> int | None:
    """Run a part in a process of its own; return its exit code, or None where it was ended at its deadline."""
    command = [sys.executable, __file__, f"--part={letter}"]
    command += [f"--deadline={time.time() + seconds}", f"--out={OUT.value}", *(["--dry"] if DRY.value else [])]
    # What a part compiles the next ones may have; this run knows no program of an earlier one.
    surroundings = os.environ | dict(DYDIT_JAX_CACHE=cache, JAX_COMPILATION_CACHE_DIR=f"{cache}/programs")
    # A machine with several GPUs lends one.
    surroundings["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    surroundings |= SURROUNDINGS.get(letter, {})
    process = subprocess.Popen(command, env=surroundings, start_new_session=True)
    try:
        return process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # with what it started
            process.wait()


def measure_part(letter: str) -> None:
    """Measure a part in this process, which has the device for itself and can be ended."""
    import gpu_parts  # not in the process that starts this one

    results = Results(OUT.value)
    session = Session(results, letter, DEADLINE.value, time.time)
    with session.noting():
        gpu_parts.run_part(letter, session, gpu_parts.dry_sizes() if DRY.value else gpu_parts.full_sizes(), OUT.value)
    results.update_part(letter, state=session.state)
    sys.exit(session.state == FAILED)


def find_environment() -> dict:
    """Return where this run takes place.

    Raises:
      InputError: no GPU, and no --dry.
    """
    probe = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=False)
    if probe.returncode:
        raise InputError(f"JAX does not start here: {probe.stderr.strip().splitlines()[-1]}")
    device = json.loads(probe.stdout.splitlines()[-1])
    if device["platform"] != "gpu" and not DRY.value:
        raise InputError(
            f"JAX finds no GPU here, only {device['kind']!r}; install jax[cuda12] or jax[cuda13], or give --dry to try "
            "the parts at tiny sizes."
        )
    return dict(
        command="python " + " ".join(sys.argv),
        date=time.strftime("%Y-%m-%d"),
        device=device["kind"],
        device_gib=device["bytes_limit"] and device["bytes_limit"] / 2**30,
        driver=_output("nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"),
        machine=f"{platform.machine()}, {os.cpu_count()} CPUs",
        commit=COMMIT.value or _output("git", "-C", str(HERE), "describe", "--always", "--abbrev=12", "--dirty"),
        versions=dict(python=platform.python_version(), **{name: _version(name) for name in PACKAGES}),
        xla_flags=os.environ.get("XLA_FLAGS"),
        dry=DRY.value,
    )


def _output(*command: str) -> str | None:
    """Return what a program prints, or None where there is none or it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return " ".join(done.stdout.split()) if done.returncode == 0 else None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    run(main)
