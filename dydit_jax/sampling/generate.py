"""From noise to images: guidance, per-image randomness, the loop over the schedule.

Every image has its own key, made of the seed and its index, so that an image does not depend on the batch it was made
in. The loop runs as compiled scans over segments of the schedule; between two segments the host only reports progress.
In the mode `fast`, the default, the segments are those of a plan, each on weights narrowed to what it needs; in the
others they are equal pieces on all weights.

Source of guidance: https://arxiv.org/abs/2207.12598; that only the first three channels are guided is how the published
DiT models are sampled.
"""

import collections
import dataclasses
import functools
import itertools
import operator
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from dydit_jax.diffusion.gaussian import coefficients
from dydit_jax.diffusion.samplers import SamplingConfig, make_sampler, run_sampler
from dydit_jax.diffusion.schedules import DiffusionConfig, make_schedule, respace
from dydit_jax.errors import InputError, require_known
from dydit_jax.fast.narrow import NarrowedBlocks, Unnarrowed, with_gates
from dydit_jax.fast.plan import Plan, Segment, Shares, make_plan, whole_segments
from dydit_jax.fast.tokens import (
    CHECKED_FORMS,
    can_run,
    capacities_of,
    counted_shares,
    default_form,
    overflows,
    places_needed,
    runners,
)
from dydit_jax.models.cost import routed_macs
from dydit_jax.models.dit import MODES as APPLY_MODES
from dydit_jax.models.dit import DiTConfig, Model
from dydit_jax.models.layers import unconstrained
from dydit_jax.models.routing import Routing
from dydit_jax.runtime.aot import Call, call_of, compiled_ahead, shape_of
from dydit_jax.runtime.processes import to_host
from dydit_jax.runtime.seeds import seed_words
from dydit_jax.runtime.settings import own_settings
from dydit_jax.runtime.sharding import BATCH, batch_sharding, replicated, require_divisible
from dydit_jax.sampling.guidance import require_label_table
from dydit_jax.sampling.noise import first_noise, image_keys, step_noise

MODES = (*APPLY_MODES, "fast")
PROGRESS_PIECES = 10
GUIDED_FIRST_CHANNELS = 3
MOST_MODULATION_BYTES = 2**30  # of float32, on a device
# Of one block, a quarter of a TPU's fast memory: of more, some are written to the slow one and read again.
MOST_SCORE_BYTES = 2**25
BYTES_PER_NUMBER = 4


@dataclasses.dataclass(frozen=True)
class Samples:
    """Images and how they were computed.

    Attributes:
      images: float32 [B,side,side,C], in the model's own space.
      timesteps: what the network was told at each step [S].
      routing: means over the batch: heads [S,L,H], groups [S,L,G], tokens [S,L,N].
      macs: mean MACs of one image's forward pass at each step [S]; guidance runs two.
      shares: of tokens that were on, the calibration of a plan.
      over: at each step and in each layer [S,L], in how many passes (one per device, more on TPUs) more tokens were on
        than the largest capacity that saves anything.
    """

    images: np.ndarray
    timesteps: np.ndarray
    routing: Routing
    macs: np.ndarray
    shares: Shares
    over: np.ndarray


def guided(run: Callable, x, t, labels, *, sampling: SamplingConfig, config: DiTConfig):
    """Run a network with classifier-free guidance.

    Args:
      run: (x, t, labels) -> the output [B,side,side,2C] and anything else.
      x: [B,side,side,C].
      t: timestep, a scalar.
      labels: [B].
      sampling: scale and channels; scale 1 runs the network once, on the labels alone.
      config: the model's.

    Returns:
      The output [B,side,side,2C] and what else `run` gave, for [2B,...] under guidance, the conditional images first.
    """
    labels = guided_labels(labels, sampling=sampling, config=config)
    if sampling.guidance == 1.0:
        return run(x, jnp.full(x.shape[:1], t), labels)
    x = jnp.concatenate([x, x])
    output, record = run(x, jnp.full(x.shape[:1], t), labels)
    conditional, unconditional = jnp.split(output, 2)
    channels = config.channels
    if sampling.guided_channels == "first_three":
        channels = min(channels, GUIDED_FIRST_CHANNELS)
    mixed = unconditional + sampling.guidance * (conditional - unconditional)
    return jnp.concatenate([mixed[..., :channels], conditional[..., channels:]], axis=-1), record


def guided_labels(labels, *, sampling: SamplingConfig, config: DiTConfig):
    """Return the labels that `guided` runs the network on: [B], or [2B] where it runs on no class as well."""
    if sampling.guidance == 1.0:
        return labels
    return jnp.concatenate([labels, jnp.full_like(labels, config.null_label)])


# --- The loop ------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames=("model", "sampling", "form", "capacities", "mesh"))
def run_segment(params, blocks, state, steps, gates, labels, keys, *, model: Model, sampling, form, capacities, mesh):
    """Run a segment's steps on its blocks, each device on its own images.

    Args:
      params: the parameter tree, on every device; its blocks are not used.
      blocks: one parameter tree per block, narrowed to the segment, or `Unnarrowed`.
      state: of the sampler.
      steps: coefficients of the segment's steps.
      gates: of heads and groups, per layer [steps,1,kept] or None.
      labels, keys: of the images [B].
      model, sampling: the network and the sampler.
      form: how tokens run, one of `tokens.forms_of`; None opens all.
      capacities: per layer, for that form.
      mesh: whose devices share the images, or None.

    Returns:
      The state, and a `_Record` with a leading axis of passes, those of the first device first.
    """

    def run_on_a_device(params, blocks, state, steps, gates, labels, keys):
        layers = blocks.narrowed() if isinstance(blocks, Unnarrowed) else blocks

        def run_pass(images):
            state, labels, keys = images
            conditions = guided_labels(labels, sampling=sampling, config=model.config)
            extra = (*gates, _modulations_ahead(model, params, layers, steps.timestep, conditions))
            predict = functools.partial(
                _predict, params, layers, labels, model=model, sampling=sampling, form=form, capacities=capacities
            )
            noise_at = lambda step: step_noise(keys, step, state.current.shape[1:])
            return run_sampler(make_sampler(sampling), state, steps, extra, predict=predict, noise_at=noise_at)

        images, size = (state, labels, keys), images_of_pass(model, sampling, len(labels))
        if size == len(labels):
            state, record = run_pass(images)
            return state, jax.tree.map(lambda leaf: leaf[None], record)
        passes = jax.tree.map(lambda leaf: leaf.reshape(-1, size, *leaf.shape[1:]), images)
        state, record = jax.lax.map(run_pass, passes)
        return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), state), record

    if mesh is None:
        return run_on_a_device(params, blocks, state, steps, gates, labels, keys)
    # Packing tokens over all devices would move them between devices at every layer; this way nothing is moved.
    split, whole = BATCH, PartitionSpec()
    return jax.shard_map(
        run_on_a_device,
        mesh=mesh,
        in_specs=(whole, whole, split, whole, whole, split, split),
        out_specs=(split, split),
        check_vma=False,
    )(params, blocks, state, steps, gates, labels, keys)


def images_of_pass(model: Model, sampling: SamplingConfig, images: int) -> int:
    """Return how many of a device's images go through a segment together, before the next ones do.

    On a TPU so many that their attention scores stay in fast memory, unless that leaves too few for its matrix units.
    Elsewhere all of them.

    Args:
      model, sampling: the network and the sampler.
      images: on one device, like the result without those that guidance adds.
    """
    if model.platform != "tpu":
        return images
    scores = runs_per_image(sampling) * model.config.heads * model.config.tokens**2 * jnp.dtype(model.dtype).itemsize
    most = max(1, MOST_SCORE_BYTES // scores)
    largest = max(size for size in range(1, min(most, images) + 1) if images % size == 0)
    return largest if 2 * largest > most else images


def runs_per_image(sampling: SamplingConfig) -> int:
    """Return how often the network runs on an image in one step: twice with guidance."""
    return 1 if sampling.guidance == 1.0 else 2


def _modulations_ahead(model: Model, params, layers, timesteps, labels):
    """Return `Model.modulations` of all steps of a segment, [S,...], or None where they are too large to keep.

    A third of a DiT's weights only multiply one vector per image. Made for all steps at once, the modulations read them
    once per segment and not at every step, which on few images is most of what they cost.
    """
    steps, images = len(timesteps), len(labels)
    *of_blocks, of_output = jax.eval_shape(model.modulations, params, layers, timesteps[:1], labels[:1])
    numbers = sum(shape.size for shape in (*of_blocks, of_output)) * steps * images
    if numbers * BYTES_PER_NUMBER > MOST_MODULATION_BYTES:
        return None
    found = model.modulations(params, layers, jnp.repeat(timesteps, images), jnp.tile(labels, steps))
    if model.platform == "cpu":  # an array per part: loops that read a slice of all parts twice are not vectorised
        by_step = lambda parts: tuple(part.reshape(steps, images, -1) for part in parts)  # [S,B,D]
    else:
        by_step = lambda parts: parts.reshape(len(parts), steps, images, -1).swapaxes(0, 1)  # [S,parts,B,D]
    return tuple(map(by_step, found))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Record:
    """What a step keeps of its tokens: mean gates [L,N], the images' mean squared shares [L], places needed [L]."""

    tokens: jax.Array
    squares: jax.Array
    needed: jax.Array


def network_of(model: Model, params, layers, *, heads, groups, form, capacities, modulations=None) -> Callable:
    """Return (x, t, labels) -> the prediction and the token gates, on narrowed layers and open tokens.

    Args:
      model, params, layers, heads, groups, modulations: as for `Model.apply_layers`.
      form: how tokens run, one of `tokens.forms_of`; None opens all.
      capacities: per layer, for that form.
    """
    if model.platform == "gpu":
        layers = with_gates(layers, heads, groups)
        heads = groups = (None,) * len(layers)
    if form == "fused" or (form is None and model.runs_fused):
        only = None if form is None else [capacity for (capacity,) in capacities]
        return functools.partial(model.apply_fused, params, layers, capacities=only, modulations=modulations)
    routing = dict(heads=heads, groups=groups, modulations=modulations)
    if form == "pooled":
        only = [capacity for (capacity,) in capacities]
        return functools.partial(model.apply_pooled, params, layers, capacities=only, **routing)
    run_on_tokens = None if form is None else runners(form, capacities)
    return functools.partial(model.apply_layers, params, layers, run_on_tokens=run_on_tokens, **routing)


def _predict(params, layers, labels, x, c, extra, *, model: Model, sampling, form, capacities):
    """Predict one step; return the output and its `_Record`."""
    heads, groups, modulations = extra
    network = network_of(
        model, params, layers, heads=heads, groups=groups, form=form, capacities=capacities, modulations=modulations
    )
    output, tokens = guided(network, x, c.timestep, labels, sampling=sampling, config=model.config)
    return output, _Record(tokens.mean(0), jnp.square(tokens.mean(-1)).mean(0), places_needed(form, tokens))


@functools.cache
def _compiled_begin(sampling: SamplingConfig, shape: tuple[int, ...], mesh: Mesh | None):
    """Make (indices, labels, `seed_words`) -> the first state, keys and labels of the images, leading axis B."""

    def begin(indices, labels, seed):
        keys = image_keys(seed, indices)
        return make_sampler(sampling).init(first_noise(keys, shape)), keys, jnp.asarray(labels)

    # On a mesh every process makes its own part.
    return jax.jit(begin) if mesh is None else jax.jit(begin, out_shardings=batch_sharding(mesh))


@own_settings()
def generate(
    model: Model,
    params,
    labels,
    *,
    sampling: SamplingConfig,
    diffusion: DiffusionConfig,
    seed: int = 0,
    indices=None,
    mode: str = "fast",
    plan: Plan | None = None,
    blocks: NarrowedBlocks | None = None,
    mesh: Mesh | None = None,
    report: Callable[[int], None] | None = None,
) -> Samples:
    """Draw one batch of images.

    Args:
      model, params: the network.
      labels: [B], 0 .. classes; `classes` itself stands for "no class".
      sampling: sampler, steps, guidance.
      diffusion: the process that the model was trained on.
      seed: with an image's index it fixes all its noise.
      indices: of the images, [B]; 0 .. B - 1 by default.
      mode: "fast" (only what is on is computed), "gated" (all is computed and multiplied by the gates) or "complete".
      plan: of `fast`, from `plan_sampling`; made here if missing. Results do not depend on it.
      blocks: of these params, on a mesh replicated, for batches that follow each other: the next need not get memory
        for weights and cut them apart anew; made here if missing.
      mesh: whose devices share the batch, which they must divide; None computes on one device.
      report: called with the number of steps done since its last call.

    Returns:
      The images, and what was on while they were made.

    Raises:
      InputError: labels out of range, an unknown mode, steps that the schedule does not have, or a plan of another run.
    """
    require_known("mode", mode, MODES)
    model = dataclasses.replace(model, constrain=unconstrained)  # each device computes its own images
    config, labels = model.config, _checked_labels(labels, model.config.classes)
    require_label_table(params, config)
    table = steps_of(sampling, diffusion)
    indices = np.arange(len(labels)) if indices is None else np.asarray(indices)
    if mesh is not None:
        require_divisible(mesh, len(labels))
        params = jax.device_put(params, replicated(mesh))
    shape = (config.side, config.side, config.channels)
    state, keys, labels = _compiled_begin(sampling, shape, mesh)(indices, labels, seed_words(seed))
    devices = 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]
    together, runs = images_of_pass(model, sampling, len(labels) // devices), runs_per_image(sampling)
    heads, groups, programs = programs_of(model, params, table, mode, plan, together, runs=runs)
    images = together * runs
    blocks = blocks or NarrowedBlocks(params["blocks"], dtype=model.dtype, platform=model.platform)
    rest = {name: part for name, part in params.items() if name != "blocks"}
    arrays = dict(params=rest, labels=labels, keys=keys)
    run = _Run(model, blocks, arrays, table=table, sampling=sampling, mesh=mesh, images=images, report=report)

    def in_full(segment: Segment) -> list[Program]:
        """Return a program for each step, all of them alike: what is seldom needed is compiled once."""
        steps = whole_segments(heads, groups, pieces=len(heads))[segment.start : segment.stop]
        form = programs[0].form  # of all; it says what is recorded
        return [Program(step, form, _capacities(config, form, None, step, images=images)) for step in steps]

    state, records = run.through(programs, state, in_full)
    over = np.concatenate(list(map(run.over, programs, records)), axis=1)  # [passes,S,L]
    record = jax.tree.map(lambda *parts: np.concatenate(parts, axis=1), *records)  # [passes,S,...]
    routing = Routing(np.float32(heads), np.float32(groups), record.tokens.mean(0))
    routed = mode != "complete" and config.routers != "none"
    macs = routed_macs(routing, config.macs) if routed else np.full(len(heads), float(config.macs.complete))
    shares = _shares(routing.tokens.mean(-1), record, len(labels))
    return Samples(to_host(state.current), table.timestep, routing, np.asarray(macs), shares, over.sum(0))


def _shares(mean: np.ndarray, record: _Record, images: int) -> Shares:
    """Gather what a run of so many images had on, from its mean shares [S,L] and its record [passes,S,...]."""
    variance = np.maximum(0, record.squares.mean(0) - mean**2)
    unbiased = images / max(1, images - 1)  # both runs of guidance are of the same image
    return Shares(mean, np.sqrt(unbiased * variance), record.needed.max(0), images)


@dataclasses.dataclass(frozen=True)
class Program:
    """What is compiled for a segment: the form of its tokens (None: all are open) and the capacities of each layer."""

    segment: Segment
    form: str | None
    capacities: tuple | None


class _Run:
    """What the programs of a run share, and the weights of the one that runs."""

    def __init__(
        self, model: Model, blocks: NarrowedBlocks, arrays: dict, *, table, sampling, mesh, images: int, report
    ):
        self._blocks, self._arrays, self._table, self._report = blocks, arrays, table, report
        self._platform = model.platform
        self._tokens = dict(images=images, tokens=model.config.tokens)
        self._settings = dict(model=model, sampling=sampling, mesh=mesh)

    def through(self, programs: list, state, in_full: Callable) -> tuple:
        """Run programs one after the other.

        Whether all tokens had a place is known after a program's last step. If not, its result is void, and so is what
        was started on it: its steps are run again in full. A check within the program would make a GPU's host wait at
        every step, and bring the steps in full into every program.

        Args:
          programs: of consecutive segments.
          state: of the sampler, before the first.
          in_full: from a segment to programs for the same steps in which every token has a place.

        Returns:
          The state after the last, and a `_Record` for each program.
        """
        # An accelerator runs one segment while the host starts the next. A CPU would gain nothing by it, and hold the
        # weights of both.
        ahead = 0 if self._platform == "cpu" else 1
        runs, running, records = [], collections.deque(), []
        shapes = jax.tree.map(shape_of, dict(self._arrays, state=state))
        with compiled_ahead(self._call(program, shapes) for program in programs) as compiled:
            runs.append(next(compiled))
            while len(records) < len(programs):
                following = len(records) + len(running)
                if following < len(programs) and len(running) <= ahead:
                    before = state
                    state, record = self._start(programs[following], runs[following], before)
                    running.append((before, record))
                    runs.extend(itertools.islice(compiled, 1))
                    continue
                program = programs[len(records)]
                before, record = running.popleft()
                record = to_host(record)
                if program.form in CHECKED_FORMS and self.over(program, record).any():
                    running.clear()
                    state, steps = self.through(in_full(program.segment), before, in_full)
                    record = jax.tree.map(lambda *parts: np.concatenate(parts, axis=1), *steps)
                elif self._report is not None:
                    self._report(len(program.segment))
                records.append(record)
        return state, records

    def over(self, program: Program, record: _Record) -> np.ndarray:
        """Return which passes had at which step and in which layer more tokens on than fit: [passes,S,L]."""
        if program.form is None:
            return np.zeros(record.needed.shape, bool)
        return overflows(program.form, program.capacities, record.needed, **self._tokens)

    def _call(self, program: Program, shapes: dict) -> Call:
        blocks = self._blocks.shapes(*program.segment.kept)
        described = program_arguments(program, blocks=blocks, table=self._table, **shapes)
        return call_of(run_segment, described, program_settings(program, self._settings))

    def _start(self, program: Program, run, state) -> tuple:
        blocks = self._blocks.keep(*program.segment.kept)  # the first while its program is compiled
        arguments = dict(self._arrays, blocks=blocks, state=state, table=self._table)
        return run.result()(*program_arguments(program, **arguments))


def program_arguments(program: Program, *, params, blocks, state, labels, keys, table) -> tuple:
    """Return the arguments of `run_segment` for a program, of which all but its blocks and the state are the run's."""
    segment = program.segment
    steps = jax.tree.map(operator.itemgetter(slice(segment.start, segment.stop)), table)
    # [steps,1,kept] per layer: the same for all images.
    gates = jax.tree.map(lambda gate: gate[:, None].astype(np.float32), (segment.head_gates, segment.group_gates))
    return params, blocks, state, steps, gates, labels, keys


def program_settings(program: Program, settings: dict) -> dict:
    """Return the static arguments of `run_segment` for a program: the run's and its own."""
    return settings | dict(form=program.form, capacities=program.capacities)


def programs_of(model: Model, params, table, mode: str, plan: Plan | None, images: int, *, runs: int):
    """Return the gates [S,L,H] and [S,L,G] of a run, and its programs.

    Args:
      model, params: the network.
      table: coefficients of the run's steps.
      mode: one of `MODES`.
      plan: of `fast`, or None.
      images: of one pass on one device.
      runs: of the network on each of them, two with guidance.
    """
    config, steps = model.config, len(table.step)
    if mode == "fast":
        plan = plan or plan_of(model, params, table)
        if plan.heads.shape != (steps, config.depth, config.heads):
            raise InputError(
                f"The plan is for {plan.heads.shape[0]} steps of a model with {plan.heads.shape[1:]} layers and heads; "
                f"this run has {steps} steps and {(config.depth, config.heads)}. Make it with `plan_sampling`."
            )
        # A plan may have been kept by a JAX that had the kernels, which this one lacks.
        form = plan.form if can_run(model, plan.form, images * runs) else default_form(model)
        segments, heads, groups = plan.segments, plan.heads, plan.groups
    else:
        plan, form = None, "multiply" if mode == "gated" else None
        if mode == "gated":
            heads, groups = jax.device_get(_time_gates(params, table.timestep, model=model))
        else:
            heads = groups = np.ones((steps, config.depth, config.heads), bool)
        pieces = max(n for n in range(1, PROGRESS_PIECES + 1) if steps % n == 0) if steps >= 2 * PROGRESS_PIECES else 1
        segments = whole_segments(heads, groups, pieces=pieces)
    known = None if plan is None else plan.shares
    shares = known and counted_shares(form, known, images)
    capacities = functools.partial(_capacities, config, form, shares, images=images * runs)
    return heads, groups, [Program(segment, form, capacities(segment)) for segment in segments]


def _capacities(config: DiTConfig, form: str | None, shares, segment: Segment, *, images: int):
    """Return the capacities of every layer of a segment, for the block's tokens of one pass.

    Args:
      config: the model's.
      form: one of `tokens.forms_of`; None opens all.
      shares: `counted_shares` of the run [S,L], or None.
      segment: whose steps count.
      images: of one pass on one device, guidance included.
    """
    if form is None:
        return None
    of_layers = [None] * config.depth if shares is None else shares[segment.start : segment.stop].T
    # A block with places of its own needs no capacity of the form.
    forms = [form if places == config.tokens else "multiply" for places in config.capacities]
    sizes = dict(images=images, tokens=config.tokens)
    return tuple(capacities_of(own, layer, **sizes) for own, layer in zip(forms, of_layers))


def steps_of(sampling: SamplingConfig, diffusion: DiffusionConfig):
    """Return the coefficients of a run's steps, from the most noise to the least, [S] each.

    Raises:
      InputError: steps that the schedule does not have.
    """
    table = coefficients(respace(make_schedule(diffusion), sampling.steps))
    return jax.tree.map(lambda column: column[::-1], table)


@functools.partial(jax.jit, static_argnames="model")
def _time_gates(params, timesteps, *, model: Model):
    """Return the gates of a whole schedule; compiled once per model, not once per batch."""
    return model.time_gates(params, timesteps)


def plan_of(model: Model, params, table, *, segments: int | None = None) -> Plan:
    """Plan a run over the steps of a table; see `plan_sampling`."""
    heads, groups = jax.device_get(_time_gates(params, table.timestep, model=model))
    return make_plan(heads, groups, model.config.macs, segments=segments)


@own_settings()
def plan_sampling(
    model: Model, params, *, sampling: SamplingConfig, diffusion: DiffusionConfig, segments: int | None = None
) -> Plan:
    """Plan `fast` sampling, once for all batches of a job.

    Args:
      model, params: the network.
      sampling, diffusion: as for `generate`.
      segments: into how many programs the schedule is cut; None decides by itself.

    Returns:
      The plan; with `plan.calibrated(samples.shares)` of any samples it chooses its capacities by what they had on.

    Raises:
      InputError: fewer segments than one, or more than steps.
    """
    return plan_of(model, params, steps_of(sampling, diffusion), segments=segments)


def _checked_labels(labels, classes: int):
    labels = np.asarray(labels, np.int32)
    wrong = labels[(labels < 0) | (labels > classes)]
    if wrong.size:
        raise InputError(
            f"Labels must be from 0 to {classes - 1}, or {classes} for no class; not {sorted(set(wrong.tolist()))}."
        )
    return labels
