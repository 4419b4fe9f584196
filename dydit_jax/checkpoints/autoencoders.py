"""Autoencoders in one `.safetensors` file, with their record in its metadata.

Files of earlier versions have no record: they are Stable Diffusion's, by `AutoencoderConfig`'s defaults.
"""

import dataclasses
import json

from dydit_jax.checkpoints.arrays import format_of, read_arrays, read_metadata, require_arrays, write_arrays
from dydit_jax.checkpoints.places import without_places
from dydit_jax.errors import InputError, name_file
from dydit_jax.models.autoencoder import Autoencoder, AutoencoderConfig, abstract_params
from dydit_jax.records import read_record
from dydit_jax.runtime.files import parse_json
from dydit_jax.trees import flatten, unflatten

AUTOENCODER_FORMAT, WITHOUT_RECORD = "dydit-jax autoencoder 2", "dydit-jax autoencoder 1"
RECORD_KEY = "autoencoder"


def save_autoencoder(path, autoencoder: Autoencoder, about: dict) -> None:
    """Write an autoencoder and what made it, whole or not at all."""
    record = json.dumps(dataclasses.asdict(autoencoder.config))
    metadata = {"format": AUTOENCODER_FORMAT, RECORD_KEY: record, "about": json.dumps(without_places(about))}
    write_arrays(path, flatten(autoencoder.params), metadata)


def read_autoencoder(path) -> Autoencoder:
    """Read a file of `save_autoencoder`, or one of an earlier version.

    Raises:
      InputError: no such file, one of another kind, or a damaged one.
    """
    config = read_autoencoder_config(path)
    leaves, _ = read_arrays(path, format_of(path))
    expected = {name: leaf.shape for name, leaf in flatten(abstract_params(config)).items()}
    require_arrays(leaves, expected, path, "autoencoder")
    return Autoencoder(config, unflatten(leaves))


def read_autoencoder_config(path) -> AutoencoderConfig:
    """Read the record of a file of `save_autoencoder`, or one of an earlier version, and none of its arrays.

    Raises:
      InputError: no such file, one of another kind, or a damaged one.
    """
    metadata = read_metadata(path)
    if not is_autoencoder_format(metadata.get("format")):
        raise InputError(
            f"{path} holds no autoencoder of ours, but {metadata.get('format')!r}; convert files of other programs "
            "with convert_torch_weights.py."
        )
    record = parse_json(metadata.get(RECORD_KEY, "{}"), f"The record in {path}", remedy="convert it again")
    with name_file(path):
        return read_record(AutoencoderConfig, record, RECORD_KEY)


def is_autoencoder_format(name: str | None) -> bool:
    """Return whether a file's format is that of an autoencoder."""
    return name in (AUTOENCODER_FORMAT, WITHOUT_RECORD)
