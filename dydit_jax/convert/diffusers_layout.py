"""DiTs as diffusers keeps them: `DiTTransformer2DModel` and the folders of its `DiTPipeline`, read and written.

    <folder>/model_index.json                   which pipeline it is, and names of classes
    <folder>/transformer/config.json            the model's arguments
    <folder>/transformer/diffusion_pytorch_model.safetensors   or .bin, .fp16.safetensors, or an index of several files
    <folder>/vae/...                            an autoencoder in the same form
    <folder>/scheduler/scheduler_config.json    see `diffusers_scheduler`

Tensors get the original's names here, and the rest is as with any other file (`tables`). Each block there holds a copy
of the embedders of timestep and label, and queries, keys and values apart.

What diffusers computes differently, and no file can change: its frequencies of the timestep are 10000^(-i/127), those
of DiT 10000^(-i/128).
"""

import dataclasses
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from dydit_jax.convert.detect import LABEL_TABLE
from dydit_jax.convert.diffusers_scheduler import TRANSFORMER, VERSION
from dydit_jax.convert.tables import POSITION_NAME, export_state_dict
from dydit_jax.diffusion.process import Diffusion, Process
from dydit_jax.errors import InputError, some_of
from dydit_jax.labels import spell_name
from dydit_jax.models.autoencoder import NORM_GROUPS, AutoencoderConfig
from dydit_jax.models.config import DiTConfig
from dydit_jax.runtime.files import read_json, require_local

logger = logging.getLogger(__name__)

INDEX_FILE, CONFIG_FILE = "model_index.json", "config.json"
AUTOENCODER, PIPELINE = "vae", "DiTPipeline"
MODEL_CLASSES = (
    "DiTTransformer2DModel",
    "Transformer2DModel",
    "AutoencoderKL",
)  # the second is the first one's old name
WEIGHTS_NAME = "diffusion_pytorch_model"
# Full precision first, and formats that are read without a pickle.
WEIGHTS_FILES = tuple(
    name.format(WEIGHTS_NAME)
    for name in (
        "{}.safetensors",
        "{}.safetensors.index.json",
        "{}.bin",
        "{}.fp16.safetensors",
        "{}.safetensors.index.fp16.json",
        "{}.fp16.bin",
    )
)
INDEX_ENDING = re.compile(r"\.index(\.\w+)?\.json$")
# Folders whose weights come from DiT's own training; and what a config of ours says of their features of the timestep.
FROM_DIT, FEATURES_KEY = ("DiT-XL-2-256", "DiT-XL-2-512"), "_downscale_freq_shift"
OTHER_FEATURES = (
    "weights that were trained with diffusers, and not only brought there as facebook/DiT-XL-2-256 was, have learned "
    "other features of the timestep than DiT's and draw worse here; no file says which these are"
)
MOST_DIGITS = 12  # of a label
NULL_CLASS = 1000  # of DiTPipeline, whatever the number of classes
MLP_RATIO = 4

# The original's name of a module, and diffusers'. `{layer}` stands for the number of the block.
_THEIRS = "transformer_blocks.{layer}"
EMBEDDERS = (
    ("t_embedder.mlp.0", f"{_THEIRS}.norm1.emb.timestep_embedder.linear_1"),
    ("t_embedder.mlp.2", f"{_THEIRS}.norm1.emb.timestep_embedder.linear_2"),
)
LABELS = f"{_THEIRS}.norm1.emb.class_embedder.embedding_table.weight"
MODULES = (
    ("x_embedder.proj", "pos_embed.proj"),
    ("final_layer.adaLN_modulation.1", "proj_out_1"),
    ("final_layer.linear", "proj_out_2"),
    ("blocks.{layer}.attn.proj", f"{_THEIRS}.attn1.to_out.0"),
    ("blocks.{layer}.mlp.fc1", f"{_THEIRS}.ff.net.0.proj"),
    ("blocks.{layer}.mlp.fc2", f"{_THEIRS}.ff.net.2"),
    ("blocks.{layer}.adaLN_modulation.1", f"{_THEIRS}.norm1.linear"),
)
QKV, QKV_PARTS = "blocks.{layer}.attn.qkv", tuple(f"{_THEIRS}.attn1.to_{part}" for part in "qkv")
KINDS = ("weight", "bias")
POSITIONS = "pos_embed.pos_embed"  # which earlier versions stored


# --- Reading -------------------------------------------------------------------------------------


def weights_file(source) -> Path:
    """Return the file of weights that a user's source means: itself, or that of a folder of diffusers'.

    Args:
      source: a file, a pipeline's folder, or that of one of its models.

    Raises:
      InputError: a folder of another pipeline or model, or without weights; or what is not on this machine.
    """
    folder = require_local(source)
    if not folder.is_dir():
        return folder
    if (folder / INDEX_FILE).is_file():
        _require_class(folder / INDEX_FILE, (PIPELINE,))
        folder = folder / TRANSFORMER
    if not (folder / CONFIG_FILE).is_file():
        return folder  # which is refused as a folder
    _require_class(folder / CONFIG_FILE, MODEL_CLASSES)
    found = [folder / name for name in WEIGHTS_FILES if (folder / name).is_file()]
    if not found:
        raise InputError(f"{folder} holds no weights: none of {', '.join(WEIGHTS_FILES)}.")
    return found[0]


def _require_class(path: Path, known: Sequence[str]) -> None:
    name = read_json(path, remedy="copy the folder again").get("_class_name")
    if name not in known:
        raise InputError(f"{path} is of a {name!r:.80}, which is none of {', '.join(known)}: it can't be converted.")


def is_index(name: str) -> bool:
    """Return whether a file's name is that of an index of several files of weights."""
    return INDEX_ENDING.search(name) is not None


def read_class_names(source) -> list[str]:
    """Return the names of the classes that a pipeline's folder lists, by label; [] where it has none.

    Raises:
      InputError: a list that is none.
    """
    path = Path(source) / INDEX_FILE
    listed = read_json(path, remedy="copy the folder again").get("id2label") if path.is_file() else None
    if not listed:
        return []
    listed = listed if isinstance(listed, dict) else {"": listed}
    names = {
        int(label): spell_name(str(name))
        for label, name in listed.items()
        if label.isdecimal() and len(label) <= MOST_DIGITS
    }
    if sorted(names) != list(range(len(listed))):
        raise InputError(f"{path} has an id2label whose labels are not 0 to {len(listed) - 1}; mend it, or remove it.")
    return [names[label] for label in range(len(names))]


def is_diffusers(tensors: Mapping[str, np.ndarray]) -> bool:
    """Return whether tensors by name are a transformer of diffusers'."""
    return any(name.startswith("transformer_blocks.") for name in tensors)


def has_features_of_dit(path) -> bool:
    """Return whether weights are known to be trained on DiT's features of the timestep: by their folder, or by us.

    Args:
      path: of the file of weights.
    """
    path = Path(path)
    config = path.with_name(CONFIG_FILE)
    made_here = config.is_file() and read_json(config, remedy="copy the folder again").get(FEATURES_KEY) == 0
    return made_here or any(part in FROM_DIT for part in path.parts)


def with_original_names(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Give the tensors of a `DiTTransformer2DModel` the original's names.

    Args:
      tensors: by diffusers' names; other names are kept, and are surplus later.

    Returns:
      Tensors by the original's names; queries, keys and values of a block are one.

    Raises:
      InputError: another model of diffusers', or blocks whose embedders differ.
    """
    if LABELS.format(layer=0) not in tensors:
        raise InputError("These are weights of diffusers', but of no DiTTransformer2DModel: its blocks embed labels.")
    depth = len({name.split(".")[1] for name in tensors if name.startswith("transformer_blocks.")})
    _require_equal_embedders(tensors, depth)
    left, renamed = dict(tensors), {}
    for layer in range(depth):
        for kind in KINDS:
            parts = [f"{part.format(layer=layer)}.{kind}" for part in QKV_PARTS]
            if all(part in left for part in parts):
                renamed[f"{QKV.format(layer=layer)}.{kind}"] = np.concatenate([left.pop(part) for part in parts])
    for ours, theirs in _names(depth).items():
        if theirs in left:
            renamed[ours] = left.pop(theirs)
    copies = {name for _, name in _embedder_copies(depth)}
    return renamed | {name: tensor for name, tensor in left.items() if name not in copies}


def _names(depth: int) -> dict[str, str]:
    """Return diffusers' name of every tensor that has one there, by the original's name."""
    names = {LABEL_TABLE: LABELS.format(layer=0), POSITION_NAME: POSITIONS}
    for ours, theirs in (*EMBEDDERS, *MODULES):
        for layer in range(depth if "{layer}" in ours else 1):
            for kind in KINDS:
                names[f"{ours.format(layer=layer)}.{kind}"] = f"{theirs.format(layer=layer)}.{kind}"
    return names


def _embedder_copies(depth: int) -> list[tuple[str, str]]:
    """Return the names of the embedders' tensors in block 0, each with that of a copy in another block."""
    names = [LABELS, *(f"{theirs}.{kind}" for _, theirs in EMBEDDERS for kind in KINDS)]
    return [(name.format(layer=0), name.format(layer=layer)) for layer in range(1, depth) for name in names]


def _require_equal_embedders(tensors: Mapping[str, np.ndarray], depth: int) -> None:
    wrong = [
        copy
        for first, copy in _embedder_copies(depth)
        if first in tensors and copy in tensors and not np.array_equal(tensors[first], tensors[copy])
    ]
    if wrong:
        raise InputError(
            f"The blocks embed timesteps and labels differently ({some_of(wrong)} differ from block 0's); here, as in "
            "DiT, all blocks share one embedder."
        )


# --- Writing -------------------------------------------------------------------------------------


def require_exportable(config: DiTConfig, process: Process) -> None:
    """Raise where `DiTPipeline` can't hold a model.

    Raises:
      InputError: positions of its own, an MLP of another width, or another process than diffusion.
    """
    if config.positions == "stored":
        raise InputError("diffusers' DiTTransformer2DModel computes its positions; this model stores its own.")
    if config.mlp_ratio != MLP_RATIO:
        raise InputError(f"diffusers' DiTTransformer2DModel has model.mlp_ratio {MLP_RATIO}, not {config.mlp_ratio}.")
    if not isinstance(process, Diffusion):
        raise InputError(
            f"diffusers' DiTPipeline draws models that predict noise; this one's process is {process.name}."
        )


def with_diffusers_names(params: Mapping, config: DiTConfig) -> dict[str, np.ndarray]:
    """Turn our parameter tree into the tensors of a `DiTTransformer2DModel`; routers have no place there."""
    static = dataclasses.replace(config, routers="none", token_capacity=())
    tensors, depth, renamed = export_state_dict(params, static), config.depth, {}
    for ours, theirs in _names(depth).items():
        if ours != POSITION_NAME:
            renamed[theirs] = tensors[ours]
    for layer in range(depth):
        for kind in KINDS:
            parts = np.split(tensors[f"{QKV.format(layer=layer)}.{kind}"], 3)
            names = [f"{part.format(layer=layer)}.{kind}" for part in QKV_PARTS]
            renamed |= dict(zip(names, map(np.ascontiguousarray, parts), strict=True))
    return renamed | {copy: renamed[first] for first, copy in _embedder_copies(depth)}


def transformer_config(config: DiTConfig) -> dict:
    """Return the arguments of a `DiTTransformer2DModel`."""
    return dict(
        _class_name="DiTTransformer2DModel",
        _diffusers_version=VERSION,
        num_attention_heads=config.heads,
        attention_head_dim=config.width // config.heads,
        in_channels=config.channels,
        out_channels=2 * config.channels,
        num_layers=config.depth,
        dropout=0.0,
        attention_bias=True,
        sample_size=config.side,
        patch_size=config.patch,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=config.classes,
        norm_type="ada_norm_zero",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
        **{FEATURES_KEY: 0},
    )


def autoencoder_config(config: AutoencoderConfig, side: int) -> dict:
    """Return the arguments of an `AutoencoderKL`.

    Args:
      config: the autoencoder's record.
      side: of the latents.

    Raises:
      InputError: latents with a shift, with a scale per channel, or attention in the outer stages: not in DiTPipeline.
    """
    if any(config.shift) or len(config.scale) > 1 or config.attention:
        raise InputError(
            "diffusers' DiTPipeline decodes latents of one scale, without a shift or attention in the outer stages; "
            "leave --autoencoder out."
        )
    stages = len(config.widths)
    return dict(
        _class_name="AutoencoderKL",
        _diffusers_version=VERSION,
        act_fn="silu",
        block_out_channels=list(config.widths),
        down_block_types=["DownEncoderBlock2D"] * stages,
        up_block_types=["UpDecoderBlock2D"] * stages,
        in_channels=3,
        out_channels=3,
        latent_channels=config.channels,
        layers_per_block=config.resnets,
        norm_num_groups=NORM_GROUPS,
        sample_size=side * config.factor,
        scaling_factor=config.scale[0],
        use_quant_conv=config.quant_conv,
        use_post_quant_conv=config.quant_conv,
    )


def model_index(*, class_names: Sequence[str], with_autoencoder: bool) -> dict:
    """Return what `DiTPipeline.from_pretrained` reads first; without an autoencoder it has to be given one."""
    index = dict(
        _class_name=PIPELINE,
        _diffusers_version=VERSION,
        scheduler=["diffusers", "DDIMScheduler"],
        transformer=["diffusers", "DiTTransformer2DModel"],
        vae=["diffusers", "AutoencoderKL"] if with_autoencoder else [None, None],
    )
    return index | (dict(id2label={str(label): name for label, name in enumerate(class_names)}) if class_names else {})
