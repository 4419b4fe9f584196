"""Running the MLP of a block on some of the tokens: by multiplication, or on a fixed number per image.

*Top-k* gives every image of a block a fixed capacity: the tokens with the largest scores get a place, and those of them
whose gate is open are updated. Shapes are static, so a training step saves what is left out too, and its cost is known
beforehand. Where an image has no more open tokens than places the result is that of the threshold alone; where it has
more, the open tokens with the smallest scores are left out.
"""

import jax.numpy as jnp


def multiply_by_gates(function, x, gates):
    """Apply a function to all tokens x [B,N,D] and multiply by their gates [B,N]."""
    return gates[:, :, None] * function(x)


def ranks(scores):
    """Return the place of every token among its image's, 0 for the largest score: [B,N] from [B,N]."""
    return jnp.argsort(jnp.argsort(-scores, axis=-1, stable=True), axis=-1)


def running_counts(on):
    """Count along the last axis what is on up to each place, itself included: int32 from 0 or 1, [...,n].

    As a product, which is exact for zeros and ones: a TPU takes longer over a cumulative sum.
    """
    size = on.shape[-1]
    return (on.astype(jnp.float32) @ jnp.triu(jnp.ones((size, size)))).astype(jnp.int32)


def run_on_places(function, x, gates, places, *, capacity: int, platform: str):
    """Apply a function to the tokens that have a place.

    Args:
      function: maps tokens [B,capacity,D] to [B,capacity,D], each by itself.
      x: tokens [B,N,D].
      gates: [B,N]; the result is multiplied by them.
      places: [B,N], distinct within an image from 0 to capacity - 1; tokens with any other number have none.
      capacity: places of one image.
      platform: "tpu" moves tokens by a product with zeros and ones, the others by index.

    Returns:
      [B,N,D]: gate times the function's result where a token has a place, zeros elsewhere.
    """
    tokens = x.shape[1]
    inside = (places >= 0) & (places < capacity)
    gates = jnp.where(inside, gates, 0)
    if platform == "tpu":
        # One-hot products keep the fusions around them; gathers of short rows do not.
        chosen = (places[:, None, :] == jnp.arange(capacity)[:, None]).astype(x.dtype)  # [B,C,N]
        packed = jnp.einsum("bcn,bnd->bcd", chosen, x)
        return gates[:, :, None] * jnp.einsum("bcn,bcd->bnd", chosen, function(packed))
    # A sort along the image's own axis, not a scatter: a scatter gathers the batch from all devices first.
    source = jnp.argsort(jnp.where(inside, places, tokens), axis=-1)[:, :capacity]  # [B,C]
    packed = jnp.take_along_axis(x, source[:, :, None], axis=1)  # [B,C,D]
    spread = jnp.take_along_axis(function(packed), jnp.where(inside, places, 0)[:, :, None], axis=1)
    return gates[:, :, None] * jnp.where(inside[:, :, None], spread, 0)
