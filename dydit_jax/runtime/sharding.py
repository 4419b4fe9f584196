"""One mesh, one table: which axis of which parameter lies on which axis of the mesh.

The mesh has three axes. `data` copies the parameters and splits the batch; `fsdp` splits both; `tensor` splits heads
and MLP groups, as whole units: their gates are known everywhere. Parameters, moments and EMA share the table, because
their paths end alike; a path that no rule matches is an error, never silent replication.
"""

import concurrent.futures
import dataclasses
import functools
import re
from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from dydit_jax.errors import InputError
from dydit_jax.records import require_range
from dydit_jax.runtime.processes import to_host
from dydit_jax.runtime.settings import own_settings
from dydit_jax.trees import path_name

AXES = ("data", "fsdp", "tensor")
BATCH = PartitionSpec(("data", "fsdp"))

# Path pattern -> mesh axes of the last axes of the array; a leading L is never split.
RULES = (
    # Small, and copied everywhere; the first rule, since a user's router may have parts with any name.
    (r"(head|group|token)_router/", ()),
    (r"attention/qkv$", (None, "fsdp", "tensor", None)),
    (r"attention/qkv_bias$", (None, "tensor", None)),
    (r"attention/out$", ("tensor", None, "fsdp")),
    (r"mlp/up$", ("fsdp", "tensor", None)),
    (r"mlp/up_bias$", ("tensor", None)),
    (r"mlp/down$", ("tensor", None, "fsdp")),
    (r"modulation/kernel$", ("fsdp", None, None)),
    # Low-rank updates: split like the axes of their kernels that they have.
    (r"(attention/qkv|mlp/up)_lora_a$", ("fsdp", None)),
    (r"(attention/qkv|mlp/up)_lora_b$", ("tensor", None)),
    (r"(attention/out|mlp/down)_lora_a$", ("tensor", None, None)),
    (r"(attention/out|mlp/down)_lora_b$", ("fsdp",)),
    (r"lora_mixture/(kernel|bias)$", ()),
    # Small too, or read by an index.
    (r"(attention/out_bias|mlp/down_bias|modulation/bias)$", ()),
    (r"(patch_embed|label_embed|output|time_embed|guidance_embed)/(kernel|bias|table|positions)(_in|_out)?$", ()),
    (r"(^|/)(step|count|skipped|skipped_in_a_row)$", ()),
)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices on each axis of the mesh; one of them may be -1 and takes what is left.

    Attributes:
      data: devices that split the batch and hold all of the state.
      fsdp: devices that split the batch and the state.
      tensor: devices that split heads and MLP groups.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1

    def __post_init__(self):
        for axis in AXES:
            if getattr(self, axis) != -1:
                require_range(f"mesh.{axis}", getattr(self, axis), low=1)
        if list(dataclasses.astuple(self)).count(-1) > 1:
            raise InputError(
                f"Only one of mesh.data, mesh.fsdp and mesh.tensor may be -1: {dataclasses.astuple(self)}."
            )


def make_mesh(config: MeshConfig, devices=None) -> Mesh:
    """Arrange devices as the configuration says.

    Args:
      config: sizes of the axes.
      devices: all devices by default.

    Raises:
      InputError: sizes whose product is not the number of devices.
    """
    count = len(devices or jax.devices())
    sizes = [getattr(config, axis) for axis in AXES]
    if -1 in sizes:
        sizes[sizes.index(-1)] = max(count // -int(np.prod(sizes)), 1)
    if np.prod(sizes) != count:
        raise InputError(f"A mesh of {' x '.join(map(str, sizes))} needs {np.prod(sizes)} devices; there are {count}.")
    devices, types = devices or jax.devices(), (AxisType.Auto,) * len(AXES)
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        return jax.make_mesh(tuple(sizes), AXES, axis_types=types, devices=devices)
    return Mesh(_across_slices(devices, sizes, slices), AXES, axis_types=types)


def _across_slices(devices, sizes: list[int], slices: int) -> np.ndarray:
    """Arrange devices of several TPU slices: only the data axis, which talks least, goes over the slow network.

    Raises:
      InputError: a data axis that the slices do not divide.
    """
    data, fsdp, tensor = sizes
    if data % slices:
        raise InputError(
            f"mesh.data must be a multiple of the {slices} slices, not {data}; fsdp and tensor stay within one."
        )
    return mesh_utils.create_hybrid_device_mesh((data // slices, fsdp, tensor), (slices, 1, 1), devices)


def shardings(mesh: Mesh, tree):
    """Return the sharding of every leaf of a parameter tree or training state.

    Args:
      mesh: from `make_mesh`.
      tree: arrays or shapes.

    Returns:
      The same tree of `NamedSharding`. An axis whose length the mesh axis does not divide is copied.

    Raises:
      ValueError: a path that no rule matches.
    """
    return jax.tree_util.tree_map_with_path(lambda path, leaf: _sharding(mesh, path_name(path), leaf.shape), tree)


def _sharding(mesh: Mesh, name: str, shape: tuple[int, ...]) -> NamedSharding:
    for pattern, axes in RULES:
        if re.search(pattern, name):
            axes = (None,) * (len(shape) - len(axes)) + axes
            fits = (axis if axis and size % mesh.shape[axis] == 0 else None for axis, size in zip(axes, shape))
            return NamedSharding(mesh, PartitionSpec(*fits))
    raise ValueError(f"No sharding rule matches {name} {shape}; add one to RULES.")


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Return the sharding of anything whose first axis is the batch."""
    return NamedSharding(mesh, BATCH)


def process_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
    """Return which rows of a global batch this process has to bring, in their order."""
    slices = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([np.arange(batch_size)[rows] for rows in slices]))


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding of what every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def make_constrain_fn(mesh: Mesh):
    """Return the function that pins activations to the batch's sharding between blocks."""
    sharding = batch_sharding(mesh)
    return lambda x: jax.lax.with_sharding_constraint(x, sharding)


def require_divisible(mesh: Mesh, batch_size: int) -> None:
    """Raise unless the batch divides evenly over the devices that split it.

    Raises:
      InputError: with both numbers.
    """
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch_size % parts:
        raise InputError(f"A batch of {batch_size} does not divide over {parts} devices (mesh.data x mesh.fsdp).")


def round_up(count: int, multiple: int) -> int:
    """Return the smallest multiple that is not below the count: how many images so many devices share evenly."""
    return -(-count // multiple) * multiple


def run_without_mesh(function):
    """Return the result of a function that runs in a thread of its own, where a mesh of the caller is not known."""
    with concurrent.futures.ThreadPoolExecutor(1) as alone:
        return alone.submit(own_settings()(function)).result()  # settings are known to one thread, too


def map_in_slices(
    function, params, batch: np.ndarray, mesh: Mesh, *, slice_size: int, report: Callable[[int], None] | None = None
):
    """Apply `function(params, slice)` to slices of a batch, each split over all devices, and join the results.

    The last slice is filled up, so that one compiled program serves all.

    Args:
      function: compiled once per mesh; its results may be any tree.
      params: on every device.
      batch: [n,...] on the host.
      mesh: from `make_mesh`.
      slice_size: rounded up to a multiple of the devices.
      report: called with the rows of the batch that are done since its last call, or None.

    Returns:
      The function's results for the whole batch, on the host.
    """
    size = round_up(min(slice_size, len(batch)), mesh.size)
    filled = np.concatenate([batch, np.repeat(batch[-1:], -len(batch) % size, axis=0)])
    run = _compiled(function, mesh)
    results = []
    for first in range(0, len(filled), size):
        results.append(to_host(run(params, _placed(filled[first : first + size], mesh))))
        if report is not None:
            report(min(size, len(batch) - first))
    return jax.tree.map(lambda *parts: np.concatenate(parts)[: len(batch)], *results)


def _placed(rows: np.ndarray, mesh: Mesh):
    """Return rows that every process has as an array in its shards; a single process leaves that to `jit`."""
    if jax.process_count() == 1:
        return rows
    return jax.make_array_from_callback(rows.shape, batch_sharding(mesh), lambda at: rows[at])


@functools.cache
def _compiled(function, mesh: Mesh):
    return jax.jit(function, in_shardings=(replicated(mesh), batch_sharding(mesh)))
