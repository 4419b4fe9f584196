"""Autoencoders of Stable Diffusion's kind in diffusers' layout, and in that of CompVis's code: a matter of spelling.

`encoder.down_blocks.0.resnets.1.conv1.weight` of diffusers is `encoder/down_blocks_0/resnets_1/conv1/kernel` here, and
`encoder.down.0.block.1.conv1.weight` of CompVis. We write diffusers' names. The shape of the network shows in its
tensors; scale and shift of its latents are said beside them, or known of the published ones.
"""

import dataclasses
import itertools
import logging
import re
from collections.abc import Mapping

import numpy as np

from dydit_jax.convert.evidence import TENSORS, Evidence
from dydit_jax.convert.tables import require_no_problems
from dydit_jax.errors import InputError, some_of
from dydit_jax.models.autoencoder import LATENT_SCALE, NORM_GROUPS, AutoencoderConfig, abstract_params
from dydit_jax.trees import flatten, unflatten

logger = logging.getLogger(__name__)

# Names of attention's layers in diffusers until 0.18, and in CompVis's code.
OLD_ATTENTION_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
COMPVIS_ATTENTION_NAMES = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
FIRST_STAGE = "first_stage_model."  # the autoencoder in a checkpoint of latent diffusion
# What their training keeps beside them: discriminator, counters, and what VA-VAE's aligns its latents with.
BESIDE_AUTOENCODERS = ("loss.", "model_ema.", "foundation_model.", "linear_proj.")
# Parts of CompVis's names, each with its name in diffusers.
COMPVIS_NAMES = tuple(
    (re.compile(pattern), name)
    for pattern, name in (
        (r"\.mid\.block_(\d)\.", lambda match: f".mid_block.resnets.{int(match[1]) - 1}."),
        (r"\.mid\.attn_1\.", ".mid_block.attentions.0."),
        (r"\.down\.(\d)\.downsample\.", r".down_blocks.\1.downsamplers.0."),
        (r"\.down\.(\d)\.block\.", r".down_blocks.\1.resnets."),
        (r"\.down\.(\d)\.attn\.", r".down_blocks.\1.attentions."),
        (r"\.nin_shortcut\.", ".conv_shortcut."),
        (r"\.norm_out\.", ".conv_norm_out."),
    )
)
# CompVis counts the decoder's stages from the finest, diffusers from the coarsest.
COMPVIS_UP = re.compile(r"\.up\.(\d)\.(upsample|block|attn)\.")
UP_PARTS = dict(upsample="upsamplers.0", block="resnets", attn="attentions")
PUBLISHED_RECORDS = (
    "Stable Diffusion 3's has 16 channels, scale 1.5305 and shift 0.0609; FLUX's 16, 0.3611 and 0.1159; the statistics "
    "of VA-VAE's 32 channels are published beside it"
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


def convert_autoencoder(source: Mapping[str, np.ndarray]) -> tuple[AutoencoderConfig, dict]:
    """Turn the tensors of CompVis's layout or diffusers', with old or new attention names, into our parameter tree.

    Returns:
      The network's shape, with scale and shift by default, and its parameters.

    Raises:
      InputError: an autoencoder of another kind, naming missing, surplus and misshapen tensors.
    """
    source = _with_new_names(source)
    config = _detect_shape(source)
    targets = {source_name(path): (path, leaf.shape) for path, leaf in flatten(abstract_params(config)).items()}
    missing = [f"missing {name}" for name in targets if name not in source]
    surplus = [f"surplus {name} {source[name].shape}" for name in source if name not in targets]
    leaves, misshapen = {}, []
    for name, (path, shape) in targets.items():
        if name in source:
            leaves[path] = _to_ours(np.asarray(source[name], np.float32), len(shape))
            if leaves[path].shape != shape:
                misshapen.append(f"{name} is {source[name].shape}, which makes {leaves[path].shape}, not {shape}")
    require_no_problems("the autoencoder", missing, surplus, misshapen)
    return config, unflatten(leaves)


def _detect_shape(source: Mapping[str, np.ndarray]) -> AutoencoderConfig:
    """Read the shape of a network from its tensors by diffusers' names; what contradicts it is found later."""
    stages = _count(source, "encoder.down_blocks.{}.resnets.0.conv2.weight")
    first_of_stage = [source[f"encoder.down_blocks.{index}.resnets.0.conv2.weight"] for index in range(stages)]
    conv_in = source.get("decoder.conv_in.weight")
    if not stages or conv_in is None or {tensor.ndim for tensor in (conv_in, *first_of_stage)} != {4}:
        raise InputError(
            "These are the weights of an autoencoder of another kind: only those built as Stable Diffusion's are "
            "supported (diffusers' AutoencoderKL: sd-vae, SDXL's, Stable Diffusion 3's, FLUX's; VA-VAE)."
        )
    return AutoencoderConfig(
        channels=conv_in.shape[1],
        widths=tuple(tensor.shape[0] for tensor in first_of_stage),
        resnets=_count(source, "encoder.down_blocks.0.resnets.{}.conv2.weight"),
        attention=f"encoder.down_blocks.{stages - 1}.attentions.0.to_q.weight" in source,
        quant_conv="quant_conv.weight" in source,
    )


def _count(source: Mapping, name: str) -> int:
    """Return how many names there are, numbered from 0."""
    return next(number for number in itertools.count() if name.format(number) not in source)


def require_supported(evidence: Evidence) -> None:
    """Raise where an autoencoder's description names another network, which its tensors may not show.

    Raises:
      InputError: another class of diffusers, or another number of groups in its norms.
    """
    kind, groups = evidence.value("class_name"), evidence.value("norm_groups")
    if kind not in (None, "AutoencoderKL"):
        raise InputError(f"{evidence.sources['class_name']} says {kind}; the autoencoder must be an AutoencoderKL.")
    if groups not in (None, NORM_GROUPS):
        raise InputError(f"{evidence.sources['norm_groups']} says {groups}; norms must have {NORM_GROUPS} groups.")


def with_record(config: AutoencoderConfig, evidence: Evidence) -> AutoencoderConfig:
    """Give an autoencoder the scale and shift of its latents, by all that says something about them.

    Raises:
      InputError: nothing says them, or sources that disagree.
    """
    evidence.say("latent_channels", config.channels, TENSORS)
    if config.channels == AutoencoderConfig.channels and evidence.value("latents_std") is None:
        reason = "that of Stable Diffusion, SDXL's is 0.13025; --latent_scale decides"
        evidence.guess("latent_scale", LATENT_SCALE, reason)
    scale, std, shift, mean = (
        _channel_values(field, config.channels, evidence)
        for field in ("latent_scale", "latents_std", "latent_shift", "latents_mean")
    )
    if scale is None and std is None:
        raise InputError(
            f"Nothing says the scale and shift of these latents of {config.channels} channels: {PUBLISHED_RECORDS}. "
            "Give --latent_scale and --latent_shift, or put diffusers' config.json beside the file."
        )
    if shift is not None and mean is not None:
        shifts = " and ".join(evidence.sources[field] for field in ("latent_shift", "latents_mean"))
        raise InputError(f"{shifts} say both what is taken from latents; remove one.")
    one = np.ones(1)
    scale = (one if scale is None else scale) / (one if std is None else std)
    shift = next(values for values in (shift, mean, np.zeros(1)) if values is not None)
    return dataclasses.replace(config, scale=tuple(map(float, scale)), shift=tuple(map(float, shift)))


def _channel_values(field: str, channels: int, evidence: Evidence) -> np.ndarray | None:
    """Return what is said of a field, float64 [1] or [C]."""
    if evidence.value(field) is None:
        return None
    values = np.atleast_1d(np.float64(evidence.value(field)))
    if len(values) not in (1, channels) or (field == "latents_std" and not (values > 0).all()):
        raise InputError(
            f"{evidence.sources[field]} must be one number or {channels}, one for each channel, and a deviation above "
            f"0, not {len(values)}: {some_of(values)}."
        )
    return values


def export_autoencoder(params: Mapping) -> dict[str, np.ndarray]:
    """Turn our parameter tree into diffusers' names and axes."""
    exported = {}
    for path, leaf in flatten(params).items():
        leaf = np.asarray(leaf)
        axes = {4: (3, 2, 0, 1), 2: (1, 0)}.get(leaf.ndim)
        exported[source_name(path)] = np.ascontiguousarray(leaf.transpose(axes) if axes else leaf)
    return exported


def _with_new_names(source: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return tensors of any layout by the names of today's diffusers."""
    stages = 1 + max((int(match[1]) for name in source if (match := COMPVIS_UP.search(name))), default=0)
    return {_new_name(name, stages): tensor for name, tensor in source.items()}


def _new_name(name: str, stages: int) -> str:
    """Return the name of today's diffusers for a tensor in any layout, of a network with these stages."""
    for pattern, new in COMPVIS_NAMES:
        name = pattern.sub(new, name)
    name = COMPVIS_UP.sub(lambda match: f".up_blocks.{stages - 1 - int(match[1])}.{UP_PARTS[match[2]]}.", name)
    if "attentions" not in name:
        return name
    names = OLD_ATTENTION_NAMES | COMPVIS_ATTENTION_NAMES
    return ".".join(names.get(part, part) for part in name.split("."))


def _to_ours(array: np.ndarray, axes: int) -> np.ndarray:
    """Put the input axis before the output axis; old files store Linear layers as 1 x 1 convolutions."""
    if axes == 2 and array.ndim == 4:
        array = array.reshape(array.shape[:2])
    if array.ndim == 4:
        array = array.transpose(2, 3, 1, 0)
    elif array.ndim == 2:
        array = array.T
    return np.ascontiguousarray(array)
