"""Runs that continue: the work directory of a training, with its configuration, its log and Orbax checkpoints.

    <workdir>/config.json          the configuration that the run was started with
    <workdir>/lock.json            who trains here now (`runtime/locks.py`)
    <workdir>/checkpoints/<step>/  params, ema, rest (step, moments, counters), about (versions, data, digests)
    <workdir>/best.json            which checkpoint has the best FID, where that is measured; it is kept beyond `keep`
    <workdir>/set_aside/           checkpoints that the run did not go on from, damaged or later than `--from_step`, by
                                   step, and the lines of `metrics.jsonl` after the step that it went on from
    <workdir>/weights.safetensors  the EMA after the last step

A training passes over a damaged checkpoint with a warning and goes on from the newest whole one: the same steps give
the same state again. Whoever reads weights gets an error that names that step, and chooses.
"""

import contextlib
import dataclasses
import logging
import sys
from collections.abc import Callable

import jax
from etils import epath

from dydit_jax.checkpoints.best import read_best
from dydit_jax.checkpoints.descriptions import About, Config
from dydit_jax.checkpoints.reading import (
    CHECKPOINTS_FOLDER,
    checkpoint_folder,
    describe,
    newest_step,
    read_about,
    read_checkpoint,
    saved_steps,
)
from dydit_jax.errors import DamageError, InputError, StopError, name_file
from dydit_jax.records import read_mapping, require_mapping
from dydit_jax.runtime.files import as_system_errors, locate, make_folder, read_json
from dydit_jax.runtime.locks import FolderLock
from dydit_jax.runtime.processes import is_main, on_all_processes

logger = logging.getLogger(__name__)

CONFIG_FILE = "config.json"
SET_ASIDE_FOLDER = "set_aside"


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When a run is saved.

    Attributes:
      every_steps: steps between two checkpoints.
      keep: how many of the newest are kept.
    """

    every_steps: int = 1000
    keep: int = 2

    def __post_init__(self):
        if self.every_steps < 1 or self.keep < 1:
            raise InputError(f"checkpoint.every_steps and checkpoint.keep must be at least 1, not {self}.")


def _make_barrier_fn() -> Callable:
    """Make the barrier at which processes wait for each other while they write behind the training.

    Orbax waits there also in a process that has failed, before it says so; but the others wait where that process did
    not come, for 20 minutes. What is raised here instead is what went wrong.
    """
    import orbax.checkpoint as ocp  # here and below: it takes seconds, and only runs need it

    wait = ocp.multihost.get_barrier_sync_fn()

    def wait_unless_failed(*, key: str, timeout_ms: int) -> None:
        failure = sys.exception()
        if failure is not None:
            raise failure
        wait(key=key, timeout_ms=timeout_ms)

    return wait_unless_failed


class _Kept:
    """Orbax's policy of what is kept: the newest checkpoints, and the best one."""

    def __init__(self, newest: int, best: int | None):
        self.newest, self.best = newest, best

    def should_preserve(self, checkpoints, *, context) -> list[bool]:
        """Return for each checkpoint, oldest first, whether it stays."""
        old = len(checkpoints) - self.newest
        return [index >= old or info.step == self.best for index, info in enumerate(checkpoints)]


class Run:
    """The checkpoints of one work directory, written and read; use as a context, leaving waits for writes under way.

    Args:
      workdir: of one run. Opening removes what a killed run had half written. The best checkpoint of `best.json` is
        kept from the start, whether or not the run measures.
      config: how many checkpoints to keep.
      lock: of the work directory, asked for before every save; None in processes that do not hold it.
      from_step: noted in every checkpoint: see `resume`.

    Raises:
      InputError: a `best.json` that is damaged.
    """

    def __init__(
        self, workdir, config: CheckpointConfig, *, lock: FolderLock | None = None, from_step: int | None = None
    ):
        import orbax.checkpoint as ocp

        known = on_all_processes(lambda: read_best(workdir))
        self._kept = _Kept(config.keep, None if known is None else known["step"])
        options = ocp.CheckpointManagerOptions(
            preservation_policy=self._kept,
            enable_async_checkpointing=True,
            cleanup_tmp_directories=True,
            async_options=ocp.AsyncOptions(barrier_sync_fn=_make_barrier_fn()),
            lightweight_initialize=True,  # damaged metadata must not keep the run from its other checkpoints
        )
        self._workdir, self._lock, self._from_step = workdir, lock, from_step
        self._manager = ocp.CheckpointManager(checkpoint_folder(workdir), options=options)

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        if kind is None:
            self._manager.close()
            return
        # What ends the run has been said; a write that fails on the way out must not hide it.
        with contextlib.suppress(Exception):
            self._manager.close()

    @property
    def latest_step(self) -> int | None:
        """The newest whole checkpoint's step, or None."""
        return self._manager.latest_step()

    def save(self, step: int, items: dict, about: dict) -> None:
        """Save trees by name, unless the newest checkpoint is of this step. Writing goes on behind.

        Digests are taken before this returns: the arrays may then be donated.

        Raises:
          StopError: this checkpoint or the one before could not be written, a full disk for example; or another
            program has taken over the work directory.
        """
        import orbax.checkpoint as ocp

        if self.latest_step == step:
            return
        if self._lock is not None:
            self._lock.require_held()
        if self._from_step is not None:
            about = dict(about, from_step=self._from_step)
        trees = {name: ocp.args.StandardSave(tree) for name, tree in items.items()}
        arguments = ocp.args.Composite(**trees, about=ocp.args.JsonSave(describe(items, about)))
        with self._named_failure():
            self._manager.save(step, args=arguments, force=True)

    def keep_best(self, step: int) -> None:
        """Keep the checkpoint of a step, however many are saved after it, until another is the best."""
        self._kept.best = step

    def wait(self) -> None:
        """Wait until everything is written.

        Raises:
          StopError: it could not be.
        """
        with self._named_failure():
            self._manager.wait_until_finished()

    @contextlib.contextmanager
    def _named_failure(self):
        """Turn a failure to write into a message that names the last good checkpoint."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 (the storage below has no common error)
            reason = " ".join(str(error).split())[:300]
            raise StopError(
                f"A checkpoint could not be written ({reason}). The newest whole one is of step "
                f"{self._newest_whole()}; make room, and the same command continues from it."
            ) from error

    def _newest_whole(self) -> int | None:
        self._manager.reload()
        return self._manager.latest_step()

    def restore(self, step: int, items: dict) -> dict:
        """Read trees by name into the shapes and shardings of `items`, and the record `about`.

        Raises:
          DamageError: a checkpoint that is not as it was written.
          InputError: one of another model.
        """
        return read_checkpoint(self._workdir, step, items)

    def resume(self, items: dict) -> tuple[int, dict] | None:
        """Restore the checkpoint to go on from: the newest whole one, or that of `from_step`; None where there is none.

        A command with `from_step` goes back once: checkpoints that it has saved since are noted as its own, and when it
        is repeated it goes on from the newest of them.

        Returns:
          The step, and what `restore` returns. Nothing on the disk is changed; see `set_aside`.

        Raises:
          InputError: no whole checkpoint, none of `from_step`, or one of another model.
        """
        if self._from_step is not None and not self._went_back():
            return self._from_step, _restored_as_asked(self._workdir, self._from_step, items)
        step, damage = newest_step(self._workdir), []
        while step is not None:
            try:
                restored = self.restore(step, items)
            except DamageError as error:
                logger.warning("%s. Trying an older checkpoint.", error)
                damage.append(str(error))
                step = newest_step(self._workdir, below=step)
            else:
                return step, restored
        if damage:
            raise InputError(f"No checkpoint of {self._workdir} is whole: {'; '.join(damage)}. Start another run.")
        return None

    def _went_back(self) -> bool:
        """Return whether a checkpoint is of a run that has gone back to `from_step` already."""
        step = newest_step(self._workdir)
        while step is not None and step > self._from_step:
            with contextlib.suppress(DamageError):
                if read_about(self._workdir, step).get("from_step") == self._from_step:
                    return True
            step = newest_step(self._workdir, below=step)
        return False

    def set_aside(self, *, after: int) -> None:
        """Move the checkpoints of later steps out of the way of those to come; nothing is deleted.

        Raises:
          InputError: a disk that does not allow it.
        """
        on_all_processes(lambda: _set_aside(self._workdir, after) if is_main() else None)
        self._manager.reload()
        if self._kept.best is not None and self._kept.best > after:
            self._kept.best = None


def _set_aside(workdir, after: int) -> None:
    folder = checkpoint_folder(workdir).parent / SET_ASIDE_FOLDER
    for step in saved_steps(workdir):
        if step <= after:
            continue
        number, place = 0, folder / str(step)
        while place.exists():
            number += 1
            place = folder / f"{step}.{number}"
        try:
            with as_system_errors():
                make_folder(folder)
                checkpoint_folder(workdir, step).rename(place)
        except OSError as error:
            raise InputError(f"Can't move checkpoint {step} to {place}: {error}.") from error
        logger.warning("Checkpoint %d lies in %s now.", step, place)


def _restored_as_asked(workdir, step: int, items: dict) -> dict:
    """Restore the checkpoint of one step and no other.

    Raises:
      InputError: there is none, it is damaged, or of another model; says which is whole.
    """
    on_all_processes(lambda: _require_saved(workdir, step))
    try:
        return read_checkpoint(workdir, step, items)
    except DamageError as error:
        whole = _whole_below(workdir, step, items)
        older = "no older one is whole" if whole is None else f"step {whole} is whole: --from_step={whole} takes it"
        raise InputError(f"{error}; {older}.") from None


def _require_saved(workdir, step: int) -> None:
    steps = saved_steps(workdir)
    if step not in steps:
        there = ", ".join(map(str, steps)) or "none"
        raise InputError(f"{workdir} has no checkpoint of step {step}; there are: {there}.")


def _whole_below(workdir, step: int, items: dict) -> int | None:
    """Return the newest step below one whose checkpoint is whole."""
    while (step := newest_step(workdir, below=step)) is not None:
        with contextlib.suppress(DamageError):
            read_checkpoint(workdir, step, items)
            return step
    return None


def is_run(path) -> bool:
    """Return whether a folder is the work directory of a training."""
    return (locate(path) / CONFIG_FILE).is_file()


def split_step(path) -> tuple[epath.Path, int | None]:
    """Return work directory and step of a path to one checkpoint of a run; any other path as it is, and None."""
    path = locate(path)
    workdir = path.parent.parent
    if path.name.isdecimal() and path.parent.name == CHECKPOINTS_FOLDER and is_run(workdir):
        return workdir, int(path.name)
    return path, None


def read_run_config(workdir) -> dict:
    """Return the configuration that a run was started with, as plain dicts.

    Raises:
      InputError: a file that is empty, damaged, no run's, or with values of other types.
    """
    path = epath.Path(workdir) / CONFIG_FILE
    remedy = "put the run's configuration there, from a copy, or name another folder"
    config = read_json(path, remedy=remedy)
    if not isinstance(config.get("model"), dict):
        raise InputError(f"{path} describes no model; {remedy}.")
    with name_file(path):
        for name, section in config.items():
            require_mapping(section or {}, f"config.{name}")
        return read_mapping(Config, config, "config")


def has_checkpoint(workdir) -> bool:
    """Return whether a work directory has a checkpoint to go on from."""
    return bool(workdir) and bool(saved_steps(workdir))


def load_run_params(workdir, shapes: dict, from_step: int | None = None, kind: str = "ema") -> tuple[dict, dict]:
    """Read the trained parameters of a run's newest step, or of `from_step`; changes nothing in the work directory.

    Args:
      workdir: of the run.
      shapes: of what it trains, by its configuration.
      from_step: of a checkpoint; None takes the newest.
      kind: "ema" or "params".

    Returns:
      The parameters on the host, and the checkpoint's record, with its "step".

    Raises:
      InputError: no checkpoint yet, a damaged one (with the step of a whole one), or one of another model.
    """
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    shaped = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here)
    items = {kind: jax.tree.map(shaped, shapes)}
    step = newest_step(workdir) if from_step is None else from_step
    if step is None:
        raise InputError(f"{workdir} holds a run, but no checkpoint of it yet.")
    try:
        restored = _restored_as_asked(workdir, step, items)
    except InputError:
        newer = newest_step(workdir)
        if from_step is not None or newer in (step, None):
            raise
        # The run goes on meanwhile: it has saved a newer checkpoint, and removed this one while it was read.
        step, restored = newer, _restored_as_asked(workdir, newer, items)
    # Every process then places them where it wants.
    with name_file(checkpoint_folder(workdir, step)):
        about = read_mapping(About, restored["about"], "about")
    return jax.device_get(restored[kind]), dict(about, step=step)
