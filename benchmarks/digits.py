"""The digits study: what a dynamic model costs and gives, beside static models, over several training seeds.

    python benchmarks/digits.py --runs runs --out docs/digits.json --picture docs/images/digits_study.png

Per seed: a static DiT; from it the control (trained on for the steps that fine-tuning takes) and a DyDiT for each
lambda; and a static DiT of half the size, trained for the steps of both stages. Runs that are there already are
continued or reused.

Measured on 1000 images per model, 100 of each class: accuracy of a classifier trained on the real digits, Fréchet
distance in its features to the real training digits, and MACs. The judge is scikit-learn's and shares nothing with the
models.
"""

import dataclasses
import sys
from collections.abc import Mapping

from absl import flags
from etils import epath
from judge import Judge
from studies import mean_and_deviation, measure, provenance, table_header, table_line, train_to_end, values_of

from dydit_jax.data.sources import digits
from dydit_jax.drawing.style import LINES, OPEN, SMALL, count_ticks, in_style, new_figure, save_figure
from dydit_jax.pipeline import Pipeline
from dydit_jax.runtime.console import run
from dydit_jax.runtime.files import write_json

RUNS = flags.DEFINE_string("runs", "runs", "Folder of the work directories.")
OUT = flags.DEFINE_string("out", "docs/digits.json", "File for the results.")
PICTURE = flags.DEFINE_string("picture", "", "File for the picture, PNG; none without it.")
NUM_IMAGES = flags.DEFINE_integer("num_images", 1000, "Images per model and guidance.")
SEEDS = flags.DEFINE_list("seeds", ["0", "1", "2"], "Seeds of training: initial values, noise, order of the data.")
LAMBDAS = flags.DEFINE_list("lambdas", ["0.3", "0.5", "0.7", "0.9"], "Budgets of the DyDiTs.")

GUIDANCES = (1.0, 2.0)
MEASURES = {"accuracy": 3, "distance": 2}  # with their decimal places


@dataclasses.dataclass(frozen=True)
class Contestant:
    """A model of the study: its name, its config file, what is set beside it, and the model that it starts from."""

    name: str
    config: str
    settings: Mapping = dataclasses.field(default_factory=dict)
    start: str = ""


def contestants() -> list[Contestant]:
    """Return the models in the order of training: the start comes first."""
    dynamic = [
        Contestant(f"DyDiT, lambda {budget}", "digits_dydit", {"loss.budget": budget}, "static")
        for budget in LAMBDAS.value
    ]
    return [
        Contestant("static", "digits_dit"),
        Contestant("static, trained on", "digits_control", start="static"),
        Contestant("static, half the size", "digits_half"),
        *dynamic,
    ]


def train(model: Contestant, seed: str) -> epath.Path:
    """Run train.py to its end, unless it did; returns the work directory."""
    place = lambda name: epath.Path(RUNS.value) / f"seed_{seed}" / name.replace(", ", "_").replace(" ", "_")
    start = {"train.init_from": place(model.start)} if model.start else {}
    settings = {"train.seed": seed, "data.seed": seed, **model.settings, **start}
    return train_to_end(model.config, place(model.name), settings)


def measure_all(models: list[Contestant]) -> list[dict]:
    """Train and measure models, seed by seed; returns a row for each model, seed and guidance."""
    judge, rows = Judge(), []
    for seed in SEEDS.value:
        for model in models:
            pipeline = Pipeline.load(train(model, seed), precision="float32")
            for guidance in GUIDANCES:
                found = measure(pipeline, judge, pipeline.sampling(guidance=guidance), images=NUM_IMAGES.value)
                rows.append(dict(model=model.name, seed=int(seed), guidance=guidance, **found))
    return rows


def table(results: list[dict]) -> str:
    """Return the results as a Markdown table: mean and standard deviation over the training seeds."""
    headers = [f"{key}, guidance {guidance:.0f}" for guidance in GUIDANCES for key in MEASURES]
    lines = table_header("model", "million MACs", "open share", *headers)
    for name in dict.fromkeys(row["model"] for row in results):
        macs, share = (
            values_of(results, key, model=name, guidance=GUIDANCES[0]).mean() for key in ("macs", "mac_ratio")
        )
        cells = [
            mean_and_deviation(values_of(results, key, model=name, guidance=guidance), places)
            for guidance in GUIDANCES
            for key, places in MEASURES.items()
        ]
        lines.append(table_line(name, f"{macs / 1e6:.2f}", f"{share:.3f}", *cells))
    return "\n".join(lines)


@in_style
def draw(results: list[dict]):
    """Draw distance over cost: a point per training seed, a line through the means of the DyDiTs."""
    figure = new_figure(5.6)
    axes = figure.subplots(2, 1, sharex=True)
    names = list(dict.fromkeys(row["model"] for row in results))
    static = [name for name in names if not name.startswith("DyDiT")]
    looks = dict(zip(static, zip("soD", [LINES[1][0], LINES[2][0], LINES[3][0]])))
    for axis, guidance in zip(axes, GUIDANCES):
        means = []
        for name in names:
            macs, distance = (values_of(results, key, model=name, guidance=guidance) for key in ("macs", "distance"))
            marker, color = looks.get(name, ("v", OPEN))
            label = name if name in looks else None if means else "DyDiT, by lambda"
            axis.plot(macs, distance, marker, color=color, label=label, ms=5.5, mew=0)
            if name not in looks:
                means.append((macs.mean(), distance.mean()))
                place = dict(textcoords="offset points", xytext=(8, 4), fontsize=SMALL)
                axis.annotate(name.split()[-1], means[-1], **place)
        axis.plot(*zip(*means), color=OPEN, lw=1)
        axis.set_title(f"Fréchet distance to the real digits, guidance {guidance:.0f}")
        axis.set_ylim(0)
    axes[-1].set_xlabel("MACs per image and pass")
    axes[-1].xaxis.set_major_formatter(count_ticks())
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower left", ncols=2)
    return figure


def main():
    results = measure_all(contestants())
    real = Judge().measure(*digits("test"))
    write_json(OUT.value, provenance() | dict(images=NUM_IMAGES.value, real_test_digits=real, results=results))
    if PICTURE.value:
        save_figure(PICTURE.value, draw(results))
    sys.stdout.write(table(results) + "\n")


if __name__ == "__main__":
    run(main)
