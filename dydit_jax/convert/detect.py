"""Which model a set of PyTorch tensors is: what their shapes show, and what only other sources can say."""

import math
from collections.abc import Mapping

import ml_dtypes
import numpy as np

from dydit_jax.convert.evidence import TENSORS, Evidence
from dydit_jax.convert.tables import POSITION_NAME
from dydit_jax.errors import InputError, some_of
from dydit_jax.models.config import SIZES, DiTConfig
from dydit_jax.models.layers import position_table

LABEL_TABLE = "y_embedder.embedding_table.weight"
HEADS_OF_SIZE = {(depth, width): heads for depth, width, heads in SIZES.values()}
SPACES = ("latent", "pixels")
IMAGE_CHANNELS, LATENT_CHANNELS = (1, 3), 4
# Pixels along an image's side for each of its latent's: of Stable Diffusion's autoencoder, and of others.
LATENT_FACTOR, OTHER_FACTOR = 8, 16


def detect_config(tensors: Mapping[str, np.ndarray], evidence: Evidence | None = None) -> DiTConfig:
    """Read the configuration of a DiT or DyDiT from its tensors, and from other sources where they leave it open.

    Args:
      tensors: by their PyTorch names; beyond shapes, only the position table is looked at.
      evidence: of the other sources; what the tensors show and what is guessed is added.

    Returns:
      The configuration. It counts a row for "no class", whether or not the source has one: see `evidence`'s `null_row`.

    Raises:
      InputError: tensors of something else, a source that they contradict, or a choice that no source makes; names the
        flag that decides.
    """
    evidence = Evidence() if evidence is None else evidence
    width, channels, patch, columns = _shape(tensors, "x_embedder.proj.weight", 4)
    hidden = _shape(tensors, "blocks.0.mlp.fc1.weight", 2)[0]
    rows = _shape(tensors, "final_layer.linear.weight", 2)[0]
    if patch != columns or hidden % width:
        raise InputError(f"Patches of {patch} x {columns} and an MLP of {hidden} at width {width} are no DiT's.")
    evidence.guess(
        "process", "diffusion", "the same tensors could be a SiT's, which predict velocities; --process decides"
    )
    _require_outputs(rows, channels * patch**2, evidence)
    shown = dict(depth=_depth(tensors), width=width, channels=channels, patch=patch, mlp_ratio=hidden // width)
    for field, value in shown.items():
        evidence.say(field, value, TENSORS)
    heads, routers = _heads_and_routers(tensors, evidence, shown)
    side = _side(tensors, evidence, patch, channels)
    return DiTConfig(
        **shown,
        heads=heads,
        routers=routers,
        side=side,
        classes=_classes(tensors, evidence),
        positions=_positions(tensors, side // patch, width),
    )


def _shape(tensors: Mapping, name: str, axes: int) -> tuple[int, ...]:
    if name not in tensors:
        raise InputError(f"These are not the weights of a DiT: there is no {name} among {some_of(tensors)}.")
    if tensors[name].ndim != axes or 0 in tensors[name].shape:
        raise InputError(f"{name} must have {axes} axes, not the shape {tensors[name].shape}.")
    return tensors[name].shape


def _require_outputs(rows: int, half: int, evidence: Evidence) -> None:
    """Raise unless an output has 2C channels, or C, where it is a flow's, whose second half is ignored."""
    if rows not in (half, 2 * half):
        raise InputError(f"final_layer.linear.weight has {rows} rows; this model's would be {2 * half}, or {half}.")
    if rows == half and evidence.value("process") != "flow":
        raise InputError(
            f"final_layer.linear.weight has {rows} rows; a diffusion, which learns its variance, has {2 * half}. Only "
            "flows can do without: --process=flow if it predicts velocities."
        )


def _depth(tensors: Mapping) -> int:
    """Count the blocks, which must be numbered from 0 without a gap."""
    numbers = {name.split(".")[1] for name in tensors if name.startswith("blocks.")}
    if numbers != {str(number) for number in range(len(numbers))}:
        raise InputError(f"The blocks must be numbered from 0 to {len(numbers) - 1}, not {some_of(sorted(numbers))}.")
    return len(numbers)


def _classes(tensors: Mapping, evidence: Evidence) -> int:
    """Return how many rows of the label table are classes, and settle whether one more stands for no class."""
    rows = _shape(tensors, LABEL_TABLE, 2)[0]
    classes, null_row = evidence.value("classes"), evidence.value("null_row")
    if classes is None and null_row is None:
        evidence.guess("null_row", True, f"the last of {rows} labels as no class; --classes={rows} if it is a class")
    elif classes is not None:
        if rows not in (classes, classes + 1):
            raise InputError(
                f"{evidence.sources['classes']} says classes {classes}; {LABEL_TABLE} has {rows} rows, which are "
                f"{rows} classes, or {rows - 1} and a row for no class."
            )
        evidence.say("null_row", rows > classes, f"{evidence.sources['classes']} beside a table of {rows} rows")
    evidence.say("classes", rows - evidence.value("null_row"), f"a table of {rows} rows")
    return evidence.value("classes")


def _side(tensors: Mapping, evidence: Evidence, patch: int, channels: int) -> int:
    """Return the side of the input in its own pixels, and settle whether those are an image's or a latent's."""
    if POSITION_NAME in tensors:
        tokens = _shape(tensors, POSITION_NAME, 3)[1]
        if math.isqrt(tokens) ** 2 != tokens:
            raise InputError(f"{POSITION_NAME} has {tokens} tokens, which is no square.")
        evidence.say("side", math.isqrt(tokens) * patch, TENSORS)
    side, image_size = evidence.value("side"), evidence.value("image_size")
    if side and image_size:
        factors = (LATENT_FACTOR,) if channels == LATENT_CHANNELS else (LATENT_FACTOR, OTHER_FACTOR)
        spaces = {side: "pixels"} | {factor * side: "latent" for factor in factors}
        if image_size not in spaces:
            behind = " or ".join(str(factor * side) for factor in factors)
            raise InputError(
                f"{evidence.sources['image_size']} says image_size {image_size}, {evidence.sources['side']} says an "
                f"input of side {side}: images of {side} pixels, or of {behind} behind an autoencoder."
            )
        evidence.say("space", spaces[image_size], f"{evidence.sources['image_size']} beside an input of side {side}")
    if evidence.value("autoencoder"):
        evidence.say("space", "latent", evidence.sources["autoencoder"])
    if channels == LATENT_CHANNELS or channels in IMAGE_CHANNELS:
        space = "latent" if channels == LATENT_CHANNELS else "pixels"
        evidence.guess("space", space, f"the input has {channels} channels; --space decides")
    if not evidence.value("space"):
        raise InputError(f"An input of {channels} channels may be anything; give --space: {' or '.join(SPACES)}.")
    if side is None and image_size is None:
        raise InputError(f"There is no {POSITION_NAME} to tell the image's size; give --image_size.")
    return side or _input_side(image_size, evidence)


def _input_side(image_size: int, evidence: Evidence) -> int:
    """Return the side of a network's input for images of a size."""
    factor = LATENT_FACTOR if evidence.value("space") == "latent" else 1
    if image_size % factor:
        raise InputError(f"The image_size of a model in latents must be a multiple of {factor}, not {image_size}.")
    evidence.say("side", image_size // factor, f"{evidence.sources['image_size']} by the space")
    return image_size // factor


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


def _heads_and_routers(tensors: Mapping, evidence: Evidence, shown: Mapping) -> tuple[int, str]:
    """Return the number of heads and the layout of the routers; each may decide the other."""
    size = (shown["depth"], shown["width"])
    published, name = HEADS_OF_SIZE.get(size), "blocks.0.attn_rate.router.weight"
    named = evidence.named_size
    if named and named not in _names(size, shown["patch"]):
        evidence.doubts.append(f"the training calls its model {named}, which the tensors are not; that is not used")
    elif named and evidence.value("heads") is None:
        evidence.say("heads", published, f"the training's name for its model, {named},")
    if name not in tensors:
        if evidence.value("routers") is not None:
            raise InputError(f"{evidence.sources['routers']} is for a model with routers; this is a static DiT.")
        if published is not None:
            reason = f"the published size of depth {size[0]} and width {size[1]}; --heads decides"
            evidence.guess("heads", published, reason)
        if evidence.value("heads") is None:
            raise InputError(f"A DiT of depth {size[0]} and width {size[1]} is no published size; give --heads.")
        return evidence.value("heads"), "none"
    outputs = _shape(tensors, name, 2)[0]
    said = (evidence.value("heads"), evidence.value("routers"))
    choices = {(outputs, "free"), (outputs + 1, "first_on")}
    fitting = [
        choice
        for choice in sorted(choices)
        if shown["width"] % choice[0] == 0 and all(value in (None, part) for value, part in zip(said, choice))
    ]
    if len(fitting) > 1 and published in dict(fitting):
        reason = f"routers of {outputs} outputs at a published size; --heads or --routers decides"
        evidence.guess("heads", published, reason)
        fitting = [choice for choice in fitting if choice[0] == published]
    if len(fitting) != 1:
        raise InputError(
            f"Routers with {outputs} outputs at width {shown['width']} fit {fitting or 'no layout'} with heads "
            f"{said[0] or 'unknown'} ({evidence.sources.get('heads', 'nobody says')}); give --heads or --routers "
            "(free: one output per head; first_on: one less)."
        )
    ((heads, routers),) = fitting
    for field, value in (("heads", heads), ("routers", routers)):
        evidence.say(field, value, f"{TENSORS}, by routers of {outputs} outputs,")
    return heads, routers


def _names(size: tuple[int, int], patch: int) -> list[str]:
    """Return the published names of a depth and width with patches of a side."""
    return [f"{name}/{patch}" for name, (depth, width, _) in SIZES.items() if (depth, width) == size]
