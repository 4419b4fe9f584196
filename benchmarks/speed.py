"""Measure complete, gated and fast sampling of one checkpoint in one run.

    python benchmarks/speed.py --batch_size 100 --out docs/speed_digits.json

The modes take turns, so that whatever else the machine does meets all of them; medians are reported. The ideal speed-up
is the ratio of MACs, the efficiency is the measured speed-up over the ideal one. The first call includes compilation.
"""

import json
import platform
import sys
import time

import jax
import numpy as np
from absl import flags
from etils import epath

from dydit_jax.build import resolve_precision
from dydit_jax.console import run
from dydit_jax.generate import MODES, generate, token_shares
from dydit_jax.loading import load_checkpoint
from dydit_jax.models.dit import Model

CHECKPOINT = flags.DEFINE_string("checkpoint", "assets/digits_dydit.safetensors", "Weights to sample.")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 100, "Images at once.")
ROUNDS = flags.DEFINE_integer("rounds", 9, "Timed calls of each mode.")
PRECISION = flags.DEFINE_string("precision", "auto", "auto, bfloat16, float32 or highest.")
OUT = flags.DEFINE_string("out", None, "File for the results.", required=True)


def main():
    weights = load_checkpoint(CHECKPOINT.value)
    dtype, matmul_precision = resolve_precision(PRECISION.value)
    model, params = Model(weights.model, dtype, matmul_precision), jax.device_put(weights.params)
    labels = np.arange(BATCH_SIZE.value) % weights.model.classes

    def draw(mode, **settings):
        began = time.monotonic()
        settings = dict(sampling=weights.sampling, diffusion=weights.diffusion, mode=mode, **settings)
        samples = generate(model, params, labels, **settings)
        return samples, time.monotonic() - began

    shares = token_shares(draw("gated")[0])
    settings = {mode: dict(shares=shares) if mode == "fast" else {} for mode in MODES}
    first = {mode: draw(mode, **settings[mode]) for mode in MODES}
    seconds = {mode: [] for mode in MODES}
    for _ in range(ROUNDS.value):
        for mode in MODES:
            seconds[mode].append(draw(mode, **settings[mode])[1])
    median = {mode: float(np.median(taken)) for mode, taken in seconds.items()}
    macs = {mode: float(first[mode][0].macs.mean()) for mode in MODES}
    ideal, measured = macs["complete"] / macs["fast"], median["complete"] / median["fast"]
    images = {mode: first[mode][0].images for mode in MODES}
    report = dict(
        command=" ".join(sys.argv),
        machine=f"{platform.machine()}, {jax.devices()[0].device_kind}",
        date=time.strftime("%Y-%m-%d"),
        precision=dtype.name,
        median_seconds=median,
        first_call_seconds={mode: taken for mode, (_, taken) in first.items()},
        macs_per_pass=macs,
        ideal_speedup=ideal,
        measured_speedup=measured,
        speedup_over_gated=median["gated"] / median["fast"],
        efficiency=measured / ideal,
        largest_difference_to_gated=float(
            np.abs(images["fast"] - images["gated"]).max() / np.abs(images["gated"]).max()
        ),
    )
    epath.Path(OUT.value).write_text(json.dumps(report, indent=2) + "\n")
    sys.stdout.write(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    run(main)
