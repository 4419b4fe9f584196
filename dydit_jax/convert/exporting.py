"""The way back: weights of ours in the layout of the original, or as a folder that diffusers' `DiTPipeline` loads."""

import dataclasses
import logging
from collections.abc import Callable

from etils import epath

from dydit_jax.checkpoints import Weights, format_of, is_autoencoder_format, load_weights, read_autoencoder
from dydit_jax.convert import diffusers_layout
from dydit_jax.convert.autoencoders import export_autoencoder
from dydit_jax.convert.conversion import output_file
from dydit_jax.convert.diffusers_scheduler import SCHEDULER, SCHEDULER_FILE, scheduler_config
from dydit_jax.convert.tables import export_state_dict
from dydit_jax.convert.torch_files import write_tensors
from dydit_jax.diffusion.process import Diffusion
from dydit_jax.errors import InputError, require_known
from dydit_jax.models.autoencoder import Autoencoder
from dydit_jax.models.config import DiTConfig
from dydit_jax.models.routing import time_router_names
from dydit_jax.runtime.files import locate, write_json
from dydit_jax.runtime.locks import is_free

logger = logging.getLogger(__name__)

EXPORT_LAYOUTS = ("original", "diffusers")


@dataclasses.dataclass(frozen=True)
class Export:
    """What a user asks of `convert_torch_weights.py --export`.

    Attributes:
      source: a `.safetensors` file of ours, of a DiT or an autoencoder, a folder with one, or what else names one.
      out: file to write, whose ending decides the format; for diffusers a folder, new or empty.
      layout: "original" or "diffusers".
      autoencoder: for diffusers: one of ours that goes into the folder; "" leaves it to the user.
      overwrite: whether an output that exists is replaced.
    """

    source: str
    out: str
    layout: str = "original"
    autoencoder: str = ""
    overwrite: bool = False

    def __post_init__(self):
        require_known("--export", self.layout, EXPORT_LAYOUTS)
        if not str(self.out):
            raise InputError("--out is empty; name a file, or for diffusers a folder.")
        if self.autoencoder and self.layout != "diffusers":
            raise InputError("--autoencoder is for --export diffusers, whose folder holds one.")


def export(
    request: Export, load: Callable[..., Weights] = load_weights, find: Callable[[str], epath.Path] = output_file
) -> epath.Path:
    """Write weights of ours in another layout.

    Args:
      request: what to write, and where.
      load: reads the weights of a DiT; by default complete ones alone.
      find: returns the file that a source or an autoencoder means; by default itself, or that in a folder.

    Returns:
      What was written.

    Raises:
      InputError: unreadable weights, an output that exists, an unknown ending, or a model that the layout can't hold:
        no other has updates that depend on the timestep, or is conditioned on the guidance scale, and the original
        has no capacity of tokens and no routers but its own.
    """
    out, source = locate(request.out), find(request.source)
    if request.layout == "diffusers":
        _require_free(out, request)
        weights = _load(load, source)
        diffusers_layout.require_exportable(weights.model, weights.process)
        decoder = read_autoencoder(find(request.autoencoder)) if request.autoencoder else None
        _write_pipeline(out, weights, decoder)
    else:
        if out.exists() and not request.overwrite:
            raise InputError(f"{out} exists; give --overwrite to replace it.")
        write_tensors(out, _tensors_of(source, load))
    logger.info("Wrote %s in the layout of %s.", out, request.layout)
    return out


def _require_free(out, request: Export) -> None:
    """Raise unless a folder is new or empty, or holds what may be replaced: an export."""
    if is_free(out) or request.overwrite and (out / diffusers_layout.INDEX_FILE).is_file():
        return
    raise InputError(f"{out} is not empty; name a new folder, or give --overwrite where it is an export already.")


def _load(load: Callable[..., Weights], source) -> Weights:
    weights = load(source)
    if weights.lora is not None:
        raise InputError(f"{source} has low-rank updates that depend on the timestep; no other layout has them.")
    if weights.model.guidance_free:
        raise InputError(f"{source} is conditioned on the guidance scale; no other layout has a place for that.")
    return weights


def _tensors_of(source, load: Callable[..., Weights]) -> dict:
    if source.is_file() and is_autoencoder_format(format_of(source)):
        return export_autoencoder(read_autoencoder(source).params)
    weights = _load(load, source)
    _require_original_routers(weights.model, source)
    process = weights.process
    if isinstance(process, Diffusion) and process != Diffusion():
        logger.warning(
            "A plain file doesn't say its schedule: on the way in give --schedule=%s --train_steps=%d.",
            *(process.schedule, process.train_steps),
        )
    return export_state_dict(weights.params, weights.model)


def _require_original_routers(config: DiTConfig, source) -> None:
    """Raise where the original would choose other heads, groups or tokens."""
    chosen = dict(
        token_capacity=config.token_capacity,
        time_router={*time_router_names(config.time_router)} - {DiTConfig.time_router},
        token_router={config.token_router} - {DiTConfig.token_router},
    )
    lost = [f"model.{name} {getattr(config, name)!r}" for name, value in chosen.items() if value]
    if lost and config.routers != "none":
        raise InputError(
            f"{source} has {', '.join(lost)}; the original's layout has no place for that. --export diffusers writes "
            "the model without its routing."
        )


def _write_pipeline(out, weights: Weights, decoder: Autoencoder | None) -> None:
    """Write the folder of a `DiTPipeline`, its index last: a folder without one is not finished."""
    layout, config = diffusers_layout, weights.model
    parts = [(layout.TRANSFORMER, layout.transformer_config(config))]
    tensors = {layout.TRANSFORMER: layout.with_diffusers_names(weights.params, config)}
    if decoder is not None:
        parts.append((layout.AUTOENCODER, layout.autoencoder_config(decoder.config, config.side)))
        tensors[layout.AUTOENCODER] = export_autoencoder(decoder.params)
    (out / layout.INDEX_FILE).unlink(missing_ok=True)
    for name, arguments in parts:
        (out / name).mkdir(parents=True, exist_ok=True)
        write_json(out / name / layout.CONFIG_FILE, arguments)
        write_tensors(out / name / layout.WEIGHTS_FILES[0], tensors.pop(name))
    (out / SCHEDULER).mkdir(exist_ok=True)
    write_json(out / SCHEDULER / SCHEDULER_FILE, scheduler_config(weights.process))
    index = layout.model_index(class_names=weights.class_names, with_autoencoder=decoder is not None)
    write_json(out / layout.INDEX_FILE, index)
    _warn(weights, with_autoencoder=decoder is not None)


def _warn(weights: Weights, *, with_autoencoder: bool) -> None:
    """Say what the images of diffusers' pipeline will not be."""
    config, null_class = weights.model, diffusers_layout.NULL_CLASS
    if config.routers != "none":
        logger.warning("The model is exported complete: its routing does not exist in diffusers, nor what it saves.")
    if config.classes != null_class:
        logger.warning(
            "DiTPipeline takes class %d for no class, whatever the model; with %d classes, sample it with "
            "guidance_scale=1.",
            *(null_class, config.classes),
        )
    if not with_autoencoder:
        logger.warning(
            "The folder holds no autoencoder: give DiTPipeline.from_pretrained one as vae=..., or export with "
            "--autoencoder."
        )
    logger.warning(
        "diffusers computes other features of the timestep than DiT. For the same images set "
        "block.norm1.emb.time_proj.downscale_freq_shift = 0 in every block of pipe.transformer.transformer_blocks."
    )
