"""One of several processes: trains, samples or packs latents as told, for `test_processes.py`."""

import json
import os
import sys

import jax
import numpy as np

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", int(os.environ.get("WORKER_DEVICES", 4)))

from stand_ins import mean_for_autoencoder  # noqa: E402 (after the devices are fixed)

from dydit_jax.jobs import prepare_latents as preparation  # noqa: E402
from dydit_jax.jobs.sample import Request, sample  # noqa: E402
from dydit_jax.jobs.train import train_and_evaluate  # noqa: E402
from dydit_jax.runtime import peers  # noqa: E402
from dydit_jax.runtime.processes import joined_processes  # noqa: E402


def main():
    port, count, number, action, told = sys.argv[1:]
    told = json.loads(told)
    for name, seconds in json.loads(os.environ.get("WORKER_PEERS", "{}")).items():
        setattr(peers, name, seconds)
    with joined_processes(f"localhost:{port}", int(count), int(number)):
        if action == "train":
            train_and_evaluate(told["config"][int(number)], told["workdir"][int(number)])
        elif action == "latents":
            with mean_for_autoencoder():
                preparation.prepare_latents(preparation.LatentsRequest(**told))
        else:
            samples = sample(Request(**told))
            np.save(f"{told['out']}/process_{number}.npy", samples.images)


if __name__ == "__main__":
    main()
