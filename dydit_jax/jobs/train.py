"""A run: from a config to the last step, through restarts, bad batches and notices to leave.

One way through: config -> data, model, state (a checkpoint's or the first) -> steps -> checkpoints -> EMA weights.
Batches and random draws depend on seed and step alone: a run that stops and goes on is the run that did not stop,
whatever the number of devices or processes before and after.
"""

import contextlib
import dataclasses
import functools
import json
import logging
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from etils import epath
from jax.sharding import Mesh

from dydit_jax.checkpoints import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    Run,
    Weights,
    has_checkpoint,
    is_run,
    package_versions,
    read_run_config,
    save_adapter,
    save_weights,
)
from dydit_jax.data.batches import batches
from dydit_jax.data.sources import DataConfig, DataSource
from dydit_jax.errors import InputError, StopError
from dydit_jax.jobs.ema import draw_samples, measure_ema, place_examples
from dydit_jax.jobs.endings import about_newest, checkpoint_named, require_finite, require_progress
from dydit_jax.jobs.judging import Judge, open_judge
from dydit_jax.jobs.training_data import class_names_of, open_training_data, with_counted_classes, with_latents
from dydit_jax.loading import load_decoder
from dydit_jax.models.cost import format_count
from dydit_jax.models.dit import Model
from dydit_jax.models.precision import build_model
from dydit_jax.models.trainable import EVERYTHING, split_params
from dydit_jax.runtime.files import write_json
from dydit_jax.runtime.locks import LOCK_FILE, FolderLock
from dydit_jax.runtime.peaks import best_case, flops_utilisation
from dydit_jax.runtime.peers import RESTART_CODE
from dydit_jax.runtime.processes import PreemptionNotice, is_main, on_all_processes, one_for_all, require_same, to_host
from dydit_jax.runtime.settings import own_settings
from dydit_jax.runtime.sharding import (
    batch_sharding,
    make_mesh,
    process_rows,
    replicated,
    require_divisible,
    shardings,
)
from dydit_jax.runtime.tracking import Clock, Profile, StallWatchdog, duration
from dydit_jax.runtime.writers import Writers, open_writers
from dydit_jax.training.experiment import Experiment, build_update, differences, read_experiment
from dydit_jax.training.initialize import first_params, frozen_base, kept_class_names, starting_leaves, starting_weights
from dydit_jax.training.objective import passes_at
from dydit_jax.training.optimizer import build_optimizer
from dydit_jax.training.update import TrainState, all_finite, batch_shapes, compile_update, init_state
from dydit_jax.trees import flatten, unflatten

logger = logging.getLogger(__name__)

# --- The loop ------------------------------------------------------------------------------------


def require_own_workdir(workdir, config: dict) -> None:
    """Raise unless a work directory is this run's: empty, or of a run with the same configuration.

    Raises:
      InputError: not empty, or another configuration's; nothing is changed.
    """
    workdir = epath.Path(workdir)
    if is_run(workdir):
        found = differences(read_run_config(workdir), config)
        if found:
            raise InputError(f"{workdir} holds a run with another configuration: {'; '.join(found)}.")
    elif workdir.exists() and (not workdir.is_dir() or not all(map(_is_left_behind, workdir.iterdir()))):
        raise InputError(f"{workdir} is neither empty nor a run's work directory; name another one.")


@contextlib.contextmanager
def claimed_workdir(workdir, config: dict) -> Iterator[FolderLock]:
    """Hold a work directory that is this run's.

    Raises:
      InputError: see `require_own_workdir`; or not writable, or one that another training works in.
    """
    workdir = epath.Path(workdir)
    require_own_workdir(workdir, config)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"Can't write to {workdir}: {error}.") from error
    with FolderLock(workdir) as lock:
        write_json(workdir / CONFIG_FILE, config)
        yield lock


def _is_left_behind(path: epath.Path) -> bool:
    """Return whether a file is of a run that was killed before it had written its configuration."""
    return path.name == LOCK_FILE or path.name.endswith(".partial")


@own_settings()
def train_and_evaluate(config: dict, workdir, from_step: int | None = None) -> TrainState:
    """Run an experiment from its newest whole checkpoint, or from the start, to its last step.

    Args:
      config: a config file's content as plain dicts.
      workdir: where configuration, metrics and checkpoints go; a run found there is continued.
      from_step: go back to the checkpoint of this step; later ones are set aside.

    Returns:
      The last state. Its EMA also lies in the work directory as one `.safetensors` file.

    Raises:
      InputError: anything wrong with the config or the work directory, before anything is compiled.
      StopError: told to leave, too many bad batches in a row, or a checkpoint that can't be written.
    """
    if not workdir:
        raise InputError("--workdir is empty; name the folder that this run may write to.")
    config = on_all_processes(lambda: with_counted_classes(config))
    experiment = on_all_processes(lambda: read_experiment(config))
    require_same("configuration", json.dumps(config, sort_keys=True))
    mesh = on_all_processes(lambda: make_mesh(experiment.mesh))
    on_all_processes(lambda: require_divisible(mesh, experiment.data.batch_size // experiment.train.accumulate))
    settings = dict(precision=experiment.train.precision, remat=experiment.train.remat)
    lora = experiment.lora if "lora" in experiment.train.trainable else None
    model = build_model(experiment.model, **settings, mesh=mesh, lora=lora)
    continued = has_checkpoint(workdir)
    require_same("content of the work directory", str((continued, from_step)))
    if from_step is not None and not continued:
        raise InputError(f"--from_step={from_step}: {workdir} has no checkpoint yet.")
    # A run that trains only some of its parameters has the others from there, whenever it goes on.
    needed = not continued or experiment.train.trainable != EVERYTHING
    weights = on_all_processes(lambda: starting_weights(model, experiment)) if needed else None
    on_all_processes(lambda: require_own_workdir(workdir, config) if is_main() else None)
    experiment = with_latents(experiment, workdir)
    # A data source that does not fit says so now.
    data = on_all_processes(lambda: open_training_data(experiment))
    require_same("dataset", data.fingerprint)
    names = class_names_of(data)
    source = on_all_processes(lambda: starting_leaves(weights, model, experiment, names))
    names = names or kept_class_names(weights, experiment)
    base = on_all_processes(lambda: frozen_base(weights, source, model, experiment))
    judge = on_all_processes(lambda: open_judge(experiment, mesh))
    with contextlib.ExitStack() as claim:
        lock = on_all_processes(lambda: claim.enter_context(claimed_workdir(workdir, config)) if is_main() else None)
        on_all_processes(lambda: _require_shared(workdir))
        workdir = epath.Path(workdir)
        run = Run(workdir, experiment.checkpoint, lock=lock, from_step=from_step)
        about = dict(versions=package_versions(), data=data.fingerprint, class_names=names)
        about |= dict(base=base) if base else {}
        with jax.set_mesh(mesh), run, one_for_all(lambda: about_newest(workdir)):
            state, about = _restored_or_first(run, model, experiment, mesh, source, about)
            _describe(state, workdir, model, mesh)
            parts = Parts(run, workdir, model, experiment, mesh, data, about, judge)
            state = _run_steps(state, parts)
            ema = to_host(state.ema)
        about = dict(config=config, step=int(state.step), **{key: about[key] for key in ("versions", "class_names")})
        if is_main():
            weights = Weights(experiment.model, experiment.process, experiment.sampling, ema, about, lora)
            with checkpoint_named(run, workdir):
                _save_result(workdir / WEIGHTS_FILE, weights, base)
    return state


def _save_result(path, weights: Weights, base: dict | None) -> None:
    """Write the EMA weights, or an adapter where only some were trained."""
    if base:
        save_adapter(path, weights, base)
    else:
        save_weights(path, weights)
    logger.info("Wrote the EMA weights to %s.", path)


def _require_shared(workdir) -> None:
    """Raise where this process does not see the work directory that the main one has made.

    Raises:
      InputError: a folder on a disk of one machine alone.
    """
    if not is_run(workdir):
        raise InputError(
            f"{workdir} is not what process 0 sees there; name a folder that all machines share, or gs://."
        )


def _describe(state: TrainState, workdir, model: Model, mesh: Mesh) -> None:
    """Say what is trained and where it lies."""
    leaves = jax.tree.leaves(state)
    on_a_device = sum(leaf.addressable_shards[0].data.nbytes for leaf in leaves)
    split = sum(leaf.addressable_shards[0].data.nbytes < leaf.nbytes for leaf in leaves)
    trained, frozen = (sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (state.params, state.frozen))
    logger.info(
        "%s: %s parameters, %s of them trained, %s MACs per image and pass, mesh %s on %d x %s in %d processes, "
        "precision %s.",
        workdir.name,
        *(format_count(trained + frozen), format_count(trained)),
        format_count(model.config.macs.complete),
        dict(mesh.shape),
        mesh.size,
        jax.devices()[0].device_kind,
        jax.process_count(),
        jnp.dtype(model.dtype).name,
    )
    logger.info(
        "State: %.2f GiB, %.2f GiB of it on each device; %d of %d arrays are split.",
        *(sum(leaf.nbytes for leaf in leaves) / 2**30, on_a_device / 2**30, split, len(leaves)),
    )


def _restored_or_first(run: Run, model: Model, experiment: Experiment, mesh: Mesh, source: dict, about: dict):
    """Return the state of the checkpoint to go on from, or of step 0, in their shards, and the next one's `about`."""
    optimizer, trainable = build_optimizer(experiment.optimizer), experiment.train.trainable
    make_state = functools.partial(init_state, optimizer=optimizer)
    trained, frozen = split_params(model.abstract_params(), trainable)
    abstract = jax.eval_shape(make_state, trained)
    layout = shardings(mesh, abstract)
    shaped = jax.tree.map(lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s), abstract, layout)
    found = run.resume(_items(shaped))
    if found is None:
        trained, frozen = split_params(first_params(model, experiment, mesh, source), trainable)
        return dataclasses.replace(jax.jit(make_state, out_shardings=layout)(trained), frozen=frozen), about
    step, restored = found
    data, before = about["data"], restored["about"]
    if before.get("base", {}).get("checksum") != about.get("base", {}).get("checksum"):
        raise InputError(
            f"train.init_from {experiment.train.init_from} has changed since the run of step {step} started from it; "
            "put the same weights there, or start another run."
        )
    if before["data"] != data:
        raise InputError(
            f"The dataset is not the one that the run of step {step} was trained on "
            f"({data} here, {before['data']} there); give it back, or start another run from these weights."
        )
    run.set_aside(after=step)
    logger.info("Continuing from step %d.", step)
    leaves, layout = flatten(frozen), flatten(shardings(mesh, frozen))
    placed = unflatten({name: jax.device_put(source[name], layout[name]) for name in leaves})
    about = about | dict(class_names=about["class_names"] or before.get("class_names", ()))
    return TrainState(params=restored["params"], ema=restored["ema"], **restored["rest"], frozen=placed), about


def _items(state: TrainState) -> dict:
    """Split a state into what a checkpoint stores under separate names, so that the EMA can be read alone."""
    rest = {name: leaf for name, leaf in vars(state).items() if name not in ("params", "ema", "frozen")}
    return dict(params=state.params, ema=state.ema, rest=rest)


@dataclasses.dataclass(frozen=True)
class Parts:
    """What a run works with; `about` is kept with every checkpoint, and without metrics there is no judge."""

    run: Run
    workdir: epath.Path
    model: Model
    experiment: Experiment
    mesh: Mesh
    data: DataSource
    about: dict
    judge: Judge | None


def _run_steps(state: TrainState, parts: Parts) -> TrainState:
    """Step to the end, reporting, drawing, measuring and saving on the way."""
    run, workdir, model, experiment, mesh, data, about, judge = vars(parts).values()
    step, last, tracking = int(state.step), experiment.train.steps, experiment.tracking
    shapes = jax.eval_shape(lambda state: state, state), batch_shapes(model.config, experiment.data.batch_size)
    compiled = functools.cache(lambda passes: compile_update(build_update(experiment, model, passes), *shapes, mesh))
    passes = functools.partial(passes_at, model=experiment.model, loss=experiment.loss)
    source = _placed_batches(data, experiment.data, mesh, start=step)
    settings = dataclasses.asdict(experiment)
    writers = open_writers(tracking, workdir, step, settings) if is_main() else Writers([])
    shown, decode = None, None
    if tracking.samples_every_steps:  # an autoencoder that is not there must not end the run days later
        shown = place_examples(data, experiment, mesh)
        decode = load_decoder(experiment.sampling.autoencoder, model.config.channels, mesh)
    finite = jax.jit(all_finite, out_shardings=replicated(mesh))
    if step < last:
        require_finite(finite, step, state, workdir)
        logger.info("Compiling a step.")
        compiled(passes(step))  # before the clock starts
        _log_time_estimate(step, model, experiment)
    clock = Clock(step, last)
    profile, watch = Profile(tracking.profile, workdir), StallWatchdog(tracking.stall_seconds)
    with writers, profile, watch, PreemptionNotice() as notice:
        if judge is not None:
            with checkpoint_named(run, workdir):
                judge.open(workdir, run, step)
                _judge(judge, step, state, writers, watch)  # where the run was stopped before it had
        while step < last:
            profile.at(step)
            watch.now(f"the batch of step {step + 1}")
            batch = next(source)
            watch.now(f"step {step + 1}")
            state, metrics = compiled(passes(step))(state, batch)
            step += 1
            if step % tracking.every_steps == 0 or step == last:
                watch.now(f"the results of step {step}")
                metrics = {name: float(value) for name, value in jax.device_get(metrics).items()}
                with checkpoint_named(run, workdir):
                    _report(step, last, metrics, clock, writers, model, experiment)
                require_progress(step, metrics, run, experiment)
                profile.look(step)
            leaving = notice.at(step)
            watch.now(f"the checkpoint of step {step}")
            judged = judge is not None and judge.is_due(step)
            if step % experiment.checkpoint.every_steps == 0 or step == last or leaving or judged:
                require_finite(finite, step, state, workdir)
                run.save(step, _items(state), about, force=True)
            if leaving:
                run.wait()
                raise StopError(f"Told to stop: step {step} is saved, the same command goes on from it.", RESTART_CODE)
            if tracking.samples_every_steps and step % tracking.samples_every_steps == 0:
                watch.now(f"the samples of step {step}")
                with checkpoint_named(run, workdir):
                    grid, seen = draw_samples(step, state, workdir, model, experiment, mesh, decode)
                    writers.draw(step, grid)
                    writers.write(step, seen | measure_ema(state, model, experiment, shown))
            if judged:
                run.wait()  # the best checkpoint must be there
                with checkpoint_named(run, workdir):
                    _judge(judge, step, state, writers, watch)
        watch.now("the last checkpoint")
        run.wait()
    return state


def _placed_batches(data: DataSource, config: DataConfig, mesh: Mesh, *, start: int) -> Iterator[dict]:
    """Iterate over the batches from a step on, split over the devices of all processes."""
    sharding, size = batch_sharding(mesh), config.batch_size
    place = lambda leaf: jax.make_array_from_process_local_data(sharding, leaf, (size, *leaf.shape[1:]))
    for batch in batches(data, config, start=start, rows=process_rows(mesh, size)):
        yield jax.tree.map(place, batch)


def _judge(judge: Judge, step: int, state: TrainState, writers: Writers, watch: StallWatchdog) -> None:
    """Measure the EMA of a step if that is due, and write the scores."""
    if judge.is_due(step):
        watch.now(f"the metrics of step {step}")
        writers.write(step, judge.measure(step, state, watch.now))


def _step_macs(step: int, model: Model, experiment: Experiment) -> float:
    """Return the MACs of a step's forward passes: what counts as use of the chips, with every gate open."""
    passes = passes_at(step, model=experiment.model, loss=experiment.loss)
    return len(passes) * experiment.data.batch_size * model.config.macs.complete


def _log_time_estimate(step: int, model: Model, experiment: Experiment) -> None:
    """Say before the first step how long the run takes at least, where the chips' peak is known."""
    found = best_case(_step_macs(step, model, experiment), model.dtype, model.remat)
    if found is not None and is_main():
        seconds, utilisation = found
        logger.info(
            "At the chips' peak a step takes %.3f s, the %d steps to go %s; MFU at most %.0f %%.",
            *(seconds, experiment.train.steps - step, duration(seconds * (experiment.train.steps - step))),
            100 * utilisation,
        )


def _report(
    step: int, last: int, metrics: dict, clock: Clock, writers: Writers, model: Model, experiment: Experiment
) -> None:
    """Write the metrics of a step and one line for people."""
    pace, seconds_left = clock.read(step)
    metrics["time/steps_per_second"] = pace
    utilisation = flops_utilisation(_step_macs(step - 1, model, experiment) * pace, model.dtype)
    if utilisation is not None:
        metrics["time/mfu"] = utilisation
    writers.write(step, metrics)
    ratio = (
        f"  ratio {metrics['cost/ratio']:.3f} (target {metrics['cost/target']:.3f})" if "cost/ratio" in metrics else ""
    )
    skipped = f"  skipped {metrics['optimizer/skipped_batches']:.0f}" if metrics["optimizer/skipped_batches"] else ""
    mfu = "" if utilisation is None else f"  MFU {100 * utilisation:.0f} %"
    if is_main():
        logger.info(
            "step %d/%d  loss %.4f%s%s  %.1f steps/s%s  %s left",
            *(step, last, metrics["loss/total"], ratio, skipped, pace, mfu, duration(seconds_left)),
        )
