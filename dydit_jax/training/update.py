"""One training step: a pure function of state and batch, and how it is compiled.

One way through: batch -> what is drawn at random -> x_t -> model (gated and complete pass) -> loss terms -> gradients
-> update. Random draws depend on seed and step alone.

Source: DyDiT, https://arxiv.org/abs/2410.03456, and its training code. It differs from that code where the code steps
its optimizer twice per batch in the first stage: here every batch is one clipped step, or is skipped.
"""

import dataclasses
import functools
import logging
import math
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from dydit_jax.diffusion.losses import STRATA
from dydit_jax.diffusion.process import Process
from dydit_jax.diffusion.terms import MOST_STEPS, LossConfig
from dydit_jax.errors import InputError, require_known
from dydit_jax.models.config import DiTConfig
from dydit_jax.models.dit import Model
from dydit_jax.models.precision import PRECISIONS, REMAT_SETTINGS
from dydit_jax.models.trainable import EVERYTHING, join_params, require_parts
from dydit_jax.records import require_range
from dydit_jax.runtime.seeds import make_key, require_seed
from dydit_jax.runtime.sharding import batch_sharding, replicated, shardings
from dydit_jax.training.objective import draw_examples, objective
from dydit_jax.training.optimizer import OptimizerConfig, build_learning_rate, build_optimizer

logger = logging.getLogger(__name__)

BYTES_PER_GIB = 2**30
NEW_CLASSES = ("random", "mean")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The length of a run and its surroundings.

    Attributes:
      steps: updates in all.
      seed: seed of initial values and of every random draw but the data's order, 0 to 2^64 - 1.
      ema_decay: decay of the exponential moving average of the parameters, which is what gets sampled.
      init_from: weights to start from (anything that `sample.py --checkpoint` takes), empty for random ones. Routers
        that these lack are initialised afresh: the start of fine-tuning a DiT into a DyDiT. Classes and side of the
        images may be others.
      class_map: which class of `init_from` a class starts from: "0:207,1:360" (own:theirs, numbers or names), or a file
        with such a pair per line. Without it classes are matched by name, or by number where both have equally
        many.
      new_classes: rows of the label table for the other classes: "random", or "mean", the mean of all of `init_from`.
      precision: "bfloat16", "float32", "highest" (float32 products in full, for comparisons) or "auto": bfloat16
        on accelerators, float32 on CPUs.
      remat: what the backward pass recomputes: "none", "block" (all of a block), "dots" (all but products) or "auto",
        which is "dots".
      accumulate: into how many parts a batch is split, computed one after the other to save memory.
      trainable: what is trained: "everything", or some of "routers", "labels" (their table) and "lora" (low-rank
        updates of attention and MLP, see the section `lora`); the rest stays as it is in `init_from`.
      max_skips: the run stops when so many batches were skipped one after the other.
    """

    steps: int
    seed: int = 0
    ema_decay: float = 0.9999
    init_from: str = ""
    class_map: str = ""
    new_classes: str = "random"
    precision: str = "auto"
    remat: str = "auto"
    accumulate: int = 1
    trainable: tuple[str, ...] = EVERYTHING
    max_skips: int = 100

    def __post_init__(self):
        require_range("train.steps", self.steps, 1, MOST_STEPS)
        require_range("train.accumulate", self.accumulate, low=1)
        require_range("train.max_skips", self.max_skips, low=1)
        require_seed("train.seed", self.seed)
        require_range("train.ema_decay", self.ema_decay, 0.0, 1.0)
        require_known("precision", self.precision, PRECISIONS)
        require_known("train.new_classes", self.new_classes, NEW_CLASSES)
        if self.class_map and not self.init_from:
            raise InputError(f"train.class_map {self.class_map!r} needs train.init_from, whose classes it names.")
        require_known("remat", self.remat, REMAT_SETTINGS)
        require_parts("train.trainable", self.trainable)
        if self.trainable != EVERYTHING and not self.init_from:
            raise InputError(
                f"train.trainable {self.trainable} needs train.init_from, which holds what is not trained."
            )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that an update changes, and the parameters that it leaves alone.

    Attributes:
      step: updates tried, int32.
      params, ema: trees of the parameters that are trained, float32.
      opt_state: the optimiser's moments.
      skipped: batches that were refused, for their gradient or for what it makes of the parameters, int32.
      skipped_in_a_row: the last of them, up to now, int32.
      frozen: tree of the other parameters; empty where everything is trained.
    """

    step: jax.Array
    params: dict
    ema: dict
    opt_state: optax.OptState
    skipped: jax.Array
    skipped_in_a_row: jax.Array
    frozen: dict = dataclasses.field(default_factory=dict)

    def with_ema(self) -> dict:
        """Return the whole parameter tree, with the EMA of what is trained."""
        return join_params(self.ema, self.frozen)


def init_state(params, optimizer: optax.GradientTransformation, frozen: dict | None = None) -> TrainState:
    """Make the state before the first step; the EMA starts at the parameters.

    Args:
      params: what is trained.
      optimizer: from `build_optimizer`.
      frozen: the other parameters.
    """
    zero = lambda: jnp.zeros((), jnp.int32)  # an array each: an update reuses the memory of each
    moments, ema = optimizer.init(params), jax.tree.map(jnp.copy, params)
    return TrainState(zero(), params, ema, moments, zero(), zero(), frozen or {})


def accumulate_gradients(differentiate: Callable, examples: dict, parts: int):
    """Return gradients and metrics of a batch, computed part after part and averaged.

    Where 4 divides the examples of a part, it gets runs of `STRATA` neighbours, so that it sees easy and hard timesteps
    alike, else shorter runs. Each device keeps its own examples. What differs from the whole batch at once, beside
    rounding: the budget's penalty is the mean of the parts' penalties, which is the penalty of the whole plus the
    variance of the parts' ratios.

    Args:
      differentiate: examples -> (gradients, metrics), both means over the examples.
      examples: arrays with the leading axis B, a multiple of parts.
      parts: how many.
    """
    if parts == 1:
        return differentiate(examples)
    run = math.gcd(STRATA, len(examples["t"]) // parts)
    # [B] -> [B / (parts run), parts, run] -> [parts, B / parts]
    split = lambda leaf: leaf.reshape(-1, parts, run, *leaf.shape[1:]).swapaxes(0, 1)
    stacked = jax.tree.map(lambda leaf: split(leaf).reshape(parts, -1, *leaf.shape[1:]), examples)

    def add(total, part):
        return jax.tree.map(lambda new, old: old + new / parts, differentiate(part), total), None

    shapes = jax.eval_shape(differentiate, jax.tree.map(lambda leaf: leaf[0], stacked))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    return jax.lax.scan(add, zeros, stacked)[0]


def all_finite(tree) -> jax.Array:
    """Return whether every value of a tree's arrays is a finite number, as a scalar on their devices."""
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all()


def make_update_fn(
    model: Model,
    passes: tuple[str, ...],
    *,
    loss: LossConfig,
    process: Process,
    optimizer: OptimizerConfig,
    train: TrainConfig,
) -> Callable:
    """Make the pure function (state, batch) -> (state, metrics) of one step; the caller compiles it.

    Args:
      model: the network.
      passes: "gated", "complete" or both; see `passes_at`.
      loss, process, optimizer, train: sections of the config.
    """
    learning_rate, skip_norm = build_learning_rate(optimizer), optimizer.skip_norm or jnp.inf
    advance_if = _make_advance_fn(build_optimizer(optimizer), ema_decay=train.ema_decay, platform=model.platform)
    settings = dict(model=model, loss=loss, process=process, passes=passes)

    def lose(trained, examples, step, frozen):
        return objective(join_params(trained, frozen), examples, step, **settings)

    differentiate = jax.grad(lose, has_aux=True)

    def update(state: TrainState, batch) -> tuple[TrainState, dict]:
        key = jax.random.fold_in(make_key(train.seed), state.step)
        examples = draw_examples(batch, key, **settings)
        gradients, metrics = accumulate_gradients(
            functools.partial(differentiate, state.params, step=state.step, frozen=state.frozen),
            examples,
            train.accumulate,
        )
        norm = optax.tree.norm(gradients)
        # A refused batch leaves no trace but the counter: neither moments nor EMA move. NaN < inf is false. With
        # finite norms and the bounds of `OptimizerConfig` what comes out is finite too: it need not be read again.
        accepted = (norm < skip_norm) & jnp.isfinite(optax.tree.norm(state.params))
        rate = learning_rate(state.step - state.skipped)  # the schedule stands still too where a batch is refused
        before = state.params, state.ema, state.opt_state
        params, ema, opt_state = advance_if(accepted, gradients, norm, *before)
        state = TrainState(
            step=state.step + 1,
            params=params,
            ema=ema,
            opt_state=opt_state,
            skipped=state.skipped + jnp.where(accepted, 0, 1),
            skipped_in_a_row=jnp.where(accepted, 0, state.skipped_in_a_row + 1),
            frozen=state.frozen,
        )
        metrics |= {
            "optimizer/gradient_norm": norm,
            "optimizer/skipped_batches": state.skipped,
            "optimizer/skipped_in_a_row": state.skipped_in_a_row,
            "optimizer/learning_rate": rate,
        }
        return state, metrics

    return update


def _make_advance_fn(transform: optax.GradientTransformation, *, ema_decay: float, platform: str) -> Callable:
    """Make the function (accepted, gradients, norm, params, ema, opt_state) -> params, ema, opt_state after a step.

    They are as they were where the batch is not accepted.
    """

    def advance(gradients, norm, params, ema, opt_state):
        updates, opt_state = transform.update(gradients, opt_state, params, norm=norm)
        # Behind a barrier they are computed once, and not again for their EMA from copies of all that they come from.
        params = jax.lax.optimization_barrier(optax.apply_updates(params, updates))
        return params, optax.incremental_update(params, ema, 1.0 - ema_decay), opt_state

    def keep(gradients, norm, *before):
        return before

    def advance_if(accepted, gradients, norm, *before):
        if platform == "cpu":
            return jax.lax.cond(accepted, advance, keep, gradients, norm, *before)
        # XLA for GPUs copies what a conditional may change: of XL/2 12.6 GiB beside the state, not 4.1
        return jax.tree.map(functools.partial(jnp.where, accepted), advance(gradients, norm, *before), before)

    return advance_if


def batch_shapes(model: DiTConfig, size: int) -> dict:
    """Return the shapes of a batch of so many images."""
    shape = (size, model.side, model.side, model.channels)
    return dict(image=jax.ShapeDtypeStruct(shape, jnp.float32), label=jax.ShapeDtypeStruct(shape[:1], jnp.int32))


def compile_update(update: Callable, state: TrainState, batch: dict, mesh: Mesh) -> Callable:
    """Compile an update for a mesh; the old state's memory is reused for the new one.

    Args:
      update: from `make_update_fn`.
      state: a state or its shapes.
      batch: a batch or its shapes, from `batch_shapes`.
      mesh: whose devices share the batch.
    """
    state_shardings = shardings(mesh, state)
    began = time.monotonic()
    compiled = (
        jax.jit(
            update,
            in_shardings=(state_shardings, batch_sharding(mesh)),
            out_shardings=(state_shardings, replicated(mesh)),
            donate_argnums=0,
        )
        .lower(state, batch)
        .compile()
    )
    logger.info("Compiled the update in %.1f s.", time.monotonic() - began)
    memory = compiled.memory_analysis()
    if memory is not None:  # not every backend says
        logger.info(
            "Memory per device: %.2f GiB state and batch, %.2f GiB beside them during a step.",
            *(size / BYTES_PER_GIB for size in (memory.argument_size_in_bytes, memory.temp_size_in_bytes)),
        )
    return compiled
