"""What complete and fast sampling launch, move and multiply on a GPU, without a GPU.

    pip install "jax[cuda12]"
    python benchmarks/gpu_counts.py --out docs/speed/gpu_counts.json

XLA compiles XL/2 in bfloat16 for an H200 (`gpu_compiler.py`), for `--batch_size` images with guidance; of what comes
out, launches, bytes and FLOPs are counted (`hlo.py`). These are counts, not times. Four parts:

    block   one more block: the difference of a network of three and one of two. `fast` keeps 11 of 16 heads and 10 of
            16 groups, and nothing that it keeps is closed at any step
    step    a step of 250 with all blocks; of `fast` one of a segment in the middle of the plan of a profile
            (`profiles.py`); apart from it what the segment's program does once, and the seconds of a processor to lower
            and to compile it: without choosing algorithms of libraries, which needs the GPU
    train   one block, forward and backward, of a static training step without guidance, by what is kept for its
            gradient; and the memory beside the state of a step of six blocks
    plan    without compiling: what plans of 1 to 16 segments cost beyond the MACs of what they keep, were products to
            fill whole tiles of 128 columns, with more heads to fill them, and with the widths of one program for all

`floor_microseconds` adds up, launch by launch, the longer of two times that no GPU falls below: all bytes at the peak
of the memory, all FLOPs at that of the products. Bytes that stay in the cache can make it faster.
"""

import dataclasses
import functools
import importlib.metadata
import json
import sys
import time

from gpu_compiler import BANDWIDTH, DESCRIPTION, PEAK_FLOPS, Compiled, as_if_on_a_gpu, compile_for_gpu  # before jax

# isort: split
import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from etils import epath
from hlo import Launch, count, floor_seconds, split_by_steps
from profiles import swinging_logits
from training_steps import describe_training

from dydit_jax.diffusion.process import Diffusion
from dydit_jax.diffusion.samplers import Sampler, SamplingConfig
from dydit_jax.fast.execution.registry import (
    EXECUTIONS,
    dense_execution,
    find_execution,
    layer_executions,
    whole_execution,
)
from dydit_jax.fast.narrow import NarrowedBlocks, cast_for_products
from dydit_jax.fast.plan import Segment, make_plan, whole_segments
from dydit_jax.fast.segmentation import Job
from dydit_jax.fast.usage import TokenUsage
from dydit_jax.models.config import published_config
from dydit_jax.models.dit import REMATS, Model
from dydit_jax.models.execution import Masked
from dydit_jax.runtime.console import run
from dydit_jax.runtime.settings import own_settings
from dydit_jax.sampling.guidance import evaluations_of
from dydit_jax.sampling.segment import SegmentProgram, SegmentSettings, run_segment, segment_inputs
from dydit_jax.sampling.table import make_table
from dydit_jax.training.experiment import build_update
from dydit_jax.training.update import batch_shapes

# What is counted: `gated` computes all, so does `fast` for few images, "whole"; the others are executions of `fast`.
RUNS = ("complete", "gated", "whole", "triton", "triton_fused")
MODEL = flags.DEFINE_string("model", "XL/2", "A published size.")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 32, "Images; the network runs on twice their number.", lower_bound=1)
PARTS = flags.DEFINE_list("parts", ["block", "step", "train", "plan"], "block, step, train, plan.")
SHOWN = flags.DEFINE_integer("shown", 0, "Launches to list for each program of a block, those with most bytes first.")
OUT = flags.DEFINE_string("out", None, "File for the results.", required=True)

TILE = 128  # columns of a product that are computed together
HEADS, GROUPS = 11, 10  # that `fast` keeps in a block of the part "block"
SHARES = (0.65, 0.65, 0.65)  # of heads, groups and tokens that are open
DEVIATION, CALIBRATED = 0.024, 32  # of the images' shares of open tokens; images of the calibration
STEPS, GUIDANCE = "250", 1.5
TRAINED_BLOCKS = 6


@dataclasses.dataclass(frozen=True)
class Schedule:
    """A run to be counted: the network, the solver's table, and the gates of its heads and groups, bool [S,L,units]."""

    model: Model
    sampling: SamplingConfig
    table: object
    gates: tuple[np.ndarray, np.ndarray]

    @property
    def evaluations(self) -> np.ndarray:
        """How often the network runs on an image at each step [S]."""
        return evaluations_of(self.model.config, self.table.guidance)

    def plan(self, images: int | None = None, segments: int | None = None):
        """Return the plan of a job of so many images, or of one that never ends."""
        job = None if images is None else Job(images, "gpu", self.model.config.width)
        settings = dict(execution="triton", evaluations=self.evaluations)
        return make_plan(*self.gates, self.model.config.macs, **settings, segments=segments, job=job)

    def program(self, run: str, segment: Segment) -> SegmentProgram:
        """Return the program of a segment, with the rows that a calibration chooses for open tokens."""
        rows, depth = 2 * BATCH_SIZE.value, self.model.config.depth
        with as_if_on_a_gpu():
            alike = dict(complete=dense_execution, gated=lambda _: Masked("gpu"), whole=whole_execution)
            if run in alike:
                return SegmentProgram(segment, (alike[run](self.model),) * depth, rows)
        column = lambda value: np.full((len(segment), depth), value)
        usage = TokenUsage(column(SHARES[2]), column(DEVIATION), column(0.0), CALIBRATED)
        execution = find_execution(run, "gpu")
        shares = execution.required_shares(usage, BATCH_SIZE.value)
        return SegmentProgram(segment, layer_executions(execution, self.model.config, shares, images=rows), rows)

    def segment(self, run: str) -> Segment:
        """Return a segment of a run: one in the middle of the plan, or the first of those that leave nothing out."""
        if run in EXECUTIONS:
            segments = self.plan().segments
            return segments[len(segments) // 2]
        gates = [np.ones_like(of_units) for of_units in self.gates] if run == "complete" else self.gates
        return whole_segments(*gates, pieces=10, evaluations=self.evaluations)[0]


def make_schedule(depth: int | None = None) -> Schedule:
    """Make the run; with a depth, of so many blocks whose gates never change."""
    config = published_config(MODEL.value, side=32, routers="free")
    config = dataclasses.replace(config, depth=depth or config.depth)
    sampling = SamplingConfig(sampler="ddpm", steps=STEPS, guidance=GUIDANCE)
    table = make_table(sampling, Diffusion())
    if depth:
        kept = lambda units: np.broadcast_to(np.arange(config.heads) < units, (len(table), depth, config.heads))
        gates = kept(HEADS), kept(GROUPS)
    else:
        generator, units = np.random.default_rng(0), (config.depth, config.heads)
        gates = tuple(swinging_logits(generator, len(table), units, share) > 0 for share in SHARES[:2])
    return Schedule(Model(config, jnp.dtype("bfloat16"), platform="gpu"), sampling, table, gates)


@own_settings()
def compile_program(schedule: Schedule, program: SegmentProgram) -> Compiled:
    """Compile a program of a run."""
    model, batch, table = schedule.model, BATCH_SIZE.value, schedule.table
    config, sampler = model.config, Sampler(table.form, schedule.sampling.clip)
    params = model.abstract_params()
    cast = jax.eval_shape(functools.partial(cast_for_products, dtype=model.dtype), params.pop("blocks"))
    narrowed = lambda whole: NarrowedBlocks(whole, dtype=model.dtype, platform="gpu").narrow_to(*program.segment.kept)
    noise = jax.ShapeDtypeStruct((batch, config.side, config.side, config.channels), jnp.float32)
    arrays = dict(
        params=params,
        state=jax.eval_shape(sampler.init, noise),
        labels=jax.ShapeDtypeStruct((batch,), jnp.int32),
        keys=jax.eval_shape(lambda: jax.random.split(jax.random.key(0), batch)),
        counted=jax.ShapeDtypeStruct((batch,), jnp.float32),
    )
    inputs = segment_inputs(program, table=table, blocks=jax.eval_shape(narrowed, cast), **arrays)
    evaluations = program.segment.evaluations
    channels = schedule.sampling.guided_channels
    settings = SegmentSettings(model, sampler, channels, evaluations, program.executions, mesh=None)
    return compile_for_gpu(run_segment, inputs, settings=settings)


def counted(launches: list[Launch]) -> dict:
    """Return what `count` does, the bytes of all but libraries' products and attention, and the floor."""
    others = [each for each in launches if each.kind not in ("product", "attention")]
    floor = 1e6 * floor_seconds(launches, BANDWIDTH, PEAK_FLOPS)
    return count(launches) | dict(bytes_beside_products=count(others)["bytes"], floor_microseconds=floor)


def count_blocks() -> dict:
    """Return the counts of one block."""
    rows = {}
    for name in RUNS:
        both = []
        for depth in (2, 3):
            schedule = make_schedule(depth)
            # As long as the others: of a long one modulations are made at every step.
            segment = dataclasses.replace(schedule.segment(name), stop=len(schedule.segment("complete")))
            compiled = compile_program(schedule, schedule.program(name, segment))
            both.append(split_by_steps(compiled.text, len(segment))[0])
        few, many = map(counted, both)
        rows[name] = {name: many[name] - few.get(name, 0) for name in many}
        for each in sorted(both[0], key=lambda each: -each.bytes)[: SHOWN.value]:
            sys.stderr.write(f"  {each.bytes / 1e6:8.1f} MB  {each.flops / 1e9:7.1f} GFLOP  {each.name[:150]}\n")
    return rows


def count_steps() -> dict:
    """Return the counts of one step of the whole network, of what its program does once, and the seconds to make it."""
    schedule, rows = make_schedule(), {}
    for name in RUNS:
        jax.clear_caches()
        segment = schedule.segment(name)
        compiled = compile_program(schedule, schedule.program(name, segment))
        of_step, once = split_by_steps(compiled.text, len(segment))
        rows[name] = dict(
            **counted(of_step),
            product_shapes=len({each.product for each in of_step if each.product}),
            once=counted(once),
            temporary_mib=compiled.temporary_bytes / 2**20,
            lowering_seconds=compiled.lowering_seconds,
            compiling_seconds=compiled.compiling_seconds,
        )
    return rows | dict(plan=schedule.plan().summary(), plan_of_one_batch=schedule.plan(BATCH_SIZE.value).summary())


def count_training() -> dict:
    """Return the counts of one block of a training step, and the step's memory, by what is kept for the gradient."""
    config = dataclasses.replace(published_config(MODEL.value, side=32), depth=TRAINED_BLOCKS)
    optimizer, rows = dict(learning_rate=1e-4, clip_norm=1.0), {}
    experiment, state = describe_training(config, BATCH_SIZE.value, optimizer=optimizer)
    for remat in REMATS:
        model = Model(config, jnp.dtype("bfloat16"), remat=remat, platform="gpu")
        update = jax.jit(build_update(experiment, model, ("complete",)), donate_argnums=0)
        compiled = compile_for_gpu(update, state, batch_shapes(config, BATCH_SIZE.value))
        of_block, _ = split_by_steps(compiled.text, TRAINED_BLOCKS)
        rows[remat] = counted(of_block) | dict(temporary_gib=compiled.temporary_bytes / 2**30)
    return rows


def count_plans() -> dict:
    """Return by the number of segments what plans cost beyond the MACs of what they keep, from dimensions alone."""
    schedule, rows = make_schedule(), {}
    for segments in (1, 2, 4, 8, 16):
        plan = schedule.plan(segments=segments)
        lengths = np.array([len(segment) for segment in plan.segments])[:, None]
        kept = np.array([[[len(units) for units in kind] for kind in segment.kept] for segment in plan.segments])
        heads, groups = kept.transpose(1, 0, 2)  # [segments,L] each
        cost = lambda heads, groups, tile, lengths=lengths: _macs_in_tiles(schedule, lengths, heads, groups, tile)
        own = cost(heads, groups, 1)
        per_tile = TILE / (schedule.model.config.width // schedule.model.config.heads)
        filled = np.minimum(np.ceil(heads / per_tile) * per_tile, schedule.model.config.heads).astype(int)
        rows[segments] = dict(
            padding=plan.padding,
            in_tiles=cost(heads, groups, TILE) / own - 1,
            in_tiles_filled_with_heads=cost(filled, groups, TILE) / own - 1,
            widths_of_one_program=cost(*(np.broadcast_to(of.max(0), of.shape) for of in (heads, groups)), 1) / own - 1,
        )
    return rows


def _macs_in_tiles(schedule: Schedule, lengths, heads, groups, tile: int) -> float:
    """Return the MACs of all steps, columns of projections rounded up to whole tiles; in units that cancel out."""
    config = schedule.model.config
    rounded = lambda kept, columns: np.ceil(kept * columns / tile) * tile
    macs, size, hidden = config.macs, config.width // config.heads, config.hidden // config.heads
    projections = 3 * config.tokens * config.width  # times columns
    others = macs.attention / config.heads - projections * size  # of a head
    attention = projections * rounded(heads, size) + others * heads
    half = (
        config.tokens * config.width
    )  # of the MLP, times hidden units: the first product's columns, the second's depth
    mlp = SHARES[2] * half * (rounded(groups, hidden) + hidden * groups)
    fixed = (macs.fixed + macs.routers) / config.depth
    return float((lengths * (attention + mlp + fixed)).sum())


COUNTS = dict(block=count_blocks, step=count_steps, train=count_training, plan=count_plans)


def main():
    report = dict(
        command="python " + " ".join(sys.argv),
        versions={name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "jax-cuda12-pjrt")},
        date=time.strftime("%Y-%m-%d"),
        model=MODEL.value,
        batch_size=BATCH_SIZE.value,
        gpu=" ".join(DESCRIPTION.split()),
    )
    path = epath.Path(OUT.value)
    path.parent.mkdir(parents=True, exist_ok=True)
    for name in PARTS.value:
        report[name] = COUNTS[name]()
        sys.stderr.write(json.dumps(report[name], indent=1) + "\n")
        path.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    run(main)
