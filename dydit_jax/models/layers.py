"""The layers of a diffusion transformer, each with its routed unit as an array axis.

Axes, the same letters in every file, comment and einsum of this project:

    B batch    N tokens    D width    H heads    K head size    G MLP groups    F units of a group
    L layers   C channels of the input image or latent          P patch side    S sampling steps

Heads and groups are axes of their kernels ([3,D,H,K], [H,K,D], [D,G,F], [G,F,D]): a gate is then a
broadcast, a narrowed layer an index on one axis, a sharding a name. Every layer reads H and G from its
arrays, never from a config, so that one code serves the full and the narrowed weights.

Parameters are float32. Each layer computes in its `dtype`; norms, softmax, embeddings of the timestep and
the residual stream stay in float32.

Source: DiT, https://arxiv.org/abs/2212.09748, section 3 and figure 3.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dydit_jax.models.attention import attend
from dydit_jax.models.lora import add_updates, expand, has_update, reducing_kernel
from dydit_jax.models.products import multiply, separate

TIME_FREQUENCIES = 128  # 128 cosines and 128 sines: 256 features
MAX_PERIOD = 10_000.0
MAX_BETA = 1000  # what beta = 1 is to the features
NORM_EPSILON = 1e-6


# --- Initialisers and arithmetic -----------------------------------------------------------------


def xavier_uniform(fan_in: int, fan_out: int):
    """Xavier's uniform initialiser for a kernel whose axes are those of a [fan_in, fan_out] matrix, split."""
    bound = math.sqrt(6.0 / (fan_in + fan_out))
    return lambda key, shape: jax.random.uniform(key, shape, jnp.float32, -bound, bound)


def constant(value: float):
    """Initialiser that ignores its key."""
    return lambda key, shape: jnp.full(shape, value, jnp.float32)


def normal(deviation: float):
    """Gaussian initialiser of mean zero."""
    return lambda key, shape: deviation * jax.random.normal(key, shape, jnp.float32)


def layer_norm(x, *, single_pass: bool = False):
    """Normalise over the last axis in float32, without learned scale or shift.

    Args:
      x: [...,D].
      single_pass: whether the variance is E[x^2] - E[x]^2, which a compiler can put into the product that makes x. It
        loses digits where the mean is far larger than the deviation, which is not so in a residual stream.
    """
    x = x.astype(jnp.float32)
    if single_pass:
        mean, inverse = single_pass_statistics(x)
        return (x - mean) * inverse
    centred = x - x.mean(-1, keepdims=True)
    return centred * jax.lax.rsqrt(jnp.mean(centred * centred, -1, keepdims=True) + NORM_EPSILON)


def modulate(x, shift, scale):
    """Return x * (1 + scale) + shift with one shift and scale per image: x [B,N,D], the others [B,D]."""
    return x * (1 + scale[:, None]) + shift[:, None]


def modulated_norm_thrice(x, shift, scale, statistics=None):
    """Return the modulated norm of x three times, written in three ways, for queries, keys and values.

    Written differently, so that a TPU's compiler cannot see that they are equal. It would compute one and keep it for
    three products in fast memory, which the attention scores need. What it gains: docs/speed/README.md.

    Args:
      x: tokens [B,N,D], float32.
      shift, scale: [B,D].
      statistics: as for `single_pass_statistics`.

    Returns:
      Three times [B,N,D].
    """
    mean, inverse = single_pass_statistics(x, statistics)
    shift, factor = shift[:, None], 1 + scale[:, None]
    return (
        (x - mean) * inverse * factor + shift,
        (x * inverse - mean * inverse) * factor + shift,
        (x * factor - mean * factor) * inverse + shift,
    )


def single_pass_statistics(x, statistics=None):
    """Return mean and inverse deviation over the last axis, [...,1], with the variance as E[x^2] - E[x]^2.

    Args:
      x: [...,D].
      statistics: its mean and mean square [...], where they are known.
    """
    mean, square = statistics or (x.mean(-1), jnp.mean(x * x, -1))
    mean, square = mean[..., None], square[..., None]
    variance = jnp.maximum(square - mean * mean, 0)
    return mean, jax.lax.rsqrt(variance + NORM_EPSILON)


def position_table(grid: int, width: int) -> np.ndarray:
    """Make the fixed 2-D sine-cosine table of a grid x grid field of tokens, row by row.

    Args:
      grid: tokens on a side.
      width: D, divisible by 4. The first half encodes the column, the second the row; per axis sines
        come first, then cosines, with frequencies 10000^(-i/(D/4)).

    Returns:
      float32 [N,D], N = grid * grid; computed in float64.
    """
    frequency = MAX_PERIOD ** (-np.arange(width // 4) / (width // 4))
    angle = np.arange(grid)[:, None] * frequency
    axis = np.concatenate([np.sin(angle), np.cos(angle)], axis=1)  # [grid,D/2]
    columns = np.broadcast_to(axis[None, :], (grid, grid, width // 2))
    rows = np.broadcast_to(axis[:, None], (grid, grid, width // 2))
    return np.concatenate([columns, rows], axis=-1).reshape(grid * grid, width).astype(np.float32)


def _time_frequencies() -> np.ndarray:
    """Return exp(-ln(10000) i / 128) as float32 [128], rounded as in the original.

    At t = 999 the last bit of a frequency moves its angle by 3e-5, so the rounding is part of the model: the exponent
    is rounded to float32 first, and entry 12, whose exact value lies 0.48 of a last place above the nearest float32,
    was rounded up by the exponential that made the reference table.
    """
    exponent = np.float32(-math.log(MAX_PERIOD)) * np.arange(TIME_FREQUENCIES, dtype=np.float32) / TIME_FREQUENCIES
    frequency = np.exp(exponent.astype(np.float64)).astype(np.float32)
    frequency[12] = np.nextafter(frequency[12], np.float32(1))
    return frequency


def time_features(t):
    """Return the 256 cosine-then-sine features of timesteps t [B] as float32 [B,256]."""
    angle = t.astype(jnp.float32)[:, None] * _time_frequencies()
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)


# --- Embeddings ----------------------------------------------------------------------------------


class PatchEmbed(nnx.Module):
    """A P x P convolution with stride P, written as one product per patch, plus the position table."""

    def __init__(self, config, *, dtype, rngs: nnx.Rngs):
        patch, channels, width = config.patch, config.channels, config.width
        init = xavier_uniform(patch * patch * channels, width)
        self.kernel = nnx.Param(init(rngs.params(), (patch, patch, channels, width)))
        self.bias = nnx.Param(jnp.zeros(width))
        if config.positions == "stored":
            self.positions = nnx.Param(jnp.asarray(position_table(config.side // patch, width)))
        self.dtype = dtype

    def __call__(self, x):
        """Turn images [B,side,side,C] into float32 tokens [B,N,D], row by row."""
        patch, _, channels, width = self.kernel.shape
        batch, side, _, _ = x.shape
        grid = side // patch
        x = x.astype(self.dtype).reshape(batch, grid, patch, grid, patch, channels)
        kernel = self.kernel[...].astype(self.dtype)
        x = jnp.einsum("bipjqc,pqcd->bijd", x, kernel).reshape(batch, grid * grid, width)  # [B,N,D]
        stored = hasattr(self, "positions")
        positions = jax.lax.stop_gradient(self.positions[...]) if stored else position_table(grid, width)
        return x.astype(jnp.float32) + self.bias[...] + positions


class TimeEmbed(nnx.Module):
    """Linear, SiLU, Linear on the features of the timestep.

    Float32 at the highest matmul precision whatever the rest runs in: the gates of heads and groups are
    thresholds on this vector, and a plan made on one machine must hold on another.
    """

    def __init__(self, *, width: int, deviation: float, rngs: nnx.Rngs):
        init = normal(deviation)
        self.kernel_in = nnx.Param(init(rngs.params(), (2 * TIME_FREQUENCIES, width)))
        self.bias_in = nnx.Param(jnp.zeros(width))
        self.kernel_out = nnx.Param(init(rngs.params(), (width, width)))
        self.bias_out = nnx.Param(jnp.zeros(width))

    def __call__(self, t, added=0.0):
        """Return the embedding of timesteps t [B] as float32 [B,D]; `added` to their features [B,256]."""
        hidden = jnp.dot(time_features(t) + added, self.kernel_in[...], precision="highest") + self.bias_in[...]
        return jnp.dot(jax.nn.silu(hidden), self.kernel_out[...], precision="highest") + self.bias_out[...]


class GuidanceEmbed(nnx.Module):
    """A Linear without bias on the features of beta = 1 / scale, added to those of the timestep; zero at the start.

    Source: guidance-free training, https://arxiv.org/abs/2501.15420.
    """

    def __init__(self):
        self.kernel = nnx.Param(jnp.zeros((2 * TIME_FREQUENCIES, 2 * TIME_FREQUENCIES)))

    def __call__(self, beta):
        """Return what beta [B], 0 .. 1, adds to the features of the timestep, float32 [B,256]."""
        return jnp.dot(time_features(MAX_BETA * beta), self.kernel[...], precision="highest")


class LabelEmbed(nnx.Module):
    """A table of num_classes + 1 rows; the last one stands for "no class"."""

    def __init__(self, *, classes: int, width: int, deviation: float, rngs: nnx.Rngs):
        self.table = nnx.Param(normal(deviation)(rngs.params(), (classes + 1, width)))

    def __call__(self, labels):
        """Return the rows of labels [B] as float32 [B,D]."""
        return jnp.asarray(self.table[...])[labels]


def guided_embedding(time_embed, guidance_embed, t, labels, beta, config):
    """Return the embedding of timesteps [B,D], with the guidance that the network is conditioned on.

    Args:
      time_embed, guidance_embed: the modules; None for a model without guidance in one pass.
      t, labels: [B].
      beta: [B], a scalar or None, which is 1. Images without a class have nothing to be guided to: theirs is 1.
      config: of the model.
    """
    if guidance_embed is None:
        return time_embed(t)
    beta = jnp.where(labels == config.null_label, 1.0, 1.0 if beta is None else beta)
    return time_embed(t, guidance_embed(beta))


# --- Parts of a block ----------------------------------------------------------------------------


def unconstrained(x):
    """Return x: in place of a sharding constraint where none is needed."""
    return x


class Modulation(nnx.Module):
    """SiLU and a Linear from the condition to `parts` vectors; zero at the start, as in adaLN-zero."""

    def __init__(self, *, width: int, parts: int, dtype, platform: str):
        self.kernel = nnx.Param(jnp.zeros((width, parts, width)))
        self.bias = nnx.Param(jnp.zeros((parts, width)))
        self.dtype, self.platform = dtype, platform

    def __call__(self, condition):
        """Turn the condition [B,D] into float32 [parts,B,D]."""
        width, parts, _ = self.kernel.shape
        condition, kernel = jax.nn.silu(condition).astype(self.dtype), self.kernel[...].astype(self.dtype)
        # As one plain product a TPU copies the kernel first; with an axis of its own for the parts a CPU does.
        if self.platform == "tpu":
            vectors = jnp.einsum("bd,dpe->pbe", condition, kernel)
        else:
            vectors = (condition @ kernel.reshape(width, parts * width)).reshape(-1, parts, width).swapaxes(0, 1)
        return vectors.astype(jnp.float32) + self.bias[...][:, None]


class Attention(nnx.Module):
    """Multi-head self-attention; a head that is off is zeroed before the output projection."""

    def __init__(self, *, width: int, heads: int, dtype, platform: str, rngs: nnx.Rngs, lora=None):
        size = width // heads
        # Queries, keys and values are one [D,3D] Linear in the original: its fan-out is 3D.
        self.qkv = nnx.Param(xavier_uniform(width, 3 * width)(rngs.params(), (3, width, heads, size)))
        self.qkv_bias = nnx.Param(jnp.zeros((3, heads, size)))
        self.out = nnx.Param(xavier_uniform(width, width)(rngs.params(), (heads, size, width)))
        self.out_bias = nnx.Param(jnp.zeros(width))
        self.dtype, self.platform = dtype, platform
        add_updates(self, lora, dict(qkv=((width,), (3, heads, size)), out=((heads, size), (width,))), rngs)

    def __call__(self, x, gates, mixture=None):
        """Attend over tokens.

        Args:
          x: [B,N,D], or three times that.
          gates: of the heads [B,H], or None (all on).
          mixture: of low-rank updates [B,E], or None; see `models.lora`.

        Returns:
          [B,N,D].
        """
        out_bias = self.out_bias[...].astype(self.dtype)
        if self.out.shape[0] == 0:  # narrowed to no head at all
            return jnp.broadcast_to(out_bias, jax.tree.leaves(x)[0].shape)
        x = jax.tree.map(lambda tokens: tokens.astype(self.dtype), x)
        # Stacked, or narrowed to three arrays each.
        qkv, bias = ([part.astype(self.dtype) for part in leaf.get_value()] for leaf in (self.qkv, self.qkv_bias))
        out = self.out[...].astype(self.dtype)
        if has_update(self, "qkv"):
            update = expand(self, "qkv", x @ reducing_kernel(self, "qkv"), mixture)  # [B,N,3,H,K]
            bias = [part + update[:, :, i] for i, part in enumerate(bias)]
        if not has_update(self, "out"):
            return attend(x, qkv, bias, out, gates, platform=self.platform) + out_bias
        kernels = out, reducing_kernel(self, "out")
        attended, reduced = attend(x, qkv, bias, kernels, gates, platform=self.platform)
        return attended + expand(self, "out", reduced, mixture) + out_bias


class MLP(nnx.Module):
    """Linear, tanh-GELU, Linear; a group that is off is zeroed before the GELU, where gelu(0) = 0."""

    def __init__(self, *, width: int, groups: int, hidden: int, dtype, platform: str, rngs: nnx.Rngs, lora=None):
        units = hidden // groups
        self.up = nnx.Param(xavier_uniform(width, hidden)(rngs.params(), (width, groups, units)))
        self.up_bias = nnx.Param(jnp.zeros((groups, units)))
        self.down = nnx.Param(xavier_uniform(hidden, width)(rngs.params(), (groups, units, width)))
        self.down_bias = nnx.Param(jnp.zeros(width))
        self.dtype, self.platform = dtype, platform
        add_updates(self, lora, dict(up=((width,), (groups, units)), down=((groups, units), (width,))), rngs)

    def __call__(self, x, gates, mixture=None):
        """Transform tokens x [B,N,D] with gates [B,G] or None (all groups on); returns [B,N,D].

        `mixture` is as for `Attention`.
        """
        width, groups, units = self.up.shape
        down_bias = self.down_bias[...].astype(self.dtype)
        if groups == 0:  # narrowed to no group at all
            return jnp.broadcast_to(down_bias, x.shape)
        # Plain matrices: compilers fuse and tile [D,G*F] better than two contracted axes.
        up, down = (leaf[...].astype(self.dtype) for leaf in (self.up, self.down))
        product = functools.partial(multiply, platform=self.platform)
        hidden = product(x.astype(self.dtype), up.reshape(width, groups * units))  # [B,N,G*F]
        hidden = hidden + self.up_bias[...].astype(self.dtype).reshape(groups * units)
        if has_update(self, "up"):
            reduced = x.astype(self.dtype) @ reducing_kernel(self, "up")
            hidden = hidden + expand(self, "up", reduced, mixture).reshape(hidden.shape)
        if gates is not None:
            hidden = hidden * jnp.repeat(gates.astype(self.dtype), units, axis=-1)[:, None]
        hidden = jax.nn.gelu(hidden, approximate=True)
        if self.platform == "tpu":
            # Else its compiler makes the GELU part of the product behind it, which then waits for it, once per tile.
            hidden = separate(hidden)
        result = product(hidden, down.reshape(groups * units, width)) + down_bias
        if has_update(self, "down"):
            reduced = hidden @ reducing_kernel(self, "down").reshape(groups * units, -1)
            result = result + expand(self, "down", reduced, mixture)
        return result


class Output(nnx.Module):
    """Norm, modulation by the condition, and a Linear from tokens to the pixels of their patch."""

    def __init__(self, *, width: int, patch: int, channels: int, dtype, platform: str):
        self.modulation = Modulation(width=width, parts=2, dtype=dtype, platform=platform)
        self.kernel = nnx.Param(jnp.zeros((width, patch, patch, channels)))
        self.bias = nnx.Param(jnp.zeros((patch, patch, channels)))
        self.dtype = dtype

    def __call__(self, x, modulation, constrain=unconstrained):
        """Turn tokens x [B,N,D] into float32 images [B,side,side,channels]; modulation: shift and scale, [B,D] each."""
        _, patch, _, channels = self.kernel.shape
        batch, tokens, width = x.shape
        grid = math.isqrt(tokens)
        shift, scale = map(constrain, modulation)
        x = modulate(layer_norm(x), shift, scale).reshape(batch, grid, grid, width).astype(self.dtype)
        x = jnp.einsum("bijd,dpqc->bipjqc", x, self.kernel[...].astype(self.dtype))
        x = x.astype(jnp.float32) + self.bias[...][:, None]
        return x.reshape(batch, grid * patch, grid * patch, channels)
