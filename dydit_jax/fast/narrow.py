"""The weights of a segment: the stacked blocks cut apart, each with its own kept heads and groups."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

# Which axis of a layer's parameter counts heads, and which counts groups.
HEAD_AXES = {("attention", "qkv"): 2, ("attention", "qkv_bias"): 1, ("attention", "out"): 0}
GROUP_AXES = {("mlp", "up"): 1, ("mlp", "up_bias"): 0, ("mlp", "down"): 0}


@functools.partial(jax.jit, static_argnames=("heads", "groups", "dtype"))
def narrow(blocks: dict, *, heads: tuple, groups: tuple, dtype) -> tuple[dict, ...]:
    """Return one parameter tree per layer with the units that a segment keeps.

    Biases of the projections stay whole: they are added whatever is on.

    Args:
      blocks: the parameters of all blocks, stacked [L,...].
      heads, groups: per layer, the kept units, ascending.
      dtype: of the kernels of attention and MLP, which are only read in it.
    """
    return tuple(
        _narrow_layer(jax.tree.map(lambda leaf, layer=layer: leaf[layer], blocks), kept_heads, kept_groups, dtype)
        for layer, (kept_heads, kept_groups) in enumerate(zip(heads, groups, strict=True))
    )


def _narrow_layer(layer: dict, heads: tuple[int, ...], groups: tuple[int, ...], dtype) -> dict:
    narrowed = {name: dict(part) if isinstance(part, dict) else part for name, part in layer.items()}
    for axes, kept in ((HEAD_AXES, heads), (GROUP_AXES, groups)):
        for (part, name), axis in axes.items():
            leaf = narrowed[part][name]
            if len(kept) < leaf.shape[axis]:
                leaf = jnp.take(leaf, np.asarray(kept, np.int32), axis=axis)
            narrowed[part][name] = leaf.astype(dtype)
    return narrowed
