"""From noise to images: the run of a whole schedule over a batch.

Every image has its own key, made of the seed and its index, so that an image does not depend on the batch it was made
in. The loop runs as compiled scans over segments of the schedule; between two segments the host only reports progress.
In the mode `fast`, the default, the segments are those of a plan, each on weights narrowed to what it needs; in the
others they are equal pieces on all weights.

    SamplingRun: model, weights, schedule, mesh      what is static
      .plan()                                        gates of the schedule -> segments
      .draw(labels)     programs -> runner -> Samples
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dydit_jax.diffusion.process import Process
from dydit_jax.diffusion.samplers import Sampler, SamplingConfig
from dydit_jax.errors import InputError, require_known
from dydit_jax.fast.execution.registry import (
    EXECUTIONS,
    default_execution,
    dense_execution,
    find_execution,
    layer_executions,
    whole_execution,
)
from dydit_jax.fast.narrow import NarrowedBlocks
from dydit_jax.fast.plan import Plan, Segment, executed_gates, make_plan, whole_segments
from dydit_jax.fast.segmentation import Job
from dydit_jax.fast.usage import TokenUsage, measure_usage
from dydit_jax.models.cost import routed_macs
from dydit_jax.models.dit import MODES as APPLY_MODES
from dydit_jax.models.dit import Model
from dydit_jax.models.execution import Masked, TokenExecution
from dydit_jax.models.layers import unconstrained
from dydit_jax.models.lora import fold_constant
from dydit_jax.models.routing import Routing
from dydit_jax.runtime.cache import keep_programs
from dydit_jax.runtime.processes import to_host
from dydit_jax.runtime.seeds import seed_words
from dydit_jax.runtime.settings import own_settings
from dydit_jax.runtime.sharding import batch_sharding, replicated, require_divisible
from dydit_jax.sampling.guidance import evaluations_of, require_label_table
from dydit_jax.sampling.noise import first_noise, image_keys
from dydit_jax.sampling.runner import Committed, SegmentRunner
from dydit_jax.sampling.segment import SegmentProgram, SegmentSettings, microbatch_size
from dydit_jax.sampling.table import make_table

MODES = (*APPLY_MODES, "fast")
PROGRESS_PIECES = 10
# Of programs that run for milliseconds, and compile three times as fast without optimization.
RUN_ONCE = {"cpu": {"xla_backend_optimization_level": 0}}


@dataclasses.dataclass(frozen=True)
class Samples:
    """Images and how they were computed.

    Attributes:
      images: float32 [B,side,side,C], in the model's own space.
      timesteps: of the steps [S], one for each row of the solver's table.
      evaluations: how often the network ran on an image at each of them, int [S]: twice with guidance.
      routing: gates as they were executed, means over the batch: heads [S,L,H], groups [S,L,G], tokens [S,L,N].
      macs: mean MACs of one image's forward pass at each step [S], of open gates alone.
      executed_macs: the same, of everything that was computed: closed units of a segment's union, empty rows and steps
        that were redone included, images that only fill up the batch not.
      usage: of tokens, the calibration of a plan.
      overflow_count: passes per step and layer [S,L] (one pass per device, more on TPUs) whose open tokens exceeded the
        largest capacity below the full batch.
    """

    images: np.ndarray
    timesteps: np.ndarray
    evaluations: np.ndarray
    routing: Routing
    macs: np.ndarray
    executed_macs: np.ndarray
    usage: TokenUsage
    overflow_count: np.ndarray

    def merge(self, other: "Samples", *, weight: float) -> "Samples":
        """Return the record of these images and a later batch, whose share of all is `weight`, with its images."""
        mean = lambda before, now: (1 - weight) * before + weight * now
        return Samples(
            images=other.images,
            timesteps=self.timesteps,
            evaluations=self.evaluations,
            routing=dataclasses.replace(self.routing, tokens=mean(self.routing.tokens, other.routing.tokens)),
            macs=mean(self.macs, other.macs),
            executed_macs=mean(self.executed_macs, other.executed_macs),
            usage=self.usage.merge(other.usage),
            overflow_count=self.overflow_count + other.overflow_count,
        )

    @property
    def mean_macs(self) -> float:
        """Mean of `macs` over all passes of the network."""
        return float(np.average(self.macs, weights=self.evaluations))

    @property
    def mean_executed_macs(self) -> float:
        """Mean of `executed_macs` over all passes of the network."""
        return float(np.average(self.executed_macs, weights=self.evaluations))


class SamplingRun:
    """A model ready to be sampled, with all that its batches share.

    Attributes:
      model: the network.
      params: its parameters; blocks in the dtype of their products, on a mesh copied to every device.
      sampling, process: how it is sampled, and the process that it was trained on.
      table: of the solver, a row per step from the most noise to the least.
      evaluations: how often the network runs on an image at each step, int [S]: twice with guidance.
      mesh: whose devices share a batch, or None.
    """

    @own_settings()
    def __init__(self, model: Model, params, *, sampling: SamplingConfig, process: Process, mesh: Mesh | None = None):
        """Cast the weights once.

        Args:
          model, params: the network.
          sampling: sampler, steps, guidance.
          process: that the model was trained on.
          mesh: whose devices share the batches, which they must divide; None computes on one device.

        Raises:
          InputError: what `make_table` refuses, or a table of labels of another size.
        """
        if model.lora is not None and model.lora.experts == 1:
            model, params = dataclasses.replace(model, lora=None), _fold_constant(params, lora=model.lora)
        require_label_table(params, model.config)
        self.table = make_table(sampling, process)
        self.evaluations = evaluations_of(model.config, self.table.guidance)
        self.model = dataclasses.replace(model, constrain=unconstrained)  # each device computes its own images
        self.sampling, self.process, self.mesh = sampling, process, mesh
        params = params if mesh is None else jax.device_put(params, replicated(mesh))
        self._blocks = NarrowedBlocks(params["blocks"], dtype=model.dtype, platform=model.platform)
        self.params = params | dict(blocks=self._blocks.whole)

    @property
    def devices(self) -> int:
        """How many devices share a batch."""
        return 1 if self.mesh is None else self.mesh.shape["data"] * self.mesh.shape["fsdp"]

    @functools.cached_property
    @own_settings()
    def time_gates(self) -> tuple[np.ndarray, np.ndarray]:
        """The gates of the whole schedule: heads [S,L,H] and groups [S,L,G]."""
        gates = jax.device_get(_compiled_time_gates(self.model)(self.params, self.table.timestep))
        for router, units in zip((self.model.routers.heads, self.model.routers.groups), gates):
            if not np.isin(units, (0, 1)).all():
                message = "must return gates that are exactly 0 or 1; between them lie others"
                raise InputError(f"{router.__name__}.__call__ {message}.")
        return gates

    def plan(self, segments: int | None = None, *, images: int | None = None) -> Plan:
        """Plan `fast` sampling, once for all batches of a job.

        Args:
          segments: into how many programs the schedule is cut, 0 to leave nothing out; None decides by itself.
          images: of the whole job, which decides how many segments are worth compiling; None for very many.

        Returns:
          The plan; with `plan.with_usage(samples.usage)` its capacities are chosen by what those images needed.

        Raises:
          InputError: a number of segments that `require_segments` refuses.
        """
        config = self.model.config
        token_share = float(np.mean(config.capacities)) / config.tokens
        job = None if images is None else Job(images, self.model.platform, config.width, token_share)
        settings = dict(execution=default_execution(self.model).name, evaluations=self.evaluations)
        return make_plan(*self.time_gates, config.macs, **settings, segments=segments, job=job)

    @own_settings()
    def draw(
        self,
        labels,
        *,
        seed: int = 0,
        indices=None,
        counted: int | None = None,
        mode: str = "fast",
        plan: Plan | None = None,
        report: Callable[[int], None] | None = None,
    ) -> Samples:
        """Draw one batch of images.

        Args:
          labels: [B], 0 .. classes; `classes` itself stands for "no class".
          seed: with an image's index it fixes all its noise.
          indices: of the images, [B]; 0 .. B - 1 by default.
          counted: how many of the images, the first ones, are of the job. The others fill up the batch, and no record
            of gates or MACs knows them. None counts all.
          mode: "fast" (only open gates are computed), "gated" (all is computed and multiplied by the gates) or
            "complete".
          plan: of `fast`, from `plan`; made here for these images if missing. Results do not depend on it.
          report: called with the number of steps done since its last call.

        Returns:
          The images, and the gates that were open while they were made.

        Raises:
          InputError: labels out of range, an unknown mode, or a plan of another run.
        """
        require_known("mode", mode, MODES)
        labels = checked_labels(labels, self.model.config.classes)
        indices = np.arange(len(labels)) if indices is None else np.asarray(indices)
        counted = len(labels) if counted is None else counted
        if self.mesh is not None:
            require_divisible(self.mesh, len(labels))
        programs, densely = self.programs(len(labels), mode=mode, plan=plan)
        shape = (self.model.config.side, self.model.config.side, self.model.config.channels)
        sampler = Sampler(self.table.form, self.sampling.clip)
        own = np.float32(np.arange(len(labels)) < counted)
        state, arrays = _compiled_begin(sampler, shape, self.mesh)(indices, labels, own, seed_words(seed))
        runner = SegmentRunner(
            blocks=self._blocks,
            arrays=dict(arrays, params=self._rest),
            table=self.table,
            settings=SegmentSettings(
                self.model,
                sampler,
                self.sampling.guided_channels,
                evaluations=programs[0].segment.evaluations,
                executions=programs[0].executions,
                mesh=self.mesh,
            ),
            densely=densely,
            report=report,
        )
        state, committed = runner.run(programs, state)
        return self._samples(to_host(state.xt), counted, committed, mode)

    def programs(self, images: int, *, mode: str = "fast", plan: Plan | None = None) -> tuple[list, Callable]:
        """Return the programs of a batch, and the function from one of them to dense programs for its steps.

        Args:
          images: of the batch.
          mode, plan: as for `draw`.
        """
        config = self.model.config
        all_open = (np.ones((len(self.table), config.depth, config.heads), bool),) * 2
        heads, groups = all_open if mode == "complete" else self.time_gates
        plan = self._checked(plan or self.plan(images=images)) if mode == "fast" else None
        if plan is None or plan.whole:
            steps = len(self.table)
            pieces = PROGRESS_PIECES if steps >= 2 * PROGRESS_PIECES else 1
            segments = whole_segments(heads, groups, pieces=pieces, evaluations=self.evaluations)
        else:
            segments = plan.segments
        execution, usage = self._execution(mode, plan, images), plan and plan.usage

        def program(segment: Segment, usage: TokenUsage | None) -> SegmentProgram:
            microbatch = microbatch_size(self.model, segment.evaluations, -(-images // self.devices))
            shares = usage and execution.required_shares(usage, microbatch)
            shares = None if shares is None else shares[segment.start : segment.stop]
            rows = microbatch * segment.evaluations
            return SegmentProgram(segment, layer_executions(execution, config, shares, images=rows), rows)

        def densely(short: SegmentProgram) -> list[SegmentProgram]:
            """Return a program for each step, all of them alike: what is seldom needed is compiled once."""
            first, last = short.segment.start, short.segment.stop
            steps = whole_segments(heads, groups, pieces=len(heads), evaluations=self.evaluations)[first:last]
            return [program(step, None) for step in steps]

        return [program(segment, usage) for segment in segments], densely

    def _execution(self, mode: str, plan: Plan | None, images: int) -> TokenExecution:
        """Return how the tokens of a batch run."""
        if mode == "complete" or self.model.config.routers == "none":
            return dense_execution(self.model)
        if mode == "gated":
            return Masked(self.model.platform)
        if plan.whole:
            return whole_execution(self.model)
        # A plan may have been kept by a machine or a JAX that had kernels which this one lacks.
        known = EXECUTIONS.get(plan.execution)
        if known is None or not known.available(self.model, self.images_of_pass(images)):
            return default_execution(self.model)
        return find_execution(plan.execution, self.model.platform)

    def images_of_pass(self, images: int) -> int:
        """Return the images of a batch in the largest pass on one device, those that guidance adds included."""
        of_device = -(-images // self.devices)
        return max(count * microbatch_size(self.model, count, of_device) for count in set(self.evaluations.tolist()))

    @functools.cached_property
    def _rest(self) -> dict:
        return {name: part for name, part in self.params.items() if name != "blocks"}

    def _checked(self, plan: Plan) -> Plan:
        config, steps = self.model.config, len(self.table)
        if plan.heads.shape != (steps, config.depth, config.heads):
            raise InputError(
                f"The plan is for {plan.heads.shape[0]} steps of a model with {plan.heads.shape[1:]} layers and heads; "
                f"this run has {steps} steps and {(config.depth, config.heads)}. Make it with `plan`."
            )
        if (plan.evaluations != self.evaluations).any():
            raise InputError("The plan is for guidance at other steps than this run's. Make it with `plan`.")
        return plan

    def _samples(self, images: np.ndarray, counted: int, committed: list[Committed], mode: str) -> Samples:
        """Gather the result of a run, in which so many images count."""
        config, records = self.model.config, [segment.record for segment in committed]  # [passes,steps,...]
        join = lambda parts: np.concatenate(list(parts))
        overflowed = (segment.program.overflowed(segment.record.needed, tokens=config.tokens) for segment in committed)
        heads, groups = executed_gates([segment.program.segment for segment in committed], config.heads)
        # The segments may differ in their passes, whose size depends on guidance.
        passes = counted * self.evaluations  # of the network, at each step
        routing = Routing(heads, groups, join(record.tokens.sum(0) for record in records) / passes[:, None, None])
        squares = join(record.squares.sum(0) for record in records) / passes[:, None]
        needed = join(record.needed.max(0) for record in records)
        routed = mode != "complete" and config.routers != "none"
        complete = np.full(len(heads), float(config.macs.complete))
        return Samples(
            images=images,
            timesteps=self.table.timestep,
            evaluations=self.evaluations,
            routing=routing,
            macs=np.asarray(routed_macs(routing, config.macs)) if routed else complete,
            executed_macs=join(_executed_macs(segment, config, routed) for segment in committed),
            usage=measure_usage(routing.tokens.mean(-1), squares, needed, counted),
            overflow_count=join(devices.sum(0) for devices in overflowed),
        )


def generate(
    model: Model,
    params,
    labels,
    *,
    sampling: SamplingConfig,
    process: Process,
    seed: int = 0,
    mode: str = "fast",
) -> Samples:
    """Draw one batch of images on one device; `SamplingRun` keeps what further batches share.

    Args:
      model, params: the network.
      sampling, process: as for `SamplingRun`.
      labels, seed, mode: as for `SamplingRun.draw`.
    """
    keep_programs()
    return SamplingRun(model, params, sampling=sampling, process=process).draw(labels, seed=seed, mode=mode)


def _executed_macs(segment: Committed, config, routed: bool) -> np.ndarray:
    """Return the MACs of one image's forward pass at each step of a segment, of everything that was computed."""
    program = segment.program
    rows = program.rows_run(segment.record.needed, tokens=config.tokens).mean(0)  # [steps,L]
    share = lambda units, of: np.broadcast_to(np.array([len(layer) for layer in units])[:, None] / of, (*rows.shape, 1))
    tokens = rows[..., None] / (program.images * config.tokens)
    heads, groups = (share(units, config.heads) for units in program.segment.kept)
    macs = np.asarray(routed_macs(Routing(heads, groups, tokens), config.macs)) - (0 if routed else config.macs.routers)
    return macs + (config.macs.complete + config.macs.routers if segment.redone else 0)


_fold_constant = jax.jit(fold_constant, static_argnames="lora")


@functools.cache
def _compiled_time_gates(model: Model):
    """Make (params, timesteps) -> the gates of a whole schedule; compiled once per model, not once per batch."""
    return jax.jit(model.time_gates, compiler_options=RUN_ONCE.get(model.platform))


@functools.cache
def _compiled_begin(sampler: Sampler, shape: tuple[int, ...], mesh: Mesh | None):
    """Make (indices, labels, counted, `seed_words`) -> the first state, and arrays of the images, leading axis B."""

    def begin(indices, labels, counted, seed):
        keys = image_keys(seed, indices)
        arrays = dict(labels=jnp.asarray(labels), keys=keys, counted=jnp.asarray(counted))
        return sampler.init(first_noise(keys, shape)), arrays

    options = dict(compiler_options=RUN_ONCE.get(jax.default_backend()))
    # On a mesh every process makes its own part.
    return jax.jit(begin, **options, **({} if mesh is None else dict(out_shardings=batch_sharding(mesh))))


def checked_labels(labels, classes: int) -> np.ndarray:
    """Return labels as int32 [B].

    Raises:
      InputError: one that is not from 0 to `classes`, which stands for "no class".
    """
    labels = np.asarray(labels, np.int32)
    wrong = labels[(labels < 0) | (labels > classes)]
    if wrong.size:
        allowed = f"from 0 to {classes - 1}, or {classes} for no class" if classes else "0 for a model without classes"
        raise InputError(f"Labels must be {allowed}; not {sorted(set(wrong.tolist()))}.")
    return labels
