"""From the name of a precision to a model that computes in it."""

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from dydit_jax.errors import require_known
from dydit_jax.models.config import DiTConfig
from dydit_jax.models.dit import Model
from dydit_jax.runtime.sharding import make_constrain_fn

PRECISIONS = ("auto", "bfloat16", "float32", "highest")


def resolve_precision(name: str) -> tuple[jnp.dtype, str]:
    """Return the dtype of products and JAX's name of their precision."""
    require_known("precision", name, PRECISIONS)
    if name == "auto":
        name = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    dtype = jnp.bfloat16 if name == "bfloat16" else jnp.float32
    return jnp.dtype(dtype), "highest" if name == "highest" else "default"


def build_model(config: DiTConfig, *, precision: str, mesh: Mesh, remat: str = "none") -> Model:
    """Make the model for a mesh.

    Args:
      config: what it is.
      precision: one of `PRECISIONS`.
      mesh: whose devices split the batch.
      remat: what the backward pass recomputes.
    """
    dtype, matmul_precision = resolve_precision(precision)
    return Model(config, dtype, matmul_precision, remat, make_constrain_fn(mesh))
