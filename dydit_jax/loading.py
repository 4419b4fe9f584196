"""From whatever a user calls a checkpoint to weights: a file, a folder, a run's work directory or a published name."""

import contextlib
import dataclasses
import functools
import logging
import pathlib
from collections.abc import Callable, Iterator

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from dydit_jax.checkpoints import (
    ADAPTER_FORMAT,
    CONFIG_FILE,
    WEIGHTS_FILE,
    Weights,
    apply_adapter,
    format_of,
    is_run,
    load_adapter,
    load_run_params,
    load_weights,
    read_autoencoder,
    read_autoencoder_config,
    read_run_config,
    save_weights,
    split_step,
)
from dydit_jax.convert.conversion import Conversion, convert, output_file
from dydit_jax.convert.hub import is_address, known_file, local_file
from dydit_jax.convert.published import SHIPPED, converted_file, fetch, known_names, naming_fetched
from dydit_jax.diffusion.process import read_process
from dydit_jax.diffusion.samplers import SamplingConfig
from dydit_jax.errors import DamageError, InputError, name_file, require_known
from dydit_jax.latents import decode_latents, require_channels
from dydit_jax.models.autoencoder import Autoencoder, AutoencoderConfig
from dydit_jax.models.config import read_model
from dydit_jax.models.dit import Model
from dydit_jax.models.lora import LoRAConfig
from dydit_jax.models.trainable import EVERYTHING, require_parts, split_params
from dydit_jax.records import read_record
from dydit_jax.runtime.cache import cache_folder
from dydit_jax.runtime.files import BUCKET, hold_lock, is_local, locate
from dydit_jax.runtime.settings import own_settings
from dydit_jax.runtime.sharding import replicated

logger = logging.getLogger(__name__)

WEIGHTS = ("ema", "params")
LARGE_SHARE = 0.01  # of the start in an EMA


@own_settings()
def load_checkpoint(checkpoint, from_step: int | None = None, weights: str = "ema", base: str = "") -> Weights:
    """Load weights for sampling, or to start a training from.

    Args:
      checkpoint: a `.safetensors` file of ours, a folder with one, a training's work directory (its newest step, EMA
        weights; nothing is changed in it), one of its checkpoints (`<workdir>/checkpoints/<step>`), or the name of a
        known model: "digits", which comes with the package, or a published one, which is fetched and converted once.
        An address is fetched and converted once too: hf://owner/name[/<file or folder>][@<revision>], https://...
      from_step: another step than the newest, of a work directory.
      weights: "ema", which is warned of where it is still near its start, or "params", the raw parameters of a work
        directory.
      base: of an adapter: the weights that it was trained on, by any of these names; "" takes those that it names,
        but for an address that was not fetched before, and a bucket that the adapter itself does not lie in.

    Returns:
      Complete weights, an adapter's merged with those of its base.

    Raises:
      InputError: none of these, a damaged one, or an adapter for another base.
    """
    require_known("weights", weights, WEIGHTS)
    found, record = _load(checkpoint, from_step, weights)
    if record:
        complete = load_checkpoint(base) if base else _load_named(record["checkpoint"], checkpoint)
        return apply_adapter(found, complete, record)
    if base:
        logger.warning("The base %s is not needed: %s holds complete weights.", base, checkpoint)
    return found


def _load(checkpoint, from_step: int | None = None, weights: str = "ema") -> tuple[Weights, dict | None]:
    """Return what a checkpoint itself holds, and the record of its base where that is an adapter."""
    if from_step is None and not is_address(checkpoint):
        checkpoint, from_step = split_step(checkpoint)
    path = _resolved(checkpoint, "model")
    if not is_run(path):
        if from_step is not None:
            raise InputError(f"--from_step={from_step} needs a training's work directory; {path} is none.")
        if weights != "ema":
            raise InputError(f"--weights={weights} needs a training's work directory; {path} holds one set of weights.")
        file = output_file(path) if path.is_dir() else path
        with _naming_cached(file):
            found, record = load_adapter(file) if format_of(file) == ADAPTER_FORMAT else (load_weights(file), None)
    else:
        found, record = _load_run(path, from_step, weights)
    if weights == "ema":
        warn_of_start(found.about)
    return found, record


@contextlib.contextmanager
def _naming_cached(file) -> Iterator[None]:
    """Say in an error about damage that the file can be made again, where it is one of the cache."""
    try:
        yield
    except DamageError as error:
        if cache_folder() not in pathlib.Path(file).parents:
            raise
        raise DamageError(f"{error} Remove it: it lies in the cache, and is fetched or made again then.") from error


def _load_named(base: str, adapter) -> Weights:
    """Return the weights that an adapter names as its base; nothing is fetched that only a file asks for.

    Raises:
      InputError: an address that was not fetched before or another bucket, no complete weights, or what
        `load_checkpoint` refuses.
    """
    is_elsewhere = known_file(base) is None if is_address(base) else _bucket_of(base) not in ("", _bucket_of(adapter))
    if is_elsewhere:
        raise InputError(
            f"The base of {adapter} is at an address, and is not fetched unasked; give --base={base}, here or to "
            "convert_torch_weights.py --merge."
        )
    found, record = _load(base)
    if record:
        raise InputError(f"The base that {adapter} names, {base}, is an adapter too; give complete weights as --base.")
    return found


def _bucket_of(path) -> str:
    """Return the bucket that a file or folder lies in, "" where it is on this machine."""
    return "" if is_local(path) else str(path).removeprefix(BUCKET).partition("/")[0]


def _load_run(workdir, from_step: int | None, kind: str) -> tuple[Weights, dict | None]:
    """Return the weights that a run has trained, and the record of their base where it trains only some of them."""
    config = read_run_config(workdir)
    read = lambda cls, name: read_record(cls, config.get(name) or {}, name)
    with name_file(workdir / CONFIG_FILE):
        trainable = config.get("train", {}).get("trainable", EVERYTHING)
        require_parts("train.trainable", trainable)
        model, lora = read_model(config["model"]), read(LoRAConfig, "lora") if "lora" in trainable else None
        settings = read_process(config), read(SamplingConfig, "sampling")
    trained, _ = split_params(Model(model, lora=lora).abstract_params(), trainable)
    params, about = load_run_params(workdir, trained, from_step, kind)
    if trainable != EVERYTHING and "base" not in about:
        raise InputError(f"{workdir} trains {', '.join(trainable)} alone, but its checkpoint names no base.")
    return Weights(model, *settings, params, dict(about, config=config), lora), about.get("base")


def merge(checkpoint, out, *, base: str = "", overwrite: bool = False) -> epath.Path:
    """Write complete weights to one `.safetensors` file: those of an adapter merged with its base.

    Args:
      checkpoint, base: as for `load_checkpoint`.
      out: file, or folder for one.
      overwrite: whether an output that exists is replaced.

    Raises:
      InputError: what `load_checkpoint` refuses, or an output that exists.
    """
    target = output_file(out)
    if target.exists() and not overwrite:
        raise InputError(f"{target} exists; give --overwrite to replace it.")
    weights = load_checkpoint(checkpoint, base=base)
    about = {name: value for name, value in weights.about.items() if name != "base"}  # no longer apart from it
    save_weights(target, dataclasses.replace(weights, about=dict(about, merged=weights.about.get("base"))))
    logger.info("Wrote %s.", target)
    return target


def warn_of_start(about: dict) -> None:
    """Warn where an EMA still holds much of what its training started from: random values, or weights of before.

    Args:
      about: of weights; "config" and "step" where they come from a training.
    """
    train, step = about.get("config", {}).get("train") or {}, about.get("step")
    decay = train.get("ema_decay")
    if decay is None or step is None or decay**step <= LARGE_SHARE:
        return
    of_start = "its images will be noise, or poor"
    if train.get("init_from"):
        of_start = "its images are partly those of the weights before"
    logger.warning(
        "After %d steps at a decay of %g the EMA still is %.1f %% of what training started from: %s. Train longer or "
        "with a smaller train.ema_decay; of a work directory, --weights=params takes the raw parameters.",
        *(step, decay, 100 * decay**step, of_start),
    )


def find_weights(checkpoint) -> epath.Path:
    """Return the file, or the run without a finished one, that any name of a checkpoint or an autoencoder means.

    Raises:
      InputError: none of these.
    """
    if not is_address(checkpoint) and split_step(checkpoint)[1] is not None:
        return locate(checkpoint)
    path = _resolved(checkpoint, "autoencoder" if str(checkpoint) in known_names("autoencoder") else "model")
    file = output_file(path) if path.is_dir() else path
    return file if file.is_file() else path


def load_autoencoder(autoencoder) -> Autoencoder:
    """Load an autoencoder from a `.safetensors` file of ours, a folder with one, or by name.

    Raises:
      InputError: neither.
    """
    path = _resolved(autoencoder, "autoencoder")
    with _naming_cached(path):
        return read_autoencoder(output_file(path) if path.is_dir() else path)


def find_autoencoder_config(autoencoder: str) -> AutoencoderConfig | None:
    """Return the record of an autoencoder without its arrays, fetching nothing; None where there is no such file.

    Args:
      autoencoder: as for `load_autoencoder`. Those published by name are all Stable Diffusion's.

    Raises:
      InputError: a file of something else.
    """
    found = known_file(autoencoder) if is_address(autoencoder) else autoencoder
    path = locate(found or "")
    if found and path.exists():
        return read_autoencoder_config(output_file(path) if path.is_dir() else path)
    return AutoencoderConfig() if autoencoder in known_names("autoencoder") else None


def load_decoder(autoencoder: str, channels: int, mesh: Mesh) -> Callable:
    """Return the function from samples [B,side,side,C] to images [B,side,side,1 or 3], about [-1, 1].

    Args:
      autoencoder: as for `load_autoencoder`; "" for models in pixels, whose samples are images.
      channels: C of the model.
      mesh: whose devices share the work.

    Raises:
      InputError: no autoencoder, or one of other channels.
    """
    if not autoencoder:
        return np.asarray
    loaded = load_autoencoder(autoencoder)
    require_channels(loaded.config, channels, autoencoder)
    return functools.partial(decode_latents, jax.device_put(loaded, replicated(mesh)), mesh=mesh)


def _resolved(checkpoint, holds: str) -> epath.Path:
    """Return the path that the name or address of a "model" or "autoencoder" means."""
    if is_address(checkpoint):
        make = lambda source, out, exact: convert(Conversion(str(source), str(out)), origin=exact)
        return epath.Path(local_file(str(checkpoint), make))
    path = locate(checkpoint)
    if path.exists():
        if path.is_dir() and not is_run(path) and not (path / WEIGHTS_FILE).is_file():
            raise InputError(
                f"{path} is neither a run's work directory nor a folder with {WEIGHTS_FILE}. A folder of diffusers' is "
                "converted first: convert_torch_weights.py."
            )
        return path
    name, known = str(checkpoint), known_names(holds)
    if name not in known:
        raise InputError(f"There is no file {path}, and no published {holds} of that name; known: {', '.join(known)}.")
    if name in SHIPPED:
        return epath.Path(SHIPPED[name])
    converted = converted_file(name)
    if not converted.exists():
        # Processes of one machine that start together need it once.
        with hold_lock(converted.with_name(converted.name + ".lock"), to=f"to convert {name}"):
            if not converted.exists():
                source = fetch(name)
                with naming_fetched(source):
                    convert(Conversion(str(source), str(converted)))
    return epath.Path(converted)
