"""Stable Diffusion autoencoders in diffusers' layout, in and out: a matter of spelling.

`encoder.down_blocks.0.resnets.1.conv1.weight` there is `encoder/down_blocks_0/resnets_1/conv1/kernel` here.
Latents have one scale here; an autoencoder of another one, as SDXL's, gets the ratio into its two 1 x 1 convolutions.
"""

import math
import re
from collections.abc import Mapping

import numpy as np

from dydit_jax.errors import InputError
from dydit_jax.models import autoencoder
from dydit_jax.models.autoencoder import LATENT_SCALE
from dydit_jax.trees import flatten, unflatten

# Until diffusers 0.18 the attention's layers had other names.
OLD_ATTENTION_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def is_autoencoder(tensors: Mapping[str, np.ndarray]) -> bool:
    """Return whether tensors by name are those of an autoencoder."""
    return any(name.startswith("decoder.") for name in tensors)


def source_name(path: str) -> str:
    """Return the PyTorch name of one of our parameters."""
    *modules, leaf = path.split("/")
    modules = [re.sub(r"_(\d+)$", r".\1", module) for module in modules]
    return ".".join([*modules, "bias" if leaf == "bias" else "weight"])


def convert_autoencoder(source: Mapping[str, np.ndarray]) -> dict:
    """Turn diffusers' tensors, with old or new attention names, into our parameter tree.

    Raises:
      InputError: listing every missing, surplus or misshapen tensor.
    """
    source = {_new_name(name): tensor for name, tensor in source.items()}
    targets = {source_name(path): (path, leaf.shape) for path, leaf in flatten(autoencoder.abstract_params()).items()}
    problems = [f"missing {name}" for name in targets if name not in source]
    problems += [f"surplus {name} {source[name].shape}" for name in source if name not in targets]
    leaves = {}
    for name, (path, shape) in targets.items():
        if name in source:
            leaves[path] = _to_ours(np.asarray(source[name], np.float32), len(shape))
            if leaves[path].shape != shape:
                problems.append(f"{name} is {source[name].shape}, which makes {leaves[path].shape}, not {shape}")
    if problems:
        raise InputError(f"The tensors do not make the autoencoder ({len(problems)} problems): {'; '.join(problems)}")
    return unflatten(leaves)


def rescale_latents(params: Mapping, scale: float) -> dict:
    """Return the parameters of an autoencoder whose latents, at our scale, are those of `params` at its own.

    Args:
      params: of an autoencoder as it was trained.
      scale: by which its latents are multiplied, with no shift.
    """
    if scale == LATENT_SCALE:
        return dict(params)
    ratio, leaves = scale / LATENT_SCALE, flatten(params)
    # Of the encoder's eight channels the first four are the mean, the others the logarithm of the variance.
    mean, log_variance = np.float32([ratio] * 4 + [1.0] * 4), np.float32([0.0] * 4 + [2 * math.log(ratio)] * 4)
    return unflatten(
        leaves
        | {
            "quant_conv/kernel": leaves["quant_conv/kernel"] * mean,
            "quant_conv/bias": leaves["quant_conv/bias"] * mean + log_variance,
            "post_quant_conv/kernel": leaves["post_quant_conv/kernel"] / np.float32(ratio),
        }
    )


def export_autoencoder(params: Mapping) -> dict[str, np.ndarray]:
    """Turn our parameter tree into diffusers' names and axes."""
    exported = {}
    for path, leaf in flatten(params).items():
        leaf = np.asarray(leaf)
        axes = {4: (3, 2, 0, 1), 2: (1, 0)}.get(leaf.ndim)
        exported[source_name(path)] = np.ascontiguousarray(leaf.transpose(axes) if axes else leaf)
    return exported


def _new_name(name: str) -> str:
    if "attentions" not in name:
        return name
    return ".".join(OLD_ATTENTION_NAMES.get(part, part) for part in name.split("."))


def _to_ours(array: np.ndarray, axes: int) -> np.ndarray:
    """Put the input axis before the output axis; old files store Linear layers as 1 x 1 convolutions."""
    if axes == 2 and array.ndim == 4:
        array = array.reshape(array.shape[:2])
    if array.ndim == 4:
        array = array.transpose(2, 3, 1, 0)
    elif array.ndim == 2:
        array = array.T
    return np.ascontiguousarray(array)
