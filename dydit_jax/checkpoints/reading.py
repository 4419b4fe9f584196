"""Reading the checkpoints of a run: never changes its work directory, and tells damage from another model.

A checkpoint's record `about` holds type, shape and digest of every array, and a checksum of itself. What does not fit
the model is known from the record alone; what then can't be read, or has another digest, is damaged. Checkpoints from
before digests have no such record: they are read, and what fails is called damaged.
"""

import functools
import hashlib
import json
import logging
import re
import sys
from collections.abc import Callable

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from dydit_jax.checkpoints.descriptions import CheckpointRecord
from dydit_jax.checkpoints.digests import digests
from dydit_jax.errors import DamageError, InputError
from dydit_jax.records import read_mapping
from dydit_jax.runtime.files import locate
from dydit_jax.runtime.processes import on_all_processes
from dydit_jax.trees import flatten

logger = logging.getLogger(__name__)

CHECKPOINTS_FOLDER = "checkpoints"
ARRAYS_KEY, SUM_KEY = "arrays", "checksum"


def checkpoint_folder(workdir, step: int | None = None) -> epath.Path:
    """Return where a run's checkpoints lie, or one of them, as an absolute path."""
    folder = locate(workdir)
    if not folder.is_absolute():  # gs:// is; `absolute` would put the current folder before it
        folder = folder.absolute()
    folder = folder / CHECKPOINTS_FOLDER
    return folder if step is None else folder / str(step)


def saved_steps(workdir) -> list[int]:
    """Return the steps of the checkpoints that were written to their end, ascending; whole or damaged since."""
    import orbax.checkpoint as ocp  # here and below: it takes seconds, and only runs need it

    folder = checkpoint_folder(workdir)
    found = ocp.path.step.checkpoint_steps_paths(folder) if folder.is_dir() else []
    return sorted(int(path.name) for path in found if path.name.isdecimal())


def newest_step(workdir, below: int | None = None) -> int | None:
    """Return the newest checkpoint's step (of those below a step) as process 0 sees it, or None."""
    steps = [step for step in saved_steps(workdir) if below is None or step < below]
    step = steps[-1] if steps else -1
    if jax.process_count() > 1:  # a run that goes on may save a new one while the processes look
        step = int(multihost_utils.broadcast_one_to_all(np.int32(step)))
    return None if step < 0 else step


def describe(items: dict, about: dict) -> dict:
    """Return the record of a checkpoint: `about`, with every array's type, shape and digest, and its own checksum.

    Args:
      items: trees of arrays by name, wherever they lie; all processes call this together.
      about: must be JSON.
    """
    sums = {name: digests(tree) for name, tree in items.items()}
    arrays = {
        item: {name: [str(leaf.dtype), list(leaf.shape), sums[item][name]] for name, leaf in flatten(tree).items()}
        for item, tree in items.items()
    }
    record = dict(about, **{ARRAYS_KEY: arrays})
    return dict(record, **{SUM_KEY: _checksum(record)})


def read_checkpoint(workdir, step: int, items: dict) -> dict:
    """Read trees by name into the shapes and shardings of `items`, and the record `about`; all processes together.

    Raises:
      DamageError: a checkpoint that is not as it was written, in all processes, whichever found out.
      InputError: a checkpoint of another model.
    """
    path = checkpoint_folder(workdir, step)
    about = read_about(workdir, step)
    arrays = about.pop(ARRAYS_KEY, None)
    if arrays is None:
        logger.info("%s has no digests, it is from an earlier version: taken as it is.", path)
    else:
        _require_fit(path, items, arrays)
    restored = {name: _agreed(functools.partial(_read_item, path / name, tree)) for name, tree in items.items()}
    for name, tree in restored.items() if arrays is not None else ():
        wrong = [leaf for leaf, digest in digests(tree).items() if digest != arrays[name][leaf][2]]
        if wrong:
            raise DamageError(f"{path / name} is damaged: {_some(wrong)} not as written")
    return dict(restored, about=about)


def read_about(workdir, step: int) -> dict:
    """Read the record of a checkpoint, its own checksum checked; all processes together.

    Raises:
      DamageError: it is not as it was written.
    """
    return _agreed(functools.partial(_read_record, checkpoint_folder(workdir, step) / "about"))


def _read_record(path: epath.Path) -> dict:
    import orbax.checkpoint as ocp

    record = _read(path, ocp.JsonCheckpointHandler, ocp.args.JsonRestore())
    try:
        record = read_mapping(CheckpointRecord, record, "record")
    except InputError as error:
        raise DamageError(f"{path} is damaged: {error}") from None
    checksum = record.pop(SUM_KEY, None)
    if checksum != (_checksum(record) if ARRAYS_KEY in record else None):
        raise DamageError(f"{path} is damaged: not as written")
    return record


def _read_item(path: epath.Path, tree):
    import orbax.checkpoint as ocp

    return _read(path, ocp.StandardCheckpointHandler, ocp.args.StandardRestore(tree))


def _read(path: epath.Path, handler: type, arguments):
    """Read one item of a checkpoint, by this process alone: none waits for another that has failed.

    Raises:
      DamageError: a file is missing or damaged; names it where the storage does.
    """
    import orbax.checkpoint as ocp

    _mute_storage()
    alone = ocp.options.MultiprocessingOptions(primary_host=None, active_processes={jax.process_index()})
    try:
        with ocp.Checkpointer(handler(), multiprocessing_options=alone) as reader:
            return reader.restore(path, args=arguments)
    except (MemoryError, jax.errors.JaxRuntimeError):  # nothing is wrong with the files
        raise
    except Exception as error:  # noqa: BLE001 (the storage below has no common error)
        raise DamageError(_reason(error, path)) from None


def _reason(error: Exception, path: epath.Path) -> str:
    """Say in a line which file the storage could not read, and why."""
    chain = [error]
    while chain[-1].__cause__ or chain[-1].__context__:
        chain.append(chain[-1].__cause__ or chain[-1].__context__)
    said = " ".join(" ".join(str(link) for link in chain).split())
    files = re.findall(re.escape(str(path)) + r"[^\s\"':,]*", said)
    kind = re.search(r"\b[A-Z]+_[A-Z_]+\b(?=: )|not found|[Pp]ermission denied", said)
    reason = kind.group().lower().replace("_", " ") if kind else f"{type(error).__name__}: {said[:100]}"
    return f"{max(files, key=len, default=path)} can't be read ({reason})"


@functools.cache
def _mute_storage() -> None:
    """Keep off the terminal what Orbax drops after a failure, a page for every array; all else is heard as before."""
    before = sys.unraisablehook

    def hear(unraisable):
        dropped = str(unraisable.exc_value).startswith(("Encountered error while reading", "Event loop is closed"))
        if not dropped:
            before(unraisable)

    sys.unraisablehook = hear


def _agreed(read: Callable):
    """Read in every process; damage that one of them finds is damage for all.

    Raises:
      DamageError: in all of them.
    """
    try:
        return on_all_processes(read)
    except InputError as error:
        raise DamageError(str(error)) from None


def _require_fit(path: epath.Path, items: dict, arrays: dict) -> None:
    """Raise unless a checkpoint holds arrays of these names, shapes and types.

    Raises:
      InputError: naming some of those that differ.
    """
    for item, tree in items.items():
        wanted = {name: (str(leaf.dtype), leaf.shape) for name, leaf in flatten(tree).items()}
        found = {name: entry[:2] for name, entry in arrays.get(item, {}).items()}
        wrong = sorted(name for name in wanted | found if wanted.get(name) != found.get(name))
        if wrong:
            raise InputError(f"{path} does not fit this model: {_some([f'{item}/{name}' for name in wrong])} differ.")


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + f" and {len(names) - 3} more" * (len(names) > 3)


def _checksum(record: dict) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
