"""The compiled program of a segment: consecutive steps of the schedule on the same narrowed weights.

Each device runs its own images: packing tokens over all devices would move them at every layer, this way nothing is
moved.
"""

import dataclasses
import functools
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from dydit_jax.diffusion.samplers import Sampler, SamplerState, run_sampler
from dydit_jax.diffusion.solvers import SolverTable
from dydit_jax.fast.narrow import DeferredBlocks, fold_gates
from dydit_jax.fast.plan import Segment
from dydit_jax.models.dit import Layer, Model
from dydit_jax.models.execution import TokenExecution, TopK
from dydit_jax.models.lora import MIXTURE, fold_block, mixture_weights, without_updates
from dydit_jax.runtime.sharding import BATCH
from dydit_jax.sampling.guidance import condition_labels, guide
from dydit_jax.sampling.noise import step_noise

MOST_MODULATION_BYTES = 2**30  # of float32, on a device
# Of one block, a quarter of a TPU's fast memory: of more, some are written to the slow one and read again.
MOST_SCORE_BYTES = 2**25
BYTES_PER_NUMBER = 4


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SegmentInputs:
    """The arrays of `run_segment`.

    Attributes:
      params: the parameter tree without its blocks, on every device.
      blocks: one parameter tree per block, narrowed to the segment, or `DeferredBlocks`.
      state: of the sampler.
      rows: of the solver's table, those of the segment.
      gates: of heads and of groups, per layer [steps,1,kept] or None.
      labels, keys: of the images [B].
      counted: float32 [B], 1 for images of the job, 0 for those that only fill up a batch: no record knows them.
    """

    params: Any
    blocks: Any
    state: SamplerState
    rows: SolverTable
    gates: Any
    labels: jax.Array
    keys: jax.Array
    counted: jax.Array


@dataclasses.dataclass(frozen=True)
class SegmentSettings:
    """The static arguments of `run_segment`.

    Attributes:
      model: the network.
      sampler: the solver's step.
      guided_channels: one of `GUIDED_CHANNELS`.
      evaluations: how often the network runs on an image in a step: twice with guidance.
      executions: of the layers.
      mesh: whose devices share the images, or None.
    """

    model: Model
    sampler: Sampler
    guided_channels: str
    evaluations: int
    executions: tuple[TokenExecution, ...]
    mesh: Mesh | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StepRecord:
    """What is kept of the tokens of a step: sums over the counted images, both passes of guidance included.

    Attributes:
      tokens: of the gates [L,N].
      squares: of the images' squared shares of open tokens [L].
      needed: share of the rows that the pass needed [L], for all images, see `TokenExecution.rows_needed`.
    """

    tokens: jax.Array
    squares: jax.Array
    needed: jax.Array


@functools.partial(jax.jit, static_argnames="settings")
def run_segment(inputs: SegmentInputs, *, settings: SegmentSettings) -> tuple[SamplerState, StepRecord]:
    """Run a segment's steps on its blocks.

    Returns:
      The state, and the records of its steps [passes,steps,...], the passes of the first device first.
    """
    run = functools.partial(_run_on_a_device, settings=settings)
    if settings.mesh is None:
        return run(inputs)
    split, whole = BATCH, PartitionSpec()
    images = dict(state=split, labels=split, keys=split, counted=split)
    specs = SegmentInputs(params=whole, blocks=whole, rows=whole, gates=whole, **images)
    sharded = jax.shard_map(run, mesh=settings.mesh, in_specs=(specs,), out_specs=(split, split), check_vma=False)
    return sharded(inputs)


def _run_on_a_device(inputs: SegmentInputs, *, settings: SegmentSettings):
    model, evaluations = settings.model, settings.evaluations
    blocks, (heads, groups) = inputs.blocks, inputs.gates
    blocks = blocks.narrowed() if isinstance(blocks, DeferredBlocks) else blocks
    layers = [Layer(block, None, None, execution) for block, execution in zip(blocks, settings.executions)]
    mixtures = mixtures_ahead(model, inputs.params, layers, inputs.rows.timestep)
    without = [dataclasses.replace(layer, params=without_updates(layer.params)) for layer in layers]

    def run_pass(images):
        state, labels, keys, counted = images
        counted = jnp.tile(counted, evaluations)
        conditions = condition_labels(labels, evaluations=evaluations, config=model.config)
        betas = 1 / inputs.rows.guidance if model.config.guidance_free else None
        ahead = modulations_ahead(model, inputs.params, without, inputs.rows.timestep, conditions, betas)

        def predict(x, row, extra):
            heads, groups, modulations, mixtures = extra
            folded = fold_updates(model, layers, mixtures)
            beta = 1 / row.guidance if model.config.guidance_free else None
            network = bind_network(model, inputs.params, folded, heads, groups, modulations, beta)
            guidance = dict(scale=row.guidance if evaluations == 2 else None, guided_channels=settings.guided_channels)
            output, tokens = guide(network, x, row.timestep, labels, **guidance, config=model.config)
            return output, record_step(settings.executions, tokens, counted)

        noise_at = lambda step: step_noise(keys, step, state.xt.shape[1:])
        extra = heads, groups, ahead, mixtures
        return run_sampler(settings.sampler, state, inputs.rows, extra, predict=predict, noise_at=noise_at)

    images = inputs.state, inputs.labels, inputs.keys, inputs.counted
    size = microbatch_size(model, evaluations, len(inputs.labels))
    if size == len(inputs.labels):
        state, record = run_pass(images)
        return state, jax.tree.map(lambda leaf: leaf[None], record)
    passes = jax.tree.map(lambda leaf: leaf.reshape(-1, size, *leaf.shape[1:]), images)
    state, record = jax.lax.map(run_pass, passes)
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), state), record


def mixtures_ahead(model: Model, params, layers: list[Layer], timesteps):
    """Return the weights of the experts of low-rank updates at all steps of a segment, per layer [S,E]; or None."""
    if model.lora is None:
        return None
    embedding = model.embed_time(params, timesteps)  # [S,D]
    return [mixture_weights(layer.params[MIXTURE], embedding) for layer in layers]


def fold_updates(model: Model, layers: list[Layer], mixtures) -> list[Layer]:
    """Return layers with their low-rank updates folded into the kernels; without updates, as they are.

    Args:
      model, layers: what runs.
      mixtures: weights of the experts at this step, per layer [E].
    """
    if model.lora is None:
        return layers
    folded = (fold_block(layer.params, mixture, model.lora) for layer, mixture in zip(layers, mixtures, strict=True))
    return [dataclasses.replace(layer, params=params) for layer, params in zip(layers, folded)]


def bind_network(model: Model, params, layers: list[Layer], heads, groups, modulations=None, beta=None):
    """Return (x, t, labels) -> the prediction and the token gates, on narrowed layers.

    Args:
      model, params, layers, modulations, beta: as for `Model.apply_layers`; gates of the layers are ignored.
      heads, groups: per layer, gates [1,kept] of the kept units, or None where all are open.
    """
    if model.platform == "gpu":
        folded = fold_gates([layer.params for layer in layers], heads, groups)
        layers = [dataclasses.replace(layer, params=params) for layer, params in zip(layers, folded)]
    else:
        with_gates = zip(layers, heads, groups)
        layers = [dataclasses.replace(layer, heads=h, groups=g) for layer, h, g in with_gates]
    return functools.partial(model.apply_layers, params, layers, modulations=modulations, beta=beta)


def record_step(executions: tuple[TokenExecution, ...], tokens, counted) -> StepRecord:
    """Return the record of a step from its token gates [B,L,N] and which of the images count [B]."""
    # Layers of top-k need no rows of the run's execution; what they are said to need is never compared with anything.
    rule = next((execution for execution in executions if not isinstance(execution, TopK)), executions[0])
    if rule.platform == "gpu" and rule.routed:
        # As one array: else each reduction is a kernel that reads those of all layers, and takes long to compile.
        tokens = jax.lax.optimization_barrier(tokens)
    squares = jnp.square(tokens.mean(-1)) * counted[:, None]
    return StepRecord((tokens * counted[:, None, None]).sum(0), squares.sum(0), rule.rows_needed(tokens))


def microbatch_size(model: Model, evaluations: int, images: int) -> int:
    """Return how many of a device's images go through a segment together, before the next ones do.

    On a TPU the most that keep their attention scores in fast memory, unless that leaves too few for its matrix units.
    Elsewhere all of them.

    Args:
      model: the network.
      evaluations: how often it runs on an image in a step: twice with guidance.
      images: on one device, like the result without those that guidance adds.
    """
    if model.platform != "tpu":
        return images
    heads, tokens = model.config.heads, model.config.tokens
    scores = evaluations * heads * tokens**2 * jnp.dtype(model.dtype).itemsize
    most = max(1, MOST_SCORE_BYTES // scores)
    largest = max(size for size in range(1, min(most, images) + 1) if images % size == 0)
    return largest if 2 * largest > most else images


def modulations_ahead(model: Model, params, layers: list[Layer], timesteps, labels, betas=None):
    """Return `Model.modulations` of all steps of a segment, [S,...], or None where they are too large to keep.

    A third of a DiT's weights only multiply one vector per image. Made for all steps at once, the modulations read them
    once per segment and not at every step, which on few images is most of what they cost. `betas`, of guidance in one
    pass, are those of the steps [S], or None.
    """
    steps, images = len(timesteps), len(labels)
    parts = jax.eval_shape(lambda: model.modulations(params, layers, timesteps[:1], labels[:1]))
    if sum(part.size for part in parts) * steps * images * BYTES_PER_NUMBER > MOST_MODULATION_BYTES:
        return None
    times, betas = jax.tree.map(lambda of_steps: jnp.repeat(of_steps, images), (timesteps, betas))
    modulations = model.modulations(params, layers, times, jnp.tile(labels, steps), betas)
    if model.platform == "cpu":  # an array per part: loops that read a slice of all parts twice are not vectorised
        by_step = lambda parts: tuple(part.reshape(steps, images, -1) for part in parts)  # [S,B,D]
    else:
        by_step = lambda parts: parts.reshape(len(parts), steps, images, -1).swapaxes(0, 1)  # [S,parts,B,D]
    return tuple(map(by_step, modulations))


# --- The programs of a run -----------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class SegmentProgram:
    """What is compiled for a segment.

    Attributes:
      segment: the steps, and what is kept of the blocks.
      executions: how the tokens of each layer run.
      images: of one pass on one device, those that guidance adds included.
    """

    segment: Segment
    executions: tuple[TokenExecution, ...]
    images: int

    def overflowed(self, needed: np.ndarray, *, tokens: int) -> np.ndarray:
        """Return which passes needed more rows than fit, by step and layer: bool like `needed` [passes,steps,L]."""
        return self._by_layer("overflowed", needed, tokens)

    def rows_run(self, needed: np.ndarray, *, tokens: int) -> np.ndarray:
        """Return the rows that each pass computed, by step and layer: an array like `needed` [passes,steps,L]."""
        return self._by_layer("rows_run", needed, tokens)

    def is_void(self, needed: np.ndarray, *, tokens: int) -> bool:
        """Return whether some pass needed more rows than it computed, so that the segment's result is wrong."""
        may_overflow = np.array([execution.may_overflow for execution in self.executions])
        return bool((self.overflowed(needed, tokens=tokens) & may_overflow).any())

    def _by_layer(self, method: str, needed: np.ndarray, tokens: int) -> np.ndarray:
        sizes, layers = dict(images=self.images, tokens=tokens), enumerate(self.executions)
        return np.stack([getattr(run, method)(needed[..., layer], **sizes) for layer, run in layers], axis=-1)


def segment_inputs(program: SegmentProgram, *, table: SolverTable, blocks, **rest) -> SegmentInputs:
    """Return the inputs of a program.

    Args:
      program: whose segment counts.
      table: of all steps of the run.
      blocks: of the segment.
      **rest: the other arrays of `SegmentInputs`, which do not depend on the segment.
    """
    segment = program.segment
    rows = jax.tree.map(operator.itemgetter(slice(segment.start, segment.stop)), table)
    # [steps,1,kept] per layer: the same for all images.
    gates = jax.tree.map(lambda gate: gate[:, None].astype(np.float32), (segment.head_gates, segment.group_gates))
    return SegmentInputs(blocks=blocks, rows=rows, gates=gates, **rest)
