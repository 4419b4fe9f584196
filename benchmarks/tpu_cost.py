"""What the TPU compiler says complete and fast sampling cost, without a TPU.

    pip install "jax[tpu]"
    python benchmarks/tpu_cost.py --chips v5e,v6e --batch_sizes 32,64 --out docs/speed/tpu_xl2.json

XL/2 in bfloat16 with the residual stream in float32, on one core. The fast model keeps 11 of 16 heads and 10 of 16
groups in every block and has 65 % of the tokens on, with standard deviation `--deviation` between images. It has as
many places for them as a job's own calibration on so many images gives it, in each form: those of an image (`one_hot`)
or of all images of a pass together (`pooled`); `--capacity` sets another number. What images differ by, and how many
places they need, `capacities.py` measures. Both models of cost, and what they cannot see, are explained in
`tpu_compiler.py`. The efficiency is the speed-up over the ratio of MACs.
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

from dydit_jax.diffusion.samplers import SamplerState, SamplingConfig
from dydit_jax.diffusion.schedules import DiffusionConfig
from dydit_jax.fast.narrow import NarrowedBlocks, cast_for_products, narrow
from dydit_jax.fast.plan import Shares
from dydit_jax.fast.tokens import capacities_of, counted_shares, packed_together, runners
from dydit_jax.jobs.sample import MOST_CALIBRATION_IMAGES
from dydit_jax.models.cost import routed_macs
from dydit_jax.models.dit import Block, Model, published_config
from dydit_jax.models.pooled import Stream
from dydit_jax.models.routing import Routing
from dydit_jax.runtime.console import run
from dydit_jax.sampling.generate import images_of_pass, run_segment, steps_of

MODEL = flags.DEFINE_string("model", "XL/2", "A published size.")
DEPTH = flags.DEFINE_integer("depth", None, "Blocks of the model; those of its size by default.")
CHIP_NAMES = flags.DEFINE_list("chips", ["v5e", "v6e"], f"Of {', '.join(CHIPS)}.")
BATCH_SIZES = flags.DEFINE_list("batch_sizes", ["32"], "Images of one pass.")
PARTS = flags.DEFINE_list("parts", ["block", "model"], "block, model.")
HEADS = flags.DEFINE_integer("heads", 11, "Heads that the fast model keeps in each block.")
GROUPS = flags.DEFINE_integer("groups", 10, "Groups that the fast model keeps in each block.")
TOKEN_SHARE = flags.DEFINE_float("token_share", 0.65, "Of an image's tokens that are on.")
DEVIATION = flags.DEFINE_float("deviation", 0.024, "Of the images' shares of tokens that are on, of all tokens.")
CALIBRATED = flags.DEFINE_integer("calibrated", MOST_CALIBRATION_IMAGES, "Images that a job was calibrated on.")
CAPACITY = flags.DEFINE_integer(
    "capacity", None, "Places for an image's tokens, on average over images that pool them."
)
FORMS = flags.DEFINE_list("forms", ["one_hot", "pooled"], "How the fast model packs tokens, see `fast/tokens.py`.")
STEPS = 25  # of the compiled scan over the schedule, as in one segment of ten
SHOWN = flags.DEFINE_integer("shown", 0, "Instructions to list for each program, the dearest first.")
OUT = flags.DEFINE_string("out", None, "File for the results.", required=True)


def main():
    rows = []
    for chip in CHIP_NAMES.value:
        for batch in map(int, BATCH_SIZES.value):
            for part in PARTS.value:
                rows += {"block": _blocks, "model": _models}[part](chip, batch)
                sys.stderr.write("\n".join(map(_in_words, rows[-1 - len(FORMS.value) :])) + "\n")
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


def _in_words(row: dict) -> str:
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
                row["places"] = _capacity(mode.split()[-1], images)
                row[f"{kind}_speedup"] = getattr(costs["complete"], kind) / cycles
                row[f"{kind}_efficiency"] = row[f"{kind}_speedup"] / (macs["complete"] / work)
        rows.append(row)
        for estimated, scheduled, told in sorted(cost.instructions, key=lambda row: -row[1])[: SHOWN.value]:
            sys.stderr.write(f"  {estimated / 1e3:8.0f}k {scheduled / 1e3:8.0f}k  {told[:200]}\n")
    return rows


def _fast(form: str) -> str:
    return f"fast, {form}"


def _capacity(form: str, images: int) -> int:
    """Return the places in a form for the images of a pass."""
    if CAPACITY.value:
        return CAPACITY.value * packed_together(form, images)
    column = lambda value: np.full((1, 1), value)
    mean = column(TOKEN_SHARE.value)
    shares = counted_shares(form, Shares(mean, column(DEVIATION.value), mean, CALIBRATED.value), images)
    [capacity] = capacities_of(form, shares[:, 0], images=images, tokens=_model().config.tokens)
    return capacity


def _model() -> Model:
    config = published_config(MODEL.value, side=32, routers="free")
    config = dataclasses.replace(config, depth=DEPTH.value or config.depth)
    return Model(config, jnp.dtype("bfloat16"), platform="tpu")


def _blocks(chip: str, batch: int) -> list[dict]:
    """Cost one block, modulation included."""
    config, dtype = _model().config, _model().dtype
    block = nnx.eval_shape(lambda: Block(config, dtype=dtype, platform="tpu", rngs=nnx.Rngs(0)))
    graph, weights = nnx.split(block)
    stacked = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((1, *leaf.shape), leaf.dtype), nnx.to_pure_dict(weights))
    kept = lambda heads, groups: jax.eval_shape(
        lambda blocks: narrow(blocks, heads=(tuple(range(heads)),), groups=(tuple(range(groups)),), dtype=dtype)[0],
        stacked,
    )
    x = jax.ShapeDtypeStruct((batch, config.tokens, config.width), jnp.float32)
    condition = jax.ShapeDtypeStruct((batch, config.width), jnp.float32)

    def complete(weights, x, condition):
        block = nnx.merge(graph, nnx.State(weights))
        return block(x, block.modulation(condition), None, None, routed=False)[0]

    def fast(weights, x, condition, *, form: str):
        block, capacity = nnx.merge(graph, nnx.State(weights)), _capacity(form, batch)
        if form == "pooled":
            return block.run_pooled(Stream(x), block.modulation(condition), None, None, capacity=capacity)
        [run_on_tokens] = runners(form, ((capacity,),))
        return block(x, block.modulation(condition), None, None, routed=True, run_on_tokens=run_on_tokens)

    costs = dict(complete=compile_and_cost(complete, kept(config.heads, config.heads), x, condition, chip=chip))
    for form in FORMS.value:
        narrowed = kept(HEADS.value, GROUPS.value)
        costs[_fast(form)] = compile_and_cost(functools.partial(fast, form=form), narrowed, x, condition, chip=chip)
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
    sampling, diffusion = SamplingConfig(sampler="ddpm", steps="250"), DiffusionConfig()
    steps = jax.tree.map(lambda column: jnp.asarray(column[:STEPS]), steps_of(sampling, diffusion))
    params = model.abstract_params()
    params["blocks"] = jax.eval_shape(functools.partial(cast_for_products, dtype=model.dtype), params["blocks"])
    noise = jax.ShapeDtypeStruct((batch, config.side, config.side, config.channels), jnp.float32)
    labels = jax.ShapeDtypeStruct((batch,), jnp.int32)
    costs = {}
    together = images_of_pass(model, sampling, batch)
    for form in (None, *FORMS.value):
        heads, groups = (config.heads, config.heads) if form is None else (HEADS.value, GROUPS.value)
        kept = dict(heads=(tuple(range(heads)),) * config.depth, groups=(tuple(range(groups)),) * config.depth)
        blocks = jax.eval_shape(
            lambda whole, kept=kept: NarrowedBlocks(whole, dtype=model.dtype, platform="tpu").keep(**kept),
            params["blocks"],
        )
        capacities = None if form is None else ((_capacity(form, together),),) * config.depth
        gates = ((None,) * config.depth, (None,) * config.depth)

        def step(params, blocks, noise, labels, form=form, capacities=capacities, gates=gates):
            state = SamplerState(noise, noise)
            keys = jax.random.split(jax.random.key(0), batch)
            settings = dict(model=model, sampling=sampling, form=form, capacities=capacities, mesh=None)
            return run_segment(params, blocks, state, steps, gates, labels, keys, **settings)

        costs["complete" if form is None else _fast(form)] = compile_and_cost(
            step, params, blocks, noise, labels, chip=chip
        )
    gates = lambda kept, units: np.broadcast_to(np.arange(units) < kept, (1, config.depth, units)).astype(np.float32)
    tokens = np.full((1, config.depth, config.tokens), TOKEN_SHARE.value, np.float32)
    routing = Routing(gates(HEADS.value, config.heads), gates(GROUPS.value, config.heads), tokens)
    macs = dict(complete=float(config.macs.complete), fast=float(np.asarray(routed_macs(routing, config.macs))[0]))
    return _rows("model", chip, batch, together, costs, {mode: STEPS * batch * count for mode, count in macs.items()})


if __name__ == "__main__":
    run(main)
