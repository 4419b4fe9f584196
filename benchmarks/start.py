"""Time `sample.py` from the command to the last picture: `fast` against `complete`, with an empty cache and a full one.

    python benchmarks/start.py --out docs/speed/start.json
    python benchmarks/start.py --only digits_1,s2_1 --rounds 1 --out start.json

Each run is a process of its own, as a user starts it, and the two modes take turns. Each mode has a cache of its own,
empty in its first run of a round, full in its second. It reports the least seconds of all rounds, since whatever else
a machine does only adds to them: those on the clock, and those of the processor, all cores together. The digits model
is the one that ships; S/2 has random weights with 65 % of heads, groups and tokens open (`profiles.py`), on pixels,
DDIM with 20 steps. The results are written after every job. A table in Markdown goes to the output.
"""

import dataclasses
import json
import os
import platform
import subprocess
import sys
import tempfile
import time

from absl import flags
from etils import epath
from profiles import profiled_params

from dydit_jax.checkpoints import Weights, save_weights
from dydit_jax.diffusion.process import Diffusion
from dydit_jax.diffusion.samplers import SamplingConfig
from dydit_jax.errors import require_known
from dydit_jax.models.config import published_config
from dydit_jax.models.dit import Model
from dydit_jax.runtime.console import run
from dydit_jax.sampling.table import make_table

S2 = "S/2"
JOBS = {f"digits_{images}": ("digits", images) for images in (1, 16, 100, 1000)} | {"s2_1": (S2, 1), "s2_16": (S2, 16)}
MODES = ("complete", "fast")
CACHES = ("cold", "warm")

ONLY = flags.DEFINE_list("only", list(JOBS), "Jobs to run; all by default.")
ROUNDS = flags.DEFINE_integer("rounds", 3, "Rounds; the least seconds count.", lower_bound=1)
OUT = flags.DEFINE_string("out", "docs/speed/start.json", "File for the results.")

SHARES = (0.65, 0.65, 0.65)


def main():
    for name in ONLY.value:
        require_known("job", name, JOBS)
    about = dict(
        command="python " + " ".join(sys.argv),
        machine=f"{os.cpu_count()} cores, {_processor()}",
        date=time.strftime("%Y-%m-%d"),
        rounds=ROUNDS.value,
    )
    jobs, path = {}, epath.Path(OUT.value)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        for name in ONLY.value:
            model, images = JOBS[name]
            checkpoint = _random_weights(epath.Path(folder) / "s2.safetensors") if model == S2 else model
            jobs[name] = dict(images=images, **_run_job(checkpoint, images))
            path.write_text(json.dumps(about | dict(jobs=jobs), indent=1) + "\n")
            sys.stderr.write(f"{name}: {json.dumps(jobs[name]['ratio'])}\n")
    sys.stdout.write(table_of(jobs))


def table_of(jobs: dict) -> str:
    """Return a row per job and cache: seconds of both modes, in brackets those of the processor, and their ratios."""
    lines = ["| job | cache | segments | complete | fast | ratio | ratio of processor seconds |", "|---" * 7 + "|"]
    for name, job in jobs.items():
        for cache in CACHES:
            complete, fast = (job[cache][mode] for mode in MODES)
            cells = [f"{taken['seconds']:.1f} ({taken['processor_seconds']:.1f})" for taken in (complete, fast)]
            ratios = [f"{job['ratio'][cache][kind]:.2f}" for kind in ("seconds", "processor_seconds")]
            lines.append(f"| {name} | {cache} | {job['segments']} | " + " | ".join([*cells, *ratios]) + " |")
    return "\n".join(lines) + "\n"


def _run_job(checkpoint, images: int) -> dict:
    """Run a job in both modes with both caches, some rounds of it; return the least seconds and their ratios."""
    taken, segments = {cache: {mode: [] for mode in MODES} for cache in CACHES}, None
    for number in range(ROUNDS.value):
        with tempfile.TemporaryDirectory() as folder:
            for cache in CACHES:
                for mode in MODES if number % 2 == 0 else reversed(MODES):
                    out = epath.Path(folder) / f"{mode}_{cache}"
                    command = ["sample.py", "--checkpoint", str(checkpoint), "--num_images", str(images)]
                    command += ["--mode", mode, "--out", str(out)]
                    taken[cache][mode].append(_run(command, cache=f"{folder}/cache_{mode}"))
                    if mode == "fast":
                        segments = json.loads((out / "manifest.json").read_text())["segments"]
    kinds = ("seconds", "processor_seconds")
    least = lambda runs: {kind: min(found[kind] for found in runs) for kind in kinds}
    best = {cache: {mode: least(runs) for mode, runs in of_modes.items()} for cache, of_modes in taken.items()}
    ratio = {
        cache: {kind: best[cache]["fast"][kind] / best[cache]["complete"][kind] for kind in kinds} for cache in CACHES
    }
    return dict(segments=segments, ratio=ratio, **best)


def _run(command: list[str], *, cache: str) -> dict:
    """Run a command of this package; return its seconds.

    Raises:
      SystemExit: it failed; what it said is shown.
    """
    # Without a folder of the user's for programs, theirs lie in this cache as well.
    environment = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    environment["DYDIT_JAX_CACHE"] = cache
    with tempfile.TemporaryFile() as said:
        began = time.perf_counter()
        process = subprocess.Popen([sys.executable, *command], env=environment, stdout=said, stderr=said)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode != 0:
            said.seek(0)
            raise SystemExit(f"{' '.join(command)} ended with {process.returncode}:\n{said.read().decode()}")
    return dict(seconds=seconds, processor_seconds=usage.ru_utime + usage.ru_stime)


def _random_weights(path):
    """Write S/2 on pixels with routers made to order, unless it is there; return where."""
    if not path.exists():
        config = dataclasses.replace(published_config(S2, side=32, routers="free"), channels=3)
        model, process = Model(config), Diffusion()
        sampling = SamplingConfig(sampler="ddim", steps="20", clip=1.0)
        params = profiled_params(model, make_table(sampling, process).timestep, SHARES)
        save_weights(path, Weights(config, process, sampling, params, {}))
    return path


def _processor() -> str:
    """Return the processor's name as far as the system knows it."""
    information = epath.Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    run(main)
