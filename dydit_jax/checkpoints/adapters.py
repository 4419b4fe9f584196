"""Adapters: what a training of routers, labels or low-rank updates has changed, and which weights it belongs to.

One small `.safetensors` file, like `weights`, with the base's name and the checksum of its parameters. Without its base
an adapter is nothing; with another one it would be something else, so the checksum must be that of the base.
"""

import functools
import json

import jax
from etils import epath

from dydit_jax.checkpoints.arrays import format_of, read_arrays, write_arrays
from dydit_jax.checkpoints.descriptions import AdapterDescription
from dydit_jax.checkpoints.places import without_places
from dydit_jax.checkpoints.weights import (
    DESCRIPTION_KEY,
    FORMAT,
    Weights,
    checksum,
    parse_description,
    read_weights,
    require_shapes,
    write_weights,
)
from dydit_jax.errors import InputError
from dydit_jax.models.dit import Model
from dydit_jax.models.lora import fold_constant
from dydit_jax.trees import flatten, unflatten

ADAPTER_FORMAT = "dydit-jax adapter 1"
SHOWN_DIGITS = 12  # of a checksum


def describe_base(checkpoint: str, weights: Weights) -> dict:
    """Return the record of the weights that an adapter belongs to, JSON.

    Args:
      checkpoint: that they were loaded from.
      weights: complete.

    Raises:
      InputError: weights that are a base and its adapter already.
    """
    if "base" in weights.about or weights.lora is not None:
        raise InputError(
            f"{checkpoint} is an adapter; train.trainable needs complete weights to start from. Merge it first: "
            f"convert_torch_weights.py --merge --source {checkpoint} --out merged.safetensors."
        )
    return dict(checkpoint=str(checkpoint), checksum=checksum(weights.params))


def save_adapter(path, weights: Weights, base: dict) -> None:
    """Write an adapter.

    Args:
      path: the file; its folder is made.
      weights: whose parameters are the trained ones alone.
      base: from `describe_base`.

    Raises:
      InputError: a place that can't be written to, or a disk that is full; nothing is left there then.
    """
    write_weights(path, weights, ADAPTER_FORMAT, base=base)


def load_adapter(path) -> tuple[Weights, dict]:
    """Read an adapter: the trained parameters alone, and the record of their base.

    Raises:
      InputError: no such file, another format, or a damaged one.
    """
    weights, described = read_weights(path, ADAPTER_FORMAT, AdapterDescription)
    return weights, described["base"]


def apply_adapter(adapter: Weights, base: Weights, record: dict) -> Weights:
    """Return the complete weights of an adapter on its base.

    Updates that do not depend on the timestep are folded into the kernels; the others stay beside them.

    Args:
      adapter: whose parameters are the trained ones alone.
      base: complete weights.
      record: of the base that the adapter was trained on.

    Raises:
      InputError: another base, or parameters that do not make the model which the adapter describes.
    """
    found = checksum(base.params)
    if found != record["checksum"]:
        raise InputError(
            f"This is an adapter for another base: it was trained on {record['checkpoint']} with the checksum "
            f"{record['checksum'][:SHOWN_DIGITS]}..., and these weights have {found[:SHOWN_DIGITS]}...; name the right "
            "ones with --base."
        )
    wanted = flatten(Model(adapter.model, lora=adapter.lora).abstract_params())
    leaves = {name: leaf for name, leaf in flatten(base.params).items() if name in wanted} | flatten(adapter.params)
    require_shapes(leaves, adapter.model, "The adapter on its base", lora=adapter.lora)
    params, lora = unflatten(leaves), adapter.lora
    if lora is not None and lora.experts == 1:
        params, lora = jax.device_get(_fold(lora)(params)), None
    about = adapter.about | dict(base=record)
    return Weights(adapter.model, adapter.process, adapter.sampling, params, about, lora)


@functools.cache
def _fold(lora):
    return jax.jit(functools.partial(fold_constant, lora=lora))


def published_file(path, folder) -> epath.Path:
    """Return a file of weights or an adapter whose description has no place of this machine: itself, or a copy.

    In a copy not even those are left that this machine needs: of an adapter's base, and of the autoencoder that decodes
    its images.

    Args:
      path: of weights or an adapter.
      folder: for the copy.

    Raises:
      InputError: as for `load_weights` and `save_weights`.
    """
    leaves, metadata = read_arrays(path, ADAPTER_FORMAT if format_of(path) == ADAPTER_FORMAT else FORMAT)
    described = parse_description(metadata, path)
    published = without_places(described)
    if published == described:
        return epath.Path(path)
    out = epath.Path(folder) / epath.Path(path).name
    write_arrays(out, leaves, metadata | {DESCRIPTION_KEY: json.dumps(published, sort_keys=True)})
    return out
