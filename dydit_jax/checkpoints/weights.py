"""Weights that describe themselves: one `.safetensors` file, float32, with the configuration in its metadata.

What is published, shipped and sampled from; reading it can't run code.
"""

import dataclasses
import hashlib
import importlib.metadata
import json

import numpy as np

from dydit_jax.checkpoints.arrays import read_arrays, write_arrays
from dydit_jax.diffusion.process import Process, process_sections, read_process
from dydit_jax.diffusion.samplers import SamplingConfig
from dydit_jax.errors import InputError
from dydit_jax.models.config import DiTConfig
from dydit_jax.models.dit import Model
from dydit_jax.records import read_record
from dydit_jax.runtime.progress import counted_bytes
from dydit_jax.trees import flatten, unflatten

FORMAT = "dydit-jax weights 1"
WEIGHTS_FILE = "weights.safetensors"


@dataclasses.dataclass(frozen=True)
class Weights:
    """A model that can be sampled: what it is, how it was trained, how it likes to be sampled, its parameters."""

    model: DiTConfig
    process: Process
    sampling: SamplingConfig
    params: dict
    about: dict

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes by label; empty where they are not known."""
        return tuple(self.about.get("class_names", ()))


def package_versions() -> dict[str, str]:
    """Return the versions of what decides the numbers."""
    return {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint")}


def checksum(params) -> str:
    """Return the SHA-256 of a parameter tree's names and values, the same in whatever file it lies."""
    digest = hashlib.sha256()
    for name, leaf in counted_bytes(dict(sorted(flatten(params).items())), "checksum of the weights"):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(leaf))
    return digest.hexdigest()


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
        **process_sections(weights.process),
        sampling=dataclasses.asdict(weights.sampling),
        about=weights.about,
    )
    write_arrays(path, flatten(weights.params), dict(format=FORMAT, description=json.dumps(described, sort_keys=True)))


def load_weights(path) -> Weights:
    """Read a `.safetensors` file written by `save_weights`.

    Raises:
      InputError: no such file, another format, a damaged one, or tensors that do not fit the description.
    """
    leaves, metadata = read_arrays(path, FORMAT)
    described = json.loads(metadata["description"])
    model = read_record(DiTConfig, described["model"], "model")
    _require_shapes(leaves, model, path)
    return Weights(
        model=model,
        process=read_process(described),
        sampling=read_record(SamplingConfig, described["sampling"], "sampling"),
        params=unflatten(leaves),
        about=described["about"],
    )


def _require_shapes(leaves: dict, config: DiTConfig, path) -> None:
    expected = {name: leaf.shape for name, leaf in flatten(Model(config).abstract_params()).items()}
    found = {name: leaf.shape for name, leaf in leaves.items()}
    if found != expected:
        wrong = sorted(set(found.items()) ^ set(expected.items()))
        raise InputError(f"{path} does not hold the model that it describes: {wrong[:6]}{' ...' * (len(wrong) > 6)}.")
