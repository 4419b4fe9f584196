"""The Inception network of 2015 that FID is defined on, as pure functions of a parameter tree.

`features` turns images into what the metrics of this field compare: the 2048 averages before the classifier, 7 channels
of an inner layer at every position (for sFID), and the logits over 1008 classes (for the Inception score). Every detail
is part of the definition: the resize of TensorFlow 1, the scaling by (x - 128) / 128, averages that leave the padding
out, a maximum instead of an average in the last block, no bias on the logits.

The parameters are those of the published PyTorch port; batch norms are folded into their convolutions.

Source: https://arxiv.org/abs/1512.00567; the network of https://arxiv.org/abs/1706.08500.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from dydit_jax.errors import InputError

SIDE = 299
SPATIAL_BLOCK, SPATIAL_CHANNELS = "Mixed_6d", 7  # "mixed_6/conv" of the original graph
NORM_EPSILON = 1e-3
PRECISION = jax.lax.Precision.HIGHEST


@dataclasses.dataclass(frozen=True)
class Conv:
    """A convolution with ReLU, by name; stride 2 goes without padding."""

    name: str
    stride: int = 1
    padding: str = "SAME"


@dataclasses.dataclass(frozen=True)
class Pool:
    """A 3 x 3 pooling: "average" or "maximum" at stride 1, "halve" is a maximum at stride 2 without padding."""

    kind: str


@dataclasses.dataclass(frozen=True)
class Fork:
    """Convolutions side by side on the same input, their channels joined."""

    names: tuple[str, ...]


def _convs(stem: str, *ends) -> tuple:
    return tuple(Conv(f"{stem}_{end}") for end in ends)


def _halving(name: str) -> Conv:
    return Conv(name, 2, "VALID")


STEM = (
    _halving("Conv2d_1a_3x3"),
    Conv("Conv2d_2a_3x3", 1, "VALID"),
    Conv("Conv2d_2b_3x3"),
    Pool("halve"),
    Conv("Conv2d_3b_1x1"),
    Conv("Conv2d_4a_3x3", 1, "VALID"),
    Pool("halve"),
)
_ONE = (Conv("branch1x1"),)
_POOLED = (Pool("average"), Conv("branch_pool"))
_WIDE = (_ONE, _convs("branch5x5", 1, 2), _convs("branch3x3dbl", 1, 2, 3), _POOLED)
_LONG = (_ONE, _convs("branch7x7", 1, 2, 3), _convs("branch7x7dbl", 1, 2, 3, 4, 5), _POOLED)


def _last(pool: str) -> tuple:
    fork = lambda stem, number: Fork((f"{stem}_{number}a", f"{stem}_{number}b"))
    return (
        _ONE,
        (*_convs("branch3x3", 1), fork("branch3x3", 2)),
        (*_convs("branch3x3dbl", 1, 2), fork("branch3x3dbl", 3)),
        (Pool(pool), Conv("branch_pool")),
    )


# Name -> branches, each a sequence of steps on the block's input; their results are joined.
BLOCKS = {
    **dict.fromkeys(("Mixed_5b", "Mixed_5c", "Mixed_5d"), _WIDE),
    "Mixed_6a": (
        (_halving("branch3x3"),),
        (*_convs("branch3x3dbl", 1, 2), _halving("branch3x3dbl_3")),
        (Pool("halve"),),
    ),
    **dict.fromkeys(("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"), _LONG),
    "Mixed_7a": (
        (*_convs("branch3x3", 1), _halving("branch3x3_2")),
        (*_convs("branch7x7x3", 1, 2, 3), _halving("branch7x7x3_4")),
        (Pool("halve"),),
    ),
    "Mixed_7b": _last("average"),
    "Mixed_7c": _last("maximum"),
}


def conv_names() -> list[str]:
    """Return the names of all 94 convolutions."""
    names = [step.name for step in STEM if isinstance(step, Conv)]
    for block, branches in BLOCKS.items():
        for step in (step for branch in branches for step in branch if not isinstance(step, Pool)):
            names += [f"{block}.{name}" for name in (step.names if isinstance(step, Fork) else (step.name,))]
    return names


def features(params: dict, images) -> dict:
    """Compute what the metrics compare.

    Args:
      params: {"convs": {name: {"kernel": [h,w,in,out], "bias": [out]}}, "classifier": [2048,1008]}.
      images: [B,height,width,3], 0 .. 255, any size.

    Returns:
      float32 "pool" [B,2048], "spatial" [B,2023] (17 x 17 positions of 7 channels, channels last), "logits" [B,1008].
    """
    x = (resize(images.astype(jnp.float32)) - 128) / 128  # [B,299,299,3]
    x = _run(params["convs"], "", STEM, x)
    spatial = None
    for block, branches in BLOCKS.items():
        joined = [_run(params["convs"], f"{block}.", branch, x) for branch in branches]
        if block == SPATIAL_BLOCK:
            spatial = joined[0][..., :SPATIAL_CHANNELS]
        x = jnp.concatenate(joined, axis=-1)
    pool = x.mean((1, 2))
    logits = jnp.dot(pool, params["classifier"], precision=PRECISION)
    return dict(pool=pool, spatial=spatial.reshape(len(x), -1), logits=logits)


def _run(convs: dict, prefix: str, steps: tuple, x):
    for step in steps:
        if isinstance(step, Pool):
            x = _pool(step.kind, x)
        elif isinstance(step, Fork):
            x = jnp.concatenate([_conv(convs[prefix + name], x, 1, "SAME") for name in step.names], axis=-1)
        else:
            x = _conv(convs[prefix + step.name], x, step.stride, step.padding)
    return x


def _conv(part: dict, x, stride: int, padding: str):
    numbers = ("NHWC", "HWIO", "NHWC")
    strides = (stride, stride)
    x = jax.lax.conv_general_dilated(
        x, part["kernel"], strides, padding, dimension_numbers=numbers, precision=PRECISION
    )
    return jax.nn.relu(x + part["bias"])


def _pool(kind: str, x):
    window = lambda x, start, combine, stride, padding: jax.lax.reduce_window(
        x, start, combine, (1, 3, 3, 1), (1, stride, stride, 1), padding
    )
    if kind == "average":
        counts = window(jnp.ones((1, *x.shape[1:3], 1)), 0.0, jax.lax.add, 1, "SAME")  # less at the border
        return window(x, 0.0, jax.lax.add, 1, "SAME") / counts
    stride, padding = (2, "VALID") if kind == "halve" else (1, "SAME")
    return window(x, -jnp.inf, jax.lax.max, stride, padding)


def resize(images):
    """Resize [B,height,width,3] to 299 x 299 as TensorFlow 1 did: bilinear at i * size / 299, not centred."""
    rows, columns = (_resize_matrix(size) for size in images.shape[1:3])
    return jnp.einsum("ih,bhwc,jw->bijc", rows, images, columns, precision=PRECISION)


def _resize_matrix(size: int) -> np.ndarray:
    """Return [299,size], two weights in each row."""
    at = np.arange(SIDE, dtype=np.float32) * np.float32(size / SIDE)
    low = np.floor(at).astype(int)
    share = at - low
    matrix = np.zeros((SIDE, size), np.float32)
    np.add.at(matrix, (np.arange(SIDE), low), 1 - share)
    np.add.at(matrix, (np.arange(SIDE), np.minimum(low + 1, size - 1)), share)
    return matrix


def convert_inception(tensors: dict) -> dict:
    """Turn the state dict of the published PyTorch port into parameters.

    Args:
      tensors: name -> array, 472 of them.

    Raises:
      InputError: a tensor too many, too few, or of another shape.
    """
    parts = ("conv.weight", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var")
    wanted = {f"{name}.{part}" for name in conv_names() for part in parts} | {"fc.weight", "fc.bias"}
    found = {name for name in tensors if not name.endswith("num_batches_tracked")}
    if wanted != found:
        lacking, unknown = sorted(wanted - found), sorted(found - wanted)
        raise InputError(
            f"This is not the published Inception network of FID: {len(lacking)} tensors are missing "
            f"({', '.join(lacking[:3])} ...) and {len(unknown)} unknown ({', '.join(unknown[:3])} ...)."
        )
    convs = {}
    for name in conv_names():
        kernel, scale, shift, mean, variance = (np.asarray(tensors[f"{name}.{part}"], np.float64) for part in parts)
        scale = scale / np.sqrt(variance + NORM_EPSILON)
        kernel = kernel.transpose(2, 3, 1, 0) * scale  # [h,w,in,out]
        convs[name] = dict(kernel=kernel.astype(np.float32), bias=(shift - mean * scale).astype(np.float32))
    params = dict(convs=convs, classifier=np.asarray(tensors["fc.weight"], np.float32).T)
    try:
        jax.eval_shape(features, params, jax.ShapeDtypeStruct((1, SIDE, SIDE, 3), jnp.float32))
    except (TypeError, ValueError) as error:
        raise InputError(
            f"The shapes are not those of the published Inception network: {str(error).splitlines()[0]}"
        ) from error
    return params
