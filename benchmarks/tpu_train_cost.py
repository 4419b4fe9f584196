"""What the TPU compiler says a training step on a slice needs, without a TPU: memory per chip, and collectives.

    pip install "jax[tpu]"
    python benchmarks/tpu_train_cost.py --topologies v5e:4x4,v6e:4x4,v5p:2x2x4 --out docs/speed/tpu_train_xl2.json

XL/2 at a global batch of 256 in bfloat16: the first stage (dynamic and complete pass), the second (dynamic) and
the static model's step, with the parameters copied to all chips (data), split over them (fsdp), or both (4x4: 4 x 4
chips). Cycles are not given: the compiler hides gathers of weights behind products in ways that its costs do not show;
`train_step.py --chip` has the cycles of one chip alone.
"""

import json
import sys
import time

from tpu_compiler import devices  # before jax

# isort: split
import importlib.metadata
import re

import jax
import jax.numpy as jnp
from absl import flags
from etils import epath
from training_steps import describe_training

from dydit_jax.models.config import published_config
from dydit_jax.models.dit import Model
from dydit_jax.runtime.console import run
from dydit_jax.runtime.sharding import MeshConfig, batch_sharding, make_constrain_fn, make_mesh, replicated, shardings
from dydit_jax.training.experiment import build_update
from dydit_jax.training.update import batch_shapes

MODEL = flags.DEFINE_string("model", "XL/2", "A published size.")
TOPOLOGIES = flags.DEFINE_list("topologies", ["v5e:4x4", "v6e:4x4", "v5p:2x2x4"], "Slices, as chip:shape.")
LAYOUTS = flags.DEFINE_list(
    "layouts", ["data", "fsdp"], "data, fsdp: the axis that all chips lie on; 4x4: so many on each."
)
REMATS = flags.DEFINE_list("remats", ["block"], "none, dots, block.")
STAGES = flags.DEFINE_list("stages", ["static", "second", "first"], "Steps to compile.")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 256, "Images of a step, on all chips.")
ACCUMULATE = flags.DEFINE_integer("accumulate", 1, "Parts of a batch.")
OUT = flags.DEFINE_string("out", None, "File for the results.", required=True)

PASSES = dict(static=("complete",), second=("gated",), first=("gated", "complete"))
COLLECTIVES = r"(all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?"
GIB = 2**30


def main():
    rows = []
    report = dict(
        command="python " + " ".join(sys.argv),
        versions={name: importlib.metadata.version(name) for name in ("jax", "libtpu")},
        date=time.strftime("%Y-%m-%d"),
        model=MODEL.value,
        batch_size=BATCH_SIZE.value,
        rows=rows,
    )
    path = epath.Path(OUT.value)
    path.parent.mkdir(parents=True, exist_ok=True)
    for topology in TOPOLOGIES.value:
        for layout in LAYOUTS.value:
            for remat in REMATS.value:
                for stage in STAGES.value:
                    rows.append(cost(topology, layout, remat, stage))
                    sys.stderr.write(f"{rows[-1]}\n")
                    path.write_text(json.dumps(report, indent=2) + "\n")


def cost(topology: str, layout: str, remat: str, stage: str) -> dict:
    """Compile one kind of step for a slice."""
    sizes = dict(data=(-1, 1), fsdp=(1, -1)).get(layout) or map(int, layout.split("x"))
    mesh = make_mesh(MeshConfig(*sizes), devices(topology))
    config = published_config(MODEL.value, side=32, routers="none" if stage == "static" else "first_on")
    constrain = make_constrain_fn(mesh)
    model = Model(config, jnp.dtype("bfloat16"), remat=remat, platform="tpu", constrain=constrain)
    settings = dict(optimizer=dict(learning_rate=1e-4), accumulate=ACCUMULATE.value)
    experiment, abstract = describe_training(config, BATCH_SIZE.value, **settings)
    places = shardings(mesh, abstract)
    place = lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
    batch = {name: place(leaf, batch_sharding(mesh)) for name, leaf in batch_shapes(config, BATCH_SIZE.value).items()}
    update = jax.jit(
        build_update(experiment, model, PASSES[stage]), out_shardings=(places, replicated(mesh)), donate_argnums=0
    )
    row, began = dict(topology=topology, layout=layout, remat=remat, stage=stage), time.monotonic()
    try:
        with jax.set_mesh(mesh):
            found = update.lower(jax.tree.map(place, abstract, places), batch).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return row | dict(does_not_fit=str(error).splitlines()[0])
    text, memory, weights = found.as_text(), found.memory_analysis(), weight_shapes(abstract.params)
    return row | dict(
        state_gib=memory.argument_size_in_bytes / GIB,
        temporary_gib=memory.temp_size_in_bytes / GIB,
        together_gib=(memory.argument_size_in_bytes + memory.temp_size_in_bytes) / GIB,
        collectives=dict(count_collectives(text)),
        other_gathers=[shape for shape in gathered_shapes(text) if shape not in weights],
        compile_seconds=time.monotonic() - began,
    )


def weight_shapes(params) -> set[tuple[int, ...]]:
    """Return the shapes that gathers of weights may have: of a layer or all, of one of q, k, v, neighbours merged."""
    found = set()
    for leaf in jax.tree.leaves(params):
        for skipped in range(3):
            shape = [n for n in leaf.shape[skipped:] if n > 1]
            merged = [shape[:i] + [shape[i] * shape[i + 1]] + shape[i + 2 :] for i in range(len(shape) - 1)]
            found |= {tuple(sorted(one)) for one in [shape, *merged]}
    return found


def count_collectives(text: str):
    """Yield the kinds of collectives in a program and how many instructions of each it has."""
    found = re.findall(rf"= [^=]*? {COLLECTIVES}\(", text)
    for kind in sorted(set(found)):
        yield kind, found.count(kind)


def gathered_shapes(text: str) -> list[tuple[int, ...]]:
    """Return the shapes that all-gathers make, without axes of one, sorted within."""
    shapes = []
    for types in re.findall(r"= ([^=]*?) all-gather(?:-start)?\(", text):
        sizes = re.findall(r"\w+\[([\d,]*)\]", types)[-1]
        shapes.append(tuple(sorted(int(n) for n in sizes.split(",") if n and int(n) > 1)))
    return shapes


if __name__ == "__main__":
    run(main)
