"""Time a training step: static, dynamic, and dynamic with top-k tokens; on this machine, or by the TPU compiler.

    python benchmarks/train_step.py --model S/2 --batch_size 8 --out docs/speed/train_s2.json
    python benchmarks/train_step.py --model XL/2 --batch_size 16 --chip v5e --remats block --out train_xl2_v5e.json

The steps take turns and medians are reported. With --chip nothing runs: the cycles are the compiler's, by both models
of cost in `tpu_compiler.py`; that needs `pip install "jax[tpu]"`.
"""

import json
import sys
import time

if any(argument.startswith("--chip") for argument in sys.argv):
    import tpu_compiler  # before jax: it sets the compiler's flags
# isort: split
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from etils import epath

from dydit_jax.models.config import published_config
from dydit_jax.models.dit import Model
from dydit_jax.runtime.console import run
from dydit_jax.training.experiment import build_update, read_experiment
from dydit_jax.training.optimizer import build_optimizer
from dydit_jax.training.update import batch_shapes, init_state

MODEL = flags.DEFINE_string("model", "S/2", "A published size.")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 8, "Images of a step, on one device.")
CAPACITY = flags.DEFINE_float("token_capacity", 0.5, "Share of tokens of the top-k step.")
DEPTH = flags.DEFINE_integer("depth", None, "Blocks of the model; those of its size by default.")
REMATS = flags.DEFINE_list("remats", ["none"], "Of none, block, dots: each is a contestant of its own.")
ROUNDS = flags.DEFINE_integer("rounds", 7, "Timed steps of each kind.")
CHIP = flags.DEFINE_string("chip", None, "v5e, v6e or v5p: ask the TPU compiler, time nothing.")
OUT = flags.DEFINE_string("out", None, "File for the results.", required=True)


def main():
    config = published_config(MODEL.value, side=32, routers="first_on")
    config = dataclasses.replace(config, depth=DEPTH.value or config.depth)
    limited = dataclasses.replace(config, token_capacity=(CAPACITY.value,))
    kinds = {
        "static": (config, ("complete",)),
        "dynamic": (config, ("gated",)),
        f"dynamic, top-k {CAPACITY.value}": (limited, ("gated",)),
        "dynamic and complete": (config, ("gated", "complete")),
    }
    dtype, platform = (jnp.dtype("bfloat16"), "tpu") if CHIP.value else (jnp.dtype("float32"), jax.default_backend())
    sections = dict(
        model=dataclasses.asdict(config),
        data=dict(name="synthetic", batch_size=BATCH_SIZE.value),
        optimizer=dict(learning_rate=1e-4),
        train=dict(steps=1),
    )
    experiment = read_experiment(sections)
    state = jax.eval_shape(
        lambda: init_state(Model(config).init(jax.random.key(0)), build_optimizer(experiment.optimizer))
    )
    batch = batch_shapes(config, BATCH_SIZE.value)
    updates = {
        kind if remat == REMATS.value[0] else f"{kind}, remat {remat}": build_update(
            experiment, Model(own, dtype, remat=remat, platform=platform), passes
        )
        for remat in REMATS.value
        for kind, (own, passes) in kinds.items()
    }
    rows = _costed(updates, state, batch) if CHIP.value else _timed(updates, state, batch)
    static = rows["static"]
    for row in rows.values():
        row["times_static"] = {name: value / static[name] for name, value in row.items() if name in static}
    macs = config.macs
    report = dict(
        command="python " + " ".join(sys.argv),
        machine=CHIP.value or jax.devices()[0].device_kind,
        date=time.strftime("%Y-%m-%d"),
        precision=dtype.name,
        share_of_mlp_in_macs=macs.layers * macs.mlp / macs.complete,
        rows=rows,
    )
    path = epath.Path(OUT.value)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=2) + "\n")
    sys.stdout.write(json.dumps(report, indent=2) + "\n")


def _timed(updates: dict, state, batch) -> dict:
    """Return the median seconds of each kind of step."""
    fill = lambda tree: jax.tree.map(lambda leaf: jnp.full(leaf.shape, 0.01).astype(leaf.dtype), tree)
    state, batch = jax.jit(lambda: (fill(state), fill(batch)))()
    compiled = {kind: jax.jit(update) for kind, update in updates.items()}
    seconds = {kind: [] for kind in updates}
    for _ in range(1 + ROUNDS.value):  # the first round compiles
        for kind, update in compiled.items():
            began = time.perf_counter()
            jax.block_until_ready(update(state, batch))
            seconds[kind].append(time.perf_counter() - began)
    return {kind: dict(seconds=float(np.median(taken[1:]))) for kind, taken in seconds.items()}


def _costed(updates: dict, state, batch) -> dict:
    """Return the compiler's cycles of each kind of step, and its temporary memory."""
    rows = {}
    for kind, update in updates.items():
        cost = tpu_compiler.compile_and_cost(update, state, batch, chip=CHIP.value)
        rows[kind] = dict(
            estimated=cost.estimated, scheduled=cost.scheduled, temporary_gib=cost.temporary_bytes / 2**30
        )
    return rows


if __name__ == "__main__":
    run(main)
