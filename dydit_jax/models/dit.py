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
import itertools
import math
import operator
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from dydit_jax.errors import InputError, require_known
from dydit_jax.models import cost, fused, pooled
from dydit_jax.models.attention import PLATFORMS
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
    modulated_norm_thrice,
    unconstrained,
)
from dydit_jax.models.routing import LAYOUTS, Routing, TimeRouter, TokenRouter, straight_through_gate
from dydit_jax.models.tokens import multiply_by_gates, ranks, run_on_places
from dydit_jax.records import read_record, require_range

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
      token_capacity: share of an image's tokens that pass the MLP at most, one number for all blocks or one per block;
        empty leaves the choice to the routers alone. See `tokens`.
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
    token_capacity: tuple[float, ...] = ()
    label_deviation: float = 0.02
    time_deviation: float = 0.02

    def __post_init__(self):
        for name in ("depth", "width", "heads", "patch", "side", "channels", "classes", "mlp_ratio"):
            require_range(f"model.{name}", getattr(self, name), low=1)
        for name in ("label_deviation", "time_deviation"):
            require_range(f"model.{name}", getattr(self, name), low=0.0)
        require_known("model.routers", self.routers, LAYOUTS)
        require_known("model.positions", self.positions, POSITIONS)
        if len(self.token_capacity) not in (0, 1, self.depth):
            raise InputError(
                f"model.token_capacity must have no number, one, or one for each of the {self.depth} blocks, not "
                f"{len(self.token_capacity)}."
            )
        if self.token_capacity and self.routers == "none":
            raise InputError("model.token_capacity needs routers that choose the tokens; model.routers is 'none'.")
        for share in self.token_capacity:
            if not 0 < share <= 1:
                raise InputError(f"model.token_capacity must be above 0 and at most 1, not {share!r}.")
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
    def capacities(self) -> tuple[int, ...]:
        """How many tokens of an image may pass each block's MLP; N where there is no limit."""
        shares = self.token_capacity or (1.0,)
        shares = shares * self.depth if len(shares) == 1 else shares
        return tuple(math.ceil(round(share * self.tokens, 6)) for share in shares)

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


def read_model(section: Mapping) -> DiTConfig:
    """Read the section `model`: either `size` ("XL/2") or depth, width, heads and patch."""
    section = {key: value for key, value in section.items() if value is not None}
    if "size" not in section:
        return read_record(DiTConfig, section, "model")
    size = section.pop("size")
    known = published_config(size, side=64)
    fixed = {"depth", "width", "heads", "patch"} & set(section)
    if fixed:
        raise InputError(f"model.size {size!r} fixes {', '.join(sorted(fixed))}; give the one or the others.")
    return read_record(DiTConfig, dict(dataclasses.asdict(known), **section), "model")


# --- The network ---------------------------------------------------------------------------------


class Block(nnx.Module):
    """One transformer block. Heads and groups are as many as its arrays have."""

    def __init__(self, config: DiTConfig, *, dtype, platform: str, rngs: nnx.Rngs):
        self.modulation = Modulation(width=config.width, parts=6, dtype=dtype, platform=platform)
        common = dict(width=config.width, dtype=dtype, platform=platform, rngs=rngs)
        self.attention = Attention(**common, heads=config.heads)
        self.mlp = MLP(**common, groups=config.heads, hidden=config.hidden)
        if config.routers != "none":
            self.token_router = TokenRouter(width=config.width, dtype=dtype, platform=platform, rngs=rngs)
        self.platform = platform

    def __call__(
        self,
        x,
        modulation,
        heads,
        groups,
        *,
        routed,
        noise=None,
        capacity=None,
        run_on_tokens=None,
        paired=False,
        constrain=unconstrained,
    ):
        """Run the block.

        Args:
          x: tokens [B,N,D], float32.
          modulation: of the condition, six of [B,D]: shift, scale and gate of attention, then of the MLP.
          heads, groups: gates [B or 1,H] and [B or 1,G]; None opens all.
          routed: whether tokens are routed; False opens all.
          noise: logistic noise for the tokens' logits [B,N], or None.
          capacity: places for tokens of one image; None or N gives every token one.
          run_on_tokens: (function, tokens, gates) -> the function's result where a gate is on, zeros elsewhere; None
            multiplies. Not used where `capacity` is below N.
          paired: every second image has all gates open; noise and the gates returned are of the others, [B/2,N].
          constrain: pins the sharding of anything with the leading axis B.

        Returns:
          The new tokens and the token gates [B,N], or None.
        """
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = map(constrain, modulation)
        norm = functools.partial(layer_norm, single_pass=self.platform == "tpu")
        if self.platform == "tpu" and run_on_tokens is not None:  # complete blocks: slower on a v6e
            modulated = modulated_norm_thrice(x, shift_a, scale_a)
        else:
            modulated = modulate(norm(x), shift_a, scale_a)
        attended = self.attention(modulated, heads)
        x = x + gate_a[:, None] * attended
        modulated = modulate(norm(x), shift_m, scale_m).astype(self.mlp.dtype)
        mlp = functools.partial(self.mlp, gates=groups)
        if not routed:
            return x + gate_m[:, None] * mlp(modulated), None
        # The router reads the residual stream as it stands, not its norm.
        logits = self.token_router(first_of_pairs(x) if paired else x)
        gates = straight_through_gate(logits, noise)
        if capacity is None or capacity == x.shape[1]:
            update = (run_on_tokens or multiply_by_gates)(mlp, modulated, with_open(gates) if paired else gates)
        else:
            places = ranks(logits if noise is None else logits + noise)
            gates = jnp.where(places < capacity, gates, 0)
            update = run_on_places(mlp, modulated, gates, places, capacity=capacity, platform=self.platform)
        return x + gate_m[:, None] * update, gates

    def run_fused(self, stream: fused.Stream, modulation, *, capacity: int | None):
        """Run the block in the kernels of `fused`, all heads and groups that its arrays have.

        Args:
          stream: the tokens.
          modulation: as for a call.
          capacity: places for the tokens of all images that are on; None opens all tokens.

        Returns:
          The new tokens and the token gates [B,N], or None.
        """
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation
        dtype = self.mlp.dtype
        attended = self.attention(fused.norm(stream, shift_a, scale_a, dtype=dtype), None)
        if capacity is None:
            x, normed = fused.add_and_norm(stream, attended, gate_a, shift_m, scale_m, dtype=dtype)
            return fused.Stream(x, fused.Update(self.mlp(normed, None), None, gate_m)), None
        x = fused.add(stream, attended, gate_a)
        router = self.token_router.hidden(x), *self.token_router.last_layer()
        packed, places, gates = fused.pack(x, *router, shift_m, scale_m, capacity=capacity, dtype=dtype)
        return fused.Stream(x, fused.Update(self.mlp(packed, None), places, gate_m)), gates

    def run_pooled(self, stream: pooled.Stream, modulation, heads, groups, *, capacity: int):
        """Run the block with the kernels of `pooled` around its MLP.

        Args:
          stream: the tokens.
          modulation, heads, groups: as for a call; gates are the same for all images.
          capacity: places for the tokens of all images that are on.

        Returns:
          The new tokens and the token gates [B,N].
        """
        batch, tokens, _ = stream.x.shape
        if capacity == batch * tokens:
            x, gates = self(stream.x, modulation, heads, groups, routed=True)
            return pooled.Stream(x), gates
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation
        modulated = modulated_norm_thrice(stream.x, shift_a, scale_a, stream.statistics)
        x = stream.x + gate_a[:, None] * self.attention(modulated, heads)
        gates = straight_through_gate(self.token_router(x), None)
        places = pooled.places_of(gates, capacity=capacity)
        packed = pooled.pack(x, places, shift_m, scale_m, capacity=capacity, dtype=self.mlp.dtype)
        return pooled.spread(x, self.mlp(packed[None], groups)[0], places, gate_m), gates


class DiT(nnx.Module):
    """The whole network: embeddings, stacked blocks, output, and the routers that know only the timestep."""

    def __init__(self, config: DiTConfig, *, dtype=jnp.float32, platform: str = "cpu", rngs: nnx.Rngs):
        width, self.capacities = config.width, config.capacities
        self.patch_embed = PatchEmbed(config, dtype=dtype, rngs=rngs)
        self.time_embed = TimeEmbed(width=width, deviation=config.time_deviation, rngs=rngs)
        self.label_embed = LabelEmbed(classes=config.classes, width=width, deviation=config.label_deviation, rngs=rngs)
        make_block = lambda rngs: Block(config, dtype=dtype, platform=platform, rngs=rngs)
        self.blocks = nnx.vmap(make_block)(rngs.split(config.depth))  # every parameter [L,...]
        channels = 2 * config.channels
        self.output = Output(width=width, patch=config.patch, channels=channels, dtype=dtype, platform=platform)
        if config.routers != "none":
            router = dict(layers=config.depth, width=width, units=config.heads, layout=config.routers, rngs=rngs)
            self.head_router = TimeRouter(**router)
            self.group_router = TimeRouter(**router)

    def time_gates(self, t, noise: Routing | None = None):
        """Return the gates of heads [B,L,H] and groups [B,L,G] at timesteps t [B]."""
        embedding = self.time_embed(t)
        heads = self.head_router(embedding, None if noise is None else noise.heads)
        return heads, self.group_router(embedding, None if noise is None else noise.groups)

    def __call__(self, x, t, labels, *, noise: Routing | None, gated, remat: str, constrain: Callable, paired=False):
        """Predict noise and variance; see `Model.apply`, for `paired` `Model.apply_both`."""
        tokens = constrain(self.patch_embed(x))  # [B,N,D]
        # Pinned, here and in the blocks: for a gradient of split weights, the compiler would gather the batch instead.
        condition = constrain(self.time_embed(t) + self.label_embed(labels))  # [B,D]
        heads, groups = self.time_gates(first_of_pairs(t) if paired else t, noise) if gated else (None, None)
        used_heads, used_groups = (with_open(heads), with_open(groups)) if paired else (heads, groups)
        by_layer = lambda gates: None if gates is None else gates.swapaxes(0, 1)
        graph, blocks = nnx.split(self.blocks)
        token_noise = by_layer(noise.tokens) if gated and noise else None
        layers = (blocks, by_layer(used_heads), by_layer(used_groups), token_noise)
        kept = []
        for first, last, capacity in capacity_runs(self.capacities):

            def run_block(tokens, layer, capacity=capacity):
                block, heads, groups, noise = layer
                routing = dict(routed=gated, noise=noise, capacity=capacity, paired=paired, constrain=constrain)
                block = nnx.merge(graph, block)
                tokens, gates = block(tokens, block.modulation(condition), heads, groups, **routing)
                return constrain(tokens), gates

            run = jax.tree.map(lambda leaf, first=first, last=last: leaf[first:last], layers)
            tokens, gates = jax.lax.scan(_rematerialised(run_block, remat), tokens, run)
            kept.append(gates)
        routing = Routing(heads, groups, by_layer(jnp.concatenate(kept))) if gated else None
        return self.output(tokens, self.output.modulation(condition), constrain), routing


def first_of_pairs(x):
    """Return every second row of [2B,...], beginning with the first, [B,...]; each device keeps its own."""
    return x.reshape(-1, 2, *x.shape[1:])[:, 0]


def with_open(gates):
    """Set an open gate after each row of [B,...]: [2B,...]."""
    return jnp.stack([gates, jnp.ones_like(gates)], axis=1).reshape(-1, *gates.shape[1:])


def capacity_runs(capacities: tuple[int, ...]) -> list[tuple[int, int, int]]:
    """Return (first, last + 1, capacity) of consecutive layers with the same capacity: each run is one scan."""
    runs, first = [], 0
    for capacity, layers in itertools.groupby(capacities):
        last = first + len(list(layers))
        runs.append((first, last, capacity))
        first = last
    return runs


def _rematerialised(function, remat: str):
    """Wrap a scan body so that the backward pass recomputes it: nothing kept, or the products kept."""
    if remat == "none":
        return function
    policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if remat == "dots" else None
    # Inside a scan common subexpressions cannot be merged anyway, and preventing it costs time.
    return jax.checkpoint(function, prevent_cse=False, policy=policy)


# --- The model as pure functions -----------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Model:
    """A network without its arrays: pure functions of a parameter tree.

    Attributes:
      config: what the network is.
      dtype: of products and attention scores; everything else is float32.
      matmul_precision: JAX's name of the precision of float32 products: "default" or "highest".
      remat: what the backward pass recomputes: "none", "block" (all of a block) or "dots" (all but products).
      constrain: called on arrays with the leading axis B, to pin their sharding.
      platform: "cpu", "gpu" or "tpu": for which one attention is written; that of this process by default.
    """

    config: DiTConfig
    dtype: jnp.dtype = jnp.float32
    matmul_precision: str = "default"
    remat: str = "none"
    constrain: Callable = dataclasses.field(default=unconstrained, repr=False)
    platform: str = dataclasses.field(default_factory=jax.default_backend)

    def __post_init__(self):
        require_known("remat", self.remat, REMATS)
        require_known("platform", self.platform, PLATFORMS)

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

    def apply_both(self, params, x, t, labels, *, noise: Routing | None = None):
        """Run the gated and the complete pass on the same input as one: weights are read, and gathered, once.

        Args:
          params, x, t, labels, noise: as for `apply`.

        Returns:
          The gated and the complete prediction, and the `Routing` of the gated one.

        Raises:
          InputError: a model without routers, or with places for only some of the tokens.
        """
        if self.config.routers == "none" or self.config.token_capacity:
            raise InputError("Both passes are run as one only with routers and without model.token_capacity.")
        pair = lambda leaf: jnp.repeat(leaf, 2, axis=0)  # neighbours, so that each device keeps its own
        with jax.default_matmul_precision(self.matmul_precision):
            settings = dict(noise=noise, gated=True, remat=self.remat, constrain=self.constrain, paired=True)
            predictions, routing = self._network(params)(pair(x), pair(t), pair(labels), **settings)
        gated, complete = jnp.moveaxis(predictions.reshape(-1, 2, *predictions.shape[1:]), 1, 0)
        return gated, complete, routing

    def apply_layers(self, params, layers, x, t, labels, *, heads, groups, run_on_tokens=None, modulations=None):
        """Run the network with blocks of their own, one after the other: narrowed ones have different widths.

        Args:
          params: the parameter tree; its blocks are not used.
          layers: one parameter tree per block, with the heads and groups that are kept.
          x, t, labels: as for `apply`.
          heads, groups: per layer, gates [1,kept] of what is kept, or None where all of it is on.
          run_on_tokens: per layer, how the MLP runs on the tokens that are on, see `Block`; None opens all tokens.
          modulations: from `modulations`, where they are known already.

        Returns:
          The prediction [B,side,side,2C] and the token gates [B,L,N].
        """
        routed = self.config.routers != "none" and run_on_tokens is not None

        def run_block(block, layer, tokens, modulation):
            routing = dict(routed=routed, capacity=self.config.capacities[layer])
            if routed:
                routing["run_on_tokens"] = run_on_tokens[layer]
            return block(tokens, modulation, heads[layer], groups[layer], **routing)

        return self._through_layers(params, layers, x, t, labels, modulations, run_block=run_block)

    @property
    def runs_fused(self) -> bool:
        """Whether `apply_fused` can be had: on a GPU, for sizes that its kernels accept, without places per image."""
        suits = self.platform == "gpu" and not self.config.token_capacity
        return suits and fused.accepts(self.config.tokens, self.config.width)

    def apply_fused(self, params, layers, x, t, labels, *, capacities=None, modulations=None):
        """Run the network as `apply_layers` does, all heads and groups on, in kernels for GPUs where `runs_fused`.

        Args:
          params, layers, x, t, labels, modulations: as for `apply_layers`.
          capacities: per layer, places for the tokens of all images that are on; None opens all tokens. Where more are
            on, the result is void.

        Returns:
          The prediction [B,side,side,2C] and the token gates [B,L,N].
        """
        routed = self.config.routers != "none" and capacities is not None

        def run_block(block, layer, stream, modulation):
            return block.run_fused(stream, modulation, capacity=capacities[layer] if routed else None)

        kernels = dict(run_block=run_block, begin=fused.Stream, end=fused.Stream.settled)
        return self._through_layers(params, layers, x, t, labels, modulations, **kernels)

    def runs_pooled(self, images: int) -> bool:
        """Tell whether `apply_pooled` can be had for so many images: as `runs_fused`, on a TPU."""
        suits = self.platform == "tpu" and self.config.routers != "none" and not self.config.token_capacity
        return suits and pooled.accepts(images, self.config.tokens, self.config.width, self.dtype)

    def apply_pooled(self, params, layers, x, t, labels, *, heads, groups, capacities, modulations=None):
        """Run the network as `apply_layers` does, in kernels for TPUs where `runs_pooled`.

        Args:
          params, layers, x, t, labels, heads, groups, modulations: as for `apply_layers`.
          capacities: per layer, places for the tokens of all images that are on. Where more are on, the result is void.

        Returns:
          The prediction [B,side,side,2C] and the token gates [B,L,N].
        """

        def run_block(block, layer, stream, modulation):
            gates = dict(heads=heads[layer], groups=groups[layer])
            return block.run_pooled(stream, modulation, **gates, capacity=capacities[layer])

        kernels = dict(run_block=run_block, begin=pooled.Stream, end=operator.attrgetter("x"))
        return self._through_layers(params, layers, x, t, labels, modulations, **kernels)

    def _through_layers(self, params, layers, x, t, labels, modulations, *, run_block, begin=None, end=None):
        """Run the network with blocks of their own.

        Args:
          params, layers, x, t, labels, modulations: as for `apply_layers`.
          run_block: (block, its number, stream, modulation) -> the new stream and the token gates, or None if all on.
          begin, end: from tokens to a stream and back; None if it is the tokens.

        Returns:
          The prediction [B,side,side,2C] and the token gates [B,L,N].
        """
        part, block = self._parts(params)
        *of_blocks, of_output = modulations or self.modulations(params, layers, t, labels)
        with jax.default_matmul_precision(self.matmul_precision):
            tokens, kept = part("patch_embed")(x), []  # [B,N,D]
            stream = begin(tokens) if begin else tokens
            for number, (layer, modulation) in enumerate(zip(layers, of_blocks, strict=True)):
                stream, gates = run_block(block(layer), number, stream, modulation)
                kept.append(gates)
            prediction = part("output")(end(stream) if end else stream, of_output)
        return prediction, self.open_routing(x.shape[0]).tokens if kept[0] is None else jnp.stack(kept, 1)

    def modulations(self, params, layers, t, labels) -> tuple:
        """Return what the condition makes of each block, [6,B,D], and of the output, [2,B,D].

        Args:
          params, layers: as for `apply_layers`.
          t, labels: timesteps and labels, [B].
        """
        part, block = self._parts(params)
        with jax.default_matmul_precision(self.matmul_precision):
            condition = part("time_embed")(t) + part("label_embed")(labels)  # [B,D]
            return *(block(layer).modulation(condition) for layer in layers), part("output").modulation(condition)

    def _parts(self, params):
        """Return two functions: from a part's name, and from the parameters of a block, to its module."""
        graphs = _part_graphs(self.config, self.dtype, self.platform)
        part = lambda name: nnx.merge(graphs[name], nnx.State(params[name]))
        return part, lambda layer: nnx.merge(graphs["block"], nnx.State(layer))

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
        draw = lambda key, gates: jax.random.logistic(key, gates.shape, jnp.float32)
        shapes = jax.eval_shape(lambda: self.open_routing(batch))
        keys = Routing(*jax.random.split(key, 3))
        return jax.tree.map(draw, keys, shapes)

    def _network(self, params) -> DiT:
        return nnx.merge(_graph(self.config, self.dtype, self.platform), nnx.State(params))


@functools.cache
def _graph(config: DiTConfig, dtype, platform: str):
    """Return nnx's static description of the network; traced once per configuration."""
    return nnx.graphdef(nnx.eval_shape(lambda: DiT(config, dtype=dtype, platform=platform, rngs=nnx.Rngs(0))))


@functools.cache
def _part_graphs(config: DiTConfig, dtype, platform: str) -> dict:
    """Return nnx's static descriptions of the parts that narrowed weights are put into."""
    network = nnx.eval_shape(lambda: DiT(config, dtype=dtype, platform=platform, rngs=nnx.Rngs(0)))
    block = nnx.eval_shape(lambda: Block(config, dtype=dtype, platform=platform, rngs=nnx.Rngs(0)))
    graphs = {
        name: nnx.graphdef(getattr(network, name)) for name in ("patch_embed", "time_embed", "label_embed", "output")
    }
    return graphs | {"block": nnx.graphdef(block)}


def count_parameters(config: DiTConfig) -> int:
    """Count trained numbers plus the fixed position table, as published counts do."""
    leaves = jax.tree.leaves(Model(config).abstract_params())
    table = config.tokens * config.width if config.positions == "sine_cosine" else 0
    return sum(leaf.size for leaf in leaves) + table
