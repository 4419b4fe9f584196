"""A training as its compiler needs it: the experiment, and its state as shapes."""

import dataclasses
import functools

import jax

from dydit_jax.models.config import DiTConfig
from dydit_jax.models.dit import Model
from dydit_jax.training.experiment import Experiment, read_experiment
from dydit_jax.training.optimizer import build_optimizer
from dydit_jax.training.update import TrainState, init_state


def describe_training(
    config: DiTConfig, batch_size: int, *, optimizer: dict, accumulate: int = 1
) -> tuple[Experiment, TrainState]:
    """Return an experiment of one step and its state as shapes; nothing is computed.

    Args:
      config: of the model.
      batch_size: images of a step, on all devices.
      optimizer: section of the config.
      accumulate: parts of a batch.
    """
    sections = dict(
        model=dataclasses.asdict(config),
        data=dict(name="synthetic", batch_size=batch_size),
        optimizer=optimizer,
        train=dict(steps=1, accumulate=accumulate),
    )
    experiment = read_experiment(sections)
    make_state = functools.partial(init_state, optimizer=build_optimizer(experiment.optimizer))
    return experiment, jax.eval_shape(make_state, Model(config).abstract_params())
