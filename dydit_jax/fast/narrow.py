"""The weights of a segment: one parameter tree per block, with only the heads and groups that the segment keeps."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from dydit_jax.runtime.aot import shape_of

# Which axis of a layer's parameters counts heads, and which counts groups; those of low-rank updates too.
UNIT_AXES = {
    "attention": {"qkv": 2, "qkv_bias": 1, "out": 0, "qkv_lora_b": 3, "out_lora_a": 0},
    "mlp": {"up": 1, "up_bias": 0, "down": 0, "up_lora_b": 2, "down_lora_a": 0},
}
SPLIT_QKV = ("qkv", "qkv_bias")  # of queries, keys and values, which are narrowed to an array each


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DeferredBlocks:
    """All blocks, and the units that a segment keeps of them; the segment's program narrows them.

    Attributes:
      whole: the parameters of all blocks, stacked [L,...].
      kept: for the heads of every layer, then for its groups: the layer's number and those of the kept units, int32.
      counts: number of kept units of each layer, of heads and of groups.
    """

    whole: dict
    kept: jax.Array
    counts: tuple[tuple[int, ...], tuple[int, ...]] = dataclasses.field(metadata=dict(static=True))

    def narrowed(self) -> list[dict]:
        """Return one parameter tree per block."""
        ends = iter(np.cumsum([1 + count for counts in self.counts for count in counts]).tolist())
        shared = {name: part for name, part in self.whole.items() if name not in UNIT_AXES}
        layers = [_take_layer(shared, layer) for layer in range(len(self.counts[0]))]
        for name, counts in zip(UNIT_AXES, self.counts):
            for layer, (count, end) in enumerate(zip(counts, ends)):
                layers[layer][name] = _take_units(self.whole[name], self.kept[end - count - 1 : end], name)
        return layers


class NarrowedBlocks:
    """The blocks of one segment after another, in the form that its program takes.

    On a CPU they are narrowed before the program runs. Arrays unchanged between consecutive segments are reused; others
    are freed, layer by layer, before they are rebuilt. Blocks of segments that keep everything are handled like this on
    any platform. Otherwise the program itself narrows: an accelerator would wait for its host, which can queue only a
    few operations ahead. Arrays in a CPU's memory are cut by NumPy, without anything being compiled.

    Attributes:
      whole: the parameters of all blocks, stacked [L,...], products in their dtype.
    """

    def __init__(self, blocks: dict, *, dtype, platform: str):
        """Cast the parameters that products read.

        Args:
          blocks: the parameters of all blocks, stacked [L,...]; copied to all devices of their mesh.
          dtype: of the products.
          platform: as of `Model`.
        """
        self.whole, self._platform = cast_for_products(jax.tree.map(_replicate, blocks), dtype), platform
        self._layers, self._kept = None, []
        self._shapes = {}  # of a part with so many units; a cached method would be a cycle that holds the weights

    def narrow_to(self, heads: tuple, groups: tuple):
        """Return the blocks of a segment: one parameter tree per block, or all of them, `DeferredBlocks`.

        Biases of the projections stay whole: they are added whatever is open. The kernels of queries, keys and values
        become three arrays [D,H,K], their biases [H,K]: a product cannot read a third of one array in place.

        Args:
          heads, groups: per layer, the kept units, ascending.
        """
        if self._is_deferred(heads, groups):
            self._layers = None
            return self._deferred(heads, groups)
        if self._layers is None:
            shared = {name: part for name, part in self.whole.items() if name not in UNIT_AXES}
            take_layer = _cut_layer if _on_host(shared) else _take_layer
            self._layers = [take_layer(shared, layer) for layer in range(len(heads))]
            self._kept = [{} for _ in heads]
        for layer, units in enumerate(zip(heads, groups, strict=True)):
            for name, kept in zip(UNIT_AXES, units):
                if self._kept[layer].get(name) != kept:
                    for known in (self._kept, self._layers):  # both, should memory not suffice for the new
                        known[layer].pop(name, None)
                    take_units = _cut_units if _on_host(self.whole[name]) else _take_units
                    layer_and_kept = np.asarray((layer, *kept), np.int32)
                    self._layers[layer][name] = take_units(self.whole[name], layer_and_kept, name)
                    self._kept[layer][name] = kept
        return [dict(layer) for layer in self._layers]  # the next call changes its own

    def shapes(self, heads: tuple, groups: tuple):
        """Return the shapes of what `narrow_to` would return."""
        if self._is_deferred(heads, groups):
            return jax.tree.map(shape_of, self._deferred(heads, groups))
        shared = {
            name: jax.tree.map(lambda leaf: self._shape_of(leaf, leaf.shape[1:]), part)
            for name, part in self.whole.items()
            if name not in UNIT_AXES
        }
        return [
            shared | {name: self._shape(name, len(kept)) for name, kept in zip(UNIT_AXES, units)}
            for units in zip(heads, groups, strict=True)
        ]

    def _is_deferred(self, heads: tuple, groups: tuple) -> bool:
        all_heads, all_groups = self.whole["attention"]["out"].shape[1], self.whole["mlp"]["down"].shape[1]
        keeps_all = min(map(len, heads)) == all_heads and min(map(len, groups)) == all_groups
        return self._platform != "cpu" and not keeps_all

    def _deferred(self, heads: tuple, groups: tuple) -> DeferredBlocks:
        parts = [(layer, *kept) for kind in (heads, groups) for layer, kept in enumerate(kind)]
        counts = tuple(map(len, heads)), tuple(map(len, groups))
        return DeferredBlocks(self.whole, np.concatenate(parts, dtype=np.int32), counts)

    def _shape(self, name: str, count: int) -> dict:
        if (name, count) not in self._shapes:
            self._shapes[name, count] = self._shape_of_part(name, count)
        return self._shapes[name, count]

    def _shape_of_part(self, name: str, count: int) -> dict:
        # Not by `jax.eval_shape`, which takes milliseconds each time.
        axes, shapes = UNIT_AXES[name], {}
        for leaf_name, leaf in self.whole[name].items():
            _, *shape = leaf.shape  # without the layers
            if leaf_name in axes:
                shape[axes[leaf_name]] = count
            in_three = leaf_name in SPLIT_QKV
            narrowed = self._shape_of(leaf, shape[in_three:])
            shapes[leaf_name] = (narrowed,) * 3 if in_three else narrowed
        return shapes

    def _shape_of(self, leaf, shape) -> jax.ShapeDtypeStruct:
        return shape_of(jax.ShapeDtypeStruct(shape, leaf.dtype), placed_as=leaf)


def _replicate(leaf):
    """Copy an array to all devices of its mesh: how it was sharded says nothing about a layer of it, which has no L."""
    if isinstance(leaf, jax.core.Tracer):  # of a program, which knows no devices yet
        return leaf
    if not getattr(leaf, "committed", False) or not isinstance(leaf.sharding, NamedSharding):
        return leaf
    return jax.device_put(leaf, NamedSharding(leaf.sharding.mesh, PartitionSpec()))  # of one device: nothing is copied


def cast_for_products(blocks: dict, dtype) -> dict:
    """Cast what only products read, attention, MLP and the modulation's kernel, to the dtype of the products.

    Arrays that already have this dtype stay as they are. Programs that get other blocks cast all of them, each before
    its first step.
    """
    cast = lambda part: jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), part)
    modulation = blocks["modulation"] | cast(dict(kernel=blocks["modulation"]["kernel"]))
    return blocks | dict(modulation=modulation) | {name: cast(blocks[name]) for name in UNIT_AXES}


def narrow(blocks: dict, *, heads: tuple, groups: tuple, dtype) -> list[dict]:
    """Return one parameter tree per layer with the units that a segment keeps; arguments as for `NarrowedBlocks`."""
    return NarrowedBlocks(blocks, dtype=dtype, platform="cpu").narrow_to(heads, groups)


def fold_gates(layers: list, heads: tuple, groups: tuple) -> list[dict]:
    """Multiply gates into the kernels that read what they gate.

    This is exact, since a gate is 0 or 1. It saves a GPU a pass over all heads or hidden units, and lets it merge bias
    and GELU into the product before them.

    Args:
      layers: one parameter tree per block.
      heads, groups: per layer, gates [1,kept] of the units that it has, or None where all are open.
    """
    gated = lambda kernel, gates: kernel if gates is None else kernel * gates[0][:, None, None].astype(kernel.dtype)
    return [
        layer
        | dict(
            attention=layer["attention"] | dict(out=gated(layer["attention"]["out"], of_heads)),
            mlp=layer["mlp"] | dict(down=gated(layer["mlp"]["down"], of_groups)),
        )
        for layer, of_heads, of_groups in zip(layers, heads, groups)
    ]


# Compiled once per number of kept units, not once per segment: which units they are, and of which layer, is data.
@functools.partial(jax.jit, static_argnames="name")
def _take_units(part: dict, layer_and_kept, name: str) -> dict:
    layer, kept = layer_and_kept[0], layer_and_kept[1:]

    def take(leaf, axis, *part_of_leaf):
        place = (layer, *part_of_leaf)
        if axis is None or len(kept) == leaf.shape[len(place) + axis]:
            return leaf[place]
        if axis == 0:  # units lie together, which is cheap; taken from all layers, a v5e's product reads them slower
            return jnp.take(leaf[place], kept, axis=0, mode="clip")
        # Read from all layers at once: a TPU would first copy the layer whole, into the layout that taking units wants.
        unit_of = lambda unit: leaf.at[*place, *(slice(None),) * axis, unit].get(mode="clip")
        return jax.vmap(unit_of, out_axes=axis)(kept)

    return _narrow_each(part, name, take)


def _narrow_each(part: dict, name: str, narrow_leaf) -> dict:
    """Apply a function (leaf, axis of its units, index into its first axis where it is split) to a part's arrays."""
    axes, narrowed = UNIT_AXES[name], {}
    for leaf_name, leaf in part.items():
        if leaf_name in SPLIT_QKV:
            narrowed[leaf_name] = tuple(narrow_leaf(leaf, axes[leaf_name] - 1, i) for i in range(3))
        else:
            narrowed[leaf_name] = narrow_leaf(leaf, axes.get(leaf_name))
    return narrowed


@jax.jit
def _take_layer(parts: dict, layer) -> dict:
    return jax.tree.map(lambda leaf: leaf[layer], parts)


# --- The same in a CPU's memory ------------------------------------------------------------------


def _on_host(part: dict) -> bool:
    """Return whether all arrays lie whole in a CPU's memory, where NumPy reads them as they are."""

    def is_there(leaf) -> bool:
        if not isinstance(leaf, jax.Array) or isinstance(leaf, jax.core.Tracer):
            return False
        return leaf.is_fully_replicated and all(device.platform == "cpu" for device in leaf.devices())

    return all(map(is_there, jax.tree.leaves(part)))


def _cut_units(part: dict, layer_and_kept: np.ndarray, name: str) -> dict:
    """Do what `_take_units` does, with NumPy."""
    layer, *kept = layer_and_kept.tolist()

    def cut(leaf, axis, *part_of_leaf):
        array = np.asarray(leaf)[layer, *part_of_leaf]
        if axis is not None and len(kept) < array.shape[axis]:
            array = np.take(array, kept, axis)
        return _placed_as(leaf, array)

    return _narrow_each(part, name, cut)


def _cut_layer(parts: dict, layer: int) -> dict:
    """Do what `_take_layer` does, with NumPy."""
    return jax.tree.map(lambda leaf: _placed_as(leaf, np.asarray(leaf)[layer]), parts)


def _placed_as(leaf: jax.Array, array: np.ndarray) -> jax.Array:
    """Return an array on the devices of another, fixed to them where that one is."""
    if not leaf.committed:
        return jnp.asarray(array)
    sharding = leaf.sharding
    if isinstance(sharding, NamedSharding):  # of an array with other axes
        sharding = NamedSharding(sharding.mesh, PartitionSpec())
    # Not `device_put`, which lets all processes compare what they have.
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])
