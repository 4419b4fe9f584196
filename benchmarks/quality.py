"""Quality over evaluations: what the digits model draws with every solver in few evaluations of the network.

    python benchmarks/quality.py --out docs/quality.json --picture docs/images/quality.png

A cell is a solver, a number of evaluations and a guidance: the accuracy and the Fréchet distance of its images by the
judge of `digits.py`, and, for solvers that add no noise, the root mean square difference from DDIM's images with 1000
timesteps from the same noise and with the same guidance. Every solver is on the grid that was best for it in
docs/sampling.json; those that add noise, which are not in there, on an even one (`ddpm`, as published) and an even one
in the log-SNR. Then settings with few evaluations beside 250 steps of DDPM, on more images and over several seeds.

A program takes the table as an argument, so that four run the whole study. What is measured is kept at once: the same
command goes on where it was stopped. Tables in Markdown go to the output.
"""

import dataclasses
import functools
import json
import platform
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from etils import epath
from judge import Judge
from quality_figure import draw, tables

from dydit_jax.diffusion.samplers import Sampler
from dydit_jax.diffusion.solvers import MOST_HISTORY, SolverForm, SolverTable
from dydit_jax.drawing.pictures import to_uint8
from dydit_jax.drawing.style import save_figure
from dydit_jax.errors import InputError
from dydit_jax.loading import load_checkpoint
from dydit_jax.models.dit import Model
from dydit_jax.pipeline import DrawJob, Pipeline
from dydit_jax.runtime.console import run
from dydit_jax.runtime.files import read_json, write_json
from dydit_jax.runtime.progress import counted
from dydit_jax.sampling.guidance import guide
from dydit_jax.sampling.noise import first_noise, image_keys, step_noise
from dydit_jax.sampling.table import make_table

OUT = flags.DEFINE_string("out", "docs/quality.json", "File for the results; what is there already is kept.")
PICTURE = flags.DEFINE_string("picture", "", "File for the picture, PNG; none without it.")
CHECKPOINT = flags.DEFINE_string("checkpoint", "digits", "Model of digits, in pixels.")
NUM_IMAGES = flags.DEFINE_integer("num_images", 200, "Images per cell, the ten digits in turn.")
NUM_REFERENCE = flags.DEFINE_integer("num_reference", 40, "The first of them, compared with 1000 timesteps of DDIM.")
CLAIM_IMAGES = flags.DEFINE_integer("claim_images", 1000, "Images per setting and seed beside DDPM.")
SEEDS = flags.DEFINE_list("seeds", ["0", "1", "2"], "Seeds of sampling beside DDPM.")

SOLVERS = ("ddpm", "ddim", "dpmpp_2m", "dpmpp_3m", "sde_dpmpp_2m", "unipc", "unipc_3", "heun", "ab4")
EVALUATIONS = (5, 8, 10, 15, 20, 50)
GUIDANCES = {
    "1": dict(guidance=1.0),
    "2": dict(guidance=2.0),
    "2 at 100 to 700": dict(guidance=2.0, guidance_interval=(100, 700)),
}
WITH_NOISE = {"ddpm": "{}", "sde_dpmpp_2m": "logsnr:{}"}  # their grids
# Beside 250 steps of DDPM.
SETTINGS = {
    "ddpm, 250": dict(sampler="ddpm", steps="250"),
    "unipc, logsnr:10": dict(sampler="unipc", steps="logsnr:10"),
    "dpmpp_2m, quadratic:10": dict(sampler="dpmpp_2m", steps="quadratic:10"),
    "ab4, quadratic:10": dict(sampler="ab4", steps="quadratic:10"),
    "ddim, quadratic:10": dict(sampler="ddim", steps="quadratic:10"),
    "sde_dpmpp_2m, logsnr:10": dict(sampler="sde_dpmpp_2m", steps="logsnr:10"),
}


class Study:
    """The model, and what is the same for all cells."""

    def __init__(self):
        self.weights = load_checkpoint(CHECKPOINT.value)
        self.model = Model(self.weights.model)
        self.shape = (self.weights.model.side, self.weights.model.side, self.weights.model.channels)
        self.judge = Judge()
        self.best_grids, self._references = {}, {}
        for row in sorted(read_json("docs/sampling.json")["results"], key=lambda row: -row["error"]):
            self.best_grids[row["solver"], row["evaluations"]] = row["grid"]

    def steps(self, solver: str, evaluations: int) -> str:
        """Return the timesteps with which a solver evaluates the network so often; `heun` once less."""
        if solver in WITH_NOISE:
            return WITH_NOISE[solver].format(evaluations)
        count = (evaluations + 1) // 2 if solver == "heun" else evaluations
        return f"{self.best_grids[solver, evaluations]}:{count}"

    def draw(self, images: int, **settings) -> np.ndarray:
        """Draw images with the seed 0 by some settings, float32 [n,8,8,1]."""
        sampling = dataclasses.replace(self.weights.sampling, **settings)
        table = make_table(sampling, self.weights.process)
        form = SolverForm(MOST_HISTORY, base=True, noise="none" if table.form.noise == "none" else "learned")
        unread = MOST_HISTORY - table.form.history
        table = dataclasses.replace(table, weights=np.pad(table.weights, ((0, 0), (0, 0), (0, unread))))
        keys = image_keys(0, jnp.arange(images))
        sampler = Sampler(form, sampling.clip)
        state = sampler.init(first_noise(keys, self.shape))
        labels = jnp.arange(images) % self.weights.model.classes
        for i in range(len(table)):
            row = jax.tree.map(lambda column, i=i: column[i], table)
            guided = bool(row.guidance != 1.0)
            state = advance(self.weights.params, state, row, labels, keys, self.model, sampler, guided)
        return np.asarray(state.xt)

    def reference(self, guidance: str) -> np.ndarray:
        """Draw the images that others are compared with, once."""
        if guidance not in self._references:
            settings = dict(sampler="ddim", steps="1000", **GUIDANCES[guidance])
            self._references[guidance] = self.draw(NUM_REFERENCE.value, **settings)
        return self._references[guidance]

    def measure(self, solver: str, evaluations: int, guidance: str) -> dict:
        """Return a cell of the study."""
        steps = self.steps(solver, evaluations)
        images = self.draw(NUM_IMAGES.value, sampler=solver, steps=steps, **GUIDANCES[guidance])
        few = images[: NUM_REFERENCE.value]
        near = solver not in WITH_NOISE
        error = float(np.sqrt(np.mean((few - self.reference(guidance)) ** 2))) if near else None
        seen = to_uint8(images).astype(np.float32) / 127.5 - 1
        found = self.judge.measure(seen, np.arange(len(images)) % 10)
        return dict(found, solver=solver, evaluations=evaluations, guidance=guidance, steps=steps, error=error)

    @functools.cached_property
    def pipeline(self) -> Pipeline:
        """The model as users draw with it."""
        return Pipeline(self.weights, precision="float32")

    def measure_setting(self, name: str, seed: int) -> dict:
        """Return accuracy and distance of one of `SETTINGS`, drawn as `sample.py` does."""
        labels, sampling = np.arange(CLAIM_IMAGES.value) % 10, self.pipeline.sampling(guidance=1.0, **SETTINGS[name])
        job = DrawJob(labels, np.arange(len(labels)), sampling, seed=seed)
        pixels = np.concatenate([batch.pixels for batch in self.pipeline.draw(job)])
        return dict(self.judge.measure(pixels.astype(np.float32) / 127.5 - 1, labels), setting=name, seed=seed)


@functools.partial(jax.jit, static_argnums=(5, 6, 7))
def advance(params, state, row: SolverTable, labels, keys, model: Model, sampler: Sampler, guided: bool):
    """Run one row of a table."""
    network = functools.partial(model.apply, params, mode="gated")
    settings = dict(scale=row.guidance if guided else None, guided_channels="all", config=model.config)
    output, _ = guide(network, state.xt, row.timestep, labels, **settings)
    noise = None if sampler.form.noise == "none" else step_noise(keys, row.step, state.xt.shape[1:])
    return sampler.step(state, output, row, noise)


def main():
    out, study = epath.Path(OUT.value), Study()
    about = dict(
        command="python " + " ".join(sys.argv),
        machine=platform.machine(),
        images=NUM_IMAGES.value,
        reference_images=NUM_REFERENCE.value,
        claim_images=CLAIM_IMAGES.value,
    )
    found = read_json(out) if out.is_file() else dict(about, cells=[], settings=[])
    changed = [key for key in about if key != "command" and found[key] != about[key]]
    if changed:
        raise InputError(f"{out} was measured otherwise ({', '.join(changed)} differ); name another --out.")

    def keep(part: str, row: dict) -> None:
        found[part].append(row)
        write_json(out, found | dict(date=time.strftime("%Y-%m-%d")))

    keys = lambda rows, *names: {tuple(row[name] for name in names) for row in rows}
    done = keys(found["cells"], "solver", "evaluations", "guidance")
    cells = [(s, n, g) for g in GUIDANCES for n in EVALUATIONS for s in SOLVERS if (s, n, g) not in done]
    done = keys(found["settings"], "setting", "seed")
    settings = [(name, int(seed)) for seed in SEEDS.value for name in SETTINGS if (name, int(seed)) not in done]
    for name, seed in counted(settings, len(settings), "setting", "beside DDPM"):
        keep("settings", study.measure_setting(name, seed))
    for cell in counted(cells, len(cells), "cell", "cells"):
        keep("cells", study.measure(*cell))
    if PICTURE.value:
        save_figure(PICTURE.value, draw(found["cells"]))
    sys.stdout.write(tables(json.loads(out.read_text())))


if __name__ == "__main__":
    run(main)
