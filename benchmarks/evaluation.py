"""Time the metrics on random features of the usual sizes, and state the process's memory.

python benchmarks/evaluation.py --out docs/speed/evaluation.json
"""

import json
import resource
import sys
import time

import jax
import numpy as np
from absl import flags
from etils import epath

from dydit_jax.metrics.distances import frechet_distance, moments, precision_recall
from dydit_jax.runtime.console import run

WIDTH = 2048
REFERENCE = flags.DEFINE_integer("reference", 10_000, "Features of the reference.")
SAMPLES = flags.DEFINE_integer("samples", 50_000, "Features of the samples.")
OUT = flags.DEFINE_string("out", None, "File for the results.", required=True)


def main():
    generator = np.random.default_rng(0)
    reference, samples = (
        generator.standard_normal((count, WIDTH), np.float32) for count in (REFERENCE.value, SAMPLES.value)
    )
    sides = [moments(features) for features in (reference, samples)]
    began = time.perf_counter()
    fid = frechet_distance(*sides[0], *sides[1])
    fid_seconds = time.perf_counter() - began
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.perf_counter()
    precision, recall = precision_recall(reference, samples)
    report = dict(
        command="python " + " ".join(sys.argv),
        machine=f"{jax.local_device_count()} x {jax.devices()[0].device_kind}",
        date=time.strftime("%Y-%m-%d"),
        fid_seconds=fid_seconds,
        precision_recall_seconds=time.perf_counter() - began,
        peak_gib=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        peak_gib_before_precision_recall=before / 2**20,
        values=dict(fid=fid, precision=precision, recall=recall),
    )
    path = epath.Path(OUT.value)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=2) + "\n")
    sys.stdout.write(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    run(main)
