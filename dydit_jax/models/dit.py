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
from dydit_jax.models.attention import ATTENDED
from dydit_jax.models.config import DiTConfig
from dydit_jax.models.execution import Dense, Masked, MLPStep, TokenExecution, TopK, execution_runs
from dydit_jax.models.layers import (
    MLP,
    Attention,
    GuidanceEmbed,
    LabelEmbed,
    Modulation,
    Output,
    PatchEmbed,
    TimeEmbed,
    guided_embedding,
    unconstrained,
)
from dydit_jax.models.lora import MIXTURE, LoRAConfig, Mixture
from dydit_jax.models.products import PLATFORMS
from dydit_jax.models.routing import Routers, Routing, find_routers
from dydit_jax.registry import require_array

MODES = ("complete", "gated")
REMATS = ("none", "block", "dots")

# --- The network ---------------------------------------------------------------------------------


class Block(nnx.Module):
    """One transformer block. It has the heads and groups that its arrays have."""

    def __init__(self, config: DiTConfig, *, token_router: type | None, dtype, platform: str, rngs, lora=None):
        self.modulation = Modulation(width=config.width, parts=6, dtype=dtype, platform=platform)
        common = dict(width=config.width, dtype=dtype, platform=platform, rngs=rngs, lora=lora)
        self.attention = Attention(**common, heads=config.heads)
        self.mlp = MLP(**common, groups=config.heads, hidden=config.hidden)
        if token_router is not None:
            self.token_router = token_router(width=config.width, dtype=dtype, platform=platform, rngs=rngs)
        if lora is not None and lora.experts > 1:
            setattr(self, MIXTURE, Mixture(width=config.width, experts=lora.experts, rngs=rngs))

    def mixture(self, embedding):
        """Return the weights [B,E] of low-rank experts for the embedding of timesteps [B,D]; None where one is all."""
        return getattr(self, MIXTURE)(embedding) if hasattr(self, MIXTURE) else None

    def __call__(
        self, stream, modulation, heads, groups, *, execution: TokenExecution, noise=None, force_open=None, mixture=None
    ) -> tuple:
        """Run the block.

        Args:
          stream: of the tokens [B,N,D], from `execution.enter` or the block before.
          modulation: of the condition, six of [B,D]: shift, scale and gate of attention, then of the MLP.
          heads, groups: gates [B or 1,H] and [B or 1,G]; None opens all.
          execution: how its tokens run.
          noise: logistic noise for the tokens' logits [B,N], or None.
          force_open: of each image, whether all its tokens are open [B]; None leaves it to the router.
          mixture: of low-rank updates [B,E], or None.

        Returns:
          The new stream and the token gates [B,N], None where no router was asked.
        """
        shift_a, scale_a, gate_a, *of_mlp = modulation
        normed = execution.norm(stream, shift_a, scale_a, dtype=self.attention.dtype)
        attended = self.attention(normed, heads, mixture)
        stream = execution.add(stream, attended, gate_a)
        mlp, router = functools.partial(self.mlp, gates=groups, mixture=mixture), getattr(self, "token_router", None)
        return execution.update(stream, MLPStep(mlp, router, *of_mlp, self.mlp.dtype, noise, force_open))


class DiT(nnx.Module):
    """The whole network: embeddings, stacked blocks, output, and the routers that know only the timestep."""

    def __init__(self, config: DiTConfig, *, routers: Routers, dtype=jnp.float32, platform="cpu", rngs, lora=None):
        width = config.width
        self.patch_embed = PatchEmbed(config, dtype=dtype, rngs=rngs)
        self.time_embed = TimeEmbed(width=width, deviation=config.time_init_std, rngs=rngs)
        self.label_embed = LabelEmbed(classes=config.classes, width=width, deviation=config.label_init_std, rngs=rngs)
        if config.guidance_free:
            self.guidance_embed = GuidanceEmbed()
        settings = dict(token_router=routers.token, dtype=dtype, platform=platform, lora=lora)
        make_block = lambda rngs: Block(config, **settings, rngs=rngs)
        self.blocks = nnx.vmap(make_block)(rngs.split(config.depth))  # every parameter [L,...]
        channels = 2 * config.channels
        self.output = Output(width=width, patch=config.patch, channels=channels, dtype=dtype, platform=platform)
        if routers.heads is not None:
            sizes = dict(layers=config.depth, units=config.heads, width=width, layout=config.routers)
            self.head_router = routers.heads(**sizes, rngs=rngs)
            self.group_router = routers.groups(**sizes, rngs=rngs)
            self.gates_shape = (config.depth, config.heads)

    def time_gates(self, t, noise: Routing | None = None):
        """Return the gates of heads [B,L,H] and groups [B,L,G] at timesteps t [B]."""
        embedding, noise = self.time_embed(t), noise or Routing(None, None, None)
        heads = self.head_router(t, embedding, noise.heads)
        groups = self.group_router(t, embedding, noise.groups)
        for router, gates in ((self.head_router, heads), (self.group_router, groups)):
            method = f"{type(router).__name__}.__call__"
            require_array(gates, (len(t), *self.gates_shape), "float32", method=method, returns="gates [B,L,units]")
        return heads, groups

    def __call__(
        self, x, t, labels, *, model: "Model", gated: bool, noise: Routing | None = None, force_open=None, beta=None
    ):
        """Predict noise and variance; see `Model.apply`.

        Args:
          x, t, labels, noise, beta: as for `Model.apply`.
          model: whose settings the pass is run with.
          gated: whether the routers are asked; else all gates are open, and the routing returned is None.
          force_open: of each image, whether all its gates are open [B]; None leaves it to the routers.
        """
        constrain = model.constrain
        tokens = constrain(self.patch_embed(x))  # [B,N,D]
        # Pinned, here and in the blocks: for a gradient of split weights, the compiler would gather the batch instead.
        embedding = self.time_embed(t)
        guided = guided_embedding(self.time_embed, getattr(self, "guidance_embed", None), t, labels, beta, model.config)
        condition = constrain(guided + self.label_embed(labels))  # [B,D]
        heads, groups = self.time_gates(t, noise) if gated else (None, None)
        if force_open is not None:
            heads, groups = (jnp.where(force_open[:, None, None], 1.0, gates) for gates in (heads, groups))
        by_layer = lambda gates: None if gates is None else gates.swapaxes(0, 1)
        graph, blocks = nnx.split(self.blocks)
        layers = (blocks, by_layer(heads), by_layer(groups), by_layer(noise.tokens) if gated and noise else None)
        kept = []
        for first, last, execution in execution_runs(model.layer_executions(gated)):

            def run_block(stream, layer, execution=execution):
                block, heads, groups, noise = layer
                block = nnx.merge(graph, block)
                modulation = map(constrain, block.modulation(condition))
                routing = dict(execution=execution, noise=noise, force_open=force_open)
                stream, gates = block(stream, modulation, heads, groups, **routing, mixture=block.mixture(embedding))
                return constrain(stream), gates

            run = jax.tree.map(lambda leaf, first=first, last=last: leaf[first:last], layers)
            tokens, gates = jax.lax.scan(rematerialised(run_block, model.remat), tokens, run)
            kept.append(gates)
        routing = Routing(heads, groups, by_layer(jnp.concatenate(kept))) if gated else None
        return self.output(tokens, self.output.modulation(condition), constrain), routing


def rematerialised(function, remat: str):
    """Wrap a scan body so that the backward pass recomputes it: nothing kept, or products and what heads return."""
    if remat == "none":
        return function
    policies, policy = jax.checkpoint_policies, None
    if remat == "dots":
        kept = policies.save_only_these_names(ATTENDED)
        policy = policies.save_from_both_policies(policies.dots_with_no_batch_dims_saveable, kept)
    # Inside a scan common subexpressions cannot be merged anyway, and preventing it costs time.
    return jax.checkpoint(function, prevent_cse=False, policy=policy)


# --- The model as pure functions -----------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Layer:
    """One block of a narrowed network.

    Attributes:
      params: its parameter tree, with the heads and groups that are kept.
      heads, groups: gates [1,kept] of what is kept, or None where all of it is open.
      execution: how its tokens run.
    """

    params: dict
    heads: jax.Array | None
    groups: jax.Array | None
    execution: TokenExecution


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
      lora: low-rank updates among the parameters, or None.
      routers: classes of the routers, as they are registered when the model is made: a router that a user registers
        again under its name makes another model, which shares no compiled program with this one.
    """

    config: DiTConfig
    dtype: jnp.dtype = jnp.float32
    matmul_precision: str = "default"
    remat: str = "none"
    constrain: Callable = dataclasses.field(default=unconstrained, repr=False)
    platform: str = dataclasses.field(default_factory=jax.default_backend)
    lora: LoRAConfig | None = None
    routers: Routers = dataclasses.field(init=False, repr=False)

    def __post_init__(self):
        object.__setattr__(self, "routers", find_routers(self.config))
        require_known("remat", self.remat, REMATS)
        require_known("platform", self.platform, PLATFORMS)

    def init(self, key) -> dict:
        """Make the initial parameters, a nested dict of float32 arrays, from a PRNG key."""
        network = DiT(self.config, routers=self.routers, rngs=nnx.Rngs(key), lora=self.lora)
        return nnx.to_pure_dict(nnx.state(network, nnx.Param))

    def abstract_params(self) -> dict:
        """Return the parameter tree as shapes, without computing anything."""
        return jax.eval_shape(self.init, jax.random.key(0))

    def apply(self, params, x, t, labels, *, mode: str, noise: Routing | None = None, beta=None):
        """Run the network.

        Args:
          params: the parameter tree.
          x: noisy images or latents [B,side,side,C].
          t: timesteps [B], 0 .. train_steps - 1.
          labels: [B], 0 .. classes, where `classes` stands for "no class".
          mode: "complete" or "gated". Without routers both are the same.
          noise: logistic noise for the gates in training; None decides without noise.
          beta: of a model with guidance in one pass, 1 / scale of the guidance [B]; None is 1, without guidance.

        Returns:
          The prediction, float32 [B,side,side,2C] (noise first, then variance), and the `Routing`.

        Raises:
          InputError: an unknown mode.
        """
        require_known("mode", mode, MODES)
        gated = mode == "gated" and self.config.routers != "none"
        with jax.default_matmul_precision(self.matmul_precision):
            network = self._network(params)
            prediction, routing = network(x, t, labels, model=self, gated=gated, noise=noise, beta=beta)
        return prediction, routing or self.open_routing(x.shape[0])

    def apply_both(self, params, x, t, labels, *, noise: Routing | None = None, beta=None):
        """Run the gated and the complete pass on the same input as one: weights are read, and gathered, once.

        Args:
          params, x, t, labels, noise, beta: as for `apply`.

        Returns:
          The gated and the complete prediction, and the `Routing` of the gated one.

        Raises:
          InputError: a model without routers, or with places for only some of the tokens.
        """
        if self.config.routers == "none" or self.config.token_capacity:
            raise InputError("Both passes are run as one only with routers and without model.token_capacity.")
        # Neighbours, so that each device keeps its own pairs.
        pair = lambda leaf: jnp.repeat(leaf, 2, axis=0)
        force_open = jnp.tile(jnp.asarray([False, True]), len(x))
        noise, beta = jax.tree.map(pair, (noise, beta))
        settings = dict(model=self, gated=True, noise=noise, force_open=force_open, beta=beta)
        with jax.default_matmul_precision(self.matmul_precision):
            predictions, routing = self._network(params)(pair(x), pair(t), pair(labels), **settings)
        both = lambda leaf: leaf.reshape(-1, 2, *leaf.shape[1:])  # [B,2,...]
        gated, complete = jnp.moveaxis(both(predictions), 1, 0)
        return gated, complete, jax.tree.map(lambda gates: both(gates)[:, 0], routing)

    def layer_executions(self, gated: bool) -> tuple[TokenExecution, ...]:
        """Return how the tokens of each block run in `apply`: nothing is saved but by top-k."""
        if not gated:
            return (Dense(self.platform),) * self.config.depth
        return tuple(
            Masked(self.platform) if capacity == self.config.tokens else TopK(self.platform, (capacity,))
            for capacity in self.config.capacities
        )

    def apply_layers(self, params, layers: "list[Layer]", x, t, labels, modulations=None, beta=None):
        """Run the network with blocks of their own, one after the other: narrowed ones have different widths.

        Args:
          params: the parameter tree; its blocks are not used.
          layers: the blocks.
          x, t, labels, beta: as for `apply`; beta may be a scalar.
          modulations: from `modulations`, where they are known already.

        Returns:
          The prediction [B,side,side,2C] and the token gates [B,L,N].
        """
        part, block = self._parts(params)
        *of_blocks, of_output = modulations or self.modulations(params, layers, t, labels, beta)
        kept = []
        with jax.default_matmul_precision(self.matmul_precision):
            stream = layers[0].execution.enter(part("patch_embed")(x))  # of tokens [B,N,D]
            for layer, modulation in zip(layers, of_blocks, strict=True):
                run = functools.partial(block(layer.params), execution=layer.execution)
                stream, gates = run(stream, modulation, layer.heads, layer.groups)
                kept.append(gates)
            prediction = part("output")(layers[-1].execution.leave(stream), of_output)
        return prediction, self.open_routing(x.shape[0]).tokens if kept[0] is None else jnp.stack(kept, 1)

    def modulations(self, params, layers, t, labels, beta=None) -> tuple:
        """Return what the condition makes of each block, [6,B,D], and of the output, [2,B,D].

        Args:
          params, layers, beta: as for `apply_layers`.
          t, labels: timesteps and labels, [B].
        """
        part, block = self._parts(params)
        with jax.default_matmul_precision(self.matmul_precision):
            of_guidance = part("guidance_embed") if self.config.guidance_free else None
            guided = guided_embedding(part("time_embed"), of_guidance, t, labels, beta, self.config)
            condition = guided + part("label_embed")(labels)  # [B,D]
            of_blocks = [block(layer.params).modulation(condition) for layer in layers]
            return *of_blocks, part("output").modulation(condition)

    def _parts(self, params):
        """Return two functions: from a part's name, and from the parameters of a block, to its module."""
        graphs = _part_graphs(self.config, self.routers, self.dtype, self.platform)
        part = lambda name: nnx.merge(graphs[name], nnx.State(params[name]))
        return part, lambda layer: nnx.merge(graphs["block"], nnx.State(layer))

    def embed_time(self, params, t):
        """Return the embedding of timesteps t [B], float32 [B,D]."""
        part, _ = self._parts(params)
        return part("time_embed")(t)

    def time_gates(self, params, t):
        """Return what is open at timesteps t [S]: heads [S,L,H] and groups [S,L,G], float32 0 or 1."""
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
        graph = _graph(self.config, self.routers, self.dtype, self.platform, self.lora)
        return nnx.merge(graph, nnx.State(params))


@functools.cache
def _graph(config: DiTConfig, routers: Routers, dtype, platform: str, lora: LoRAConfig | None):
    """Return nnx's static description of the network; traced once per configuration.

    Raises:
      InputError: a user's router with state that is no parameter.
    """
    settings = dict(routers=routers, dtype=dtype, platform=platform, lora=lora)
    graph, _, others = nnx.split(nnx.eval_shape(lambda: DiT(config, **settings, rngs=nnx.Rngs(0))), nnx.Param, ...)
    for path, variable in nnx.to_flat_state(others):
        name, kind = "/".join(map(str, path)), type(variable).__name__
        raise InputError(f"A router may hold no state but nnx.Param; {name} is a {kind}.")
    return graph


@functools.cache
def _part_graphs(config: DiTConfig, routers: Routers, dtype, platform: str) -> dict:
    """Return nnx's static descriptions of the parts that narrowed weights are put into, low-rank updates folded."""
    settings = dict(dtype=dtype, platform=platform)
    network = nnx.eval_shape(lambda: DiT(config, routers=routers, **settings, rngs=nnx.Rngs(0)))
    block = nnx.eval_shape(lambda: Block(config, token_router=routers.token, **settings, rngs=nnx.Rngs(0)))
    parts = ("patch_embed", "time_embed", "label_embed", "output", *["guidance_embed"] * config.guidance_free)
    graphs = {name: nnx.graphdef(getattr(network, name)) for name in parts}
    return graphs | {"block": nnx.graphdef(block)}


def count_parameters(config: DiTConfig) -> int:
    """Count trained numbers plus the fixed position table, as published counts do."""
    leaves = jax.tree.leaves(Model(config).abstract_params())
    table = config.tokens * config.width if config.positions == "sine_cosine" else 0
    return sum(leaf.size for leaf in leaves) + table
