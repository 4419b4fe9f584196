"""DiT and DyDiT: one model, with or without routers.

A `Model` is a description plus pure functions of a parameter tree: `init`, `apply`, `time_gates`. The tree is
nested dicts of float32 arrays; the parameters of all blocks are stacked on a leading axis L and run under
`lax.scan`.

    tokens  = patches of x, plus positions                                   [B,N,D]
    c       = time embedding + label embedding                               [B,D]
    per block:  x += gate_a * attention(mod(norm(x)))        heads by t
                token gate from the un-normalised x          tokens by content
                x += token * gate_m * mlp(mod(norm(x)))      groups by t
    output  = noise and variance                                             [B,side,side,2C]

Two execution modes live here: `complete` (every gate open: the static DiT) and `gated` (everything is computed
and multiplied by the gates, as the original does).

Sources: DiT, https://arxiv.org/abs/2212.09748; DyDiT, https://arxiv.org/abs/2410.03456.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from dydit_jax.errors import InputError, require_known
from dydit_jax.models import cost
from dydit_jax.models.layers import (
    MLP,
    Attention,
    LabelEmbed,
    Modulation,
    Output,
    PatchEmbed,
    TimeEmbed,
    layer_norm,
    modulate,
)
from dydit_jax.models.routing import LAYOUTS, Routing, TimeRouter, TokenRouter, hard_gate, straight_through_gate
from dydit_jax.records import require_range

# The published sizes: depth, width, heads.
SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}
PATCHES = (2, 4, 8)
MODES = ("complete", "gated")
POSITIONS = ("sine_cosine", "stored")
REMATS = ("none", "block", "dots")


@dataclasses.dataclass(frozen=True)
class DiTConfig:
    """Everything that fixes the parameter tree, its meaning and its initial values.

    Attributes:
      depth, width, heads: L, D and H; groups of the MLP are as many as heads.
      patch: P, in pixels of the input.
      side: side of the square input, in pixels (image side / 8 for latents).
      channels: C of the input; the output has 2C, noise first, then variance.
      classes: number of labels; one more row stands for "no class".
      mlp_ratio: hidden channels of the MLP per channel of the width.
      routers: "none", "free" or "first_on", see `routing`.
      positions: "sine_cosine", the fixed table that DiT is trained with, or "stored": a table of the checkpoint's own,
        which training leaves alone.
      label_deviation, time_deviation: standard deviation of the initial label table and timestep layers.
    """

    depth: int
    width: int
    heads: int
    patch: int
    side: int
    channels: int = 4
    classes: int = 1000
    mlp_ratio: int = 4
    routers: str = "none"
    positions: str = "sine_cosine"
    label_deviation: float = 0.02
    time_deviation: float = 0.02

    def __post_init__(self):
        for name in ("depth", "width", "heads", "patch", "side", "channels", "classes", "mlp_ratio"):
            require_range(f"model.{name}", getattr(self, name), low=1)
        for name in ("label_deviation", "time_deviation"):
            require_range(f"model.{name}", getattr(self, name), low=0.0)
        require_known("model.routers", self.routers, LAYOUTS)
        require_known("model.positions", self.positions, POSITIONS)
        if self.width % self.heads:
            raise InputError(f"model.heads must divide model.width: {self.width} / {self.heads} leaves a rest.")
        if self.width % 4:
            raise InputError(f"model.width must be divisible by 4 for the position table, not {self.width}.")
        if self.side % self.patch:
            raise InputError(f"model.patch must divide model.side: {self.side} / {self.patch} leaves a rest.")
        if self.routers != "none" and self.width < 16:
            raise InputError(f"model.width must be at least 16 with routers, not {self.width}.")
        if self.routers == "first_on" and self.heads < 2:
            raise InputError("model.routers 'first_on' needs at least 2 heads; with one there is nothing to switch.")
        if self.hidden % self.heads:
            raise InputError(f"model.heads must divide the MLP's {self.hidden} channels, not {self.heads}.")

    @property
    def tokens(self) -> int:
        """N, the number of tokens of one image."""
        return (self.side // self.patch) ** 2

    @property
    def hidden(self) -> int:
        """Hidden channels of the MLP, G * F."""
        return self.width * self.mlp_ratio

    @property
    def null_label(self) -> int:
        """The label that stands for "no class"."""
        return self.classes

    @property
    def macs(self) -> cost.ModelMacs:
        """MACs of one image's forward pass."""
        return cost.model_macs(self)


def published_config(name: str, **fields) -> DiTConfig:
    """Make the configuration of a published size.

    Args:
      name: size and patch, e.g. "XL/2": S, B, L or XL by 2, 4 or 8.
      **fields: the other fields of `DiTConfig`, e.g. side=32 for 256 px and side=64 for 512 px.

    Raises:
      InputError: an unknown name, with the known ones.
    """
    require_known("model size", name, [f"{size}/{patch}" for size in SIZES for patch in PATCHES])
    size, patch = name.split("/")
    depth, width, heads = SIZES[size]
    return DiTConfig(depth=depth, width=width, heads=heads, patch=int(patch), **fields)


# --- The network ---------------------------------------------------------------------------------


def gate_tokens(function, x, gates):
    """Compute everything and multiply by the gates, as the original does."""
    return gates[..., None] * function(x)


class Block(nnx.Module):
    """One transformer block. Heads and groups are as many as its arrays have."""

    def __init__(self, config: DiTConfig, *, dtype, rngs: nnx.Rngs):
        self.modulation = Modulation(width=config.width, parts=6, dtype=dtype)
        self.attention = Attention(width=config.width, heads=config.heads, dtype=dtype, rngs=rngs)
        self.mlp = MLP(width=config.width, groups=config.heads, hidden=config.hidden, dtype=dtype, rngs=rngs)
        if config.routers != "none":
            self.token_router = TokenRouter(width=config.width, rngs=rngs)

    def __call__(self, x, condition, heads, groups, route_tokens, run_on_tokens=gate_tokens):
        """Run the block.

        Args:
          x: tokens [B,N,D], float32.
          condition: [B,D].
          heads, groups: gates [B or 1,H] and [B or 1,G]; None opens all.
          route_tokens: turns the token logits [B,N] into gates; None opens all.
          run_on_tokens: (function, tokens, gates) -> the function's result where a gate is on, zeros elsewhere.

        Returns:
          The new tokens and the token gates [B,N], or None.
        """
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.modulation(condition)
        attended = self.attention(modulate(layer_norm(x), shift_a, scale_a), heads)
        x = x + gate_a[:, None] * attended
        # The router reads the residual stream as it stands, not its norm.
        tokens = None if route_tokens is None else route_tokens(self.token_router(x))
        modulated, mlp = modulate(layer_norm(x), shift_m, scale_m), functools.partial(self.mlp, gates=groups)
        update = mlp(modulated) if tokens is None else run_on_tokens(mlp, modulated, tokens)
        return x + gate_m[:, None] * update, tokens


class DiT(nnx.Module):
    """The whole network: embeddings, stacked blocks, output, and the routers that know only the timestep."""

    def __init__(self, config: DiTConfig, *, dtype=jnp.float32, rngs: nnx.Rngs):
        width = config.width
        self.patch_embed = PatchEmbed(config, dtype=dtype, rngs=rngs)
        self.time_embed = TimeEmbed(width=width, deviation=config.time_deviation, rngs=rngs)
        self.label_embed = LabelEmbed(classes=config.classes, width=width, deviation=config.label_deviation, rngs=rngs)
        make_block = lambda rngs: Block(config, dtype=dtype, rngs=rngs)
        self.blocks = nnx.vmap(make_block)(rngs.split(config.depth))  # every parameter [L,...]
        self.output = Output(width=width, patch=config.patch, channels=2 * config.channels, dtype=dtype)
        if config.routers != "none":
            router = dict(layers=config.depth, width=width, units=config.heads, layout=config.routers, rngs=rngs)
            self.head_router = TimeRouter(**router)
            self.group_router = TimeRouter(**router)

    def time_gates(self, t, noise: Routing | None = None):
        """Return the gates of heads [B,L,H] and groups [B,L,G] at timesteps t [B]."""
        embedding = self.time_embed(t)
        heads = self.head_router(embedding, None if noise is None else noise.heads)
        return heads, self.group_router(embedding, None if noise is None else noise.groups)

    def __call__(self, x, t, labels, *, noise: Routing | None, gated: bool, remat: str, constrain: Callable):
        """Predict noise and variance; see `Model.apply`."""
        tokens = constrain(self.patch_embed(x))  # [B,N,D]
        condition = self.time_embed(t) + self.label_embed(labels)  # [B,D]
        heads, groups = self.time_gates(t, noise) if gated else (None, None)
        by_layer = lambda gates: None if gates is None else gates.swapaxes(0, 1)
        graph, blocks = nnx.split(self.blocks)

        def run_block(tokens, layer):
            block, heads, groups, token_noise = layer
            route = functools.partial(straight_through_gate, noise=token_noise) if gated else None
            tokens, gates = nnx.merge(graph, block)(tokens, condition, heads, groups, route)
            return constrain(tokens), gates

        layers = (blocks, by_layer(heads), by_layer(groups), by_layer(noise.tokens) if gated and noise else None)
        tokens, token_gates = jax.lax.scan(_rematerialised(run_block, remat), tokens, layers)
        routing = Routing(heads, groups, by_layer(token_gates)) if gated else None
        return self.output(tokens, condition), routing


def _rematerialised(function, remat: str):
    """Wrap a scan body so that the backward pass recomputes it: nothing kept, or the products kept."""
    if remat == "none":
        return function
    policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if remat == "dots" else None
    # Inside a scan common subexpressions cannot be merged anyway, and preventing it costs time.
    return jax.checkpoint(function, prevent_cse=False, policy=policy)


# --- The model as pure functions -----------------------------------------------------------------


def _unconstrained(x):
    return x


@dataclasses.dataclass(frozen=True)
class Model:
    """A network without its arrays: pure functions of a parameter tree.

    Attributes:
      config: what the network is.
      dtype: of products and attention scores; everything else is float32.
      matmul_precision: JAX's name of the precision of float32 products: "default" or "highest".
      remat: what the backward pass recomputes: "none", "block" (all of a block) or "dots" (all but products).
      constrain: called on tokens [B,N,D] between blocks, to pin their sharding.
    """

    config: DiTConfig
    dtype: jnp.dtype = jnp.float32
    matmul_precision: str = "default"
    remat: str = "none"
    constrain: Callable = _unconstrained

    def __post_init__(self):
        require_known("remat", self.remat, REMATS)

    def init(self, key) -> dict:
        """Make the initial parameters, a nested dict of float32 arrays, from a PRNG key."""
        network = DiT(self.config, rngs=nnx.Rngs(key))
        return nnx.to_pure_dict(nnx.state(network, nnx.Param))

    def abstract_params(self) -> dict:
        """Return the parameter tree as shapes, without computing anything."""
        return jax.eval_shape(self.init, jax.random.key(0))

    def apply(self, params, x, t, labels, *, mode: str, noise: Routing | None = None):
        """Run the network.

        Args:
          params: the parameter tree.
          x: noisy images or latents [B,side,side,C].
          t: timesteps [B], 0 .. train_steps - 1.
          labels: [B], 0 .. classes, where `classes` stands for "no class".
          mode: "complete" or "gated". Without routers both are the same.
          noise: logistic noise for the gates in training; None decides without noise.

        Returns:
          The prediction, float32 [B,side,side,2C] (noise first, then variance), and the `Routing`.

        Raises:
          InputError: an unknown mode.
        """
        require_known("mode", mode, MODES)
        gated = mode == "gated" and self.config.routers != "none"
        with jax.default_matmul_precision(self.matmul_precision):
            prediction, routing = self._network(params)(
                x, t, labels, noise=noise, gated=gated, remat=self.remat, constrain=self.constrain
            )
        return prediction, routing or self.open_routing(x.shape[0])

    def apply_layers(self, params, layers, x, t, labels, *, heads, groups, run_on_tokens):
        """Run the network with narrowed blocks, one after the other: their widths differ.

        Args:
          params: the parameter tree; its blocks are not used.
          layers: one parameter tree per block, with the heads and groups that are kept.
          x, t, labels: as for `apply`.
          heads, groups: per layer, gates [1,kept] of what is kept, or None where all of it is on.
          run_on_tokens: per layer, how the MLP runs on the tokens that are on; see `Block`.

        Returns:
          The prediction [B,side,side,2C] and the token gates [B,L,N].
        """
        graphs = _part_graphs(self.config, self.dtype)
        part = lambda name: nnx.merge(graphs[name], nnx.State(params[name]))
        routed = self.config.routers != "none"
        with jax.default_matmul_precision(self.matmul_precision):
            tokens = part("patch_embed")(x)  # [B,N,D]
            condition = part("time_embed")(t) + part("label_embed")(labels)  # [B,D]
            kept = []
            for layer, head_gates, group_gates, run in zip(layers, heads, groups, run_on_tokens, strict=True):
                block = nnx.merge(graphs["block"], nnx.State(layer))
                tokens, gates = block(tokens, condition, head_gates, group_gates, hard_gate if routed else None, run)
                kept.append(gates)
            prediction = part("output")(tokens, condition)
        return prediction, jnp.stack(kept, 1) if routed else self.open_routing(x.shape[0]).tokens

    def time_gates(self, params, t):
        """Return what is on at timesteps t [S]: heads [S,L,H] and groups [S,L,G], float32 0 or 1."""
        if self.config.routers == "none":
            routing = self.open_routing(t.shape[0])
            return routing.heads, routing.groups
        return self._network(params).time_gates(t)

    def open_routing(self, batch: int) -> Routing:
        """Return the routing of a complete pass over `batch` images: ones."""
        ones = lambda units: jnp.ones((batch, self.config.depth, units))
        return Routing(ones(self.config.heads), ones(self.config.heads), ones(self.config.tokens))

    def router_noise(self, key, batch: int) -> Routing:
        """Draw the logistic noise of one training batch from a PRNG key."""
        draw = lambda key, gates: jax.random.logistic(key, gates.shape)
        shapes = jax.eval_shape(lambda: self.open_routing(batch))
        keys = Routing(*jax.random.split(key, 3))
        return jax.tree.map(draw, keys, shapes)

    def _network(self, params) -> DiT:
        return nnx.merge(_graph(self.config, self.dtype), nnx.State(params))


@functools.cache
def _graph(config: DiTConfig, dtype):
    """Return nnx's static description of the network; traced once per configuration."""
    return nnx.graphdef(nnx.eval_shape(lambda: DiT(config, dtype=dtype, rngs=nnx.Rngs(0))))


@functools.cache
def _part_graphs(config: DiTConfig, dtype) -> dict:
    """Return nnx's static descriptions of the parts that narrowed weights are put into."""
    network = nnx.eval_shape(lambda: DiT(config, dtype=dtype, rngs=nnx.Rngs(0)))
    block = nnx.eval_shape(lambda: Block(config, dtype=dtype, rngs=nnx.Rngs(0)))
    graphs = {
        name: nnx.graphdef(getattr(network, name)) for name in ("patch_embed", "time_embed", "label_embed", "output")
    }
    return graphs | {"block": nnx.graphdef(block)}


def count_parameters(config: DiTConfig) -> int:
    """Count trained numbers plus the fixed position table, as published counts do."""
    leaves = jax.tree.leaves(Model(config).abstract_params())
    table = config.tokens * config.width if config.positions == "sine_cosine" else 0
    return sum(leaf.size for leaf in leaves) + table
