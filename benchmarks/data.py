"""Time the loader: pictures with ADM's crop, packed latents, and its share of a training step.

    python benchmarks/data.py --out docs/speed/data.json

Makes its own data: JPEGs of 500 x 400 pixels, and moments of 256-pixel latents. From the files to the device's memory.
"""

import itertools
import json
import platform
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
from absl import flags
from PIL import Image
from tqdm import tqdm

from dydit_jax.data.batches import batches
from dydit_jax.data.latent_files import checksums_of
from dydit_jax.data.sources import DataConfig, open_source
from dydit_jax.models.config import DiTConfig
from dydit_jax.models.precision import build_model
from dydit_jax.runtime.console import run
from dydit_jax.runtime.sharding import MeshConfig, batch_sharding, make_mesh
from dydit_jax.training.experiment import build_update, read_experiment
from dydit_jax.training.objective import passes_at
from dydit_jax.training.optimizer import build_optimizer
from dydit_jax.training.update import batch_shapes, compile_update, init_state

PICTURES = flags.DEFINE_integer("pictures", 512, "JPEGs to make.")
LATENTS = flags.DEFINE_integer("latents", 8192, "Latents to make, 32 KiB each.")
THREADS = flags.DEFINE_list("threads", ["0", "2", "4"], "Threads that read ahead.")
SECONDS = flags.DEFINE_float("seconds", 15.0, "Time of each measurement.")
STEP_MODEL = flags.DEFINE_string("step_model", "S/2", "Of the step that the loader must keep up with; empty for none.")
STEPS = flags.DEFINE_integer("steps", 12, "Steps of it.")
OUT = flags.DEFINE_string("out", None, "File for the results.", required=True)

BATCH_SIZE = 64


def main():
    report = dict(
        command="python " + " ".join(sys.argv),
        machine=f"{platform.machine()}, {jax.devices()[0].device_kind}",
        date=time.strftime("%Y-%m-%d"),
        batch_size=BATCH_SIZE,
    )
    with tempfile.TemporaryDirectory() as folder:
        pictures, latents = make_pictures(Path(folder) / "pictures"), make_latents(Path(folder) / "latents")
        pixels = DiTConfig(depth=1, width=64, heads=1, patch=2, side=256, channels=3, classes=2)
        moments = DiTConfig(depth=1, width=64, heads=1, patch=2, side=32, channels=4, classes=1000)
        for name, path, model in (("images", pictures, pixels), ("latents", latents, moments)):
            report[f"{name}_per_second"] = {
                threads: pace(DataConfig(name=name, path=path, batch_size=BATCH_SIZE, threads=int(threads)), model)
                for threads in THREADS.value
            }
            sys.stderr.write(f"{name} per second, by threads: {report[f'{name}_per_second']}\n")
        if STEP_MODEL.value:
            report["step"] = waiting(latents)
    Path(OUT.value).write_text(json.dumps(report, indent=2) + "\n")
    sys.stdout.write(json.dumps(report, indent=2) + "\n")


def make_pictures(folder: Path) -> str:
    """Write JPEGs with structure at all scales, in two classes."""
    generator = np.random.default_rng(0)
    for number in tqdm(range(PICTURES.value), unit="picture", desc="making"):
        coarse = generator.integers(0, 256, (25, 20, 3), dtype=np.uint8)
        smooth = np.asarray(Image.fromarray(coarse).resize((400, 500), Image.Resampling.BICUBIC), np.int16)
        noisy = (smooth + generator.integers(-20, 20, smooth.shape)).clip(0, 255).astype(np.uint8)
        place = folder / f"class{number % 2}"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noisy).save(place / f"{number}.jpg", quality=90)
    return str(folder)


def make_latents(folder: Path) -> str:
    """Write moments as `tools/prepare_latents.py` does, all of one picture."""
    folder.mkdir()
    one = np.random.default_rng(0).standard_normal((2, 32, 32, 8)).astype(np.float16)
    moments = np.lib.format.open_memmap(folder / "moments.npy", "w+", np.float16, (LATENTS.value, *one.shape))
    moments[:] = one
    moments.flush()
    labels = np.arange(LATENTS.value, dtype=np.int32) % 1000
    np.save(folder / "labels.npy", labels)
    np.save(folder / "checksums.npy", checksums_of(moments, labels))
    return str(folder)


def pace(config: DataConfig, model: DiTConfig) -> float:
    """Return examples per second, long after what was read ahead is used up."""
    loader = batches(open_source(config, model), config, start=0)
    for _ in range(8 + 8 * config.threads):
        jax.block_until_ready(jax.device_put(next(loader)))
    began, count = time.perf_counter(), 0
    while time.perf_counter() - began < SECONDS.value:
        jax.block_until_ready(jax.device_put(next(loader)))
        count += config.batch_size
    return count / (time.perf_counter() - began)


def waiting(latents: str) -> dict:
    """Train some steps on latents; returns seconds per step and the share spent waiting for the loader."""
    sections = dict(
        model=dict(size=STEP_MODEL.value, side=32, routers="first_on"),
        data=dict(name="latents", path=latents, batch_size=8),
        optimizer=dict(learning_rate=1e-4),
        train=dict(steps=1),
    )
    experiment = read_experiment(sections)
    mesh = make_mesh(MeshConfig())
    model = build_model(experiment.model, precision="float32", mesh=mesh)
    with jax.set_mesh(mesh):
        state = jax.jit(lambda: init_state(model.init(jax.random.key(0)), build_optimizer(experiment.optimizer)))()
        passes = passes_at(0, model=model.config, loss=experiment.loss)
        batch = batch_shapes(model.config, experiment.data.batch_size)
        update = compile_update(build_update(experiment, model, passes), state, batch, mesh)
        loader = batches(open_source(experiment.data, experiment.model), experiment.data, start=0)
        waited, times = [], []
        for _ in itertools.repeat(None, STEPS.value + 1):
            began = time.perf_counter()
            batch = jax.device_put(next(loader), batch_sharding(mesh))
            waited.append(time.perf_counter() - began)
            state, metrics = update(state, batch)
            jax.block_until_ready(metrics)
            times.append(time.perf_counter() - began)
    return dict(
        model=STEP_MODEL.value,
        batch_size=8,
        seconds_per_step=float(np.median(times[1:])),
        waiting_share=float(np.sum(waited[1:]) / np.sum(times[1:])),
    )


if __name__ == "__main__":
    run(main)
