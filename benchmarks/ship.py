"""Is the study's DyDiT good enough to come with the package? If so, write it in half precision.

    python benchmarks/ship.py --runs runs/fashion --out dydit_jax/assets/fashion_dydit.safetensors

It is of lambda 0.5, trained longer than the DyDiTs that are compared. What is judged is the file that would be
written, on images drawn by its own settings with --guidance, which becomes the file's default, and several seeds of
sampling; its parent by the same:

    accuracy   at most 2 points below that of real test pictures
    distance, recall   not worse than the static parent's by more than 2 sqrt(s1^2 + s2^2), s over the sampling seeds
    MACs       at most 0.55 of the parent's
    size       at most 8 MB

A file `<data>_dydit.safetensors` among the assets is known by the name `<data>`, and nothing else has to be changed.
"""

import dataclasses
import sys
from collections.abc import Mapping

import numpy as np
from absl import flags
from etils import epath
from studies import deviation, difference, measure, provenance, table_header, table_line
from study import DATA, NUM_IMAGES, RUNS, SAMPLING_SEEDS, Training
from study_models import SHIPPED, STATIC, STUDIES
from study_pages import measures_of

from dydit_jax.checkpoints import save_weights
from dydit_jax.errors import InputError
from dydit_jax.loading import load_checkpoint
from dydit_jax.pipeline import Pipeline
from dydit_jax.runtime.console import run
from dydit_jax.runtime.files import write_json

flags.FLAGS.set_default("num_images", 1000)
flags.FLAGS.set_default("sampling_seeds", 3)
OUT = flags.DEFINE_string("out", "", "File for the weights.")
GUIDANCE = flags.DEFINE_float("guidance", 1.5, "Scale of guidance, of the images and in the file.")
RESULTS = flags.DEFINE_string("results", "", "File for what was measured, JSON; none without it.")

MOST_BYTES, MOST_MACS, MOST_POINTS, MOST_DEVIATIONS = 8_000_000, 0.55, 0.02, 2.0


def measure_model(checkpoint, judge) -> list[dict]:
    """Return what the judge says of a model's images, seed by seed, by its own settings but the guidance."""
    pipeline = Pipeline.load(checkpoint, precision="float32")
    return [
        measure(pipeline, judge, pipeline.sampling(guidance=GUIDANCE.value), images=NUM_IMAGES.value, seed=seed)
        for seed in range(SAMPLING_SEEDS.value)
    ]


def conditions(model: list[dict], parent: list[dict], real: dict, size: int) -> list[dict]:
    """Return the conditions: what it is about, its value, the bound, and whether the value is within it.

    Args:
      model, parent: rows of the measurements, one for each seed.
      real: what the judge says of real test pictures.
      size: of the file in bytes.
    """
    values = lambda rows, key: np.array([row[key] for row in rows])
    least = real["accuracy"] - MOST_POINTS
    rows = [dict(about="accuracy", value=values(model, "accuracy").mean(), least=least)]
    for key, worse in (("distance", 1), ("recall", -1)):
        if key in real:
            found = difference(values(model, key), values(parent, key))
            loss, bound = worse * found["by"], MOST_DEVIATIONS * (found["deviation"] or 0)
            rows.append(dict(about=f"{key}, loss beside the parent", value=loss, most=bound))
    ratio = values(model, "macs").mean() / values(parent, "macs").mean()
    rows += [dict(about="MACs beside the parent's", value=ratio, most=MOST_MACS)]
    rows += [dict(about="bytes", value=size, most=MOST_BYTES)]
    is_met = lambda row: row.get("least", -np.inf) <= row["value"] <= row.get("most", np.inf)
    return [dict(row, value=float(row["value"]), met=bool(is_met(row))) for row in rows]


def models_table(found: Mapping) -> str:
    """Return what was measured of the model, its parent and real pictures as Markdown: mean ± deviation over seeds."""
    measures = measures_of(found)
    lines = table_header("", "million MACs", *measures)
    for name, rows in (("static parent", found["parent"]), (SHIPPED, found["model"])):
        cells = [_spread(rows, key, places) for key, places in measures.items()]
        lines.append(table_line(name, f"{np.mean([row['macs'] for row in rows]) / 1e6:.2f}", *cells))
    real = (f"{found['real'][key]:.{places}f}" for key, places in measures.items())
    return "\n".join([*lines, table_line("real test pictures", "", *real)]) + "\n"


def _spread(rows: list[dict], key: str, places: int) -> str:
    values = np.array([row[key] for row in rows])
    return f"{values.mean():.{places}f} ± {deviation(values):.{places}f}"


def conditions_table(rows: list[dict]) -> str:
    """Return the conditions as Markdown."""
    lines = table_header("condition", "value", "bound", "met")
    for row in rows:
        bound = f"at least {row['least']:.4g}" if "least" in row else f"at most {row['most']:.4g}"
        lines.append(table_line(row["about"], f"{row['value']:.4g}", bound, "yes" if row["met"] else "**no**"))
    return "\n".join(lines) + "\n"


def main():
    if not OUT.value:
        raise InputError("--out is required: a .safetensors file.")
    if SAMPLING_SEEDS.value < 2:
        raise InputError(f"--sampling_seeds must be at least 2, for a deviation; not {SAMPLING_SEEDS.value}.")
    study = STUDIES[DATA.value]
    model, parent = (Training(study, name, 0) for name in (SHIPPED, STATIC))
    if not model.has_ended:
        raise InputError(f"{SHIPPED} has not been trained in {RUNS.value}; start with benchmarks/study.py.")
    out, candidate = epath.Path(OUT.value), epath.Path(f"{OUT.value}.candidate.safetensors")
    weights = load_checkpoint(model.folder)
    sampling = dataclasses.replace(weights.sampling, guidance=GUIDANCE.value)
    about = weights.about | dict(class_names=study.class_names)
    save_weights(candidate, dataclasses.replace(weights, sampling=sampling, about=about), dtype="float16")
    judge = study.make_judge()
    measured = dict(model=measure_model(candidate, judge), parent=measure_model(parent.folder, judge))
    real = judge.measure(*study.real_pictures(NUM_IMAGES.value))
    rows = conditions(*measured.values(), real, candidate.stat().length)
    found = measured | dict(real=real, conditions=rows)
    if RESULTS.value:
        write_json(RESULTS.value, provenance() | found)
    sys.stdout.write(f"{models_table(found)}\n{conditions_table(rows)}")
    missed = [row["about"] for row in rows if not row["met"]]
    if missed:
        raise InputError(f"Not met: {'; '.join(missed)}. {out} was not written; what was judged is {candidate}.")
    candidate.replace(out)


if __name__ == "__main__":
    run(main, about=__doc__)
