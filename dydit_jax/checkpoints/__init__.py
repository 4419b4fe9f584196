"""Weights that describe themselves, and runs that continue."""

from dydit_jax.checkpoints.arrays import format_of, read_arrays, write_arrays
from dydit_jax.checkpoints.runs import (
    CONFIG_FILE,
    CheckpointConfig,
    Run,
    has_checkpoint,
    is_run,
    load_run_weights,
    read_run_config,
    split_step,
)
from dydit_jax.checkpoints.weights import (
    FORMAT,
    WEIGHTS_FILE,
    Weights,
    checksum,
    load_weights,
    package_versions,
    save_weights,
)

__all__ = [
    "CONFIG_FILE",
    "FORMAT",
    "WEIGHTS_FILE",
    "CheckpointConfig",
    "Run",
    "Weights",
    "checksum",
    "format_of",
    "has_checkpoint",
    "is_run",
    "load_run_weights",
    "load_weights",
    "package_versions",
    "read_arrays",
    "read_run_config",
    "save_weights",
    "split_step",
    "write_arrays",
]
