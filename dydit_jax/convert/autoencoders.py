"""Stable Diffusion autoencoders in diffusers' layout, and in that of CompVis's code: a matter of spelling.

`encoder.down_blocks.0.resnets.1.conv1.weight` of diffusers is `encoder/down_blocks_0/resnets_1/conv1/kernel` here, and
`encoder.down.0.block.1.conv1.weight` of CompVis. We write diffusers' names.
Latents have one scale here; an autoencoder of another one, as SDXL's, gets the ratio into its two 1 x 1 convolutions.
"""

import logging
import math
import re
from collections.abc import Mapping

import numpy as np

from dydit_jax.convert.tables import require_no_problems
from dydit_jax.models import autoencoder
from dydit_jax.models.autoencoder import LATENT_SCALE
from dydit_jax.trees import flatten, unflatten

logger = logging.getLogger(__name__)

# Until diffusers 0.18 the attention's layers had other names.
OLD_ATTENTION_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
FIRST_STAGE = "first_stage_model."  # the autoencoder in a checkpoint of latent diffusion
BESIDE_AUTOENCODERS = ("loss.", "model_ema.")  # what their training keeps: discriminator and counters
LEVELS = 4  # of resolution; CompVis counts the decoder's from the finest, diffusers from the coarsest
# Parts of CompVis's names, each with its name in diffusers.
COMPVIS_NAMES = tuple(
    (re.compile(pattern), name)
    for pattern, name in (
        (r"\.mid\.block_(\d)\.", lambda match: f".mid_block.resnets.{int(match[1]) - 1}."),
        (r"\.mid\.attn_1\.norm\.", ".mid_block.attentions.0.group_norm."),
        (r"\.mid\.attn_1\.([qkv])\.", r".mid_block.attentions.0.to_\1."),
        (r"\.mid\.attn_1\.proj_out\.", ".mid_block.attentions.0.to_out.0."),
        (r"\.down\.(\d)\.downsample\.", r".down_blocks.\1.downsamplers.0."),
        (r"\.down\.(\d)\.block\.", r".down_blocks.\1.resnets."),
        (r"\.up\.(\d)\.upsample\.", lambda match: f".up_blocks.{LEVELS - 1 - int(match[1])}.upsamplers.0."),
        (r"\.up\.(\d)\.block\.", lambda match: f".up_blocks.{LEVELS - 1 - int(match[1])}.resnets."),
        (r"\.nin_shortcut\.", ".conv_shortcut."),
        (r"\.norm_out\.", ".conv_norm_out."),
    )
)


def is_autoencoder(tensors: Mapping[str, np.ndarray]) -> bool:
    """Return whether tensors by name are those of an autoencoder."""
    return any(name.startswith("decoder.") for name in tensors)


def only_autoencoder(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Leave out what lies beside an autoencoder in the files of its training and of latent diffusion; keep other files.

    Args:
      tensors: by name, of any file.

    Returns:
      The tensors of the autoencoder, without the name of a module around it; `tensors` where there is none.
    """
    inside = {name: tensor for name, tensor in tensors.items() if name.startswith(FIRST_STAGE)}
    found = {name.removeprefix(FIRST_STAGE): tensor for name, tensor in inside.items()} or dict(tensors)
    if is_autoencoder(found):
        found = {name: tensor for name, tensor in found.items() if not name.startswith(BESIDE_AUTOENCODERS)}
    if len(found) < len(tensors):
        logger.info("%d tensors are not the autoencoder's and left out.", len(tensors) - len(found))
    return found


def source_name(path: str) -> str:
    """Return the PyTorch name of one of our parameters."""
    *modules, leaf = path.split("/")
    modules = [re.sub(r"_(\d+)$", r".\1", module) for module in modules]
    return ".".join([*modules, "bias" if leaf == "bias" else "weight"])


def convert_autoencoder(source: Mapping[str, np.ndarray]) -> dict:
    """Turn the tensors of CompVis's layout or diffusers', with old or new attention names, into our parameter tree.

    Raises:
      InputError: naming missing, surplus and misshapen tensors.
    """
    source = {_new_name(name): tensor for name, tensor in source.items()}
    targets = {source_name(path): (path, leaf.shape) for path, leaf in flatten(autoencoder.abstract_params()).items()}
    missing = [f"missing {name}" for name in targets if name not in source]
    surplus = [f"surplus {name} {source[name].shape}" for name in source if name not in targets]
    leaves, misshapen = {}, []
    for name, (path, shape) in targets.items():
        if name in source:
            leaves[path] = _to_ours(np.asarray(source[name], np.float32), len(shape))
            if leaves[path].shape != shape:
                misshapen.append(f"{name} is {source[name].shape}, which makes {leaves[path].shape}, not {shape}")
    require_no_problems("the autoencoder", missing, surplus, misshapen)
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
    """Return the name of today's diffusers for a tensor in any layout."""
    for pattern, new in COMPVIS_NAMES:
        name = pattern.sub(new, name)
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
