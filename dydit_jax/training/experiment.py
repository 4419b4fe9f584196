"""From a config file to checked records and objects: the ConfigDict ends here.

The only module that knows every registry. Everything a user can get wrong in a config is found in `read_experiment`,
before anything is compiled or written.
"""

import dataclasses
import json
from collections.abc import Mapping

import jax
import optax

from dydit_jax.checkpoints import CheckpointConfig
from dydit_jax.data.sources import DataConfig
from dydit_jax.diffusion.losses import LossConfig
from dydit_jax.diffusion.samplers import SamplingConfig
from dydit_jax.diffusion.schedules import DiffusionConfig, make_schedule, respace
from dydit_jax.errors import InputError, require_known
from dydit_jax.models.config import DiTConfig, read_model
from dydit_jax.models.precision import PRECISIONS
from dydit_jax.records import read_record, require_range, with_current_names
from dydit_jax.runtime.seeds import require_seed
from dydit_jax.runtime.sharding import MeshConfig
from dydit_jax.runtime.tracking import TrackingConfig
from dydit_jax.sampling.guidance import require_no_class
from dydit_jax.trees import path_name

LEARNING_RATES = ("constant", "cosine")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and what happens to gradients before it.

    Attributes:
      learning_rate: peak of the learning rate, for everything but the routers.
      router_multiplier: the routers' learning rate in units of `learning_rate`. Their biases start far from the
        threshold; a short run needs about 10, the published long runs 1.
      decay: "constant" or "cosine" to 5 % of the peak.
      warmup_steps: steps in which the learning rate grows from 0 to the peak.
      decay_steps: step at which the cosine ends.
      beta1, beta2, weight_decay: AdamW's parameter of this name.
      clip_norm: gradients of a larger global norm are scaled down to it; None does not clip.
      skip_norm: a batch whose norm is not below it is skipped and counted; None skips non-finite ones alone.
    """

    learning_rate: float
    router_multiplier: float = 1.0
    decay: str = "constant"
    warmup_steps: int = 0
    decay_steps: int | None = None
    beta1: float = 0.9
    beta2: float = 0.999
    weight_decay: float = 0.0
    clip_norm: float | None = None
    skip_norm: float | None = None

    def __post_init__(self):
        require_range("optimizer.learning_rate", self.learning_rate, low=0.0)
        require_range("optimizer.router_multiplier", self.router_multiplier, low=0.0)
        require_range("optimizer.warmup_steps", self.warmup_steps, low=0)
        require_range("optimizer.beta1", self.beta1, 0.0, 1.0)
        require_range("optimizer.beta2", self.beta2, 0.0, 1.0)
        require_range("optimizer.weight_decay", self.weight_decay, low=0.0)
        require_known("optimizer.decay", self.decay, LEARNING_RATES)
        if self.decay == "cosine" and (self.decay_steps is None or self.decay_steps <= self.warmup_steps):
            raise InputError("optimizer.decay 'cosine' needs optimizer.decay_steps above optimizer.warmup_steps.")
        for name in ("clip_norm", "skip_norm"):
            if getattr(self, name) is not None:
                require_range(f"optimizer.{name}", getattr(self, name), low=1e-12)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The length of a run and its surroundings.

    Attributes:
      steps: updates in all.
      seed: seed of initial values and of every random draw but the data's order, 0 to 2^64 - 1.
      ema_decay: decay of the exponential moving average of the parameters, which is what gets sampled.
      init_from: weights to start from (anything that `sample.py --checkpoint` takes), empty for random ones. Routers
        that these lack are initialised afresh: the start of fine-tuning a DiT into a DyDiT.
      precision: "bfloat16", "float32", "highest" (float32 products in full, for comparisons) or "auto": bfloat16
        on accelerators, float32 on CPUs.
      remat: what the backward pass recomputes: "none", "block" or "dots".
      accumulate: into how many parts a batch is split, computed one after the other to save memory.
      max_skips: the run stops when so many batches were skipped one after the other.
    """

    steps: int
    seed: int = 0
    ema_decay: float = 0.9999
    init_from: str = ""
    precision: str = "auto"
    remat: str = "none"
    accumulate: int = 1
    max_skips: int = 100

    def __post_init__(self):
        require_range("train.steps", self.steps, low=1)
        require_range("train.accumulate", self.accumulate, low=1)
        require_range("train.max_skips", self.max_skips, low=1)
        require_seed("train.seed", self.seed)
        require_range("train.ema_decay", self.ema_decay, 0.0, 1.0)
        require_known("precision", self.precision, PRECISIONS)


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A whole config file, checked."""

    model: DiTConfig
    diffusion: DiffusionConfig
    data: DataConfig
    loss: LossConfig
    optimizer: OptimizerConfig
    train: TrainConfig
    sampling: SamplingConfig
    mesh: MeshConfig
    checkpoint: CheckpointConfig
    tracking: TrackingConfig


# What may change when a run is continued: it alters neither the model nor any step already taken.
CHANGEABLE = (
    "mesh",
    "checkpoint",
    "tracking",
    "sampling",
    "train.steps",
    "train.remat",
    "train.max_skips",
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
    sections = {field.name: field.type for field in dataclasses.fields(Experiment)}
    for name in config:
        require_known("section", name, sections)
    records = {
        name: read_model(config.get(name, {})) if name == "model" else read_record(cls, config.get(name, {}), name)
        for name, cls in sections.items()
    }
    experiment = Experiment(**records)
    respace(make_schedule(experiment.diffusion), experiment.sampling.steps)
    require_no_class(config, experiment.sampling)
    parts, size = experiment.train.accumulate, experiment.data.batch_size
    if size % parts:
        raise InputError(f"data.batch_size must be a multiple of {parts}, train.accumulate, not {size}.")
    wrong = [label for label in experiment.tracking.sample_labels if not 0 <= label <= experiment.model.classes]
    if wrong and experiment.tracking.samples_every_steps:
        raise InputError(f"tracking.sample_labels must be from 0 to {experiment.model.classes}, not {wrong}.")
    return experiment


def differences(old: Mapping, new: Mapping) -> list[str]:
    """List the keys in which two configs differ, other than those that may change when a run goes on.

    A key that one of them lacks has its default there; keys of earlier versions have the names of today; tuples count
    as the lists that JSON makes of them.
    """
    found = []
    for section in (field.name for field in dataclasses.fields(Experiment)):
        before, after = (_filled_in(section, config.get(section) or {}) for config in (old, new))
        for key in sorted(set(before) | set(after)):
            if before.get(key) != after.get(key) and not {section, f"{section}.{key}"} & set(CHANGEABLE):
                found.append(f"{section}.{key}: {before.get(key)!r} there, {after.get(key)!r} here")
    return found


def _filled_in(section: str, values: Mapping) -> dict:
    """Return a section with the names of today and with its defaults, as JSON has it."""
    cls = {field.name: field.type for field in dataclasses.fields(Experiment)}[section]
    fields = [field for field in dataclasses.fields(cls) if field.default is not dataclasses.MISSING]
    defaults = {field.name: field.default for field in fields}
    given = {key: value for key, value in with_current_names(cls, values).items() if value is not None}
    return json.loads(json.dumps(defaults | given))


def build_learning_rate(config: OptimizerConfig):
    """Make the function from step to the learning rate of everything but the routers."""
    if config.decay == "cosine":
        return optax.warmup_cosine_decay_schedule(
            0.0, config.learning_rate, config.warmup_steps, config.decay_steps, 0.05 * config.learning_rate
        )
    if config.warmup_steps:
        return optax.linear_schedule(0.0, config.learning_rate, config.warmup_steps)
    return optax.constant_schedule(config.learning_rate)


def build_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """Make clipping, AdamW and the routers' own learning rate. Skipping is the trainer's: it keeps the whole state."""
    return optax.chain(
        optax.identity() if config.clip_norm is None else optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(build_learning_rate(config), b1=config.beta1, b2=config.beta2, weight_decay=config.weight_decay),
        optax.masked(optax.scale(config.router_multiplier), _is_router),
    )


def _is_router(params):
    """Mark the leaves of the routers."""
    return jax.tree_util.tree_map_with_path(lambda path, _: "_router/" in path_name(path), params)
