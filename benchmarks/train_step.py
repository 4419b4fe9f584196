"""Time a training step: static, dynamic, and dynamic with top-k tokens; on this machine, or by the TPU compiler.

    python benchmarks/train_step.py --model S/2 --batch_size 8 --peers --out docs/speed/train_s2.json
    python benchmarks/train_step.py --model fashion_dit --batch_size 32 --peers --out docs/speed/train_fashion.json
    python benchmarks/train_step.py --model XL/2 --batch_size 16 --chip v5e --remats block --out train_xl2_v5e.json

The steps take turns and medians are reported. All of ours train the same state, whose memory each reuses, as in a run.
Peers are diffusers' static DiT of the same size in PyTorch, eager and compiled, with the same embeddings for all
blocks, and the error of the noise as its loss. MACs are those of three forward passes. With --chip nothing runs: the
cycles are the compiler's, by both models of cost in `tpu_compiler.py`; that needs `pip install "jax[tpu]"`.
"""

import json
import sys
import time

if any(argument.startswith("--chip") for argument in sys.argv):
    import tpu_compiler  # before jax: it sets the compiler's flags
# isort: split
import dataclasses
import importlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from etils import epath
from machines import processor
from torch_peer import CLIP_NORM, LEARNING_RATE, make_network, make_training_step, share_embeddings
from training_steps import describe_training

from dydit_jax.models.config import DiTConfig, published_config, read_model
from dydit_jax.models.dit import Model
from dydit_jax.models.precision import REMAT_SETTINGS, resolve_remat
from dydit_jax.runtime.console import run
from dydit_jax.training.experiment import build_update
from dydit_jax.training.update import batch_shapes

MODEL = flags.DEFINE_string("model", "S/2", "A published size, or the name of a config.")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 8, "Images of a step, on one device.")
CAPACITY = flags.DEFINE_float("token_capacity", 0.5, "Share of tokens of the top-k step.")
DEPTH = flags.DEFINE_integer("depth", None, "Blocks of the model; those of its size by default.")
REMATS = flags.DEFINE_list("remats", ["auto"], f"Of {', '.join(REMAT_SETTINGS)}: each is a contestant of its own.")
ROUNDS = flags.DEFINE_integer("rounds", 7, "Timed steps of each kind.")
STATIC = flags.DEFINE_bool("static", False, "Only the static step.")
PEERS = flags.DEFINE_bool("peers", False, "Also time diffusers' DiT in PyTorch.")
CHIP = flags.DEFINE_string("chip", None, "v5e, v6e or v5p: ask the TPU compiler, time nothing.")
OUT = flags.DEFINE_string("out", None, "File for the results.", required=True)

GRADIENT = "static, without its update"
FORWARDS = 3  # that a step counts as: the gradient is two more


def main():
    config = model_config(MODEL.value)
    config = dataclasses.replace(config, depth=DEPTH.value or config.depth)
    limited = dataclasses.replace(config, token_capacity=(CAPACITY.value,))
    kinds = {
        "static": (config, ("complete",)),
        "dynamic": (config, ("gated",)),
        f"dynamic, top-k {CAPACITY.value}": (limited, ("gated",)),
        "dynamic and complete": (config, ("gated", "complete")),
    }
    kinds = {kind: kinds[kind] for kind in (["static"] if STATIC.value else kinds)}
    dtype, platform = (jnp.dtype("bfloat16"), "tpu") if CHIP.value else (jnp.dtype("float32"), jax.default_backend())
    optimizer = dict(learning_rate=LEARNING_RATE, clip_norm=CLIP_NORM)
    experiment, state = describe_training(config, BATCH_SIZE.value, optimizer=optimizer)
    batch = batch_shapes(config, BATCH_SIZE.value)
    updates, macs = {}, {}
    for remat in REMATS.value:
        for kind, (own, passes) in kinds.items():
            name = kind if remat == REMATS.value[0] else f"{kind}, remat {remat}"
            model = Model(own, dtype, remat=resolve_remat(remat), platform=platform)
            updates[name] = build_update(experiment, model, passes)
            macs[name] = FORWARDS * BATCH_SIZE.value * sum(_macs(own, mode) for mode in passes)
    if CHIP.value:
        # What is left when nobody asks for the new state: gradient and norm. A pod divides the rest among its chips.
        updates[GRADIENT] = lambda state, batch, update=updates["static"]: update(state, batch)[1]
        macs[GRADIENT] = macs["static"]
    rows = _costed(updates, state, batch) if CHIP.value else _timed(updates, state, batch, config)
    _compare(rows, macs)
    report = dict(
        command="python " + " ".join(sys.argv),
        machine=CHIP.value or f"{processor()}, {jax.local_device_count()} x {jax.devices()[0].device_kind}",
        date=time.strftime("%Y-%m-%d"),
        precision=dtype.name,
        share_of_mlp_in_macs=config.macs.layers * config.macs.mlp / config.macs.complete,
        rows=rows,
    )
    path = epath.Path(OUT.value)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=2) + "\n")
    sys.stdout.write(json.dumps(report, indent=2) + "\n")


def model_config(name: str) -> DiTConfig:
    """Return a model with routers, from a published size for 256 px or from the name of a config."""
    if "/" in name:
        return published_config(name, side=32, routers="first_on")
    config = importlib.import_module(f"dydit_jax.configs.{name}").get_config()
    return dataclasses.replace(read_model(config.model.to_dict()), routers="first_on")


def _macs(config: DiTConfig, mode: str) -> float:
    """Return the MACs of an image's forward pass: tokens without a row cost nothing, closed gates as much as open."""
    macs = config.macs
    if mode == "complete":
        return macs.complete
    rows = sum(config.capacities) / config.tokens  # of all layers, in units of all tokens
    return macs.fixed + macs.routers + macs.layers * macs.attention + rows * macs.mlp


def _compare(rows: dict, macs: dict) -> None:
    """Add to each row its MACs, its speed, and multiples of the static step and of the compiled peer."""
    for name, row in rows.items():
        row["giga_macs"] = macs.get(name, macs["static"]) / 1e9
        if "seconds" in row:
            row["giga_flops_per_second"] = 2 * row["giga_macs"] / row["seconds"]
        for cycles in {"estimated", "scheduled"} & set(row):
            peak = tpu_compiler.CHIPS[CHIP.value].flops_per_cycle
            row[f"{cycles}_share_of_peak"] = 2e9 * row["giga_macs"] / peak / row[cycles]
        for other in {"static", "torch_compiled"} & set(rows):
            compared = ("seconds", "estimated", "scheduled")
            row[f"times_{other}"] = {key: row[key] / rows[other][key] for key in compared if key in row}


def _timed(updates: dict, state, batch, config: DiTConfig) -> dict:
    """Return the seconds of each kind of step, and of ours the memory beside the state, by the compiler."""
    fill = lambda tree: jax.tree.map(lambda leaf: jnp.full(leaf.shape, 0.01).astype(leaf.dtype), tree)
    held = [jax.jit(lambda: fill(state))()]
    batch = jax.jit(lambda: fill(batch))()

    def stepping(update) -> Callable:
        def step():
            held[0], _ = update(held[0], batch)
            jax.block_until_ready(held[0])

        return step

    rows, steps = {}, {}
    for kind, update in updates.items():
        began = time.perf_counter()
        compiled = jax.jit(update, donate_argnums=0).lower(held[0], batch).compile()
        temporary = compiled.memory_analysis().temp_size_in_bytes / 2**30
        rows[kind] = dict(compile_seconds=time.perf_counter() - began, temporary_gib=temporary, all_seconds=[])
        steps[kind] = stepping(compiled)
    if PEERS.value:
        peers = _peers(config)
        rows |= {kind: dict(all_seconds=[]) for kind in peers}
        steps |= peers
    for kind, step in steps.items():  # PyTorch compiles here
        began = time.perf_counter()
        step()
        rows[kind]["first_step_seconds"] = time.perf_counter() - began
        sys.stderr.write(f"{kind}: first step {rows[kind]['first_step_seconds']:.1f} s\n")
    for _ in range(ROUNDS.value):
        for kind, step in steps.items():
            began = time.perf_counter()
            step()
            rows[kind]["all_seconds"].append(time.perf_counter() - began)
    for row in rows.values():
        row["seconds"] = float(np.median(row["all_seconds"]))
    return rows


def _peers(config: DiTConfig) -> dict:
    """Return training steps of diffusers' static DiT of the same size, of the same name in both forms."""
    import torch

    steps = {}
    for name, wrap in dict(torch_eager=lambda network: network, torch_compiled=torch.compile).items():
        network = make_network(config).to("cuda" if torch.cuda.is_available() else "cpu")
        share_embeddings(network)
        steps[name] = make_training_step(network, wrap(network), config, BATCH_SIZE.value)
    return steps


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
