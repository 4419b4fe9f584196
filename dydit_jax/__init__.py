"""Dynamic diffusion transformers (DyDiT) in JAX: the public names, for use from Python.

    from dydit_jax import Pipeline

Each is imported when it is asked for: importing the package alone brings neither JAX nor anything else that is heavy.
"""

import importlib
import importlib.metadata
import typing

if typing.TYPE_CHECKING:
    from dydit_jax.data.sources import register_source
    from dydit_jax.diffusion.process import register_process
    from dydit_jax.diffusion.solvers import register_solver
    from dydit_jax.diffusion.terms import register_loss_term
    from dydit_jax.drawing.pictures import draw_grid, to_uint8
    from dydit_jax.fast.execution.registry import register_execution
    from dydit_jax.jobs.analyze import Analysis, analyze
    from dydit_jax.jobs.evaluate import Evaluation, evaluate
    from dydit_jax.jobs.train import train_and_evaluate as train
    from dydit_jax.loading import load_checkpoint
    from dydit_jax.models.config import DiTConfig, published_config
    from dydit_jax.models.dit import Model
    from dydit_jax.models.routing import register_time_router, register_token_router
    from dydit_jax.pipeline import Pipeline
    from dydit_jax.sampling.generate import generate

__all__ = [
    "Analysis",
    "DiTConfig",
    "Evaluation",
    "Model",
    "Pipeline",
    "analyze",
    "draw_grid",
    "evaluate",
    "generate",
    "load_checkpoint",
    "published_config",
    "register_execution",
    "register_loss_term",
    "register_process",
    "register_solver",
    "register_source",
    "register_time_router",
    "register_token_router",
    "to_uint8",
    "train",
]
# Where they are; in another place by another name.
_MODULES = {
    "data.sources": ("register_source",),
    "diffusion.process": ("register_process",),
    "diffusion.solvers": ("register_solver",),
    "diffusion.terms": ("register_loss_term",),
    "drawing.pictures": ("draw_grid", "to_uint8"),
    "fast.execution.registry": ("register_execution",),
    "jobs.analyze": ("Analysis", "analyze"),
    "jobs.evaluate": ("Evaluation", "evaluate"),
    "jobs.train": ("train",),
    "loading": ("load_checkpoint",),
    "models.config": ("DiTConfig", "published_config"),
    "models.dit": ("Model",),
    "models.routing": ("register_time_router", "register_token_router"),
    "pipeline": ("Pipeline",),
    "sampling.generate": ("generate",),
}
_NAMES_THERE = {"train": "train_and_evaluate"}


def __getattr__(name: str):
    """Import a public name (PEP 562)."""
    if name == "__version__":
        return importlib.metadata.version("dydit-jax")
    for module, names in _MODULES.items():
        if name in names:
            value = getattr(importlib.import_module(f"{__name__}.{module}"), _NAMES_THERE.get(name, name))
            globals()[name] = value  # the next time it is there
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})
