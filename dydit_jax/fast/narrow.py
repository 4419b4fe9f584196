"""The weights of a segment: the stacked blocks cut apart, each with its own kept heads and groups."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

# Which axis of a part's parameters counts heads, and which counts groups.
UNIT_AXES = {
    "attention": {"qkv": 2, "qkv_bias": 1, "out": 0},
    "mlp": {"up": 1, "up_bias": 0, "down": 0},
}


def narrow(blocks: dict, *, heads: tuple, groups: tuple, dtype, whole: tuple | None = None) -> tuple[dict, ...]:
    """Return one parameter tree per layer with the units that a segment keeps.

    Biases of the projections stay whole: they are added whatever is on. The kernels of queries, keys and values become
    three arrays [D,H,K]: a product cannot read a third of one array in place.

    Args:
      blocks: the parameters of all blocks, stacked [L,...].
      heads, groups: per layer, the kept units, ascending.
      dtype: of the kernels of attention, MLP and modulation, which are only read in it.
      whole: from `whole_parts`, where several segments share them; made here if missing.
    """
    index = lambda kept: np.asarray(kept, np.int32)
    whole = whole or whole_parts(blocks, dtype=dtype)
    return tuple(
        _narrow_layer(blocks, layer, index(kept_heads), index(kept_groups), dtype) | whole[layer]
        for layer, (kept_heads, kept_groups) in enumerate(zip(heads, groups, strict=True))
    )


def whole_parts(blocks: dict, *, dtype) -> tuple[dict, ...]:
    """Return per layer the parts that no segment narrows, modulation and token router; arguments as for `narrow`."""
    parts = {name: part for name, part in blocks.items() if name not in UNIT_AXES}
    layers = jax.tree.leaves(parts)[0].shape[0]
    return tuple(_take_whole(parts, layer, dtype) for layer in range(layers))


def _narrow_layer(blocks: dict, layer: int, heads: np.ndarray, groups: np.ndarray, dtype) -> dict:
    return {
        name: _take_units(blocks[name], layer, kept, tuple(axes.items()), dtype)
        for (name, axes), kept in zip(UNIT_AXES.items(), (heads, groups))
    }


# Compiled once per number of kept units, not once per segment: which units they are, and of which layer, is data.
@functools.partial(jax.jit, static_argnames=("axes", "dtype"))
def _take_units(part: dict, layer, kept, axes, dtype) -> dict:
    taken = {name: leaf[layer] for name, leaf in part.items()}
    for name, axis in axes:
        units = taken[name].shape[axis]
        leaf = taken[name] if len(kept) == units else jnp.take(taken[name], kept, axis=axis, mode="clip")
        leaf = leaf.astype(dtype)
        taken[name] = tuple(leaf) if name == "qkv" else leaf
    return taken


@functools.partial(jax.jit, static_argnames="dtype")
def _take_whole(parts: dict, layer, dtype) -> dict:
    taken = jax.tree.map(lambda leaf: leaf[layer], parts)
    taken["modulation"]["kernel"] = taken["modulation"]["kernel"].astype(dtype)
    return taken
