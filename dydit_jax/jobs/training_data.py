"""What a training does before it opens its data: count the classes, and make latents of pictures once.

A model in latents whose `data.name` is images or tfds is given the latents of these pictures, which lie beside the work
directory, in <workdir>.latents; other trainings can use them too.
"""

import dataclasses
import types
from collections.abc import Mapping

from dydit_jax.checkpoints import checksum
from dydit_jax.data.sources import DataConfig, DataSource, open_source
from dydit_jax.errors import InputError, some_of
from dydit_jax.jobs.prepare_latents import MOST_SIDE, LatentsRequest, prepare_latents
from dydit_jax.latents import require_channels
from dydit_jax.loading import find_autoencoder_config, load_autoencoder
from dydit_jax.models.autoencoder import AutoencoderConfig
from dydit_jax.records import read_record
from dydit_jax.runtime.files import is_local
from dydit_jax.runtime.processes import on_all_processes
from dydit_jax.training.experiment import Experiment

AS_MANY_AS_DATA = -1
PICTURES = ("images", "tfds")
LATENTS_SUFFIX = ".latents"


def with_counted_classes(config: Mapping) -> dict:
    """Return a config whose `model.classes` is the number of classes of its data, where it says -1.

    Args:
      config: sections by name.

    Raises:
      InputError: data that can't be opened, or a source that does not know its classes.
    """
    section = config.get("model") or {}
    if section.get("classes") != AS_MANY_AS_DATA:
        return dict(config)
    data = read_record(DataConfig, config.get("data") or {}, "data")
    channels = 3 if data.name in PICTURES and section.get("channels") != 1 else section.get("channels")
    source = open_source(data, types.SimpleNamespace(side=section.get("side"), channels=channels, classes=None))
    classes = getattr(source, "classes", None)
    if not classes:
        raise InputError(f"model.classes=-1 counts the data's classes, but data.name={data.name} has none to count.")
    return dict(config, model=dict(section, classes=classes))


def with_latents(experiment: Experiment, workdir) -> Experiment:
    """Return an experiment that reads latents in the place of pictures, where its model is one of latents.

    With several processes all of them call this. Latents that are there already are used, half of them completed.

    Args:
      experiment: that was asked for.
      workdir: of the training.

    Raises:
      InputError: an autoencoder whose latents the model can't have, or a work directory that they can't lie beside,
        before a picture is encoded; see `prepare_latents`.
    """
    data, autoencoder = experiment.data, experiment.sampling.autoencoder
    if data.name not in PICTURES or not autoencoder:
        return experiment
    config = on_all_processes(lambda: _fitting_autoencoder(experiment))
    side = experiment.model.side * config.factor
    _require_request(data.path, str(workdir), side)
    request = LatentsRequest(
        out=f"{str(workdir).rstrip('/')}{LATENTS_SUFFIX}",
        path=data.path,
        data=data.name,
        autoencoder=autoencoder,
        side=side,
        threads=max(data.threads, 1),
        max_bad=data.max_bad,
        image_key=data.image_key,
        label_key=data.label_key,
    )
    remedy = "give the pictures back as they were, or name another --workdir, for which they are made again"
    latents = str(prepare_latents(request, remedy=remedy))
    return dataclasses.replace(experiment, data=dataclasses.replace(data, name="latents", path=latents))


def _require_request(path: str, workdir: str, side: int) -> None:
    """Raise where no latents can be made of a training's pictures.

    Raises:
      InputError: in the words of a training, which has other flags than `tools/prepare_latents.py`.
    """
    if not path:
        raise InputError("data.path is empty; name the pictures.")
    if not is_local(workdir):
        raise InputError(
            f"Latents of pictures are made beside the work directory, and {workdir} is not a folder on a disk. Prepare "
            "the latents first, with tools/prepare_latents.py, and train on data.name=latents."
        )
    if side % 8 or side > MOST_SIDE:
        raise InputError(
            f"This model needs latents of pictures of {side} pixels; sides are multiples of 8, at most {MOST_SIDE}. "
            "Set model.side."
        )


def _fitting_autoencoder(experiment: Experiment) -> AutoencoderConfig:
    """Return the record of an experiment's autoencoder, which is fetched if need be."""
    name = experiment.sampling.autoencoder
    config = load_autoencoder(name).config
    require_channels(config, experiment.model.channels, name)
    return config


def open_training_data(experiment: Experiment) -> DataSource:
    """Open the training data.

    Raises:
      InputError: data that do not fit the model, or latents of another autoencoder than samples are decoded with, or
        of another scale and shift.
    """
    source = open_source(experiment.data, experiment.model)
    made_by, wanted = getattr(source, "autoencoder", ""), experiment.sampling.autoencoder
    config = find_autoencoder_config(wanted)
    if made_by and wanted and made_by != wanted:
        known = getattr(source, "autoencoder_checksum", "") if config is not None else ""
        if not known or checksum(load_autoencoder(wanted).params) != known:
            raise InputError(
                f"The latents in {experiment.data.path} are of {made_by}, but sampling.autoencoder is {wanted}. Name "
                "the autoencoder that they were made with, or prepare them again."
            )
    if config is not None:
        require_channels(config, experiment.model.channels, wanted)
        record = getattr(source, "record", config)
        if (record.scale, record.shift) != (config.scale, config.shift):
            raise InputError(
                f"The latents in {experiment.data.path} are to be used with scale {some_of(record.scale)} and shift "
                f"{some_of(record.shift)}; sampling.autoencoder, {wanted}, has {some_of(config.scale)} and "
                f"{some_of(config.shift)}. Name the autoencoder that they were made with, or prepare them again."
            )
    return source


def class_names_of(source: DataSource) -> tuple[str, ...]:
    """Return the names of a source's classes by label; () where it has none."""
    return tuple(getattr(source, "class_names", ()))
