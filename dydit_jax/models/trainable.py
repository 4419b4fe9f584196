"""Which parameters a training changes: all of them, or routers, the table of labels and low-rank updates alone.

The others are frozen: they have no gradient, no moments and no EMA, and no checkpoint of the run holds them. They come
from `train.init_from` whenever the run starts or goes on.
"""

from collections.abc import Mapping

from dydit_jax.errors import InputError
from dydit_jax.models.lora import is_low_rank
from dydit_jax.trees import flatten, unflatten

EVERYTHING = ("everything",)
POSITION_TABLE = "patch_embed/positions"  # stored in some models; it has no gradient and no weight decay
PARTS = {
    "routers": lambda path: "_router/" in path,
    "labels": lambda path: path.startswith(("label_embed/", "guidance_embed/")),
    "lora": is_low_rank,
}


def require_parts(key: str, trainable: tuple[str, ...]) -> None:
    """Raise unless it is "everything", or some of the parts, each once.

    Raises:
      InputError: with the config's key and what is allowed.
    """
    known = bool(trainable) and set(trainable) <= set(PARTS) and len(set(trainable)) == len(trainable)
    if trainable != EVERYTHING and not known:
        raise InputError(f"{key} must be ('everything',) or some of {', '.join(PARTS)}, each once, not {trainable}.")


def split_params(params: Mapping, trainable: tuple[str, ...]) -> tuple[dict, dict]:
    """Return what is trained of a parameter tree, and what is frozen: two nested dicts, arrays or shapes."""
    if trainable == EVERYTHING:
        return dict(params), {}
    leaves = flatten(params)
    trained = {path for path in leaves if any(PARTS[part](path) for part in trainable)}
    take = lambda wanted: unflatten({path: leaf for path, leaf in leaves.items() if (path in trained) == wanted})
    return take(True), take(False)


def join_params(trained: dict, frozen: dict) -> dict:
    """Return the parameter tree of two parts from `split_params`."""
    return unflatten(flatten(frozen) | flatten(trained)) if frozen else trained
