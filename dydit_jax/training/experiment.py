"""From a config file to checked records: the ConfigDict ends here.

Everything a user can get wrong in a config is found in `read_experiment`, before anything is compiled or written.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping

from dydit_jax.checkpoints import CheckpointConfig
from dydit_jax.data.sources import DataConfig
from dydit_jax.diffusion.process import PROCESSES, Process, ProcessConfig, read_process, require_meaning
from dydit_jax.diffusion.samplers import SamplingConfig
from dydit_jax.diffusion.terms import LOSS_TERMS, TIMES, WEIGHTINGS, LossConfig
from dydit_jax.errors import InputError, require_known
from dydit_jax.latents import require_decoder
from dydit_jax.models.config import DiTConfig, read_model
from dydit_jax.models.dit import Model
from dydit_jax.models.lora import LoRAConfig
from dydit_jax.records import read_record, with_current_names
from dydit_jax.runtime.sharding import MeshConfig
from dydit_jax.runtime.tracking import TrackingConfig
from dydit_jax.sampling.guidance import require_trained
from dydit_jax.sampling.table import make_table, warn_of_unlearnt_times
from dydit_jax.training.optimizer import OptimizerConfig
from dydit_jax.training.update import TrainConfig, make_update_fn


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A whole config file, checked."""

    model: DiTConfig
    process: Process
    data: DataConfig
    loss: LossConfig
    optimizer: OptimizerConfig
    train: TrainConfig
    sampling: SamplingConfig
    lora: LoRAConfig
    mesh: MeshConfig
    checkpoint: CheckpointConfig
    tracking: TrackingConfig


# What may change when a run is continued: it alters neither the model nor any step already taken. Places may, as data
# and frozen weights have a fingerprint of their own.
CHANGEABLE = (
    "mesh",
    "checkpoint",
    "tracking",
    "sampling",
    "train.steps",
    "train.remat",
    "train.init_from",
    "train.max_skips",
    "data.path",
    "data.threads",
    "data.max_bad",
)


def read_experiment(config: Mapping) -> Experiment:
    """Check a whole config.

    Args:
      config: sections by name, each a mapping; `model` may name a published size.

    Returns:
      The checked records.

    Raises:
      InputError: the first thing that is wrong, with what is allowed.
    """
    sections = config_sections()
    for name in config:
        require_known("section", name, sections)
    read = {"model": read_model, "process": lambda _: read_process(config)}
    records = {
        name: read[name](config.get(name, {})) if name in read else read_record(cls, config.get(name, {}), name)
        for name, cls in sections.items()
    }
    experiment = Experiment(**{field.name: records[field.name] for field in dataclasses.fields(Experiment)})
    _require_meaning(experiment.loss, experiment.process)
    warn_of_unlearnt_times(config, make_table(experiment.sampling, experiment.process))
    require_trained(config, experiment.sampling, classes=experiment.model.classes)
    if experiment.loss.guidance_free and not experiment.model.guidance_free:
        raise InputError(
            "loss.guidance_free needs model.guidance_free=True: a network that is conditioned on the guidance scale."
        )
    if experiment.loss.guidance_free and not 0 < experiment.loss.label_dropout < 1:
        raise InputError(
            "loss.guidance_free needs a loss.label_dropout between 0 and 1, about 0.1: its target is made with the "
            f"prediction without a class. It is {experiment.loss.label_dropout}."
        )
    if "routers" in experiment.train.trainable and experiment.model.routers == "none":
        raise InputError("train.trainable has 'routers', but model.routers is 'none'.")
    parts, size = experiment.train.accumulate, experiment.data.batch_size
    if size % parts:
        raise InputError(f"data.batch_size must be a multiple of {parts}, train.accumulate, not {size}.")
    if experiment.tracking.metrics_every_steps:
        make_table(metrics_sampling(experiment), experiment.process)
    if experiment.tracking.metrics_every_steps or experiment.tracking.samples_every_steps:
        require_decoder(experiment.sampling.autoencoder, experiment.model.channels)
    wrong = [label for label in experiment.tracking.sample_labels if not 0 <= label <= experiment.model.classes]
    if wrong and experiment.tracking.samples_every_steps:
        raise InputError(f"tracking.sample_labels must be from 0 to {experiment.model.classes}, not {wrong}.")
    return experiment


def config_sections() -> dict[str, type]:
    """Return the records of all sections by name; those of processes have the process's name."""
    sections = {field.name: field.type for field in dataclasses.fields(Experiment)}
    return sections | {"process": ProcessConfig} | PROCESSES


def _require_meaning(loss: LossConfig, process: Process) -> None:
    """Raise where the loss asks for something that the process does not have."""
    for name in loss.terms:
        require_meaning(process, "loss.terms", name, LOSS_TERMS)
    require_meaning(process, "loss.weighting", loss.weighting, WEIGHTINGS)
    require_meaning(process, "loss.times", loss.times, TIMES)


def metrics_sampling(experiment: Experiment) -> SamplingConfig:
    """Return how the images are drawn that `tracking.metrics_every_steps` measures.

    Raises:
      InputError: an unknown sampler.
    """
    tracking = experiment.tracking
    given = dict(sampler=tracking.metrics_sampler, steps=tracking.metrics_steps)
    return dataclasses.replace(experiment.sampling, **{name: value for name, value in given.items() if value})


def build_update(experiment: Experiment, model: Model, passes: tuple[str, ...]) -> Callable:
    """Make the function (state, batch) -> (state, metrics) of one training step; see `make_update_fn`."""
    names = ("loss", "process", "optimizer", "train")
    return make_update_fn(model, passes, **{name: getattr(experiment, name) for name in names})


def differences(old: Mapping, new: Mapping) -> list[str]:
    """List the keys in which two configs differ, other than those that may change when a run goes on.

    A key that one of them lacks has its default there; keys of earlier versions have the names of today; tuples count
    as the lists that JSON makes of them.
    """
    found = []
    for section in config_sections():
        before, after = (_filled_in(section, config.get(section) or {}) for config in (old, new))
        for key in sorted(set(before) | set(after)):
            if before.get(key) != after.get(key) and not {section, f"{section}.{key}"} & set(CHANGEABLE):
                found.append(f"{section}.{key}: {before.get(key)!r} there, {after.get(key)!r} here")
    return found


def _filled_in(section: str, values: Mapping) -> dict:
    """Return a section with the names of today and with its defaults, as JSON has it."""
    cls = config_sections()[section]
    fields = [field for field in dataclasses.fields(cls) if field.default is not dataclasses.MISSING]
    defaults = {field.name: field.default for field in fields}
    given = {key: value for key, value in with_current_names(cls, values).items() if value is not None}
    return json.loads(json.dumps(defaults | given))
