"""The digits study of parts and of guidance: low-rank updates beside full fine-tuning, one pass beside two.

    python benchmarks/adapters.py --runs runs --out docs/adapters.json

Runs lie where `digits.py` has them, and the same ones are reused; images, judge and measures are those of `digits.py`.
Differences are given in units of sqrt(s1^2 + s2^2), s being the deviation over training seeds, where there are several.
"""

import sys

import digits
import numpy as np
from absl import flags
from studies import difference, mean_and_deviation, provenance, table_header, table_line, values_of

from dydit_jax.runtime.console import run
from dydit_jax.runtime.files import write_json

flags.FLAGS.set_default("out", "docs/adapters.json")

DYNAMIC, EXPERTS = "DyDiT, lambda 0.5", {"lora.experts": 4, "lora.rank": 4, "lora.alpha": 8}
MODELS = (
    digits.Contestant("static", "digits_dit"),
    digits.Contestant(DYNAMIC, "digits_dydit", start="static"),
    digits.Contestant("LoRA, rank 16", "digits_lora", start="static"),
    digits.Contestant("LoRA, 4 experts of rank 4", "digits_lora", EXPERTS, "static"),
    digits.Contestant("one pass", "digits_gft", start="static"),
    digits.Contestant("one pass, lambda 0.5", "digits_gft", {"model.routers": "first_on"}, DYNAMIC),
)
# What each is compared with: full fine-tuning without guidance and with; two passes with guidance alone.
COMPARED = {
    "LoRA, rank 16": (DYNAMIC, digits.GUIDANCES),
    "LoRA, 4 experts of rank 4": (DYNAMIC, digits.GUIDANCES),
    "one pass": ("static", digits.GUIDANCES[1:]),
    "one pass, lambda 0.5": (DYNAMIC, digits.GUIDANCES[1:]),
}
SKIPPED = flags.DEFINE_multi_string("skipped", [], "A model to leave out; may be given several times.")


def table(results: list[dict]) -> str:
    """Return the results as a Markdown table: means and deviations over seeds, and MACs of a guided step."""
    values = lambda name, scale, key: values_of(results, key, model=name, guidance=scale)
    guided = digits.GUIDANCES[1]
    per_step = lambda name: np.mean(values(name, guided, "macs") * values(name, guided, "passes"))
    columns = [(scale, measure) for scale in digits.GUIDANCES for measure in digits.MEASURES]
    headers = [f"{measure}, guidance {scale:.0f}" for scale, measure in columns]
    lines = table_header("model", "MACs of a guided step", *headers)
    for name in dict.fromkeys(row["model"] for row in results):
        cells = [mean_and_deviation(values(name, *column), digits.MEASURES[column[1]]) for column in columns]
        lines.append(table_line(name, f"{per_step(name) / per_step('static'):.3f}", *cells))
    return "\n".join(lines)


def differences(results: list[dict]) -> list[dict]:
    """Return how far each model is from the one that it is compared with, in its measures."""
    rows, names = [], {row["model"] for row in results}
    for name, (other, scales) in COMPARED.items():
        for scale in scales if {name, other} <= names else ():
            for measure in digits.MEASURES:
                pair = (values_of(results, measure, model=model, guidance=scale) for model in (name, other))
                found = difference(*pair)
                row = dict(model=name, other=other, guidance=scale, measure=measure, by=found["by"])
                if found["deviation"] is not None:
                    within_two = abs(found["by"]) <= 2 * found["deviation"]
                    row |= dict(deviation=found["deviation"], within_two=within_two)
                rows.append(row)
    return rows


def main():
    results = digits.measure_all([model for model in MODELS if model.name not in SKIPPED.value])
    found = dict(images=digits.NUM_IMAGES.value, differences=differences(results), results=results)
    write_json(digits.OUT.value, provenance() | found)
    sys.stdout.write(table(results) + "\n")
    for row in found["differences"]:
        sys.stdout.write(f"{row}\n")


if __name__ == "__main__":
    run(main)
