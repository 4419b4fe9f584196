"""The flow study: a DySiT of digits beside the static SiT that it came from, and beside a DyDiT in few evaluations.

    python benchmarks/flow.py --runs runs --out docs/flow.json

Per training seed: a static SiT; from it a DySiT at lambda 0.5, and the same training without routers, the control; a
static DiT and from it a DyDiT at lambda 0.5. Runs that have ended are used as they are, others are trained or
continued.

Measured by the judge of `digits.py`, on 1000 images, 100 of each class: DySiT and its control as their configs sample
them, in 50 evaluations of the network, with guidance 1 and 2; then DySiT and DyDiT in 10 evaluations without guidance,
with several solvers each. What is measured is kept at once: the same command goes on where it was stopped.
"""

import dataclasses
import sys
from collections.abc import Mapping

from absl import flags
from etils import epath
from judge import Judge
from studies import (
    difference,
    mean_and_deviation,
    measure,
    provenance,
    table_header,
    table_line,
    train_to_end,
    values_of,
)

from dydit_jax.pipeline import Pipeline
from dydit_jax.runtime.console import run
from dydit_jax.runtime.files import read_json, write_json

RUNS = flags.DEFINE_string("runs", "runs", "Folder of the work directories.")
OUT = flags.DEFINE_string("out", "docs/flow.json", "File for the results; what is there already is kept.")
NUM_IMAGES = flags.DEFINE_integer("num_images", 1000, "Images per cell, the ten digits in turn.")
SEEDS = flags.DEFINE_list("seeds", ["0", "1", "2"], "Seeds of training: initial values, noise, order of the data.")

CONTROL, DYNAMIC, DIFFUSION = "SiT, trained on", "DySiT", "DyDiT"
GUIDANCES = (1.0, 2.0)
OWN, ENDS = "own", dict(clip=1.0)  # pixels are bounded
# Solver and times in 10 evaluations: for diffusion the best of docs/sampling.json, for a flow what could be.
FEW = {
    DYNAMIC: {
        "euler, 10": dict(sampler="euler", steps="10"),
        "heun, 5": dict(sampler="heun", steps="5"),
        "ab4, 10": dict(sampler="ab4", steps="10"),
        "dpmpp_2m, 10": dict(sampler="dpmpp_2m", steps="10", **ENDS),
        "dpmpp_2m, quadratic:10": dict(sampler="dpmpp_2m", steps="quadratic:10", **ENDS),
        "unipc, 10": dict(sampler="unipc", steps="10", **ENDS),
    },
    DIFFUSION: {
        "ddim, quadratic:10": dict(sampler="ddim", steps="quadratic:10"),
        "dpmpp_2m, quadratic:10": dict(sampler="dpmpp_2m", steps="quadratic:10"),
        "unipc, logsnr:10": dict(sampler="unipc", steps="logsnr:10"),
    },
}


@dataclasses.dataclass(frozen=True)
class Contestant:
    """A model of the study: its work directories, its config, the model that it starts from, and what is set."""

    folder: str
    config: str
    start: str = ""
    settings: Mapping = dataclasses.field(default_factory=dict)


CONTESTANTS = {
    "SiT": Contestant("sit", "digits_sit"),
    CONTROL: Contestant("sitcontrol", "digits_dysit", "SiT", {"model.routers": "none"}),
    DYNAMIC: Contestant("dysit", "digits_dysit", "SiT"),
    "DiT": Contestant("dit", "digits_dit"),
    DIFFUSION: Contestant("dydit", "digits_dydit", "DiT"),
}


@dataclasses.dataclass(frozen=True)
class Cell:
    """One measurement: of a model and a training seed, by settings of a name, with a guidance."""

    model: str
    seed: int
    settings: str
    guidance: float


def cells() -> list[Cell]:
    """Return all cells, seed by seed."""
    found = []
    for seed in map(int, SEEDS.value):
        found += [Cell(name, seed, OWN, scale) for name in (DYNAMIC, CONTROL) for scale in GUIDANCES]
        found += [Cell(name, seed, settings, 1.0) for name in FEW for settings in FEW[name]]
    return found


def trained(name: str, seed: int) -> epath.Path:
    """Return the work directory of a model, training it and what it starts from where they have not ended."""
    model = CONTESTANTS[name]
    start = {"train.init_from": trained(model.start, seed)} if model.start else {}
    place = epath.Path(RUNS.value) / f"{model.folder}_{seed}"
    return train_to_end(model.config, place, {"train.seed": seed, **start, **model.settings})


def measure_cell(cell: Cell, judge: Judge) -> dict:
    """Draw the images of a cell and let the judge see them."""
    pipeline = Pipeline.load(trained(cell.model, cell.seed), precision="float32")
    settings = {} if cell.settings == OWN else FEW[cell.model][cell.settings]
    return measure(pipeline, judge, pipeline.sampling(guidance=cell.guidance, **settings), images=NUM_IMAGES.value)


# --- Tables --------------------------------------------------------------------------------------


def tables(rows: list[dict]) -> str:
    """Return three tables in Markdown: DySiT and its control, whether they differ, and few evaluations."""
    columns = [(key, places, scale) for scale in GUIDANCES for key, places in (("accuracy", 3), ("distance", 2))]
    headers = [f"{key}, guidance {scale:.0f}" for key, _, scale in columns]
    values = lambda name, key, scale=1.0, choice=OWN: values_of(rows, key, model=name, settings=choice, guidance=scale)
    lines = table_header("model", "million MACs", "open share", *headers)
    for name in (CONTROL, DYNAMIC):
        macs, share = (values(name, key).mean() for key in ("macs", "mac_ratio"))
        cells = [mean_and_deviation(values(name, key, scale), places) for key, places, scale in columns]
        lines.append(table_line(name, f"{macs / 1e6:.2f}", f"{share:.3f}", *cells))
    lines += ["", *table_header("of DySiT and its control", "difference", "2 sqrt(s1² + s2²)", "")]
    for (key, places, scale), header in zip(columns, headers):
        found = difference(values(DYNAMIC, key, scale), values(CONTROL, key, scale))
        if found["deviation"] is None:
            continue  # nothing to compare with
        bound = 2 * found["deviation"]
        verdict = "within" if abs(found["by"]) <= bound else "**beyond**"
        lines.append(table_line(header, f"{found['by']:+.{places + 1}f}", f"{bound:.{places + 1}f}", verdict))
    lines += ["", *table_header("10 evaluations", "solver, times", "million MACs", "accuracy", "distance")]
    for name, choices in FEW.items():
        keys = ("macs", "accuracy", "distance")
        found = [(choice, *(values(name, key, choice=choice) for key in keys)) for choice in choices]
        for choice, macs, accuracy, distance in sorted(found, key=lambda row: row[3].mean()):
            judged = mean_and_deviation(accuracy, 3), mean_and_deviation(distance, 2)
            lines.append(table_line(name, choice, f"{macs.mean() / 1e6:.2f}", *judged))
    return "\n".join(lines) + "\n"


def main():
    out, judge = epath.Path(OUT.value), Judge()
    results = read_json(out)["results"] if out.is_file() else []
    done = [Cell(**{field.name: row[field.name] for field in dataclasses.fields(Cell)}) for row in results]
    for cell in cells():
        if cell not in done:
            results.append(dataclasses.asdict(cell) | measure_cell(cell, judge))
            write_json(out, provenance() | dict(images=NUM_IMAGES.value, results=results))
    sys.stdout.write(tables(results))


if __name__ == "__main__":
    run(main)
