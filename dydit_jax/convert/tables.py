"""Which PyTorch tensor is which parameter of ours: names, paths and the order of axes, both ways.

A row says: source name, path in our tree, source axes, our axes. The axes are written as for `einops`; read
from left to right they convert, from right to left they export. `{layer}` in a name stands for the number of
the block, and the path's first axis is then L.

Source of the names: the state dicts of https://github.com/facebookresearch/DiT and
https://github.com/alibaba-damo-academy/DyDiT.
"""

import dataclasses
from collections.abc import Iterator, Mapping

import einops
import numpy as np

from dydit_jax.convert.torch_files import release_pages
from dydit_jax.errors import InputError, some_of
from dydit_jax.models.config import DiTConfig
from dydit_jax.models.dit import Model
from dydit_jax.models.layers import position_table
from dydit_jax.trees import flatten, unflatten

POSITION_NAME = "pos_embed"  # if it is the sine-cosine table: left out on the way in, computed on the way out


@dataclasses.dataclass(frozen=True)
class Row:
    """One tensor, or one per block: its name there, its path here, its axes there and here."""

    name: str
    path: str
    theirs: str
    ours: str

    @property
    def per_layer(self) -> bool:
        """Whether each block has its own tensor of this kind."""
        return "{layer}" in self.name


def _linear(name: str, path: str, theirs: str, ours: str, bias: str) -> tuple[Row, Row]:
    """Rows of a Linear: `<name>.weight` under `path`, `<name>.bias` beside it."""
    bias_path = path.replace("kernel", "bias") if "kernel" in path else f"{path}_bias"
    return Row(f"{name}.weight", path, theirs, ours), Row(f"{name}.bias", bias_path, *bias.split(" -> "))


# Axes beyond the project's legend: i is the input side of a Linear, e its output side, r the reduced width of the
# token router, u the outputs of a timestep router, t the triple query-key-value, m and v the parts of a modulation,
# o the output channels.
_BLOCK = "blocks.{layer}"
DIT_ROWS = (
    *_linear("x_embedder.proj", "patch_embed/kernel", "d c p q", "p q c d", "d -> d"),
    *_linear("t_embedder.mlp.0", "time_embed/kernel_in", "d i", "i d", "d -> d"),
    *_linear("t_embedder.mlp.2", "time_embed/kernel_out", "d i", "i d", "d -> d"),
    Row("y_embedder.embedding_table.weight", "label_embed/table", "y d", "y d"),
    *_linear(f"{_BLOCK}.attn.qkv", "blocks/attention/qkv", "(t h k) d", "t d h k", "(t h k) -> t h k"),
    *_linear(f"{_BLOCK}.attn.proj", "blocks/attention/out", "d (h k)", "h k d", "d -> d"),
    *_linear(f"{_BLOCK}.mlp.fc1", "blocks/mlp/up", "(g f) d", "d g f", "(g f) -> g f"),
    *_linear(f"{_BLOCK}.mlp.fc2", "blocks/mlp/down", "d (g f)", "g f d", "d -> d"),
    *_linear(f"{_BLOCK}.adaLN_modulation.1", "blocks/modulation/kernel", "(m e) d", "d m e", "(m e) -> m e"),
    *_linear("final_layer.adaLN_modulation.1", "output/modulation/kernel", "(v e) d", "d v e", "(v e) -> v e"),
    *_linear("final_layer.linear", "output/kernel", "(p q o) d", "d p q o", "(p q o) -> p q o"),
)
POSITION_ROWS = (Row(POSITION_NAME, "patch_embed/positions", "1 n d", "n d"),)
ROUTER_ROWS = (
    *_linear(f"{_BLOCK}.attn_rate.router", "head_router/kernel", "u d", "d u", "u -> u"),
    *_linear(f"{_BLOCK}.mlp_rate.router", "group_router/kernel", "u d", "d u", "u -> u"),
    *_linear(f"{_BLOCK}.token_selection.mlp_head.0", "blocks/token_router/kernel_in", "r d", "d r", "r -> r"),
    *_linear(f"{_BLOCK}.token_selection.mlp_head.2", "blocks/token_router/kernel_out", "e r", "r e", "e -> e"),
)


def rows_of(config: DiTConfig) -> tuple[Row, ...]:
    """Return the rows of a model, with those of routers and of positions of its own where it has them."""
    routers = ROUTER_ROWS if config.routers != "none" else ()
    return DIT_ROWS + routers + (POSITION_ROWS if config.positions == "stored" else ())


def axis_sizes(config: DiTConfig) -> dict[str, int]:
    """Return the length of every axis that a row may have to split."""
    return dict(
        d=config.width,
        t=3,
        h=config.heads,
        k=config.width // config.heads,
        g=config.heads,
        f=config.hidden // config.heads,
        m=6,
        v=2,
        p=config.patch,
        q=config.patch,
        o=2 * config.channels,
    )


def _source_names(row: Row, config: DiTConfig) -> list[str]:
    return [row.name.format(layer=layer) for layer in range(config.depth)] if row.per_layer else [row.name]


def _rearrange(array, source: str, target: str, sizes: Mapping[str, int]):
    """Reorder axes as a view where numpy can; only the sizes that the pattern names are passed on."""
    named = {axis: size for axis, size in sizes.items() if axis in source.replace("(", " ").replace(")", " ").split()}
    return einops.rearrange(array, f"{source} -> {target}", **named)


def source_shapes(config: DiTConfig) -> dict[str, tuple[int, ...]]:
    """Return the name and shape of every tensor that a source of this configuration must hold.

    The sine-cosine table is left out: sources may or may not carry it.
    """
    ours, sizes, shapes = flatten(Model(config).abstract_params()), axis_sizes(config), {}
    for row in rows_of(config):
        shape = ours[row.path].shape[1:] if row.per_layer else ours[row.path].shape
        # A broadcast zero has the shape and none of the memory.
        exported = _rearrange(np.broadcast_to(np.float32(0), shape), row.ours, row.theirs, sizes)
        shapes.update(dict.fromkeys(_source_names(row, config), exported.shape))
    return shapes


def convert_state_dict(source: Mapping[str, np.ndarray], config: DiTConfig) -> dict:
    """Turn PyTorch tensors into our parameter tree.

    Args:
      source: tensors by their names there.
      config: the model that they make.

    Returns:
      The tree, float32; arrays that need no reordering or stacking share memory with `source`.

    Raises:
      InputError: naming missing, surplus and misshapen tensors.
    """
    require_complete(source, config)
    sizes, leaves = axis_sizes(config), {}
    for row in rows_of(config):
        arrays = (
            _rearrange(np.asarray(source[name]), row.theirs, row.ours, sizes) for name in _source_names(row, config)
        )
        leaves[row.path] = _stack(arrays, config.depth) if row.per_layer else _float32(next(arrays))
        for name in _source_names(row, config):
            release_pages(source[name])
    return unflatten(leaves)


def _float32(array) -> np.ndarray:
    return np.asarray(array, np.float32)


def _stack(arrays: Iterator[np.ndarray], depth: int) -> np.ndarray:
    """Stack on a new first axis, one array in memory beside the result."""
    first = next(arrays)
    stacked = np.empty((depth, *first.shape), np.float32)
    stacked[0] = first
    for layer, array in enumerate(arrays, start=1):
        stacked[layer] = array
    return stacked


def require_complete(source: Mapping[str, np.ndarray], config: DiTConfig) -> None:
    """Raise unless `source` holds exactly the tensors of `config`, in their shapes.

    Raises:
      InputError: naming what is missing, surplus and misshapen.
    """
    expected = source_shapes(config)
    missing = [f"missing {name} {shape}" for name, shape in expected.items() if name not in source]
    surplus = [
        f"surplus {name} {tensor.shape}"
        for name, tensor in source.items()
        if name not in expected and name != POSITION_NAME
    ]
    misshapen = [
        f"{name} is {source[name].shape}, must be {shape}"
        for name, shape in expected.items()
        if name in source and source[name].shape != shape
    ]
    require_no_problems("this model", missing, surplus, misshapen)


def require_no_problems(what: str, *kinds: list[str]) -> None:
    """Raise where tensors do not make a model; a few problems of each kind are named, all are counted.

    Raises:
      InputError: naming them.
    """
    if count := sum(map(len, kinds)):
        named = "; ".join(some_of(problems, separator="; ") for problems in kinds if problems)
        raise InputError(f"The tensors do not make {what} ({count} problem{'s' * (count > 1)}): {named}.")


def export_state_dict(params: Mapping, config: DiTConfig) -> dict[str, np.ndarray]:
    """Turn our parameter tree into PyTorch's names and axes, the position table included."""
    ours, sizes = flatten(params), axis_sizes(config)
    table = position_table(config.side // config.patch, config.width)
    exported = {POSITION_NAME: table[None]} if config.positions == "sine_cosine" else {}
    for row in rows_of(config):
        leaf = np.asarray(ours[row.path])
        layers = leaf if row.per_layer else leaf[None]
        for name, array in zip(_source_names(row, config), layers, strict=True):
            exported[name] = np.ascontiguousarray(_rearrange(array, row.ours, row.theirs, sizes))
    return exported
