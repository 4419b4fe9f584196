"""How the tokens of a block run: the steps that an implementation may supply, and the ones that training needs.

A block is attention, then an MLP on the tokens that its router chose. `Block` is that skeleton; a `TokenExecution`
supplies the steps that every backend does best in its own way:

    stream        = enter(tokens)                            once, before the first block
    stream        = add(stream, attention(norm(stream)), gate)      per block
    stream, gates = update(stream, step)                     per block: route, pack, MLP, spread
    tokens        = leave(stream)                            once, after the last block

A stream is whatever an implementation keeps of the tokens [B,N,D]; here it is the tokens themselves. An execution also
says how many rows it needs for a number of open tokens, so that a sampling run can choose a static capacity for each
layer. Here are the three that need no such choice:

    dense     every token passes the MLP
    masked    every token passes the MLP, the result is multiplied by the gates: what the original does
    top_k     of each image a fixed number of tokens passes, those with the largest logits (`model.token_capacity`)

*Top-k* is part of the model: where an image has no more open tokens than rows, the result is that of the threshold
alone; where it has more, the open tokens with the smallest logits are left out. Shapes are static, so a training step
saves what is left out too. The executions that only save work are in `fast/execution`.
"""

import dataclasses
import itertools
from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from dydit_jax.models.layers import layer_norm, modulate
from dydit_jax.models.routing import straight_through_gate
from dydit_jax.registry import require_array


@dataclasses.dataclass(frozen=True)
class MLPStep:
    """What the second half of a block is made of.

    Attributes:
      mlp: tokens [b,n,D] -> [b,n,D], each token by itself, with the gates of the groups applied.
      router: a `TokenRouter`, tokens [B,N,D] -> logits [B,N]; None for a block without one.
      shift, scale, gate: of the modulation [B,D].
      dtype: of the MLP's products.
      noise: logistic noise for the logits [B,N], or None.
      force_open: of each image, whether all its tokens are open [B]; None leaves it to the router.
    """

    mlp: Callable
    router: Callable | None
    shift: jax.Array
    scale: jax.Array
    gate: jax.Array
    dtype: jnp.dtype
    noise: jax.Array | None = None
    force_open: jax.Array | None = None

    def logits(self, tokens):
        """Return the router's logits [B,N] of tokens [B,N,D]."""
        logits = self.router(tokens)
        method = f"{type(self.router).__name__}.__call__"
        require_array(logits, tokens.shape[:2], "float32", method=method, returns="logits [B,N]")
        return logits


@dataclasses.dataclass(frozen=True)
class TokenExecution:
    """One way to run the tokens of a block. Without changes, a step computes every token and multiplies by its gate.

    Frozen and hashable: it is a static argument of the programs that it is compiled into.

    Attributes:
      platform: "cpu", "gpu" or "tpu".
      capacity: rows that the MLP computes, from `choose_capacity`; several where a layer chooses one of them while it
        runs; empty for all tokens.
    """

    name: ClassVar[str]
    # Whether more tokens can be open than there are rows. The pass is then void and must be computed densely.
    may_overflow: ClassVar[bool] = False
    # Whether the routers of tokens are asked.
    routed: ClassVar[bool] = True

    platform: str
    capacity: tuple[int, ...] = ()

    # --- Before a run: what it needs ---

    @classmethod
    def available(cls, model, images: int) -> bool:
        """Return whether `model` can run a pass of so many images on its platform this way.

        Args:
          model: a `Model`.
          images: of one pass on one device, those that guidance adds included.
        """
        return True

    def required_shares(self, usage, images: int) -> np.ndarray:
        """Return the shares of rows [S,L] that capacities are chosen by.

        Args:
          usage: `TokenUsage` of a calibration.
          images: of one pass on one device, without those that guidance adds.
        """
        return np.ones_like(usage.mean)

    def choose_capacity(self, shares, *, images: int, tokens: int) -> tuple[int, ...]:
        """Choose the capacity of one layer within one segment of the schedule.

        Args:
          shares: of `required_shares` the layer's, one for each step of the segment; None where nothing is known.
          images: of one pass on one device, those that guidance adds included.
          tokens: N.
        """
        return ()

    def with_capacity(self, shares, *, images: int, tokens: int) -> "TokenExecution":
        """Return the execution with the capacity that `choose_capacity` chooses."""
        return dataclasses.replace(self, capacity=self.choose_capacity(shares, images=images, tokens=tokens))

    def rows_needed(self, gates):
        """Return which share of the rows gates [B,L,N] need in each layer: [L]."""
        return gates.mean((0, 2))

    def overflowed(self, needed, *, images: int, tokens: int) -> np.ndarray:
        """Return whether a layer needed more than its largest capacity below all rows: bool of the shape of `needed`.

        Args:
          needed: from `rows_needed`, of this layer, at any number of steps.
          images, tokens: as for `choose_capacity`.
        """
        return np.zeros(np.shape(needed), bool)

    def rows_run(self, needed, *, images: int, tokens: int) -> np.ndarray:
        """Return how many rows of all images the MLP computes where so much is needed: an array like `needed`."""
        return np.full(np.shape(needed), images * tokens)

    # --- The steps of a block ---

    def enter(self, tokens):
        """Return the stream of tokens [B,N,D]."""
        return tokens

    def norm(self, stream, shift, scale, *, dtype):
        """Return the modulated norm of the tokens, what attention reads: [B,N,D], or three times that; see `attend`."""
        return modulate(self._normed(stream), shift, scale).astype(dtype)

    def add(self, stream, attended, gate):
        """Return the stream with the result of attention [B,N,D] added, scaled by gate [B,D]."""
        return stream + gate[:, None] * attended

    def update(self, stream, step: MLPStep) -> tuple:
        """Route the tokens, run the MLP on the open ones and add the result.

        Returns:
          The new stream and the token gates [B,N], None where no router was asked.
        """
        modulated = modulate(self._normed(stream), step.shift, step.scale).astype(step.dtype)
        gates, ranks = self.route(stream, step)
        result = self.run(step.mlp, modulated, gates, ranks)
        require_array(result, modulated.shape, method=f"{type(self).__name__}.run", returns="the gated result [B,N,D]")
        return stream + step.gate[:, None] * result, gates

    def leave(self, stream):
        """Return the tokens [B,N,D] of a stream."""
        return stream

    def route(self, tokens, step: MLPStep) -> tuple:
        """Return the gates [B,N] of tokens [B,N,D], and their ranks [B,N] where `run` wants them."""
        # The router reads the residual stream as it stands, not its norm.
        gates = straight_through_gate(step.logits(tokens), step.noise)
        return gates if step.force_open is None else jnp.where(step.force_open[:, None], 1.0, gates), None

    def run(self, function: Callable, tokens, gates, ranks):
        """Apply a row-wise function to the open tokens.

        Args:
          function: [b,n,D] -> [b,n,D], each token by itself.
          tokens: [B,N,D].
          gates, ranks: from `route`.

        Returns:
          [B,N,D]: gate times the function's result.
        """
        return gates[:, :, None] * function(tokens)

    def _normed(self, tokens):
        return layer_norm(tokens, single_pass=self.platform == "tpu")


class Masked(TokenExecution):
    """Every token passes the MLP, the result is multiplied by the gates."""

    name = "masked"


class Dense(TokenExecution):
    """Every token passes the MLP; no router is asked."""

    name = "dense"
    routed = False

    def update(self, stream, step: MLPStep) -> tuple:
        """Run the MLP on all tokens."""
        modulated = modulate(self._normed(stream), step.shift, step.scale).astype(step.dtype)
        return stream + step.gate[:, None] * step.mlp(modulated), None


class TopK(TokenExecution):
    """Of each image `capacity` tokens have a row, those with the largest logits."""

    name = "top_k"

    def route(self, tokens, step: MLPStep) -> tuple:
        """Return the gates, zero for tokens without a row, and the ranks of the logits."""
        logits = step.logits(tokens)
        gates = straight_through_gate(logits, step.noise)
        ranks = token_ranks(logits if step.noise is None else logits + step.noise)
        return jnp.where(ranks < self.capacity[0], gates, 0), ranks

    def run(self, function, tokens, gates, ranks):
        """Apply the function to the tokens that have a row, open or not: a closed gate has a gradient."""
        return run_on_rows(function, tokens, gates, ranks, capacity=self.capacity[0], platform=self.platform)

    def rows_run(self, needed, *, images: int, tokens: int) -> np.ndarray:
        """Return the rows of all images, whatever is needed."""
        return np.full(np.shape(needed), images * self.capacity[0])


def execution_runs(executions: tuple[TokenExecution, ...]) -> list[tuple[int, int, TokenExecution]]:
    """Return (first, last + 1, execution) of consecutive layers that run alike: each run is one scan."""
    runs, first = [], 0
    for execution, layers in itertools.groupby(executions):
        last = first + len(list(layers))
        runs.append((first, last, execution))
        first = last
    return runs


def token_ranks(scores):
    """Return the rank of every token in its image, 0 for the largest score: [B,N] from [B,N]."""
    return jnp.argsort(jnp.argsort(-scores, axis=-1, stable=True), axis=-1)


def running_counts(flags):
    """Count along the last axis the ones up to each position, itself included: int32 from 0 or 1, [...,n].

    As a product, which is exact for zeros and ones: a TPU takes longer over a cumulative sum.
    """
    size = flags.shape[-1]
    return (flags.astype(jnp.float32) @ jnp.triu(jnp.ones((size, size)))).astype(jnp.int32)


def run_on_rows(function, tokens, gates, rows, *, capacity: int, platform: str):
    """Pack the tokens that have a row, apply a function, and spread the result.

    Args:
      function: maps tokens [B,capacity,D] to [B,capacity,D], each by itself.
      tokens: [B,N,D].
      gates: [B,N]; the result is multiplied by them.
      rows: [B,N], distinct within an image from 0 to capacity - 1; tokens with any other number have none.
      capacity: rows of one image.
      platform: "tpu" moves tokens by a product with zeros and ones, the others by index.

    Returns:
      [B,N,D]: gate times the function's result where a token has a row, zeros elsewhere.
    """
    count = tokens.shape[1]
    has_row = (rows >= 0) & (rows < capacity)
    gates = jnp.where(has_row, gates, 0)
    if platform == "tpu":
        # One-hot products keep the fusions around them; gathers of short rows do not.
        chosen = (rows[:, None, :] == jnp.arange(capacity)[:, None]).astype(tokens.dtype)  # [B,R,N]
        packed = jnp.einsum("brn,bnd->brd", chosen, tokens)
        return gates[:, :, None] * jnp.einsum("brn,brd->bnd", chosen, function(packed))
    # A sort along the image's own axis, not a scatter: a scatter gathers the batch from all devices first.
    source = jnp.argsort(jnp.where(has_row, rows, count), axis=-1)[:, :capacity]  # [B,R]
    packed = jnp.take_along_axis(tokens, source[:, :, None], axis=1)  # [B,R,D]
    spread = jnp.take_along_axis(function(packed), jnp.where(has_row, rows, 0)[:, :, None], axis=1)
    return gates[:, :, None] * jnp.where(has_row[:, :, None], spread, 0)
