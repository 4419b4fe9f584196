"""Put the most important heads and MLP channels first, without changing what the network computes.

In the layout `first_on` the first head and the first MLP group are never switched off, so fine-tuning starts better if
they are the ones that matter most (DyDiT, https://arxiv.org/abs/2410.03456, section 3.4). Importance is magnitude: the
sum of the absolute weights that lead into and out of a head or channel.
"""

from collections.abc import Mapping

import numpy as np

from dydit_jax.trees import flatten, unflatten


def order_by_magnitude(params: Mapping) -> dict:
    """Return the parameters with heads, and channels of the MLP, of every block in falling order of magnitude.

    Args:
      params: the tree of a DiT, stacked [L,...], without routers: theirs would have to be ordered alike.

    Returns:
      A tree of the same shapes and the same function.
    """
    leaves = {path: np.array(leaf) for path, leaf in flatten(params).items()}
    for layer in range(len(leaves["blocks/mlp/up"])):
        _order_heads(leaves, layer)
        _order_channels(leaves, layer)
    return unflatten(leaves)


def _falling(magnitude: np.ndarray) -> np.ndarray:
    return np.argsort(-magnitude, kind="stable")


def _order_heads(leaves: dict, layer: int) -> None:
    qkv, bias = leaves["blocks/attention/qkv"][layer], leaves["blocks/attention/qkv_bias"][layer]  # [3,D,H,K], [3,H,K]
    out = leaves["blocks/attention/out"][layer]  # [H,K,D]
    order = _falling(np.abs(qkv).sum(axis=(0, 1, 3)) + np.abs(out).sum(axis=(1, 2)))
    qkv[:], bias[:], out[:] = qkv[:, :, order], bias[:, order], out[order]


def _order_channels(leaves: dict, layer: int) -> None:
    """Order single channels over all groups, so that the first group collects the strongest."""
    up, bias = leaves["blocks/mlp/up"][layer], leaves["blocks/mlp/up_bias"][layer]  # [D,G,F], [G,F]
    down = leaves["blocks/mlp/down"][layer]  # [G,F,D]
    width, groups, units = up.shape
    flat_up, flat_down = up.reshape(width, groups * units), down.reshape(groups * units, width)
    order = _falling(np.abs(flat_up).sum(0) + np.abs(flat_down).sum(1))
    up[:] = flat_up[:, order].reshape(up.shape)
    bias[:] = bias.reshape(-1)[order].reshape(bias.shape)
    down[:] = flat_down[order].reshape(down.shape)
