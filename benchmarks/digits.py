"""The digits study: what a dynamic model costs and gives, beside static models, over several training seeds.

    python benchmarks/digits.py --runs runs --out docs/digits.json --picture docs/images/digits_study.png

Per seed: a static DiT; from it the control (trained on for as many steps as fine-tuning takes) and a DyDiT for each
lambda; and a static DiT of half the size, trained for as many steps as both stages. Runs that are there already are
continued or reused.

Measured on 1000 images per model, 100 of each class: accuracy of a classifier trained on the real digits, Fréchet
distance in its features to the real training digits, and MACs. The judge is scikit-learn's and shares nothing with the
models.
"""

import dataclasses
import json
import platform
import subprocess
import sys
import time

import jax
import numpy as np
from absl import flags
from etils import epath
from judge import Judge

from dydit_jax.checkpoints import WEIGHTS_FILE
from dydit_jax.data.sources import digits
from dydit_jax.drawing.pictures import to_uint8
from dydit_jax.drawing.style import LINES, OPEN, SMALL, count_ticks, in_style, new_figure, save_figure
from dydit_jax.loading import load_checkpoint
from dydit_jax.models.precision import build_model
from dydit_jax.runtime.console import run
from dydit_jax.runtime.sharding import MeshConfig, make_mesh
from dydit_jax.sampling.generate import generate

RUNS = flags.DEFINE_string("runs", "runs", "Folder of the work directories.")
OUT = flags.DEFINE_string("out", "docs/digits.json", "File for the results.")
PICTURE = flags.DEFINE_string("picture", "", "File for the picture, PNG; none without it.")
NUM_IMAGES = flags.DEFINE_integer("num_images", 1000, "Images per model and guidance.")
SEEDS = flags.DEFINE_list("seeds", ["0", "1", "2"], "Seeds of training: initial values, noise, order of the data.")
LAMBDAS = flags.DEFINE_list("lambdas", ["0.3", "0.5", "0.7", "0.9"], "Budgets of the DyDiTs.")

GUIDANCES = (1.0, 2.0)


@dataclasses.dataclass(frozen=True)
class Contestant:
    """A model of the study: its name, its config file, what is set beside it, and the model that it starts from."""

    name: str
    config: str
    overrides: tuple[str, ...] = ()
    start: str = ""


def contestants() -> list[Contestant]:
    """Return the models in the order of training: the start comes first."""
    dynamic = [
        Contestant(f"DyDiT, lambda {budget}", "digits_dydit", (f"--config.loss.budget={budget}",), "static")
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
    if (place(model.name) / WEIGHTS_FILE).exists():
        return place(model.name)
    overrides = [f"--config.train.seed={seed}", f"--config.data.seed={seed}", *model.overrides]
    if model.start:
        overrides.append(f"--config.train.init_from={place(model.start)}")
    command = [sys.executable, "train.py", f"--config=configs/{model.config}.py", f"--workdir={place(model.name)}"]
    subprocess.run(command + overrides, check=True)
    return place(model.name)


def measure(folder: epath.Path, judge: Judge, guidance: float) -> dict:
    """Sample one model and let the judge see what a PNG would hold."""
    weights = load_checkpoint(folder)
    labels = np.arange(NUM_IMAGES.value) % 10
    mesh = make_mesh(MeshConfig())
    with jax.set_mesh(mesh):
        model = build_model(weights.model, precision="float32", mesh=mesh, lora=weights.lora)
        samples = generate(
            model,
            weights.params,
            labels,
            sampling=dataclasses.replace(weights.sampling, guidance=guidance),
            process=weights.process,
            seed=0,
            mode="gated",  # each call has its own weights: compiling segments would take longer than sampling
        )
    macs = weights.model.macs
    blocks = macs.layers * (macs.attention + macs.mlp)
    on = (samples.mean_macs - macs.fixed - macs.routers) / blocks if weights.model.routers != "none" else 1.0
    seen = to_uint8(samples.images).astype(np.float32) / 127.5 - 1
    return dict(
        judge.measure(seen, labels),
        guidance=guidance,
        macs=samples.mean_macs,
        passes=float(samples.evaluations.mean()),
        mac_ratio=float(on),
        sampler=weights.sampling.sampler,
        steps=weights.sampling.steps,
    )


def values_of(results: list[dict], name: str, guidance: float, key: str) -> np.ndarray:
    """Return what was measured of one model at one guidance, [training seeds]."""
    return np.array([row[key] for row in results if row["model"] == name and row["guidance"] == guidance])


def table(results: list[dict]) -> str:
    """Return the results as a Markdown table: mean and standard deviation over the training seeds."""
    lines = [
        "| model | million MACs | share on | "
        + " | ".join(f"accuracy, guidance {g:.0f} | distance, guidance {g:.0f}" for g in GUIDANCES)
        + " |",
        "|---" * (3 + 2 * len(GUIDANCES)) + "|",
    ]
    for name in dict.fromkeys(row["model"] for row in results):
        macs, on = (values_of(results, name, GUIDANCES[0], key).mean() for key in ("macs", "mac_ratio"))
        cells = [f"{macs / 1e6:.2f}", f"{on:.3f}"]
        for guidance in GUIDANCES:
            for key, places in (("accuracy", 3), ("distance", 2)):
                values = values_of(results, name, guidance, key)
                cells.append(f"{values.mean():.{places}f} ± {values.std(ddof=len(values) > 1):.{places}f}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
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
            macs, distance = (values_of(results, name, guidance, key) for key in ("macs", "distance"))
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
    judge = Judge()
    results = [
        dict(model=model.name, seed=int(seed), **measure(folder, judge, guidance))
        for seed in SEEDS.value
        for model in contestants()
        for folder in [train(model, seed)]
        for guidance in GUIDANCES
    ]
    report = dict(
        command=" ".join(sys.argv),
        machine=f"{platform.machine()}, {jax.devices()[0].device_kind}, {jax.device_count()} device",
        date=time.strftime("%Y-%m-%d"),
        images=NUM_IMAGES.value,
        real_test_digits=judge.measure(*digits("test")),
        results=results,
    )
    epath.Path(OUT.value).write_text(json.dumps(report, indent=2) + "\n")
    if PICTURE.value:
        save_figure(PICTURE.value, draw(results))
    sys.stdout.write(table(results) + "\n")


if __name__ == "__main__":
    run(main)
