"""One of several processes: trains, samples, packs latents, only saves, or only meets the others."""

import json
import os
import resource
import sys

import jax
import numpy as np
from jax.experimental import multihost_utils

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", int(os.environ.get("WORKER_DEVICES", 4)))

from dydit_jax.runtime import peers  # noqa: E402 (after the devices are fixed)
from dydit_jax.runtime.processes import joined_processes, one_for_all  # noqa: E402


def meet(error: str) -> None:
    """Meet the other processes again and again; fail after a while where a message for it is given."""
    with one_for_all(lambda: "The newest whole checkpoint is of step 5."):
        for count in range(10**6):
            multihost_utils.sync_global_devices("again")
            if count == 3:
                sys.stderr.write("met\n")
            if count == 5 and error:
                raise RuntimeError(error)


def save(workdir: str, full: int) -> None:
    """Save a small array every five steps; one process can't write a byte any more after a while."""
    from dydit_jax.checkpoints import CheckpointConfig, Run
    from dydit_jax.jobs.endings import about_newest

    mesh = jax.make_mesh((jax.device_count(),), ("data",))
    array = jax.jit(lambda: np.ones(64), out_shardings=jax.NamedSharding(mesh, jax.P("data")))()
    with Run(workdir, CheckpointConfig()) as run, one_for_all(lambda: about_newest(workdir)):
        for step in range(1, 100):
            if step % 5 == 0:
                run.save(step, dict(params=dict(array=array)), {})
            if step == 12 and jax.process_index() == full:
                resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))


def main():
    port, count, number, action, task = sys.argv[1:]
    task = json.loads(task)
    for name, seconds in json.loads(os.environ.get("WORKER_PEERS", "{}")).items():
        setattr(peers, name, seconds)
    with joined_processes(f"localhost:{port}", int(count), int(number)):
        if action == "meet":  # without the imports of the others, which take seconds
            meet(task.get(number, ""))
        elif action == "save":
            save(**task)
        elif action == "train":
            from dydit_jax.jobs.train import train_and_evaluate

            train_and_evaluate(task["config"][int(number)], task["workdir"][int(number)])
        elif action == "judge":
            from stand_ins import few_numbers_for_inception

            from dydit_jax.jobs.train import train_and_evaluate

            with few_numbers_for_inception():
                train_and_evaluate(task["config"], task["workdir"])
        elif action == "latents":
            from stand_ins import mean_for_autoencoder

            from dydit_jax.jobs.prepare_latents import LatentsRequest, prepare_latents

            with mean_for_autoencoder():
                prepare_latents(LatentsRequest(**task))
        else:
            from dydit_jax.jobs.sample import Request, sample

            samples = sample(Request(**task))
            np.save(f"{task['out']}/process_{number}.npy", samples.images)


if __name__ == "__main__":
    main()
