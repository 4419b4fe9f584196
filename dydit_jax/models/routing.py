"""What decides how much is computed: gates, the routers that set them, and the record of what was open.

There are two kinds of router. A *time router* opens heads and MLP groups by the timestep alone, in every block, so that
a whole sampling schedule is known before its first step. A *token router* looks at the tokens of a block and decides
which of them pass its MLP.

Source: DyDiT, https://arxiv.org/abs/2410.03456, sections 3.2 (timestep-wise dynamic width) and 3.3 (spatial-wise
dynamic token). There are three layouts:

    none      no routers: the static DiT
    free      a logit for every head and group: a block may have none open (checkpoints of December 2024)
    first_on  the first head and the first group have none and are always open (checkpoints of March 2025)

Both kinds stand in registries, to which a user can add: docs/extend.md.
"""

import dataclasses
import functools
import typing
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from dydit_jax.models.layers import constant, xavier_uniform
from dydit_jax.registry import Registry

LAYOUTS = ("none", "free", "first_on")
TEMPERATURE = 5.0
TIME_ROUTER_BIAS = 15.0  # sigmoid(15 / 5) = 0.95: everything starts open
TOKEN_ROUTER_BIAS = 35.0
TOKEN_ROUTER_REDUCTION = 16


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Routing:
    """One value per decision of a forward pass.

    As the output of a model the values are gates, exactly 0 or 1. As an input (`noise`) they are the logistic
    noise that training adds to the logits.

    Attributes:
      heads: [B,L,H].
      groups: [B,L,G].
      tokens: [B,L,N].
    """

    heads: jax.Array
    groups: jax.Array
    tokens: jax.Array


def hard_gate(logits):
    """Return 1.0 where sigmoid(logit) > 0.5, strictly, else 0.0."""
    return (logits > 0).astype(jnp.float32)


def straight_through_gate(logits, noise):
    """Return gates that are 0 or 1 forward and carry the gradient of a Gumbel-sigmoid backward.

    Args:
      logits: any shape, float32.
      noise: logistic noise of the same shape, the difference of two Gumbel draws; None decides by the
        logits alone, without a gradient.

    Returns:
      float32 gates, exactly 0.0 or 1.0.
    """
    if noise is None:
        return hard_gate(logits)
    soft = jax.nn.sigmoid((logits + noise) / TEMPERATURE)
    hard = (soft > 0.5).astype(soft.dtype)
    # In this order the two soft values cancel exactly, so the gate is exactly 0 or 1.
    return hard + (soft - jax.lax.stop_gradient(soft))


class TimeRouter(typing.Protocol):
    """What decides which heads, or which groups, are open at a timestep: an `nnx.Module`.

    Its gates must depend on the timestep alone: a sampling run is planned before its first step.
    """

    def __init__(self, *, layers: int, width: int, units: int, layout: str, rngs: nnx.Rngs):
        """Make the parameters of all layers.

        Args:
          layers: L.
          width: D, of the timestep's embedding.
          units: heads or groups of one layer.
          layout: "free", or "first_on" where the first unit of every layer must stay open.
          rngs: for initial values.
        """

    def __call__(self, t, embedding, noise) -> jax.Array:
        """Return gates [B,L,units], float32, exactly 0 or 1.

        Args:
          t: timesteps [B].
          embedding: of the timesteps [B,D], float32.
          noise: logistic noise [B,L,units] in training, else None; see `straight_through_gate`.
        """

    @staticmethod
    def macs(*, width: int, units: int, layout: str) -> int:
        """Return the multiply-adds of one layer for one timestep."""


class TokenRouter(typing.Protocol):
    """What decides which tokens pass the MLP of a block: an `nnx.Module`, one for each block."""

    def __init__(self, *, width: int, dtype, platform: str, rngs: nnx.Rngs):
        """Make the parameters of one block's router.

        Args:
          width: D.
          dtype: of the network's products.
          platform: "cpu", "gpu" or "tpu".
          rngs: for initial values.
        """

    def __call__(self, x) -> jax.Array:
        """Return logits [B,N] of tokens x [B,N,D], float32; a token is open where its logit is above 0."""

    @staticmethod
    def macs(*, width: int) -> int:
        """Return the multiply-adds for one token."""


class LinearTimeRouter(nnx.Module):
    """One Linear per layer from the timestep's embedding to the units of that layer."""

    def __init__(self, *, layers: int, width: int, units: int, layout: str, rngs: nnx.Rngs):
        outputs = _outputs(units, layout)
        self.kernel = nnx.Param(xavier_uniform(width, outputs)(rngs.params(), (layers, width, outputs)))
        self.bias = nnx.Param(constant(TIME_ROUTER_BIAS)(None, (layers, outputs)))
        self.units = units

    def logits(self, embedding):
        """Return float32 [B,L,units], or one less where the first unit is always open; embedding [B,D]."""
        return jnp.einsum("bd,ldh->blh", embedding, self.kernel[...], precision="highest") + self.bias[...]

    def __call__(self, t, embedding, noise):
        """Return gates [B,L,units] for embedding [B,D]; noise [B,L,units] or None.

        Where the first unit is always open, its noise is not used.
        """
        logits = self.logits(embedding)
        batch, layers, outputs = logits.shape
        always = self.units - outputs
        gates = straight_through_gate(logits, None if noise is None else noise[..., always:])
        return jnp.concatenate([jnp.ones((batch, layers, always)), gates], axis=-1)

    @staticmethod
    def macs(*, width: int, units: int, layout: str) -> int:
        """Return the multiply-adds of one layer for one timestep."""
        return width * _outputs(units, layout)


def _outputs(units: int, layout: str) -> int:
    """Return how many units have a logit."""
    return units - 1 if layout == "first_on" else units


@jax.custom_jvp
def dot_in_three_passes(x, kernel):
    """Multiply as a TPU does with `precision="high"`, in two products instead of three.

    Each factor is its bfloat16 rounding plus the bfloat16 rounding of the rest; the product of both rests is left out.
    The rounded and the rest of a narrow kernel stand side by side, to fill more columns of the matrix units.

    Args:
      x: [...,D], float32.
      kernel: [D,R], float32.

    Returns:
      [...,R], float32.
    """
    (rounded, rest), (kernel_rounded, kernel_rest) = _in_bfloat16(x), _in_bfloat16(kernel)
    dot = functools.partial(jnp.dot, preferred_element_type=jnp.float32)
    of_rounded = dot(rounded, jnp.concatenate([kernel_rounded, kernel_rest], axis=1))  # [...,2R]
    of_kernel_rounded, of_kernel_rest = jnp.split(of_rounded, 2, axis=-1)
    return of_kernel_rounded + of_kernel_rest + dot(rest, kernel_rounded)


@dot_in_three_passes.defjvp
def _derivative(values, tangents):
    # Not that of the roundings, which would round the gradient as well.
    (x, kernel), (x_tangent, kernel_tangent) = values, tangents
    dot = functools.partial(jnp.dot, precision="high")
    return dot_in_three_passes(x, kernel), dot(x_tangent, kernel) + dot(x, kernel_tangent)


def _in_bfloat16(x):
    """Return x rounded, and what that leaves, rounded as well."""
    # Not by `astype` alone, there and back, which a compiler may leave out.
    rounded = jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
    return rounded.astype(jnp.bfloat16), (x - rounded).astype(jnp.bfloat16)


class MLPTokenRouter(nnx.Module):
    """Linear, ReLU, Linear from each token to one logit, in float32: its sign is a discontinuity.

    Where the network computes in bfloat16, what reaches the router carries that rounding already. Its product is then
    made in three bfloat16 passes (TPU) or in TF32 (GPU), which is shorter and adds less than that.
    """

    def __init__(self, *, width: int, dtype=jnp.float32, platform: str = "cpu", rngs: nnx.Rngs):
        reduced = width // TOKEN_ROUTER_REDUCTION
        self.kernel_in = nnx.Param(xavier_uniform(width, reduced)(rngs.params(), (width, reduced)))
        self.bias_in = nnx.Param(jnp.zeros(reduced))
        self.kernel_out = nnx.Param(xavier_uniform(reduced, 1)(rngs.params(), (reduced, 1)))
        self.bias_out = nnx.Param(constant(TOKEN_ROUTER_BIAS)(None, (1,)))
        exact = dtype != jnp.bfloat16
        self.in_passes = platform == "tpu" and not exact
        self.precision = "highest" if exact else "high"

    def hidden(self, x):
        """Return what the first layer makes of tokens x [B,N,D]: [B,N,R]."""
        dot = dot_in_three_passes if self.in_passes else functools.partial(jnp.dot, precision=self.precision)
        return jax.nn.relu(dot(x, self.kernel_in[...]) + self.bias_in[...])

    def first_layer(self) -> tuple:
        """Return the kernel [D,R] and the bias [R] of the first layer."""
        return self.kernel_in[...], self.bias_in[...]

    def last_layer(self) -> tuple:
        """Return the kernel [R] and the bias [1] of the second layer."""
        return self.kernel_out[...][:, 0], self.bias_out[...]

    def __call__(self, x):
        """Return the logits [B,N] of tokens x [B,N,D]."""
        kernel, bias = self.last_layer()
        # A sum, not a product with one column, which a compiler makes a kernel of its own for.
        return (self.hidden(x) * kernel).sum(-1) + bias

    @staticmethod
    def macs(*, width: int) -> int:
        """Return the multiply-adds for one token."""
        reduced = width // TOKEN_ROUTER_REDUCTION
        return width * reduced + reduced


TIME_ROUTERS = Registry("time router", TimeRouter, {"linear": LinearTimeRouter}, base=nnx.Module)
TOKEN_ROUTERS = Registry("token router", TokenRouter, {"mlp": MLPTokenRouter}, base=nnx.Module)


def register_time_router(name: str) -> Callable:
    """Return a decorator that adds a `TimeRouter` of one's own as `model.time_router`; see `Registry.register`."""
    return TIME_ROUTERS.register(name)


def register_token_router(name: str) -> Callable:
    """Return a decorator that adds a `TokenRouter` of one's own as `model.token_router`; see `Registry.register`."""
    return TOKEN_ROUTERS.register(name)


@dataclasses.dataclass(frozen=True)
class Routers:
    """The classes of a model's routers; None where it has none."""

    heads: type[TimeRouter] | None = None
    groups: type[TimeRouter] | None = None
    token: type[TokenRouter] | None = None

    @property
    def classes(self) -> tuple[type, ...]:
        """All that there are."""
        return tuple(cls for cls in (self.heads, self.groups, self.token) if cls is not None)


def find_routers(config) -> Routers:
    """Return the classes of the routers that a model's config names."""
    if config.routers == "none":
        return Routers()
    heads, groups = (TIME_ROUTERS[name] for name in time_router_names(config.time_router))
    return Routers(heads, groups, TOKEN_ROUTERS[config.token_router])


def time_router_names(names: str) -> tuple[str, str]:
    """Return the names of the time routers of heads and of groups: one for both, or two with a comma between them."""
    heads, _, groups = names.partition(",")
    return heads.strip(), groups.strip() or heads.strip()
