"""Solvers and grids on the digits model: how far their images are from those of a thousand steps of DDIM.

    python benchmarks/solvers.py --out docs/sampling.json

Every solver starts from the same noise on the same model, without guidance. Measured is the root mean square difference
of the final images from DDIM's with all 1000 timesteps, in the model's own space, where a pixel is in [-1, 1]. The
network is compiled once, and the tables are run on the host row by row. A table in Markdown goes to the output.
"""

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

from dydit_jax.diffusion.grids import GRIDS
from dydit_jax.diffusion.samplers import Sampler, SamplingConfig
from dydit_jax.loading import load_checkpoint
from dydit_jax.models.dit import Model
from dydit_jax.runtime.console import run
from dydit_jax.sampling.noise import first_noise, image_keys, step_noise
from dydit_jax.sampling.table import make_table

OUT = flags.DEFINE_string("out", "docs/sampling.json", "File for the results.")
NUM_IMAGES = flags.DEFINE_integer("num_images", 40, "Images, the ten digits in turn.")
EVALUATIONS = flags.DEFINE_list("evaluations", ["5", "8", "10", "15", "20", "50"], "Evaluations of the network.")
CHECKPOINT = flags.DEFINE_string("checkpoint", "digits", "Model in pixels.")

DETERMINISTIC = ("ddim", "dpmpp_2m", "dpmpp_3m", "unipc", "unipc_3", "heun", "ab4")


def steps_of(solver: str, evaluations: int) -> int:
    """Return the number of timesteps with which a solver evaluates the network so often, or once less."""
    return (evaluations + 1) // 2 if solver == "heun" else evaluations


def main():
    weights, count = load_checkpoint(CHECKPOINT.value), NUM_IMAGES.value
    model, labels = Model(weights.model), jnp.arange(count) % weights.model.classes
    shape = (weights.model.side, weights.model.side, weights.model.channels)
    keys = image_keys(0, jnp.arange(count))
    network = jax.jit(lambda x, t: model.apply(weights.params, x, jnp.full(count, t), labels, mode="gated")[0])
    advance = jax.jit(Sampler.step, static_argnums=0)

    @functools.cache
    def draw(solver: str, steps: str) -> np.ndarray:
        table = make_table(SamplingConfig(sampler=solver, steps=steps, clip=weights.sampling.clip), weights.process)
        sampler = Sampler(table.form, weights.sampling.clip)
        state = sampler.init(first_noise(keys, shape))
        for index in range(len(table)):
            row = jax.tree.map(lambda column, index=index: jnp.asarray(column[index]), table)
            noise = None if table.form.noise == "none" else step_noise(keys, row.step, shape)
            state = advance(sampler, state, network(state.xt, row.timestep), row, noise)
        return np.asarray(state.xt)

    began, wanted, results = time.perf_counter(), draw("ddim", "1000"), []
    for evaluations in map(int, EVALUATIONS.value):
        for solver in DETERMINISTIC:
            for grid in GRIDS:
                images = draw(solver, f"{grid}:{steps_of(solver, evaluations)}")
                error = float(np.sqrt(np.mean((images - wanted) ** 2)))
                results.append(dict(evaluations=evaluations, solver=solver, grid=grid, error=error))
        best = min((row for row in results if row["evaluations"] == evaluations), key=lambda row: row["error"])
        sys.stderr.write(f"{evaluations} evaluations: {best['solver']} {best['grid']} {best['error']:.4f}\n")
    about = dict(
        command="python " + " ".join(sys.argv),
        machine=platform.processor() or platform.machine(),
        date=time.strftime("%Y-%m-%d"),
        images=count,
        seconds=time.perf_counter() - began,
        scale=float(np.sqrt(np.mean(wanted**2))),
    )
    epath.Path(OUT.value).write_text(json.dumps(dict(about, results=results), indent=1) + "\n")
    sys.stdout.write(table_of(results))


def table_of(results: list[dict]) -> str:
    """Return a row per solver: its error on its best grid for each number of evaluations; ddim on the trailing one."""
    numbers = sorted({row["evaluations"] for row in results})

    def cell(solver: str, evaluations: int, grids) -> str:
        rows = [row for row in results if row["solver"] == solver and row["evaluations"] == evaluations]
        best = min((row for row in rows if row["grid"] in grids), key=lambda row: row["error"])
        return f"{best['error']:.4f} {best['grid']}"

    lines = ["| solver | " + " | ".join(map(str, numbers)) + " |", "|---" * (1 + len(numbers)) + "|"]
    for solver, grids in [("ddim", ("trailing",)), *((solver, tuple(GRIDS)) for solver in DETERMINISTIC)]:
        name = f"`{solver}`" + (", trailing" if len(grids) == 1 else "")
        lines.append(f"| {name} | " + " | ".join(cell(solver, number, grids) for number in numbers) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    run(main)
