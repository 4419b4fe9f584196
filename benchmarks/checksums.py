"""Measure what noticing damage costs: checksums of a weights file, digests of a checkpoint's arrays.

    python benchmarks/checksums.py

Seconds are the processor's (`time.process_time`), of all threads: what else runs on the machine does not count.
"""

import logging
import platform
import time
from collections.abc import Callable

import jax
import numpy as np
import safetensors.numpy
from absl import flags
from etils import epath

from dydit_jax.checkpoints import read_arrays, write_arrays
from dydit_jax.checkpoints.digests import digests
from dydit_jax.runtime.console import run
from dydit_jax.runtime.files import write_json

logger = logging.getLogger("dydit_jax")

OUT = flags.DEFINE_string("out", "out/checksums.json", "File for the results.")
GIB = flags.DEFINE_float("gib", 0.5, "Size of what is written and read.")
FOLDER = flags.DEFINE_string("folder", "out/checksums", "Where the file is made; it is removed afterwards.")
ARRAYS = 8


def seconds_per_gib(action: Callable) -> float:
    """Return the least of three times, after one that does not count."""
    times = []
    for _ in range(4):
        began = time.process_time()
        action()
        times.append(time.process_time() - began)
    return round(min(times[1:]) / GIB.value, 3)


def main():
    generator = np.random.default_rng(0)
    size = int(GIB.value * 2**30 / 4 / ARRAYS)
    arrays = {str(number): generator.standard_normal(size, np.float32) for number in range(ARRAYS)}
    path = epath.Path(FOLDER.value) / "weights.safetensors"
    results = dict(
        write_with_checksums=seconds_per_gib(lambda: write_arrays(path, arrays, dict(format="benchmark"))),
        read_with_checksums=seconds_per_gib(lambda: read_arrays(path, "benchmark")),
        read_by_the_library=seconds_per_gib(lambda: safetensors.numpy.load_file(path)),
    )
    path.unlink()
    placed = jax.device_put(arrays)
    results["digests"] = seconds_per_gib(lambda: digests(placed))
    machine = dict(processor=platform.processor() or platform.machine(), device=jax.devices()[0].device_kind)
    described = dict(unit="processor seconds per GiB", **results, **machine, jax=jax.__version__)
    write_json(OUT.value, described)
    logger.info("Wrote %s: %s", OUT.value, described)


if __name__ == "__main__":
    run(main)
