"""Dynamic diffusion transformers (DyDiT) in JAX: the public names, for use from Python.

from dydit_jax import Model, draw_grid, generate, load_checkpoint, to_uint8
"""

from dydit_jax.drawing.pictures import draw_grid, to_uint8
from dydit_jax.loading import load_checkpoint
from dydit_jax.models.dit import DiTConfig, Model, published_config
from dydit_jax.sampling.generate import generate, plan_sampling

__all__ = [
    "DiTConfig",
    "Model",
    "draw_grid",
    "generate",
    "load_checkpoint",
    "plan_sampling",
    "published_config",
    "to_uint8",
]
