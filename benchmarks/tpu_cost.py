"""What the TPU compiler says complete and fast sampling cost, without a TPU.

    pip install "jax[tpu]"
    python benchmarks/tpu_cost.py --chips v5e,v6e --batch_sizes 32,64 --out docs/speed/tpu_xl2.json

XL/2 in bfloat16 with the residual stream in float32, on one core. The fast model keeps 11 of 16 heads and 10 of 16
groups in every block, and 65 % of the tokens are open, with standard deviation `--deviation` between images. Capacities
are those that a job's own calibration would choose, for each execution: rows of each image (`one_hot`), or of all
images of a pass together (`mosaic`); `--capacity` sets another number. `capacities.py` measures how much images differ
and how many rows they need. `tpu_compiler.py` explains both models of cost and what they leave out. The efficiency is
the speed-up divided by the ratio of MACs.
"""

import json
import sys
import time

from tpu_compiler import CHIPS, Cost, compile_and_cost  # before jax

# isort: split
import dataclasses
import functools
import importlib.metadata

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from etils import epath
from flax import nnx

from dydit_jax.diffusion.process import Diffusion
from dydit_jax.diffusion.samplers import Sampler, SamplingConfig
from dydit_jax.fast.execution.registry import find_execution
from dydit_jax.fast.narrow import NarrowedBlocks, cast_for_products, narrow
from dydit_jax.fast.usage import TokenUsage
from dydit_jax.models.config import published_config
from dydit_jax.models.cost import routed_macs
from dydit_jax.models.dit import Block, Model
from dydit_jax.models.execution import Dense, TokenExecution
from dydit_jax.models.routing import Routing
from dydit_jax.runtime.console import run
from dydit_jax.sampling.planning import MOST_CALIBRATED
from dydit_jax.sampling.segment import SegmentInputs, SegmentSettings, microbatch_size, run_segment
from dydit_jax.sampling.table import make_table

MODEL = flags.DEFINE_string("model", "XL/2", "A published size.")
DEPTH = flags.DEFINE_integer("depth", None, "Blocks of the model; those of its size by default.")
CHIP_NAMES = flags.DEFINE_list("chips", ["v5e", "v6e"], f"Of {', '.join(CHIPS)}.")
BATCH_SIZES = flags.DEFINE_list("batch_sizes", ["32"], "Images of one pass.")
PARTS = flags.DEFINE_list("parts", ["block", "model"], "block, model.")
HEADS = flags.DEFINE_integer("heads", 11, "Heads that the fast model keeps in each block.")
GROUPS = flags.DEFINE_integer("groups", 10, "Groups that the fast model keeps in each block.")
TOKEN_SHARE = flags.DEFINE_float("token_share", 0.65, "Share of an image's tokens that is open.")
DEVIATION = flags.DEFINE_float("deviation", 0.024, "Standard deviation of the images' shares of open tokens.")
CALIBRATED = flags.DEFINE_integer("calibrated", MOST_CALIBRATED, "Images that a job was calibrated on.")
CAPACITY = flags.DEFINE_integer("capacity", None, "Rows for an image's tokens, on average over images that share them.")
EXECUTIONS = flags.DEFINE_list(
    "executions", ["one_hot", "mosaic"], "How the fast model runs tokens, see `fast/execution`."
)
STEPS = 25  # of the compiled scan over the schedule, as in one segment of ten
SHOWN = flags.DEFINE_integer("shown", 0, "Instructions to list for each program, the dearest first.")
OUT = flags.DEFINE_string("out", None, "File for the results.", required=True)


def main():
    rows = []
    for chip in CHIP_NAMES.value:
        for batch in map(int, BATCH_SIZES.value):
            for part in PARTS.value:
                rows += {"block": _blocks, "model": _models}[part](chip, batch)
                sys.stderr.write("\n".join(map(_summary, rows[-1 - len(EXECUTIONS.value) :])) + "\n")
    report = dict(
        command="python " + " ".join(sys.argv),
        versions={name: importlib.metadata.version(name) for name in ("jax", "libtpu")},
        date=time.strftime("%Y-%m-%d"),
        model=MODEL.value,
        heads=HEADS.value,
        groups=GROUPS.value,
        token_share=TOKEN_SHARE.value,
        deviation=DEVIATION.value,
        calibrated=CALIBRATED.value,
        rows=rows,
    )
    path = epath.Path(OUT.value)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=2) + "\n")


def _summary(row: dict) -> str:
    words = [f"{row['part']} {row['mode']:13s} {row['chip']} B={row['batch']}:"]
    for kind in ("estimated", "scheduled"):
        words.append(f"{kind} {row[kind] / 1e3:.0f}k ({100 * row[f'{kind}_share_of_peak']:.1f} % of the peak)")
        if f"{kind}_efficiency" in row:
            words.append(f"speed-up {row[f'{kind}_speedup']:.2f}, efficiency {row[f'{kind}_efficiency']:.3f};")
    return " ".join(words)


def _rows(part: str, chip: str, batch: int, images: int, costs: dict[str, Cost], macs: dict[str, float]) -> list[dict]:
    """Set costs of all modes beside the peak and beside `complete`; images are of a pass, MACs of the whole batch."""
    rows = []
    for mode, cost in costs.items():
        work = macs["complete" if mode == "complete" else "fast"]
        row = dict(part=part, chip=chip, batch=batch, mode=mode, temporary_mib=cost.temporary_bytes / 2**20)
        for kind in ("estimated", "scheduled"):
            cycles = getattr(cost, kind)
            row[kind] = cycles
            row[f"{kind}_milliseconds"] = 1e3 * cycles / CHIPS[chip].clock
            row[f"{kind}_share_of_peak"] = 2 * work / CHIPS[chip].flops_per_cycle / cycles
            if mode != "complete":
                row["rows"] = _execution(mode.split()[-1], images).capacity[0]
                row[f"{kind}_speedup"] = getattr(costs["complete"], kind) / cycles
                row[f"{kind}_efficiency"] = row[f"{kind}_speedup"] / (macs["complete"] / work)
        rows.append(row)
        for estimated, scheduled, text in sorted(cost.instructions, key=lambda row: -row[1])[: SHOWN.value]:
            sys.stderr.write(f"  {estimated / 1e3:8.0f}k {scheduled / 1e3:8.0f}k  {text[:200]}\n")
    return rows


def _fast(name: str) -> str:
    return f"fast, {name}"


def _execution(name: str, images: int) -> TokenExecution:
    """Return an execution with the rows that the images of a pass need."""
    execution, tokens = find_execution(name, "tpu"), _model().config.tokens
    if CAPACITY.value:
        rows = CAPACITY.value * execution.packed_together(images)
        return dataclasses.replace(execution, capacity=(rows,))
    column = lambda value: np.full((1, 1), value)
    usage = TokenUsage(column(TOKEN_SHARE.value), column(DEVIATION.value), column(0.0), CALIBRATED.value)
    shares = execution.required_shares(usage, images)
    return execution.with_capacity(shares[:, 0], images=images, tokens=tokens)


def _model() -> Model:
    config = published_config(MODEL.value, side=32, routers="free")
    config = dataclasses.replace(config, depth=DEPTH.value or config.depth)
    return Model(config, jnp.dtype("bfloat16"), platform="tpu")


def _blocks(chip: str, batch: int) -> list[dict]:
    """Cost one block, modulation included."""
    config, dtype, router = _model().config, _model().dtype, _model().routers.token
    settings = dict(token_router=router, dtype=dtype, platform="tpu")
    block = nnx.eval_shape(lambda: Block(config, **settings, rngs=nnx.Rngs(0)))
    graph, weights = nnx.split(block)
    stacked = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((1, *leaf.shape), leaf.dtype), nnx.to_pure_dict(weights))
    kept = lambda heads, groups: jax.eval_shape(
        lambda blocks: narrow(blocks, heads=(tuple(range(heads)),), groups=(tuple(range(groups)),), dtype=dtype)[0],
        stacked,
    )
    x = jax.ShapeDtypeStruct((batch, config.tokens, config.width), jnp.float32)
    condition = jax.ShapeDtypeStruct((batch, config.width), jnp.float32)

    def run_block(weights, x, condition, *, execution: TokenExecution):
        block = nnx.merge(graph, nnx.State(weights))
        stream, _ = block(execution.enter(x), block.modulation(condition), None, None, execution=execution)
        return stream

    cost = lambda weights, execution: compile_and_cost(
        functools.partial(run_block, execution=execution), weights, x, condition, chip=chip
    )
    costs = dict(complete=cost(kept(config.heads, config.heads), Dense("tpu")))
    for name in EXECUTIONS.value:
        costs[_fast(name)] = cost(kept(HEADS.value, GROUPS.value), _execution(name, batch))
    macs = config.macs
    modulation = 6 * config.width**2
    needed = dict(
        complete=macs.attention + macs.mlp + modulation,
        fast=macs.attention * HEADS.value / config.heads
        + macs.mlp * GROUPS.value / config.heads * TOKEN_SHARE.value
        + macs.token_router
        + modulation,
    )
    return _rows("block", chip, batch, batch, costs, {mode: batch * count for mode, count in needed.items()})


def _models(chip: str, batch: int) -> list[dict]:
    """Cost the steps of a segment with the whole model, sampler included."""
    model = _model()
    config = model.config
    sampling, process = SamplingConfig(sampler="ddpm", steps="250"), Diffusion()
    table = make_table(sampling, process)
    sampler, rows = Sampler(table.form), jax.tree.map(lambda column: jnp.asarray(column[:STEPS]), table)
    params = model.abstract_params()
    params["blocks"] = jax.eval_shape(functools.partial(cast_for_products, dtype=model.dtype), params["blocks"])
    noise = jax.ShapeDtypeStruct((batch, config.side, config.side, config.channels), jnp.float32)
    labels = jax.ShapeDtypeStruct((batch,), jnp.int32)
    costs = {}
    images = microbatch_size(model, 1, batch)
    without_blocks = {name: part for name, part in params.items() if name != "blocks"}
    for name in (None, *EXECUTIONS.value):
        heads, groups = (config.heads, config.heads) if name is None else (HEADS.value, GROUPS.value)
        kept = dict(heads=(tuple(range(heads)),) * config.depth, groups=(tuple(range(groups)),) * config.depth)
        blocks = jax.eval_shape(
            lambda whole, kept=kept: NarrowedBlocks(whole, dtype=model.dtype, platform="tpu").narrow_to(**kept),
            params["blocks"],
        )
        execution = Dense("tpu") if name is None else _execution(name, images)
        settings = SegmentSettings(model, sampler, "all", 1, (execution,) * config.depth, mesh=None)

        def step(params, blocks, noise, labels, settings=settings):
            keys = jax.random.split(jax.random.key(0), batch)
            gates = ((None,) * config.depth, (None,) * config.depth)
            inputs = SegmentInputs(params, blocks, sampler.init(noise), rows, gates, labels, keys, jnp.ones(batch))
            return run_segment(inputs, settings=settings)

        costs["complete" if name is None else _fast(name)] = compile_and_cost(
            step, without_blocks, blocks, noise, labels, chip=chip
        )
    gates = lambda kept, units: np.broadcast_to(np.arange(units) < kept, (1, config.depth, units)).astype(np.float32)
    tokens = np.full((1, config.depth, config.tokens), TOKEN_SHARE.value, np.float32)
    routing = Routing(gates(HEADS.value, config.heads), gates(GROUPS.value, config.heads), tokens)
    macs = dict(complete=float(config.macs.complete), fast=float(np.asarray(routed_macs(routing, config.macs))[0]))
    return _rows("model", chip, batch, images, costs, {mode: STEPS * batch * count for mode, count in macs.items()})


if __name__ == "__main__":
    run(main)
