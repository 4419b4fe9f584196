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
from dydit_jax.errors import InputError
from dydit_jax.jobs.endings import about_newest, checkpoint_named
from dydit_jax.jobs.judging import open_judge
from dydit_jax.jobs.steps import Parts, checkpoint_items, run_steps
from dydit_jax.jobs.training_data import class_names_of, open_training_data, with_counted_classes, with_latents
from dydit_jax.models.cost import format_count
from dydit_jax.models.dit import Model
from dydit_jax.models.precision import build_model
from dydit_jax.models.trainable import EVERYTHING, split_params
from dydit_jax.runtime.files import locate, write_json
from dydit_jax.runtime.locks import FolderLock, is_free
from dydit_jax.runtime.processes import is_main, on_all_processes, one_for_all, require_same, to_host
from dydit_jax.runtime.settings import own_settings
from dydit_jax.runtime.sharding import make_mesh, require_divisible, shardings
from dydit_jax.training.experiment import Experiment, differences, read_experiment
from dydit_jax.training.initialize import first_params, frozen_base, kept_class_names, starting_leaves, starting_weights
from dydit_jax.training.optimizer import build_optimizer
from dydit_jax.training.update import TrainState, init_state
from dydit_jax.trees import flatten, unflatten

logger = logging.getLogger(__name__)


def require_own_workdir(workdir, config: dict) -> None:
    """Raise unless a work directory is this run's: empty, or of a run with the same configuration.

    Raises:
      InputError: not empty, or another configuration's; nothing is changed.
    """
    workdir = locate(workdir)
    if is_run(workdir):
        found = differences(read_run_config(workdir), config)
        if found:
            raise InputError(f"{workdir} holds a run with another configuration: {'; '.join(found)}.")
    elif not is_free(workdir):
        raise InputError(f"{workdir} is neither empty nor a run's work directory; name another one.")


@contextlib.contextmanager
def claimed_workdir(workdir, config: dict) -> Iterator[FolderLock]:
    """Hold a work directory that is this run's.

    Raises:
      InputError: see `require_own_workdir`; or not writable, or one that another training works in.
    """
    workdir = locate(workdir)
    require_own_workdir(workdir, config)
    with FolderLock(workdir) as lock:
        _warn_of_another_start(workdir, config)
        write_json(workdir / CONFIG_FILE, config)
        yield lock


def _warn_of_another_start(workdir, config: dict) -> None:
    """Say so where a run that goes on is given other weights to start from than those that it started from."""
    before = read_run_config(workdir) if is_run(workdir) and has_checkpoint(workdir) else config
    old, new = ((each.get("train") or {}).get("init_from") or "" for each in (before, config))
    if old != new:
        message = "The run started from %s; train.init_from is %s now, and what it has trained stays."
        logger.warning(message, old or "random values", new or "empty")


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
      StopError: asked to leave, too many bad batches in a row, or a checkpoint that can't be written.
    """
    if not workdir:
        raise InputError("--workdir is empty; name the folder that this run may write to.")
    config, experiment, mesh, model = _read(config)
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
    names = class_names_of(data)[: experiment.model.classes]
    source = on_all_processes(lambda: starting_leaves(weights, model, experiment, names))
    names = names or kept_class_names(weights, experiment)
    base = on_all_processes(lambda: frozen_base(weights, source, model, experiment))
    judge = on_all_processes(lambda: open_judge(experiment, mesh))
    with contextlib.ExitStack() as claim:
        lock = on_all_processes(lambda: claim.enter_context(claimed_workdir(workdir, config)) if is_main() else None)
        on_all_processes(lambda: _require_shared(workdir))
        workdir = locate(workdir)
        run = Run(workdir, experiment.checkpoint, lock=lock, from_step=from_step)
        about = dict(versions=package_versions(), data=data.fingerprint, class_names=names)
        about |= dict(base=base) if base else {}
        with jax.set_mesh(mesh), run, one_for_all(lambda: about_newest(workdir)):
            state, about = _restored_or_first(run, model, experiment, mesh, source, about)
            weights = source = None  # gigabytes on the host, which nothing needs from here on
            _describe(state, workdir, model, mesh)
            parts = Parts(run, workdir, model, experiment, mesh, data, about, judge)
            state = run_steps(state, parts)
            ema = to_host(state.ema)
        about = dict(config=config, step=int(state.step), **{key: about[key] for key in ("versions", "class_names")})
        if is_main():
            weights = Weights(experiment.model, experiment.process, experiment.sampling, ema, about, model.lora)
            with checkpoint_named(run, workdir):
                _save_result(workdir / WEIGHTS_FILE, weights, base)
    return state


def _read(config: dict) -> tuple[dict, Experiment, Mesh, Model]:
    """Return a config with its classes counted, the same as an experiment, the mesh and the model.

    Raises:
      InputError: anything wrong with it, or processes whose configs differ.
    """
    config = on_all_processes(lambda: with_counted_classes(config))
    experiment = on_all_processes(lambda: read_experiment(config))
    require_same("configuration", json.dumps(config, sort_keys=True))
    mesh = on_all_processes(lambda: make_mesh(experiment.mesh))
    on_all_processes(lambda: require_divisible(mesh, experiment.data.batch_size // experiment.train.accumulate))
    settings = dict(precision=experiment.train.precision, remat=experiment.train.remat)
    lora = experiment.lora if "lora" in experiment.train.trainable else None
    return config, experiment, mesh, build_model(experiment.model, **settings, mesh=mesh, lora=lora)


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
    found = run.resume(checkpoint_items(shaped))
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
    if before.get("data") != data:
        raise InputError(
            f"The dataset is not the one that the run of step {step} was trained on "
            f"({data} here, {before.get('data')} there); give it back, or start another run from these weights."
        )
    run.set_aside(after=step)
    logger.info("Continuing from step %d.", step)
    leaves, layout = flatten(frozen), flatten(shardings(mesh, frozen))
    placed = unflatten({name: jax.device_put(source[name], layout[name]) for name in leaves})
    about = about | dict(class_names=about["class_names"] or before.get("class_names", ()))
    return TrainState(params=restored["params"], ema=restored["ema"], **restored["rest"], frozen=placed), about
