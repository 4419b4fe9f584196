"""One number per array that changes with any of its bits, computed where the array lies.

A digest is the sum, modulo 2^32, of every element's bits, mixed with the element's position. Sums of integers do not
depend on their order, so it is the same on every mesh, and only the sums travel between devices. A change of one
element is always seen: mixing is a bijection of the bits. Other changes, values in another order among them, escape
with a chance of 2^-32.
"""

import math

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from dydit_jax.trees import flatten

GOLDEN = 0x9E3779B9  # odd: no two positions below 2^32 are moved alike


def digests(tree) -> dict[str, int]:
    """Return the digest of every array of a tree, by its path.

    Args:
      tree: arrays of any shape and type, split over devices in any way; every process that has parts of them calls
        this at the same time.
    """
    leaves = flatten(tree)
    meshes = [leaf.sharding.mesh for leaf in leaves.values() if isinstance(getattr(leaf, "sharding", 0), NamedSharding)]
    everywhere = NamedSharding(meshes[0], PartitionSpec()) if meshes else None
    sums = jax.jit(_digest_each, out_shardings=everywhere)(list(leaves.values()))
    return dict(zip(leaves, jax.device_get(sums).tolist()))


def _digest_each(arrays: list) -> jax.Array:
    return jnp.stack([_digest(array) for array in arrays])


def _digest(array) -> jax.Array:
    """Return the digest of an array, uint32 []."""
    bits = _bits(array)
    position = jnp.zeros(bits.shape, jnp.uint32)  # in row-major order
    for axis in range(bits.ndim):
        stride = math.prod(bits.shape[axis + 1 :]) % 2**32
        position += jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis) * jnp.uint32(stride)
    return jnp.sum(_mix(bits + position * jnp.uint32(GOLDEN)), dtype=jnp.uint32)


def _bits(array) -> jax.Array:
    """Return an array's bits as uint32, of the same shape; types of 8 bytes get a last axis of 2."""
    array = jnp.asarray(array)
    if array.dtype == bool:
        return array.astype(jnp.uint32)
    width = min(array.dtype.itemsize, 4)
    return jax.lax.bitcast_convert_type(array, jnp.dtype(f"uint{8 * width}")).astype(jnp.uint32)


def _mix(bits: jax.Array) -> jax.Array:
    """Spread every bit over all 32: MurmurHash3's finalizer, a bijection."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        bits = (bits ^ (bits >> shift)) * jnp.uint32(factor)
    return bits ^ (bits >> 16)
