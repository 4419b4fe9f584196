"""Weights that describe themselves: one `.safetensors` file with the configuration in its metadata.

What is published, shipped and sampled from; reading it can't run code. Numbers are float32; a file may hold them in
half precision, which halves it.
"""

import dataclasses
import hashlib
import importlib.metadata
import json

import jax
import numpy as np

from dydit_jax.checkpoints.arrays import REMEDY, read_arrays, require_arrays, write_arrays
from dydit_jax.checkpoints.descriptions import Description
from dydit_jax.checkpoints.places import without_places
from dydit_jax.diffusion.process import Process, process_sections, read_process
from dydit_jax.diffusion.samplers import SamplingConfig
from dydit_jax.errors import name_file
from dydit_jax.labels import spell_name
from dydit_jax.models.config import DiTConfig
from dydit_jax.models.dit import Model
from dydit_jax.models.lora import LoRAConfig
from dydit_jax.records import read_mapping, read_record
from dydit_jax.runtime.files import parse_json
from dydit_jax.runtime.progress import counted_bytes
from dydit_jax.trees import flatten, unflatten

FORMAT = "dydit-jax weights 1"
WEIGHTS_FILE = "weights.safetensors"
DESCRIPTION_KEY = "description"  # of the metadata


@dataclasses.dataclass(frozen=True)
class Weights:
    """A model that can be sampled: what it is, how it was trained, how it likes to be sampled, its parameters.

    `lora` says how low-rank updates among the parameters are applied; None where there are none, or all are folded.
    """

    model: DiTConfig
    process: Process
    sampling: SamplingConfig
    params: dict
    about: dict
    lora: LoRAConfig | None = None

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes by label, none beyond the model's classes; empty where they are not known."""
        return tuple(map(spell_name, self.about.get("class_names", ())[: self.model.classes]))


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


def save_weights(path, weights: Weights, *, dtype: str = "float32") -> None:
    """Write weights to one `.safetensors` file.

    Args:
      path: the file; its folder is made.
      weights: what to write; `about` must be JSON.
      dtype: of the numbers in the file, "float32" or "float16".

    Raises:
      InputError: a place that can't be written to, or a disk that is full; nothing is left there then.
    """
    params = jax.tree.map(lambda leaf: np.asarray(leaf, dtype), weights.params)
    write_weights(path, dataclasses.replace(weights, params=params), FORMAT)


def load_weights(path) -> Weights:
    """Read a `.safetensors` file written by `save_weights`; the parameters are float32.

    Raises:
      InputError: no such file, another format, a damaged one, or tensors that do not fit the description.
    """
    weights, _ = read_weights(path, FORMAT, Description)
    require_shapes(flatten(weights.params), weights.model, path, lora=weights.lora)
    return weights


def write_weights(path, weights: Weights, file_format: str, **others) -> None:
    """Write parameters and what describes them, `about` without places; `others` are JSON beside it."""
    described = dict(others, about=without_places(weights.about), **process_sections(weights.process))
    for name in ("model", "sampling", "lora"):
        if getattr(weights, name) is not None:
            described[name] = dataclasses.asdict(getattr(weights, name))
    description = json.dumps(described, sort_keys=True)
    write_arrays(path, flatten(weights.params), {"format": file_format, DESCRIPTION_KEY: description})


def read_weights(path, file_format: str, kind: type) -> tuple[Weights, dict]:
    """Read weights from a file, whatever arrays it holds.

    Args:
      path: of the file.
      file_format: that it must have.
      kind: of its description, a `TypedDict`.

    Returns:
      The weights and the description.

    Raises:
      InputError: no such file, another format, a damaged one, or a description of another kind.
    """
    leaves, metadata = read_arrays(path, file_format)
    described = parse_description(metadata, path)
    with name_file(path):
        described = read_mapping(kind, described, DESCRIPTION_KEY)
        read = lambda cls, name: read_record(cls, described[name], name)
        weights = Weights(
            model=read(DiTConfig, "model"),
            process=read_process(described),
            sampling=read(SamplingConfig, "sampling"),
            params=unflatten({name: np.asarray(leaf, np.float32) for name, leaf in leaves.items()}),
            about=described["about"],
            lora=read(LoRAConfig, "lora") if "lora" in described else None,
        )
    return weights, described


def parse_description(metadata: dict[str, str], path) -> dict:
    """Return what a file's metadata say of its weights, as it stands there.

    Raises:
      InputError: nothing, or no JSON.
    """
    text = metadata.get(DESCRIPTION_KEY, "")
    return parse_json(text, f"The {DESCRIPTION_KEY} in {path}", remedy=REMEDY)


def require_shapes(leaves: dict, config: DiTConfig, holder, *, lora: LoRAConfig | None = None) -> None:
    """Raise unless arrays, by path, are the parameters of a model.

    Args:
      leaves: arrays by path.
      config, lora: of the model.
      holder: of the arrays, for the message.

    Raises:
      InputError: with those that are missing, left over or of another shape.
    """
    expected = {name: leaf.shape for name, leaf in flatten(Model(config, lora=lora).abstract_params()).items()}
    require_arrays(leaves, expected, holder, "model")
