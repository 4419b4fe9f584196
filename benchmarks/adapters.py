"""The digits study of parts and of guidance: low-rank updates beside full fine-tuning, one pass beside two.

    python benchmarks/adapters.py --runs runs --out docs/adapters.json

Runs lie where `digits.py` has them, and the same ones are reused; images, judge and measures are those of `digits.py`.
Differences are given in units of sqrt(s1^2 + s2^2), s being the deviation over training seeds, where there are several.
"""

import json
import platform
import sys
import time

import digits
import jax
import numpy as np
from absl import flags
from etils import epath

from dydit_jax.runtime.console import run

flags.FLAGS.set_default("out", "docs/adapters.json")

DYNAMIC, EXPERTS = "DyDiT, lambda 0.5", ("--config.lora.experts=4", "--config.lora.rank=4", "--config.lora.alpha=8")
MODELS = (
    digits.Contestant("static", "digits_dit"),
    digits.Contestant(DYNAMIC, "digits_dydit", start="static"),
    digits.Contestant("LoRA, rank 16", "digits_lora", start="static"),
    digits.Contestant("LoRA, 4 experts of rank 4", "digits_lora", EXPERTS, "static"),
    digits.Contestant("one pass", "digits_gft", start="static"),
    digits.Contestant("one pass, lambda 0.5", "digits_gft", ("--config.model.routers=first_on",), DYNAMIC),
)
# What each is compared with: full fine-tuning without guidance and with; two passes with guidance alone.
COMPARED = {
    "LoRA, rank 16": (DYNAMIC, digits.GUIDANCES),
    "LoRA, 4 experts of rank 4": (DYNAMIC, digits.GUIDANCES),
    "one pass": ("static", digits.GUIDANCES[1:]),
    "one pass, lambda 0.5": (DYNAMIC, digits.GUIDANCES[1:]),
}
MEASURES = {"accuracy": 3, "distance": 2}  # with their decimal places

SKIPPED = flags.DEFINE_multi_string("skipped", [], "A model to leave out; may be given several times.")


def table(results: list[dict]) -> str:
    """Return the results as a Markdown table: means and deviations over seeds, and MACs of a guided step."""
    guided = digits.GUIDANCES[1]
    per_step = lambda name: np.mean(
        digits.values_of(results, name, guided, "macs") * digits.values_of(results, name, guided, "passes")
    )
    heads = [f"{measure}, guidance {scale:.0f}" for scale in digits.GUIDANCES for measure in MEASURES]
    lines = [f"| model | MACs of a guided step | {' | '.join(heads)} |", "|---" * (2 + len(heads)) + "|"]
    for name in dict.fromkeys(row["model"] for row in results):
        cells = [f"{per_step(name) / per_step('static'):.3f}"]
        for scale in digits.GUIDANCES:
            for measure, places in MEASURES.items():
                values = digits.values_of(results, name, scale, measure)
                spread = f" ± {values.std(ddof=1):.{places}f}" if len(values) > 1 else ""
                cells.append(f"{values.mean():.{places}f}{spread}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def differences(results: list[dict]) -> list[dict]:
    """Return how far each model is from the one that it is compared with, in its measures."""
    rows, names = [], {row["model"] for row in results}
    for name, (other, scales) in COMPARED.items():
        for scale in scales if {name, other} <= names else ():
            for measure in MEASURES:
                own, theirs = (digits.values_of(results, model, scale, measure) for model in (name, other))
                row = dict(
                    model=name, other=other, guidance=scale, measure=measure, by=float(own.mean() - theirs.mean())
                )
                if min(len(own), len(theirs)) > 1:
                    deviation = np.hypot(own.std(ddof=1), theirs.std(ddof=1))
                    row |= dict(deviation=float(deviation), within_two=bool(abs(row["by"]) <= 2 * deviation))
                rows.append(row)
    return rows


def main():
    judge = digits.Judge()
    results = [
        dict(model=model.name, seed=int(seed), **digits.measure(folder, judge, guidance))
        for seed in digits.SEEDS.value
        for model in MODELS
        if model.name not in SKIPPED.value
        for folder in [digits.train(model, seed)]
        for guidance in digits.GUIDANCES
    ]
    report = dict(
        command=" ".join(sys.argv),
        machine=f"{platform.machine()}, {jax.devices()[0].device_kind}, {jax.device_count()} device",
        date=time.strftime("%Y-%m-%d"),
        images=digits.NUM_IMAGES.value,
        differences=differences(results),
        results=results,
    )
    epath.Path(digits.OUT.value).write_text(json.dumps(report, indent=2) + "\n")
    sys.stdout.write(table(results) + "\n")
    for row in report["differences"]:
        sys.stdout.write(f"{row}\n")


if __name__ == "__main__":
    run(main)
