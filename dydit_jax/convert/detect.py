"""Which model a set of PyTorch tensors is: size, patch, classes, side and layout, read from the shapes."""

import math
from collections.abc import Mapping

import ml_dtypes
import numpy as np

from dydit_jax.convert.tables import POSITION_NAME
from dydit_jax.errors import InputError
from dydit_jax.models.dit import SIZES, DiTConfig
from dydit_jax.models.layers import position_table

HEADS_OF_SIZE = {(depth, width): heads for depth, width, heads in SIZES.values()}


def detect_config(tensors: Mapping[str, np.ndarray], **given) -> DiTConfig:
    """Read the configuration of a DiT or DyDiT from its tensors.

    Args:
      tensors: by their PyTorch names; beyond shapes, only the position table is looked at.
      **given: fields of `DiTConfig` that are known and win: `heads`, `side`, `routers`.

    Returns:
      The configuration.

    Raises:
      InputError: tensors of something else, or a shape that leaves a choice open; says which flag decides.
    """
    patch_kernel = _shape(tensors, "x_embedder.proj.weight", 4)
    table = _shape(tensors, "y_embedder.embedding_table.weight", 2)
    up = _shape(tensors, "blocks.0.mlp.fc1.weight", 2)
    output = _shape(tensors, "final_layer.linear.weight", 2)
    width, channels, patch, _ = patch_kernel
    blocks = {name.split(".")[1] for name in tensors if name.startswith("blocks.")}
    depth = 1 + max(int(number) for number in blocks if number.isdecimal())
    if output[0] != 2 * channels * patch**2:
        raise InputError(
            f"final_layer.linear.weight has {output[0]} rows; a model that learns its variance has "
            f"{2 * channels * patch**2}, and others are not supported."
        )
    heads, routers = _heads_and_routers(tensors, depth, width, given.get("heads"), given.get("routers"))
    side = given.get("side") or _side(tensors, patch)
    return DiTConfig(
        depth=depth,
        width=width,
        heads=heads,
        patch=patch,
        side=side,
        channels=channels,
        classes=table[0] - 1,
        mlp_ratio=up[0] // width,
        routers=routers,
        positions=_positions(tensors, side // patch, width),
    )


def _shape(tensors: Mapping, name: str, axes: int) -> tuple[int, ...]:
    if name not in tensors:
        raise InputError(f"These are not the weights of a DiT: there is no {name} among {_some(tensors)}.")
    if tensors[name].ndim != axes:
        raise InputError(f"{name} must have {axes} axes, not the shape {tensors[name].shape}.")
    return tensors[name].shape


def _some(names) -> str:
    names = list(names)
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _side(tensors: Mapping, patch: int) -> int:
    """Read the side of the input, in its own pixels, from the position table."""
    if POSITION_NAME not in tensors:
        raise InputError(f"There is no {POSITION_NAME} to tell the image's size; give --image_size.")
    tokens = _shape(tensors, POSITION_NAME, 3)[1]
    grid = math.isqrt(tokens)
    if grid**2 != tokens:
        raise InputError(f"{POSITION_NAME} has {tokens} tokens, which is no square.")
    return grid * patch


def _positions(tensors: Mapping, grid: int, width: int) -> str:
    """Tell the fixed table, as the precision of the file rounds it, from one of the file's own."""
    if POSITION_NAME not in tensors:
        return "sine_cosine"
    theirs = tensors[POSITION_NAME]
    if theirs.shape != (1, grid**2, width):
        raise InputError(f"{POSITION_NAME} is {theirs.shape}; this model has {(1, grid**2, width)}.")
    rounding = float(ml_dtypes.finfo(theirs.dtype).eps)
    same = np.allclose(np.asarray(theirs[0], np.float32), position_table(grid, width), rtol=0, atol=4 * rounding)
    return "sine_cosine" if same else "stored"


def _heads_and_routers(tensors, depth: int, width: int, heads: int | None, routers: str | None) -> tuple[int, str]:
    """Read the number of heads and the layout of the routers; each may decide the other."""
    name = "blocks.0.attn_rate.router.weight"
    known = heads or HEADS_OF_SIZE.get((depth, width))
    if name not in tensors:
        if known is None:
            raise InputError(f"A DiT of depth {depth} and width {width} is no published size; give --heads.")
        return known, "none"
    outputs = _shape(tensors, name, 2)[0]
    fits = {"free": outputs, "first_on": outputs + 1}
    choices = [
        (count, layout)
        for layout, count in fits.items()
        if width % count == 0 and routers in (None, layout) and known in (None, count)
    ]
    if len(choices) != 1:
        raise InputError(
            f"Routers with {outputs} outputs at width {width} fit {choices or 'no layout'}; "
            "give --heads or --routers (free: one output per head; first_on: one less)."
        )
    return choices[0]
