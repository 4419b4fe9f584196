"""The job behind `convert_torch_weights.py`: a PyTorch file in, our weights and a report out."""

import dataclasses
import logging
import time
from collections.abc import Mapping

import jax
import numpy as np
from etils import epath

from dydit_jax.checkpoints import (
    WEIGHTS_FILE,
    Weights,
    checksum,
    package_versions,
    save_autoencoder,
    save_weights,
)
from dydit_jax.convert.autoencoders import (
    convert_autoencoder,
    is_autoencoder,
    only_autoencoder,
    require_supported,
    with_record,
)
from dydit_jax.convert.detect import LABEL_TABLE, SPACES, detect_config
from dydit_jax.convert.diffusers_layout import (
    OTHER_FEATURES,
    has_features_of_dit,
    is_diffusers,
    read_class_names,
    weights_file,
    with_original_names,
)
from dydit_jax.convert.evidence import GUESS, Evidence, gather_evidence
from dydit_jax.convert.ordering import order_by_magnitude
from dydit_jax.convert.reports import Report
from dydit_jax.convert.tables import convert_state_dict, require_complete
from dydit_jax.convert.torch_files import read_torch_file, release_pages
from dydit_jax.convert.torch_network import run_torch
from dydit_jax.diffusion.process import PROCESSES, Diffusion, Process
from dydit_jax.diffusion.samplers import SamplingConfig
from dydit_jax.errors import InputError, require_known, some_of
from dydit_jax.models.autoencoder import Autoencoder, AutoencoderConfig
from dydit_jax.models.config import DiTConfig
from dydit_jax.models.dit import Model
from dydit_jax.models.routing import LAYOUTS
from dydit_jax.records import require_range
from dydit_jax.runtime.files import locate, write_json
from dydit_jax.runtime.progress import counted, counted_bytes
from dydit_jax.runtime.seeds import make_key, require_seed
from dydit_jax.runtime.settings import own_settings
from dydit_jax.trees import flatten, unflatten

logger = logging.getLogger(__name__)

DEFAULT_AUTOENCODER = "sd-vae-ft-ema"
REPORT_FILE = "report.json"
FLOATS = ("float16", "bfloat16", "float32", "float64")
SAID_OF_DITS = ("heads", "classes", "image_size", "space", "routers", "process", "schedule", "train_steps")
SAID_OF_DIFFUSIONS = ("schedule", "train_steps")
SAMPLING = {"flow": dict(sampler="euler_maruyama", steps="250")}  # as published; that of diffusion is the default
SAID_OF_AUTOENCODERS = ("latent_scale", "latent_shift")
MAX_IMAGE_SIZE, MAX_HEADS, MAX_CLASSES = 16384, 4096, 10**7


@dataclasses.dataclass(frozen=True)
class Conversion:
    """What a user asks of `convert_torch_weights.py`.

    Attributes:
      source: file of PyTorch weights (.pt, .pth, .bin, .safetensors), or folder of diffusers' DiTPipeline or one of its
        models; with --export, weights of ours.
      out: a .safetensors file, or a folder for one and its report.
      weights: which weights of a training file: ema or model.
      heads: number of heads, which the tensors of a static DiT do not show.
      classes: number of classes: all rows of the label table, or all but one.
      image_size: side of the images in pixels, also of a model in latents.
      space: what the model draws: latent or pixels.
      routers: layout of the routers, where the tensors leave it open: first_on or free.
      process: what the model was trained as: diffusion, whose networks predict noise, or flow (SiT), velocities.
      schedule: of a diffusion: linear or squared_cosine, the schedule that the model was trained on.
      train_steps: of a diffusion: number of steps of that schedule.
      latent_scale: of an autoencoder: the factor of its latents, one number or one per channel.
      latent_shift: of an autoencoder: what is taken from its latents before, one number or one per channel.
      add_routers: give a static DiT fresh routers, the start of fine-tuning: first_on or free.
      order: put heads and MLP channels of a static DiT in order of magnitude.
      seed: seed of fresh routers.
      overwrite: replace an output that exists.
      base: of an adapter, with --export or --merge: the weights that it was trained on; those that it names by default.
      verify: run both networks and print the largest difference; needs PyTorch.
    """

    source: str
    out: str
    weights: str = "ema"
    heads: int | None = None
    classes: int | None = None
    image_size: int | None = None
    space: str | None = None
    routers: str | None = None
    process: str | None = None
    schedule: str | None = None
    train_steps: int | None = None
    latent_scale: tuple[float, ...] | None = None
    latent_shift: tuple[float, ...] | None = None
    add_routers: str = ""
    order: bool = False
    seed: int = 0
    overwrite: bool = False
    base: str = ""
    verify: bool = False

    def __post_init__(self):
        require_known("weights", self.weights, ("ema", "model"))
        require_seed("--seed", self.seed)
        for name in ("routers", "add_routers"):
            if getattr(self, name):
                require_known(name, getattr(self, name), LAYOUTS[1:])
        if self.space is not None:
            require_known("space", self.space, SPACES)
        if self.process is not None:
            PROCESSES.require("process", self.process)
        given = {name: getattr(self, name) for name in SAID_OF_DIFFUSIONS}
        Diffusion(**{name: value for name, value in given.items() if value is not None})  # which refuses others
        for name, high in (("heads", MAX_HEADS), ("classes", MAX_CLASSES), ("image_size", MAX_IMAGE_SIZE)):
            if getattr(self, name) is not None:
                require_range(f"--{name}", getattr(self, name), 1, high)
        for value in self.latent_scale or ():
            require_range("--latent_scale", value, 1e-3, 1e3)
        for value in self.latent_shift or ():
            require_range("--latent_shift", value, -1e3, 1e3)

    @property
    def said(self) -> dict:
        """The user's values of the model's fields; None where none was given."""
        latents = {name: getattr(self, name) for name in SAID_OF_AUTOENCODERS}
        # One number is a number, as in diffusers' config.json.
        latents = {name: value[0] if value and len(value) == 1 else value for name, value in latents.items()}
        return {name: getattr(self, name) for name in SAID_OF_DITS} | latents


@own_settings()
def convert(request: Conversion, *, origin: str = "") -> Report:
    """Convert a PyTorch file.

    Args:
      request: what to convert, and how.
      origin: the address that the file was fetched from, for the record; "" where the user has it.

    Returns:
      The report; if the output is a folder it is also written there as JSON.

    Raises:
      InputError: anything wrong with the file or the request; nothing is written then.
    """
    began = time.monotonic()
    target = output_file(request.out)
    if target.exists() and not request.overwrite:
        raise InputError(f"{target} exists; give --overwrite to replace it.")
    path = weights_file(request.source)
    file = read_torch_file(path, weights=request.weights)
    foreign = is_diffusers(file.tensors) and not has_features_of_dit(path)
    file = dataclasses.replace(file, tensors=_arranged(file.tensors))
    require_floats(file.tensors)
    evidence = gather_evidence(path, file.options, request.said)
    if foreign:
        evidence.doubts.append(OTHER_FEATURES)
        logger.warning("%s", OTHER_FEATURES)
    about = dict(source=epath.Path(request.source).name, weights=request.weights, versions=package_versions())
    about |= dict(origin=origin) if origin else {}
    difference = config = None
    if is_autoencoder(file.tensors):
        autoencoder = _converted_autoencoder(file.tensors, evidence, request)
        params = autoencoder.params
        save_autoencoder(target, autoencoder, about)
    else:
        weights, difference = _converted_dit(file.tensors, evidence, request)
        config, params = weights.model, weights.params
        about |= dict(class_names=_class_names(request.source, config.classes)) | weights.about
        save_weights(target, dataclasses.replace(weights, about=about))
    report = Report(
        source=str(request.source),
        out=str(target),
        kind="autoencoder" if config is None else "dit",
        tensors=len(file.tensors),
        parameters=sum(tensor.size for tensor in file.tensors.values()),
        dtypes=sorted({str(tensor.dtype) for tensor in file.tensors.values()}),
        checksum=checksum(params),
        config=config and dataclasses.asdict(config),
        process=config and evidence.value("process"),
        sources=evidence.sources,
        doubts=evidence.doubts,
        macs=config and config.macs.complete,
        largest_difference=difference,
        seconds=round(time.monotonic() - began, 1),
    )
    report_path = target.with_name(REPORT_FILE if target.name == WEIGHTS_FILE else target.name + ".report.json")
    write_json(report_path, dataclasses.asdict(report))
    logger.info("%s", report.in_words())
    return report


def _arranged(tensors: dict) -> dict:
    """Return the tensors of a model in the layout that is converted, without what lies beside them."""
    return with_original_names(tensors) if is_diffusers(tensors) else only_autoencoder(tensors)


def _class_names(source, classes: int) -> list[str]:
    """Return the names of the classes, where the source is a folder that lists one for each class."""
    names = read_class_names(source)
    return names if len(names) == classes else []


def _converted_autoencoder(tensors: Mapping, evidence: Evidence, request: Conversion) -> Autoencoder:
    """Return an autoencoder with its record."""
    asked = [name for name in (*SAID_OF_DITS, "add_routers", "order", "verify") if getattr(request, name)]
    if asked:
        raise InputError(f"--{asked[0]} is for DiTs; these are the weights of an autoencoder.")
    require_supported(evidence)
    config, params = convert_autoencoder(tensors)
    config = with_record(config, evidence)
    require_finite(tensors)
    return Autoencoder(config, params)


def _converted_dit(tensors: dict, evidence: Evidence, request: Conversion) -> tuple[Weights, float | None]:
    """Return the weights of a DiT, with what its missing parts mean for sampling, and how far PyTorch is from them."""
    asked = [name for name in SAID_OF_AUTOENCODERS if getattr(request, name) is not None]
    if asked:
        raise InputError(f"--{asked[0]} is for autoencoders; these are the weights of a DiT.")
    config = detect_config(tensors, evidence)
    process = _settle_process(evidence)
    complete = _with_second_half(_with_null_row(tensors, evidence), config)
    require_complete(complete, config)
    require_finite(tensors)
    params = convert_state_dict(complete, config)
    difference = compare_with_torch(tensors, params, config, evidence) if request.verify else None
    config, params = _prepared(params, config, request)
    autoencoder, guidance, about = "", 1.5 if config.classes else 1.0, {}
    if evidence.value("space") == "latent":
        known = DEFAULT_AUTOENCODER if config.channels == AutoencoderConfig.channels else ""
        evidence.guess("autoencoder", known, "the published models'; --sampling.autoencoder decides")
        autoencoder = evidence.value("autoencoder")
    if not evidence.value("null_row"):
        guidance, about = 1.0, dict(config=dict(loss=dict(label_dropout=0.0)))  # sampling refuses guidance then
    sampling = SamplingConfig(guidance=guidance, autoencoder=autoencoder, **SAMPLING.get(process.name, {}))
    return Weights(config, process, sampling, params, about), difference


def _settle_process(evidence: Evidence) -> Process:
    """Return the process, with the schedule that a source says, or else DiT's, as a guess."""
    kind = PROCESSES[evidence.value("process")]
    if kind is not Diffusion:
        said = [evidence.sources[field] for field in SAID_OF_DIFFUSIONS if evidence.value(field) is not None]
        if said:
            raise InputError(f"{said[0]} is about the schedule of a diffusion; the process of these is {kind.name}.")
        return kind()
    evidence.guess("schedule", Diffusion.schedule, "that of DiT; --schedule decides")
    evidence.guess("train_steps", Diffusion.train_steps, "those of DiT; --train_steps decides")
    return Diffusion(*map(evidence.value, SAID_OF_DIFFUSIONS))


def _with_null_row(tensors: dict, evidence: Evidence) -> dict:
    """Give a label table without a row for "no class" one of zeros, so that all tables have it."""
    if evidence.value("null_row"):
        return tensors
    table = np.asarray(tensors[LABEL_TABLE], np.float32)
    return tensors | {LABEL_TABLE: np.concatenate([table, np.zeros_like(table[:1])])}


def _with_second_half(tensors: dict, config: DiTConfig) -> dict:
    """Give the output of a flow that has only C channels another C of zeros, which are ignored."""
    grid, channels = (config.patch, config.patch), config.channels

    def widened(array):
        half = np.asarray(array, np.float32).reshape(*grid, channels, *array.shape[1:])
        return np.concatenate([half, np.zeros_like(half)], axis=2).reshape(2 * len(array), *array.shape[1:])

    names = ("final_layer.linear.weight", "final_layer.linear.bias")
    narrow = [name for name in names if name in tensors and tensors[name].shape[:1] == (channels * config.patch**2,)]
    return tensors | {name: widened(tensors[name]) for name in narrow}


def output_file(out) -> epath.Path:
    """Return the file that an `--out` means: itself, or the weights in that folder."""
    if not str(out):
        raise InputError("--out is empty; name a .safetensors file or a folder.")
    out = locate(out)
    return out if out.suffix == ".safetensors" else out / WEIGHTS_FILE


def require_floats(tensors: Mapping[str, np.ndarray]) -> None:
    """Raise unless every tensor holds floats of 16 bits or more: others are codes of numbers that are not here.

    Raises:
      InputError: naming the tensors and their dtypes.
    """
    wrong = [f"{name} ({tensor.dtype})" for name, tensor in tensors.items() if str(tensor.dtype) not in FLOATS]
    if wrong:
        raise InputError(
            f"{len(wrong)} tensors hold no weights but codes of quantised ones, whose scales are unknown: "
            f"{some_of(wrong)}. Convert a file of {', '.join(FLOATS)}."
        )


def require_finite(tensors: Mapping[str, np.ndarray]) -> None:
    """Raise unless every number of every tensor is finite.

    Raises:
      InputError: naming the tensors and how many numbers of each are not.
    """
    wrong = []
    for name, tensor in counted_bytes(tensors, "reading"):
        with np.errstate(over="ignore"):  # what float32 can't hold is infinite here
            finite = np.isfinite(np.asarray(tensor, np.float32)).sum()
        if finite < tensor.size:
            wrong.append(f"{name} ({tensor.size - finite} of {tensor.size})")
        release_pages(tensor)
    if wrong:
        raise InputError(f"{len(wrong)} tensors hold NaN or infinite numbers: {some_of(wrong)}.")


def compare_with_torch(tensors: Mapping, params, config: DiTConfig, evidence: Evidence) -> float:
    """Run both networks on random input, gated and complete; return the largest difference relative to the scale.

    PyTorch's is built from the file alone, and from the number of heads, which its tensors do not show.

    Raises:
      InputError: the number of heads is a guess, which both sides would share.
    """
    if evidence.sources["heads"] == GUESS:
        raise InputError(f"--verify can't know the number of heads, {config.heads} is a guess; give --heads.")
    generator, rows = np.random.default_rng(0), len(tensors[LABEL_TABLE])
    x = generator.standard_normal((2, config.side, config.side, config.channels)).astype(np.float32)
    low, high = PROCESSES[evidence.value("process")]().time_range()
    t, labels = (low + (high - low) * np.array([0.017, 0.804])).astype(low.dtype), np.array([0, rows - 1])
    model, differences = Model(config, matmul_precision="highest"), []
    for mode in counted(("gated", "complete"), 2, "mode", "comparing with PyTorch"):
        theirs = run_torch(tensors, evidence.value("heads"), x, t, labels, mode=mode)
        ours, _ = jax.jit(model.apply, static_argnames="mode")(params, x, t, labels, mode=mode)
        ours = np.asarray(ours)[..., : theirs.shape[-1]]
        differences.append(float(np.abs(ours - theirs).max() / np.abs(theirs).max()))
    return max(differences)


def _prepared(params: dict, config: DiTConfig, request: Conversion) -> tuple[DiTConfig, dict]:
    """Order a static DiT and give it routers, as requested."""
    if (request.order or request.add_routers) and config.routers != "none":
        raise InputError("This model has routers already; --add_routers and --order are for a static DiT.")
    if request.order:
        params = order_by_magnitude(params)
    if request.add_routers:
        config = dataclasses.replace(config, routers=request.add_routers)
        params = unflatten(flatten(params) | fresh_routers(config, request.seed))
    return config, params


def fresh_routers(config: DiTConfig, seed: int) -> dict:
    """Return newly initialised routers by path; what else the model has is never computed."""
    routers = lambda key: {n: leaf for n, leaf in flatten(Model(config).init(key)).items() if "_router/" in n}
    return {name: np.asarray(leaf) for name, leaf in jax.jit(routers)(make_key(seed)).items()}
