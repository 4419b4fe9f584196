"""Weights that describe themselves, and runs that continue.

Two forms. *Weights*: one `.safetensors` file, float32, with the configuration in its metadata: what is published,
shipped and sampled from; reading it can't run code. *A run*: the work directory of a training, with its configuration,
its log and Orbax checkpoints of the whole state.

    <workdir>/config.json          the configuration that the run was started with
    <workdir>/checkpoints/<step>/  params, ema, rest (step, moments, counters), about (versions, data)
    <workdir>/weights.safetensors  the EMA after the last step
"""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import tempfile

import jax
import numpy as np
import orbax.checkpoint as ocp
import safetensors
import safetensors.numpy
from etils import epath

from dydit_jax.diffusion.samplers import SamplingConfig
from dydit_jax.diffusion.schedules import DiffusionConfig
from dydit_jax.errors import InputError, StopError
from dydit_jax.models.dit import DiTConfig, Model
from dydit_jax.records import read_record
from dydit_jax.trees import flatten, unflatten

FORMAT = "dydit-jax weights 1"
WEIGHTS_FILE = "weights.safetensors"
CONFIG_FILE = "config.json"
CHECKPOINTS_FOLDER = "checkpoints"


@dataclasses.dataclass(frozen=True)
class Weights:
    """A model that can be sampled: what it is, how it was trained, how it likes to be sampled, its parameters."""

    model: DiTConfig
    diffusion: DiffusionConfig
    sampling: SamplingConfig
    params: dict
    about: dict


def package_versions() -> dict[str, str]:
    """Return the versions of what decides the numbers."""
    return {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint")}


def checksum(params) -> str:
    """Return the SHA-256 of a parameter tree's names and values, the same in whatever file it lies."""
    digest = hashlib.sha256()
    for name, leaf in sorted(flatten(params).items()):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(leaf))
    return digest.hexdigest()


# --- Weights -------------------------------------------------------------------------------------


def save_weights(path, weights: Weights) -> None:
    """Write weights to one `.safetensors` file.

    Args:
      path: the file; its folder is made.
      weights: what to write; `about` must be JSON.

    Raises:
      InputError: a place that can't be written to, or a disk that is full; nothing is left there then.
    """
    described = dict(
        model=dataclasses.asdict(weights.model),
        diffusion=dataclasses.asdict(weights.diffusion),
        sampling=dataclasses.asdict(weights.sampling),
        about=weights.about,
    )
    write_arrays(path, flatten(weights.params), dict(format=FORMAT, description=json.dumps(described)))


def load_weights(path) -> Weights:
    """Read a `.safetensors` file written by `save_weights`.

    Raises:
      InputError: no such file, another format, or tensors that do not fit the description.
    """
    leaves, metadata = read_arrays(path, FORMAT)
    described = json.loads(metadata["description"])
    model = read_record(DiTConfig, described["model"], "model")
    _require_shapes(leaves, model, path)
    return Weights(
        model=model,
        diffusion=read_record(DiffusionConfig, described["diffusion"], "diffusion"),
        sampling=read_record(SamplingConfig, described["sampling"], "sampling"),
        params=unflatten(leaves),
        about=described["about"],
    )


def write_arrays(path, leaves: dict, metadata: dict[str, str]) -> None:
    """Write arrays and metadata as `.safetensors`; a file half written never bears the name.

    Raises:
      InputError: a place that can't be written to, or a disk that is full.
    """
    path = epath.Path(path)
    partial = path.with_name(path.name + ".partial")
    arrays = {name: np.ascontiguousarray(leaf) for name, leaf in leaves.items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if _is_local(path):
            safetensors.numpy.save_file(arrays, partial, metadata)
        else:
            partial.write_bytes(safetensors.numpy.save(arrays, metadata))
        partial.replace(path)
    except (OSError, safetensors.SafetensorError) as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise InputError(f"Can't write {path}: {error}.") from error


def read_arrays(path, wanted_format: str) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Read arrays by name and metadata from a `.safetensors` file of one of this project's formats.

    Raises:
      InputError: no such file, a broken one, or one of another format.
    """
    with _opened(path) as file:
        metadata = file.metadata() or {}
        if metadata.get("format") != wanted_format:
            raise InputError(
                f"{path} is not of the format {wanted_format!r}, but {metadata.get('format')!r}; "
                "convert files of other programs with convert_torch_weights.py."
            )
        return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118 (no mapping)


def format_of(path) -> str | None:
    """Return which format of this project a `.safetensors` file has, None for a foreign one.

    Raises:
      InputError: no such file, or a broken one.
    """
    with _opened(path) as file:
        return (file.metadata() or {}).get("format")


@contextlib.contextmanager
def _opened(path):
    """Open a `.safetensors` file on any kind of path; what is not on this machine is copied first."""
    path = epath.Path(path)
    if not path.is_file():
        raise InputError(f"There is no file {path}.")
    with contextlib.ExitStack() as stack:
        local = path
        if not _is_local(path):
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            local = path.copy(epath.Path(folder) / path.name)
        try:
            yield stack.enter_context(safetensors.safe_open(local, framework="numpy"))
        except (OSError, safetensors.SafetensorError) as error:
            raise InputError(f"{path} is not a readable .safetensors file: {error}.") from error


def _is_local(path: epath.Path) -> bool:
    return "://" not in str(path)


def _require_shapes(leaves: dict, config: DiTConfig, path) -> None:
    expected = {name: leaf.shape for name, leaf in flatten(Model(config).abstract_params()).items()}
    found = {name: leaf.shape for name, leaf in leaves.items()}
    if found != expected:
        wrong = sorted(set(found.items()) ^ set(expected.items()))
        raise InputError(f"{path} does not hold the model that it describes: {wrong[:6]}{' ...' * (len(wrong) > 6)}.")


# --- Runs ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When a run is saved: every so many steps, and how many of these are kept beside the newest."""

    every_steps: int = 1000
    keep: int = 2

    def __post_init__(self):
        if self.every_steps < 1 or self.keep < 1:
            raise InputError(f"checkpoint.every_steps and checkpoint.keep must be at least 1, not {self}.")


class Run:
    """The checkpoints of one work directory; use as a context, leaving waits for writes under way."""

    def __init__(self, workdir, config: CheckpointConfig):
        manager = ocp.checkpoint_managers
        options = ocp.CheckpointManagerOptions(
            save_decision_policy=manager.FixedIntervalPolicy(config.every_steps),
            preservation_policy=manager.LatestN(config.keep),
            enable_async_checkpointing=True,
            cleanup_tmp_directories=True,
        )
        workdir = epath.Path(workdir)
        if not workdir.is_absolute():  # gs:// is; `absolute` would put the current folder before it
            workdir = workdir.absolute()
        self._manager = ocp.CheckpointManager(workdir / CHECKPOINTS_FOLDER, options=options)

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

    def save(self, step: int, items: dict, about: dict, *, force: bool = False) -> bool:
        """Save trees by name if `step` is due (or `force`); returns whether it did. Writing goes on behind.

        Raises:
          StopError: this checkpoint or the one before could not be written, a full disk for example.
        """
        if self.latest_step == step:
            return False
        trees = {name: ocp.args.StandardSave(tree) for name, tree in items.items()}
        arguments = ocp.args.Composite(**trees, about=ocp.args.JsonSave(about))
        with self._named_failure():
            return self._manager.save(step, args=arguments, force=force)

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
            told = " ".join(str(error).split())[:300]
            raise StopError(
                f"A checkpoint could not be written ({told}). The newest whole one is of step {self._newest_whole()}; "
                "make room, and the same command goes on from it."
            ) from error

    def _newest_whole(self) -> int | None:
        self._manager.reload()
        return self._manager.latest_step()

    def restore(self, step: int, items: dict) -> dict:
        """Read trees by name into the shapes and shardings of `items`, and the record `about`.

        Raises:
          InputError: a checkpoint of other shapes.
        """
        trees = {name: ocp.args.StandardRestore(tree) for name, tree in items.items()}
        try:
            restored = self._manager.restore(step, args=ocp.args.Composite(**trees, about=ocp.args.JsonRestore()))
        except (ValueError, KeyError) as error:
            raise InputError(f"Checkpoint {step} does not fit this model: {str(error).splitlines()[0]}") from error
        return dict(restored.items())


def is_run(path) -> bool:
    """Return whether a folder is the work directory of a training."""
    return (epath.Path(path) / CONFIG_FILE).is_file()


def has_checkpoint(workdir) -> bool:
    """Return whether a work directory has a whole checkpoint to go on from."""
    folder = epath.Path(workdir) / CHECKPOINTS_FOLDER if workdir else None
    return folder is not None and folder.is_dir() and any(path.name.isdecimal() for path in folder.iterdir())


def load_run_weights(workdir, model: DiTConfig, diffusion: DiffusionConfig, sampling: SamplingConfig) -> Weights:
    """Read the EMA weights of a run's newest step.

    Raises:
      InputError: no checkpoint yet, or one of another model.
    """
    with Run(workdir, CheckpointConfig()) as run:
        step = run.latest_step
        if step is None:
            raise InputError(f"{workdir} holds a run, but no checkpoint of it yet.")
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        shaped = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here)
        restored = run.restore(step, dict(ema=jax.tree.map(shaped, Model(model).abstract_params())))
    ema = jax.device_get(restored["ema"])  # every process then places it where it wants
    return Weights(model, diffusion, sampling, ema, dict(restored["about"], step=step))
