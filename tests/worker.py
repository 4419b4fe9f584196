"""One of several processes: trains, samples or packs latents as told, for `test_processes.py`."""

import json
import os
import sys

import jax
import numpy as np

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", int(os.environ.get("WORKER_DEVICES", 4)))

from stand_ins import mean_for_autoencoder  # noqa: E402 (after the devices are fixed)

from dydit_jax.errors import InputError, StopError  # noqa: E402
from dydit_jax.jobs import prepare_latents as preparation  # noqa: E402
from dydit_jax.jobs.sample import Request, sample  # noqa: E402
from dydit_jax.jobs.train import train_and_evaluate  # noqa: E402
from dydit_jax.runtime.processes import start_processes  # noqa: E402


def main():
    port, count, number, action, told = sys.argv[1:]
    start_processes(f"localhost:{port}", int(count), int(number))
    told = json.loads(told)
    try:
        if action == "train":
            train_and_evaluate(told["config"][int(number)], told["workdir"][int(number)])
        elif action == "latents":
            with mean_for_autoencoder():
                preparation.prepare_latents(preparation.LatentsRequest(**told))
        else:
            samples = sample(Request(**told))
            np.save(f"{told['out']}/process_{number}.npy", samples.images)
    except (InputError, StopError) as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        sys.exit(getattr(error, "code", 2))


if __name__ == "__main__":
    main()
