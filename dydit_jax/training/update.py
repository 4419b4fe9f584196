"""One training step: state, objective, update. Pure functions of state and batch.

One way through: batch -> what is drawn at random -> x_t -> model (dynamic and complete pass) -> loss terms ->
gradients -> update. Random draws depend on seed and step alone, and belong to the whole batch, however it is split.

Source: DyDiT, https://arxiv.org/abs/2410.03456, section 3.4, and its training code. It differs from that code where
the code steps its optimiser twice per batch in the first stage: here every batch is one clipped step, or is skipped.
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

from dydit_jax.diffusion.gaussian import at_steps, coefficients, diffuse
from dydit_jax.diffusion.losses import (
    STRATA,
    budget_penalty,
    budget_target,
    denoising_error,
    drop_labels,
    stratified_timesteps,
    variational_bound,
)
from dydit_jax.diffusion.schedules import DiffusionConfig, make_schedule
from dydit_jax.models.cost import routed_ratio
from dydit_jax.models.dit import Model
from dydit_jax.runtime.seeds import make_key
from dydit_jax.runtime.sharding import batch_sharding, replicated, shardings
from dydit_jax.training.experiment import Experiment, build_learning_rate, build_optimizer

logger = logging.getLogger(__name__)

BYTES_PER_GIB = 2**30


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that an update changes.

    Attributes:
      step: updates tried, int32.
      params, ema: parameter trees, float32.
      opt_state: the optimiser's moments.
      skipped: batches that were refused, for their gradient or for what it makes of the parameters, int32.
      skipped_in_a_row: the last of them, up to now, int32.
    """

    step: jax.Array
    params: dict
    ema: dict
    opt_state: optax.OptState
    skipped: jax.Array
    skipped_in_a_row: jax.Array


# --- The objective -------------------------------------------------------------------------------


def draw_examples(batch, key, *, model: Model, experiment: Experiment, passes: tuple[str, ...]) -> dict:
    """Draw all that is random in a step.

    Args:
      batch: {"image": [B,side,side,C], "label": [B]}.
      key: PRNG key of this step.
      model, experiment, passes: as for `objective`.

    Returns:
      Arrays with the leading axis B, or None: "x0", "noise", "t", "labels" and "router_noise".
    """
    size = len(batch["label"])
    time_key, noise_key, label_key, router_key = jax.random.split(key, 4)
    dropout = dict(null_label=model.config.null_label, probability=experiment.loss.label_dropout)
    return dict(
        x0=batch["image"],
        noise=jax.random.normal(noise_key, batch["image"].shape, jnp.float32),
        t=stratified_timesteps(time_key, size, experiment.diffusion.train_steps),
        labels=drop_labels(label_key, batch["label"], **dropout),
        router_noise=model.router_noise(router_key, size) if "gated" in passes else None,
    )


def objective(params, examples, step, *, model: Model, experiment: Experiment, passes: tuple[str, ...]):
    """Return the loss of some examples and its terms.

    Args:
      params: the parameter tree.
      examples: from `draw_examples`.
      step: number of this step, for the budget's ramp.
      model, experiment: what to train and how.
      passes: "gated", "complete" or both; they share x_t, timesteps and labels.

    Returns:
      The scalar loss and a dict of scalar metrics.
    """
    x0, noise, t, labels = (examples[name] for name in ("x0", "noise", "t", "labels"))
    c = at_steps(coefficients(make_schedule(experiment.diffusion)), t)
    xt = diffuse(x0, noise, c)
    loss, metrics = 0.0, {}
    router_noise = examples["router_noise"]
    if passes == ("gated", "complete") and not model.config.token_capacity:
        *outputs, routing = model.apply_both(params, xt, t, labels, noise=router_noise)
    else:
        noises = [router_noise if mode == "gated" else None for mode in passes]
        found = [model.apply(params, xt, t, labels, mode=mode, noise=own) for mode, own in zip(passes, noises)]
        outputs, routing = [output for output, _ in found], found[0][1]
    for mode, output in zip(passes, outputs):
        terms = {
            f"loss/{mode}_mse": denoising_error(output, noise).mean(),
            f"loss/{mode}_vb": variational_bound(output, x0, xt, c).mean(),
        }
        if mode == "gated":
            ratio = routed_ratio(routing, attention=model.config.macs.attention, mlp=model.config.macs.mlp)
            target = budget_target(step, experiment.loss)
            terms["loss/budget"] = budget_penalty(ratio, target, weight=experiment.loss.budget_weight)
            metrics |= {"cost/ratio": ratio.mean(), "cost/target": target}
            metrics |= {f"routing/{name}": gates.mean() for name, gates in vars(routing).items()}
        loss += sum(terms.values())
        metrics |= terms
    return loss, metrics | {"loss/total": loss}


def passes_at(step: int, experiment: Experiment) -> tuple[str, ...]:
    """Return the passes that are trained at a step: the static model has one, a DyDiT one or two."""
    if experiment.model.routers == "none":
        return ("complete",)
    complete_steps = experiment.loss.complete_steps
    return ("gated", "complete") if complete_steps < 0 or step < complete_steps else ("gated",)


# --- The update ----------------------------------------------------------------------------------


def init_state(params, optimizer: optax.GradientTransformation) -> TrainState:
    """Make the state before the first step; the EMA starts at the parameters."""
    zero = lambda: jnp.zeros((), jnp.int32)  # an array each: an update reuses the memory of each
    return TrainState(zero(), params, jax.tree.map(jnp.copy, params), optimizer.init(params), zero(), zero())


def accumulated(differentiate: Callable, examples: dict, parts: int):
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


def make_update_fn(model: Model, experiment: Experiment, passes: tuple[str, ...]) -> Callable:
    """Make the pure function (state, batch) -> (state, metrics) of one step; the caller compiles it."""
    optimizer, learning_rate = build_optimizer(experiment.optimizer), build_learning_rate(experiment.optimizer)
    skip_norm = experiment.optimizer.skip_norm or jnp.inf
    settings = dict(model=model, experiment=experiment, passes=passes)
    differentiate = jax.grad(functools.partial(objective, **settings), has_aux=True)

    def update(state: TrainState, batch) -> tuple[TrainState, dict]:
        key = jax.random.fold_in(make_key(experiment.train.seed), state.step)
        examples = draw_examples(batch, key, **settings)
        gradients, metrics = accumulated(
            functools.partial(differentiate, state.params, step=state.step), examples, experiment.train.accumulate
        )
        norm = optax.tree.norm(gradients)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = optax.incremental_update(params, state.ema, 1.0 - experiment.train.ema_decay)
        # A refused batch leaves no trace but the counter: neither moments nor EMA move. NaN < inf is false. Moments are
        # finite where the gradients' norm is, parameters where their EMA is: one more pass over one of the four trees.
        accepted = (norm < skip_norm) & all_finite(ema)
        keep = functools.partial(jax.tree.map, lambda new, old: jnp.where(accepted, new, old))
        state = TrainState(
            step=state.step + 1,
            params=keep(params, state.params),
            ema=keep(ema, state.ema),
            opt_state=keep(opt_state, state.opt_state),
            skipped=state.skipped + jnp.where(accepted, 0, 1),
            skipped_in_a_row=jnp.where(accepted, 0, state.skipped_in_a_row + 1),
        )
        metrics |= {
            "optimizer/gradient_norm": norm,
            "optimizer/skipped_batches": state.skipped,
            "optimizer/skipped_in_a_row": state.skipped_in_a_row,
            "optimizer/learning_rate": learning_rate(state.step - 1),
        }
        return state, metrics

    return update


def compile_update(model: Model, experiment: Experiment, passes: tuple[str, ...], mesh: Mesh, state) -> Callable:
    """Compile the update for a mesh; the old state's memory is reused for the new one.

    Args:
      model, experiment, passes: as for `make_update_fn`.
      mesh: where.
      state: a state or its shapes.
    """
    state_shardings = shardings(mesh, state)
    began = time.monotonic()
    shape = (experiment.data.batch_size, model.config.side, model.config.side, model.config.channels)
    batch = dict(image=jax.ShapeDtypeStruct(shape, jnp.float32), label=jax.ShapeDtypeStruct(shape[:1], jnp.int32))
    compiled = (
        jax.jit(
            make_update_fn(model, experiment, passes),
            in_shardings=(state_shardings, batch_sharding(mesh)),
            out_shardings=(state_shardings, replicated(mesh)),
            donate_argnums=0,
        )
        .lower(state, batch)
        .compile()
    )
    logger.info("Compiled the update (%s pass) in %.1f s.", " and ".join(passes), time.monotonic() - began)
    memory = compiled.memory_analysis()
    if memory is not None:  # not every backend says
        logger.info(
            "Memory per device: %.2f GiB state and batch, %.2f GiB beside them during a step.",
            *(size / BYTES_PER_GIB for size in (memory.argument_size_in_bytes, memory.temp_size_in_bytes)),
        )
    return compiled


# --- Measuring -----------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames=("model", "diffusion", "mode"))
def patch_losses(params, x0, labels, keys, timestep, *, model: Model, diffusion: DiffusionConfig, mode: str):
    """Return the squared error of the predicted noise, mean over the values of each patch, [B,N].

    Args:
      params: of the model.
      start: x_0 [B,side,side,C].
      labels: [B].
      keys: of the examples [B]; with the timestep they fix the noise.
      timestep: one for all.
      model, diffusion: the network and its process.
      mode: "gated" or "complete".
    """
    config = model.config
    t = jnp.full(len(x0), timestep)
    draw = lambda key: jax.random.normal(jax.random.fold_in(key, timestep), x0.shape[1:], jnp.float32)
    noise = jax.vmap(draw)(keys)
    xt = diffuse(x0, noise, at_steps(coefficients(make_schedule(diffusion)), t))
    output, _ = model.apply(params, xt, t, labels, mode=mode)
    error = jnp.square(output[..., : config.channels] - noise)
    side = config.side // config.patch
    patches = error.reshape(-1, side, config.patch, side, config.patch, config.channels)
    return patches.mean((2, 4, 5)).reshape(-1, config.tokens)
