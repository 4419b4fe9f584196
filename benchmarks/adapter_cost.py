"""What training a part of the weights saves, by the compiler, and what updates of the timestep cost in sampling.

    python benchmarks/adapter_cost.py --out docs/speed/adapters.json

Training: numbers and bytes of the state, and the memory of a step as XLA compiles it for this machine's CPU, in
float32; nothing is run. Sampling: seconds of a batch with updates that are folded at every step, and without any, in
turns, on random weights with every gate open.
"""

import dataclasses
import functools
import json
import sys
import time

import jax
import numpy as np
from absl import flags
from etils import epath

from dydit_jax.diffusion.process import Diffusion
from dydit_jax.diffusion.samplers import SamplingConfig
from dydit_jax.models.config import published_config
from dydit_jax.models.dit import Model
from dydit_jax.models.lora import LoRAConfig, is_low_rank
from dydit_jax.models.trainable import PARTS, split_params
from dydit_jax.runtime.console import run
from dydit_jax.runtime.sharding import MeshConfig, make_mesh
from dydit_jax.sampling.generate import SamplingRun
from dydit_jax.training.experiment import build_update, read_experiment
from dydit_jax.training.optimizer import build_optimizer
from dydit_jax.training.update import batch_shapes, compile_update, init_state
from dydit_jax.trees import flatten

MODEL = flags.DEFINE_string("model", "XL/2", "A published size, to train.")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 8, "Images of a training step.")
DRAWN = flags.DEFINE_string("drawn", "S/2", "A published size, to draw with.")
IMAGES = flags.DEFINE_integer("images", 8, "Images of a batch that is drawn.")
STEPS = flags.DEFINE_integer("steps", 8, "Its steps.")
ROUNDS = flags.DEFINE_integer("rounds", 7, "Timed batches of each kind.")
OUT = flags.DEFINE_string("out", None, "File for the results.", required=True)

GIB = 2**30
EXPERTS = dict(rank=4, alpha=4.0, experts=4)
KINDS = {
    "everything": (("everything",), {}),
    "routers": (("routers",), {}),
    "routers, labels": (("routers", "labels"), {}),
    "routers, labels, lora of rank 16": (("routers", "labels", "lora"), {}),
    "routers, labels, 4 experts of rank 4": (("routers", "labels", "lora"), EXPERTS),
}


def cost(trainable: tuple[str, ...], lora: dict) -> dict:
    """Compile a step of the second stage and return what its state and it need."""
    config = published_config(MODEL.value, side=32, routers="first_on")
    sections = dict(
        model=dataclasses.asdict(config),
        data=dict(name="synthetic", batch_size=BATCH_SIZE.value),
        optimizer=dict(learning_rate=1e-4),
        train=dict(steps=1, trainable=trainable, init_from="dit-xl2-256"),
        lora=lora,
    )
    experiment = read_experiment(sections)
    model = Model(config, remat="block", lora=experiment.lora if "lora" in trainable else None)
    trained, frozen = split_params(model.abstract_params(), trainable)
    make_state = functools.partial(init_state, optimizer=build_optimizer(experiment.optimizer))
    state = jax.eval_shape(lambda trained, frozen: make_state(trained, frozen=frozen), trained, frozen)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    update = build_update(experiment, model, ("gated",))
    memory = compile_update(update, state, batch_shapes(config, BATCH_SIZE.value), mesh).memory_analysis()
    count = lambda tree, wanted=lambda path: True: sum(
        leaf.size for path, leaf in flatten(tree).items() if wanted(path)
    )
    return dict(
        trained=count(trained),
        low_rank=count(trained, is_low_rank),
        routers=count(trained, PARTS["routers"]),
        labels=count(trained, PARTS["labels"]),
        share_of_low_rank=count(trained, is_low_rank) / count(trained | frozen, lambda path: not is_low_rank(path)),
        optimizer_gib=sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state.opt_state)) / GIB,
        checkpoint_gib=4 * count(trained) / GIB,
        state_gib=memory.argument_size_in_bytes / GIB,
        temporary_gib=memory.temp_size_in_bytes / GIB,
        together_gib=(memory.argument_size_in_bytes + memory.temp_size_in_bytes) / GIB,
    )


def seconds_of_sampling() -> dict:
    """Return the seconds of a batch with updates of the timestep and without, medians over rounds in turns."""
    config = published_config(DRAWN.value, side=32)
    labels = np.arange(IMAGES.value)
    sampling = SamplingConfig(sampler="ddim", steps=str(STEPS.value), guidance=1.0)
    draws = {}
    for kind, lora in {"without": None, "with": LoRAConfig(**EXPERTS)}.items():
        model = Model(config, lora=lora)
        params = jax.jit(model.init)(jax.random.key(0))
        draws[kind] = functools.partial(SamplingRun(model, params, sampling=sampling, process=Diffusion()).draw, labels)
    seconds = {kind: [] for kind in draws}
    for _ in range(1 + ROUNDS.value):  # the first round compiles
        for kind, draw in draws.items():
            began = time.perf_counter()
            draw()
            seconds[kind].append(time.perf_counter() - began)
    found = {kind: float(np.median(taken[1:])) for kind, taken in seconds.items()}
    return found | dict(ratio=found["with"] / found["without"])


def main():
    rows = {kind: cost(*settings) for kind, settings in KINDS.items()}
    for row in rows.values():
        row["optimizer_of_everything"] = row["optimizer_gib"] / rows["everything"]["optimizer_gib"]
    report = dict(
        command="python " + " ".join(sys.argv),
        machine=f"{jax.devices()[0].device_kind}, float32",
        date=time.strftime("%Y-%m-%d"),
        training=rows,
    )
    path = epath.Path(OUT.value)
    path.parent.mkdir(parents=True, exist_ok=True)
    write = lambda report: path.write_text(json.dumps(report, indent=2) + "\n")
    write(report)
    report |= dict(sampling=seconds_of_sampling())
    write(report)
    sys.stdout.write(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    run(main)
