"""Weights that describe themselves, and runs that continue."""

from dydit_jax.checkpoints.adapters import (
    ADAPTER_FORMAT,
    apply_adapter,
    describe_base,
    load_adapter,
    published_file,
    save_adapter,
)
from dydit_jax.checkpoints.arrays import format_of, read_arrays, write_arrays
from dydit_jax.checkpoints.autoencoders import (
    is_autoencoder_format,
    read_autoencoder,
    read_autoencoder_config,
    save_autoencoder,
)
from dydit_jax.checkpoints.places import without_places
from dydit_jax.checkpoints.runs import (
    CONFIG_FILE,
    CheckpointConfig,
    Run,
    has_checkpoint,
    is_run,
    load_run_params,
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
    "ADAPTER_FORMAT",
    "CONFIG_FILE",
    "FORMAT",
    "WEIGHTS_FILE",
    "CheckpointConfig",
    "Run",
    "Weights",
    "apply_adapter",
    "checksum",
    "describe_base",
    "format_of",
    "has_checkpoint",
    "is_autoencoder_format",
    "is_run",
    "load_adapter",
    "load_run_params",
    "load_weights",
    "package_versions",
    "published_file",
    "read_arrays",
    "read_autoencoder",
    "read_autoencoder_config",
    "read_run_config",
    "save_adapter",
    "save_autoencoder",
    "save_weights",
    "split_step",
    "without_places",
    "write_arrays",
]
