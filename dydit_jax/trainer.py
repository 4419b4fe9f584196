"""Training: state, objective, update, loop. One trainer for the static DiT and for every stage of a DyDiT.

One way through: batch -> x_t -> model (dynamic and complete pass) -> loss terms -> gradients -> update -> checkpoint.
Random draws and batches depend on seed and step alone: a run that stops and goes on is the run that did not stop.

Source: DyDiT, https://arxiv.org/abs/2410.03456, section 3.4, and its training code. It differs from that code where
the code steps its optimiser twice per batch in the first stage: here every batch is one clipped step, or is skipped.
"""

import dataclasses
import functools
import json
import logging
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from etils import epath
from jax.sharding import Mesh

from dydit_jax.build import (
    Experiment,
    build_learning_rate,
    build_model,
    build_optimizer,
    differences,
    read_experiment,
)
from dydit_jax.checkpoints import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    Run,
    Weights,
    has_checkpoint,
    is_run,
    package_versions,
    save_weights,
)
from dydit_jax.data.sources import batches
from dydit_jax.diffusion.gaussian import at_steps, coefficients, diffuse
from dydit_jax.diffusion.losses import (
    budget_penalty,
    budget_target,
    denoising_error,
    drop_labels,
    stratified_timesteps,
    variational_bound,
)
from dydit_jax.diffusion.schedules import make_schedule
from dydit_jax.errors import InputError
from dydit_jax.loading import load_checkpoint
from dydit_jax.models.cost import routed_ratio
from dydit_jax.models.dit import Model
from dydit_jax.sharding import batch_sharding, make_mesh, replicated, require_divisible, shardings
from dydit_jax.tracking import Clock, duration, make_writers
from dydit_jax.trees import flatten, unflatten

logger = logging.getLogger(__name__)

INIT_STEP = 2**32 - 1  # the key of the initial values is that of a step which no run reaches


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that an update changes.

    Attributes:
      step: updates tried, int32.
      params, ema: parameter trees, float32.
      opt_state: the optimiser's moments.
      skipped: batches whose gradient was refused, int32.
    """

    step: jax.Array
    params: dict
    ema: dict
    opt_state: optax.OptState
    skipped: jax.Array


# --- The objective -------------------------------------------------------------------------------


def objective(params, batch, key, step, *, model: Model, experiment: Experiment, passes: tuple[str, ...]):
    """Return the loss of a batch and its terms.

    Args:
      params: the parameter tree.
      batch: {"image": [B,side,side,C], "label": [B]}.
      key: PRNG key of this step.
      step: number of this step, for the budget's ramp.
      model, experiment: what to train and how.
      passes: "gated", "complete" or both; they share x_t, timesteps and labels.

    Returns:
      The scalar loss and a dict of scalar metrics.
    """
    start, size = batch["image"], len(batch["label"])
    time_key, noise_key, label_key, router_key = jax.random.split(key, 4)
    t = stratified_timesteps(time_key, size, experiment.diffusion.train_steps)
    labels = drop_labels(
        label_key, batch["label"], null_label=model.config.null_label, probability=experiment.loss.label_dropout
    )
    noise = jax.random.normal(noise_key, start.shape)
    c = at_steps(coefficients(make_schedule(experiment.diffusion)), t)
    current = diffuse(start, noise, c)
    loss, metrics = 0.0, {}
    for mode in passes:
        router_noise = model.router_noise(router_key, size) if mode == "gated" else None
        output, routing = model.apply(params, current, t, labels, mode=mode, noise=router_noise)
        terms = {
            f"loss/{mode}_mse": denoising_error(output, noise).mean(),
            f"loss/{mode}_vb": variational_bound(output, start, current, c).mean(),
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
    zero = lambda: jnp.zeros((), jnp.int32)  # two arrays: an update reuses the memory of each
    return TrainState(zero(), params, jax.tree.map(jnp.copy, params), optimizer.init(params), zero())


def make_update_fn(model: Model, experiment: Experiment, passes: tuple[str, ...]) -> Callable:
    """Make the pure function (state, batch) -> (state, metrics) of one step; the caller compiles it."""
    optimizer, learning_rate = build_optimizer(experiment.optimizer), build_learning_rate(experiment.optimizer)
    skip_norm = experiment.optimizer.skip_norm or jnp.inf
    loss_fn = functools.partial(objective, model=model, experiment=experiment, passes=passes)

    def update(state: TrainState, batch) -> tuple[TrainState, dict]:
        key = jax.random.fold_in(jax.random.key(experiment.train.seed), state.step)
        (_, metrics), gradients = jax.value_and_grad(loss_fn, has_aux=True)(state.params, batch, key, state.step)
        norm = optax.tree.norm(gradients)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = optax.incremental_update(params, state.ema, 1.0 - experiment.train.ema_decay)
        # A refused batch leaves no trace but the counter: neither moments nor EMA move. NaN < inf is false.
        accepted = norm < skip_norm
        keep = functools.partial(jax.tree.map, lambda new, old: jnp.where(accepted, new, old))
        state = TrainState(
            step=state.step + 1,
            params=keep(params, state.params),
            ema=keep(ema, state.ema),
            opt_state=keep(opt_state, state.opt_state),
            skipped=state.skipped + jnp.where(accepted, 0, 1),
        )
        metrics |= {
            "optimizer/gradient_norm": norm,
            "optimizer/skipped_batches": state.skipped,
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
    return compiled


# --- The first parameters -----------------------------------------------------------------------


def starting_leaves(model: Model, experiment: Experiment) -> dict:
    """Read the weights of `train.init_from` by path; empty where training starts from random values.

    Raises:
      InputError: weights of another shape, or that lack more than routers.
    """
    if not experiment.train.init_from:
        return {}
    source = flatten(load_checkpoint(experiment.train.init_from).params)
    own = {name: leaf.shape for name, leaf in flatten(model.abstract_params()).items()}
    wrong = [f"{name} {leaf.shape}" for name, leaf in source.items() if own.get(name) != leaf.shape]
    wrong += [f"{name} missing" for name in own if name not in source and "_router/" not in name]
    if wrong:
        raise InputError(f"train.init_from {experiment.train.init_from} is another model: {'; '.join(wrong[:6])}.")
    return source


def first_params(model: Model, experiment: Experiment, mesh: Mesh, source: dict) -> dict:
    """Make the parameters of step 0, directly in their shards: random ones, replaced by those of `source`.

    Args:
      model, experiment: what is trained.
      mesh: where.
      source: leaves by path, from `starting_leaves`.
    """
    key = jax.random.fold_in(jax.random.key(experiment.train.seed), INIT_STEP)
    params = flatten(jax.jit(model.init, out_shardings=shardings(mesh, model.abstract_params()))(key))
    placed = {name: jax.device_put(leaf, params[name].sharding) for name, leaf in source.items()}
    return unflatten(params | placed)


# --- The loop ------------------------------------------------------------------------------------


def prepare_workdir(workdir, config: dict) -> epath.Path:
    """Make sure that a work directory is this run's: empty, or of a run with the same configuration.

    Raises:
      InputError: not given, not writable, not empty, or another configuration's; nothing is changed then.
    """
    if not workdir:
        raise InputError("--workdir is empty; name the folder that this run may write to.")
    workdir = epath.Path(workdir)
    if is_run(workdir):
        found = differences(json.loads((workdir / CONFIG_FILE).read_text()), config)
        if found:
            raise InputError(f"{workdir} holds a run with another configuration: {'; '.join(found)}.")
    elif workdir.exists() and (not workdir.is_dir() or any(workdir.iterdir())):
        raise InputError(f"{workdir} is neither empty nor a run's work directory; name another one.")
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        (workdir / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    except OSError as error:
        raise InputError(f"Can't write to {workdir}: {error}.") from error
    return workdir


def train_and_evaluate(config: dict, workdir) -> TrainState:
    """Run an experiment from its newest checkpoint, or from the start, to its last step.

    Args:
      config: a config file's content as plain dicts.
      workdir: where configuration, metrics and checkpoints go; a run found there is continued.

    Returns:
      The last state. Its EMA also lies in the work directory as one `.safetensors` file.

    Raises:
      InputError: anything wrong with the config or the work directory, before anything is compiled.
    """
    experiment = read_experiment(config)
    mesh = make_mesh(experiment.mesh)
    require_divisible(mesh, experiment.data.batch_size)
    batches(experiment.data, experiment.model, start=0)  # a data source that does not fit says so now
    model = build_model(experiment.model, precision=experiment.train.precision, mesh=mesh, remat=experiment.train.remat)
    source = {} if has_checkpoint(workdir) else starting_leaves(model, experiment)
    workdir = prepare_workdir(workdir, config)
    with jax.set_mesh(mesh), Run(workdir, experiment.checkpoint) as run:
        state = _restored_or_first(run, model, experiment, mesh, source)
        logger.info(
            "%s: %.1f M parameters, %.3f G MACs complete, mesh %s, precision %s.",
            workdir.name,
            sum(leaf.size for leaf in jax.tree.leaves(state.params)) / 1e6,
            model.config.macs.complete / 1e9,
            dict(mesh.shape),
            jnp.dtype(model.dtype).name,
        )
        state = _run_steps(state, run, model, experiment, mesh, make_writers(experiment.tracking, workdir))
    about = dict(config=config, step=int(state.step), versions=package_versions())
    ema = jax.device_get(state.ema)
    weights = Weights(experiment.model, experiment.diffusion, experiment.sampling, ema, about)
    save_weights(workdir / WEIGHTS_FILE, weights)
    logger.info("Wrote the EMA weights to %s.", workdir / WEIGHTS_FILE)
    return state


def _restored_or_first(run: Run, model: Model, experiment: Experiment, mesh: Mesh, source: dict) -> TrainState:
    """Return the newest checkpoint's state, or that of step 0, in their shards."""
    optimizer = build_optimizer(experiment.optimizer)
    make_state = functools.partial(init_state, optimizer=optimizer)
    abstract = jax.eval_shape(make_state, model.abstract_params())
    layout = shardings(mesh, abstract)
    if run.latest_step is None:
        return jax.jit(make_state, out_shardings=layout)(first_params(model, experiment, mesh, source))
    shaped = jax.tree.map(lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s), abstract, layout)
    restored = run.restore(run.latest_step, _items(shaped))
    logger.info("Continuing from step %d.", run.latest_step)
    return TrainState(params=restored["params"], ema=restored["ema"], **restored["rest"])


def _items(state: TrainState) -> dict:
    """Split a state into what a checkpoint stores under separate names, so that the EMA can be read alone."""
    rest = dict(step=state.step, opt_state=state.opt_state, skipped=state.skipped)
    return dict(params=state.params, ema=state.ema, rest=rest)


def _run_steps(state: TrainState, run: Run, model: Model, experiment: Experiment, mesh: Mesh, writers) -> TrainState:
    """Step to the end, reporting and saving on the way."""
    step, last, every = int(state.step), experiment.train.steps, experiment.tracking.every_steps
    data = batches(experiment.data, experiment.model, start=step)
    about = dict(versions=package_versions(), data=dataclasses.asdict(experiment.data))
    shapes = jax.eval_shape(lambda state: state, state)
    compiled = functools.cache(lambda passes: compile_update(model, experiment, passes, mesh, shapes))
    if step < last:
        compiled(passes_at(step, experiment))  # before the clock starts
    clock = Clock(step, last)
    while step < last:
        batch = jax.device_put(next(data), batch_sharding(mesh))
        update = compiled(passes_at(step, experiment))
        state, metrics = update(state, batch)
        step += 1
        if step % every == 0 or step == last:
            _report(step, last, jax.device_get(metrics), clock, writers)
        run.save(step, _items(state), about, force=step == last)
    return state


def _report(step: int, last: int, metrics: dict, clock: Clock, writers) -> None:
    """Write the metrics of a step and one line for people."""
    metrics = {name: float(value) for name, value in metrics.items()}
    pace, seconds_left = clock.read(step)
    metrics["time/steps_per_second"] = pace
    for writer in writers:
        writer.write(step, metrics)
    ratio = (
        f"  ratio {metrics['cost/ratio']:.3f} (target {metrics['cost/target']:.3f})" if "cost/ratio" in metrics else ""
    )
    skipped = f"  skipped {metrics['optimizer/skipped_batches']:.0f}" if metrics["optimizer/skipped_batches"] else ""
    logger.info(
        "step %d/%d  loss %.4f%s%s  %.1f steps/s  %s left",
        *(step, last, metrics["loss/total"], ratio, skipped, pace, duration(seconds_left)),
    )
