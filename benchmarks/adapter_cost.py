"""What training a part of the weights saves, by compilers, and what updates of the timestep cost in sampling.

    python benchmarks/adapter_cost.py --parts training,sampling --out docs/speed/adapters.json
    pip install "jax[cuda12]"
    python benchmarks/adapter_cost.py --parts gpu --out docs/speed/adapters.json

A file that is there keeps its other parts.

    training  numbers and bytes of the state, and the memory of a step as XLA compiles it for this machine's CPU, in
              float32; nothing is run
    gpu       the same for a GPU that need not be there (`gpu_compiler.py`), in bfloat16
    sampling  seconds of a batch with updates that are folded at every step, and without any, in turns, on random
              weights with every gate open; and of folding alone
"""

from gpu_compiler import as_if_on_a_gpu, device  # before jax

# isort: split
import dataclasses
import functools
import importlib.metadata
import json
import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from etils import epath

from dydit_jax.diffusion.process import Diffusion
from dydit_jax.diffusion.samplers import SamplingConfig
from dydit_jax.fast.narrow import NarrowedBlocks
from dydit_jax.models.config import published_config
from dydit_jax.models.dit import Model
from dydit_jax.models.lora import TARGETS, LoRAConfig, fold_block, is_low_rank
from dydit_jax.models.trainable import PARTS, split_params
from dydit_jax.runtime.console import run
from dydit_jax.runtime.sharding import MeshConfig, make_mesh
from dydit_jax.sampling.generate import SamplingRun
from dydit_jax.training.experiment import build_update, read_experiment
from dydit_jax.training.optimizer import build_optimizer
from dydit_jax.training.update import batch_shapes, compile_update, init_state
from dydit_jax.trees import flatten

COUNTED = flags.DEFINE_list("parts", ["training", "sampling"], "training, gpu, sampling.")
MODEL = flags.DEFINE_string("model", "XL/2", "A published size, to train.")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 8, "Images of a training step.")
GPU_BATCH_SIZES = flags.DEFINE_list("gpu_batch_sizes", ["8", "16", "32"], "The same, of the part `gpu`.")
DRAWN = flags.DEFINE_list(
    "drawn", ["S/2:8", "S/2:16", "B/2:4"], "Published sizes, to draw with, and images of a batch."
)
STEPS = flags.DEFINE_integer("steps", 4, "Steps of a batch that is drawn.")
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
# Of which the memory on a GPU is listed.
ON_GPU = ("everything", "routers, labels, lora of rank 16")


# --- Training ------------------------------------------------------------------------------------


def training() -> dict:
    """Return the costs of every kind of training by the CPU's compiler."""
    rows = {kind: cost(kind, BATCH_SIZE.value, "float32", jax.devices()[0]) for kind in KINDS}
    for row in rows.values():
        row["optimizer_of_everything"] = row["optimizer_gib"] / rows["everything"]["optimizer_gib"]
    return dict(machine=f"{jax.devices()[0].device_kind}, float32", rows=rows)


def training_on_gpu() -> dict:
    """Return the memory of some kinds of training by the compiler for CUDA, in bfloat16; where nothing was compiled."""
    rows, versions = [], {name: importlib.metadata.version(name) for name in ("jax", "jax-cuda12-plugin")}
    for batch_size in map(int, GPU_BATCH_SIZES.value):
        for kind in ON_GPU:
            with as_if_on_a_gpu():
                row = cost(kind, batch_size, "bfloat16", device())
            rows.append(dict(kind=kind, batch_size=batch_size) | {key: row[key] for key in row if key.endswith("_gib")})
            sys.stderr.write(f"{rows[-1]}\n")
    return dict(machine=f"{device().device_kind}, which is not there, bfloat16", versions=versions, rows=rows)


def cost(kind: str, batch_size: int, dtype: str, chip) -> dict:
    """Compile a step of the second stage for one chip and return what its state and it need."""
    trainable, lora = KINDS[kind]
    config = published_config(MODEL.value, side=32, routers="first_on")
    sections = dict(
        model=dataclasses.asdict(config),
        data=dict(name="synthetic", batch_size=batch_size),
        optimizer=dict(learning_rate=1e-4),
        train=dict(steps=1, trainable=trainable, init_from="dit-xl2-256"),
        lora=lora,
    )
    experiment = read_experiment(sections)
    updates = experiment.lora if "lora" in trainable else None
    model = Model(config, jnp.dtype(dtype), remat="block", platform=jax.default_backend(), lora=updates)
    trained, frozen = split_params(model.abstract_params(), trainable)
    make_state = functools.partial(init_state, optimizer=build_optimizer(experiment.optimizer))
    state = jax.eval_shape(lambda trained, frozen: make_state(trained, frozen=frozen), trained, frozen)
    update, mesh = build_update(experiment, model, ("gated",)), make_mesh(MeshConfig(), [chip])
    memory = compile_update(update, state, batch_shapes(config, batch_size), mesh).memory_analysis()
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


# --- Sampling ------------------------------------------------------------------------------------


def sampling() -> dict:
    """Return what updates of the timestep cost in sampling, for every size and batch."""
    rows = []
    for size, _, images in (case.partition(":") for case in DRAWN.value):
        rows.append(dict(model=size, images=int(images)) | seconds_of_sampling(size, int(images)))
        sys.stderr.write(f"{rows[-1]}\n")
    return dict(machine=f"{jax.devices()[0].device_kind}, float32", steps=STEPS.value, rounds=ROUNDS.value, rows=rows)


def seconds_of_sampling(size: str, images: int) -> dict:
    """Return the seconds of a step with updates of the timestep and without, and of folding them; in turns."""
    config, lora = published_config(size, side=32), LoRAConfig(**EXPERTS)
    settings = SamplingConfig(sampler="ddim", steps=str(STEPS.value), guidance=1.0)
    calls = {}
    for kind, updates in {"without": None, "with": lora}.items():
        model = Model(config, lora=updates)
        params = jax.jit(model.init)(jax.random.key(0))
        run = SamplingRun(model, params, sampling=settings, process=Diffusion())
        calls[kind] = functools.partial(run.draw, np.arange(images))
    calls["fold"] = folding(model, params)
    seconds = {kind: [] for kind in calls}
    for _ in range(1 + ROUNDS.value):  # the first round compiles
        for kind, call in calls.items():
            began = time.perf_counter()
            call()
            seconds[kind].append(time.perf_counter() - began)
    steps = dict(fold=1)
    times = {kind: np.array(taken[1:]) / steps.get(kind, STEPS.value) for kind, taken in seconds.items()}
    found = {f"{kind}_seconds": float(np.median(taken)) for kind, taken in times.items()}
    found |= {f"{kind}_seconds_least": float(np.min(taken)) for kind, taken in times.items()}
    ratio, share = times["with"] / times["without"], times["fold"] / times["without"]
    return found | dict(ratio=float(np.median(ratio)), fold_share=float(np.median(share)), **counts(config, images))


def folding(model: Model, params) -> Callable:
    """Return the function that folds the updates of one step into the kernels of all blocks."""
    whole = (tuple(range(model.config.heads)),) * model.config.depth
    blocks = NarrowedBlocks(params["blocks"], dtype=model.dtype, platform=model.platform).narrow_to(whole, whole)

    @jax.jit
    def fold(blocks):
        folded = [fold_block(block, jnp.full(EXPERTS["experts"], 0.25), model.lora) for block in blocks]
        return [{name: block[part][name] for name, part in TARGETS.items()} for block in folded]

    return lambda: jax.block_until_ready(fold(blocks))


def counts(config, images: int) -> dict:
    """Return what folding adds to a step: MACs, as a share, and the bytes of a kernel's way from memory and back."""
    kernels = config.depth * (4 + 2 * config.mlp_ratio) * config.width**2
    return dict(
        macs_share=EXPERTS["rank"] * kernels / (images * config.macs.complete),
        folded_gib=2 * 4 * kernels / GIB,  # read and written, in float32
    )


COSTS = dict(training=training, gpu=training_on_gpu, sampling=sampling)


def main():
    path = epath.Path(OUT.value)
    path.parent.mkdir(parents=True, exist_ok=True)
    report = json.loads(path.read_text()) if path.exists() else {}
    for part in COUNTED.value:
        made = dict(command="python " + " ".join(sys.argv), date=time.strftime("%Y-%m-%d"))
        report[part] = made | COSTS[part]()
        path.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    run(main)
