"""From the names of a precision and of what is kept for the gradient to a model that computes so."""

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from dydit_jax.errors import require_known
from dydit_jax.models.config import DiTConfig
from dydit_jax.models.dit import REMATS, Model
from dydit_jax.models.lora import LoRAConfig
from dydit_jax.runtime.sharding import make_constrain_fn

REMAT_SETTINGS = ("auto", *REMATS)
PRECISIONS = ("auto", "bfloat16", "float32", "highest")


def resolve_precision(name: str) -> tuple[jnp.dtype, str]:
    """Return the dtype of products and JAX's name of their precision."""
    require_known("precision", name, PRECISIONS)
    if name == "auto":
        name = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    dtype = jnp.bfloat16 if name == "bfloat16" else jnp.float32
    return jnp.dtype(dtype), "highest" if name == "highest" else "default"


def resolve_remat(name: str) -> str:
    """Return what the backward pass recomputes: "auto" is "dots".

    All that is not a product is computed again in less time than it is written to memory and read back, on CPUs by the
    clock, on TPUs and GPUs by their compilers: docs/speed/README.md.
    """
    require_known("remat", name, REMAT_SETTINGS)
    return "dots" if name == "auto" else name


def build_model(
    config: DiTConfig, *, precision: str, mesh: Mesh, remat: str = "none", lora: LoRAConfig | None = None
) -> Model:
    """Make the model for a mesh.

    Args:
      config: what it is.
      precision: one of `PRECISIONS`.
      mesh: whose devices split the batch.
      remat: what the backward pass recomputes, one of `REMAT_SETTINGS`.
      lora: low-rank updates among the parameters, or None.
    """
    dtype, matmul_precision = resolve_precision(precision)
    return Model(config, dtype, matmul_precision, resolve_remat(remat), make_constrain_fn(mesh), lora=lora)
