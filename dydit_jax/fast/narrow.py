"""The weights of a segment: the stacked blocks cut apart, each with its own kept heads and groups."""

import jax
import jax.numpy as jnp
import numpy as np

from dydit_jax.fast.plan import Segment

# Which axis of a layer's parameter counts heads, and which counts groups.
HEAD_AXES = {("attention", "qkv"): 2, ("attention", "qkv_bias"): 1, ("attention", "out"): 0}
GROUP_AXES = {("mlp", "up"): 1, ("mlp", "up_bias"): 0, ("mlp", "down"): 0}


def narrow(params: dict, segment: Segment) -> tuple[dict, ...]:
    """Return one parameter tree per layer with the units that a segment keeps.

    Biases of the projections stay whole: they are added whatever is on.

    Args:
      params: the parameter tree, blocks stacked [L,...].
      segment: what is kept.
    """
    return tuple(
        _narrow_layer(jax.tree.map(lambda leaf, layer=layer: leaf[layer], params["blocks"]), heads, groups)
        for layer, (heads, groups) in enumerate(zip(segment.heads, segment.groups))
    )


def _narrow_layer(layer: dict, heads: tuple[int, ...], groups: tuple[int, ...]) -> dict:
    narrowed = {name: dict(part) if isinstance(part, dict) else part for name, part in layer.items()}
    for axes, kept in ((HEAD_AXES, heads), (GROUP_AXES, groups)):
        for (part, name), axis in axes.items():
            leaf = narrowed[part][name]
            if len(kept) < leaf.shape[axis]:
                narrowed[part][name] = jnp.take(leaf, np.asarray(kept, np.int32), axis=axis)
    return narrowed
