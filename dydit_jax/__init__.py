"""Dynamic diffusion transformers (DyDiT) in JAX: the public names, for use from Python.

from dydit_jax import Model, draw_grid, generate, load_checkpoint, to_uint8
"""

from dydit_jax.drawing.pictures import draw_grid, to_uint8
from dydit_jax.loading import load_checkpoint
from dydit_jax.models.config import DiTConfig, published_config
from dydit_jax.models.dit import Model
from dydit_jax.sampling.generate import generate

__all__ = [
    "DiTConfig",
    "Model",
    "draw_grid",
    "generate",
    "load_checkpoint",
    "published_config",
    "to_uint8",
]
