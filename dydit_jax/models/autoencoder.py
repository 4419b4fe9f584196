"""Autoencoders of Stable Diffusion's kind: images [B,side,side,3] in [-1, 1] to latents [B,side/f,side/f,C] and back.

An autoencoder carries its record: its shape, and the scale and shift between its latents and what a diffusion model
sees. Attributes bear the names of diffusers' `AutoencoderKL`, so that converting its weights is a matter of spelling.
All is float32: decoding is a small part of sampling.

Source: latent diffusion, https://arxiv.org/abs/2112.10752; the default is sd-vae-ft-ema and sd-vae-ft-mse.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dydit_jax.errors import InputError, some_of
from dydit_jax.records import require_range

LATENT_SCALE = 0.18215  # brings the latents of natural images to unit variance, by Stable Diffusion's autoencoder
NORM_GROUPS = 32
LOG_VARIANCE_RANGE = (-30.0, 20.0)
MOST_CHANNELS, MOST_STAGES, MOST_WIDTH = 1024, 8, 8192  # far beyond what there is

_norm = functools.partial(nnx.GroupNorm, num_groups=NORM_GROUPS, epsilon=1e-6)


@dataclasses.dataclass(frozen=True)
class AutoencoderConfig:
    """The record of an autoencoder; what is missing in a file is Stable Diffusion's.

    A diffusion model sees (z - shift) * scale of a latent z, as in diffusers.

    Attributes:
      channels: C of the latents.
      widths: of the stages, from the finest; each but the last halves the resolution.
      resnets: per stage of the encoder; the decoder has one more.
      attention: whether every resnet of the coarsest stage is followed by attention, as in VA-VAE.
      quant_conv: whether 1 x 1 convolutions lie between encoder, decoder and the latent.
      scale: one number, or one per channel, not 0.
      shift: one number, or one per channel.
    """

    channels: int = 4
    widths: tuple[int, ...] = (128, 256, 512, 512)
    resnets: int = 2
    attention: bool = False
    quant_conv: bool = True
    scale: tuple[float, ...] = (LATENT_SCALE,)
    shift: tuple[float, ...] = (0.0,)

    def __post_init__(self):
        require_range("channels of an autoencoder", self.channels, low=1, high=MOST_CHANNELS)
        require_range("resnets of an autoencoder", self.resnets, low=1, high=MOST_STAGES)
        require_range("stages of an autoencoder", len(self.widths), low=1, high=MOST_STAGES)
        wrong = [width for width in self.widths if width % NORM_GROUPS or not 0 < width <= MOST_WIDTH]
        if wrong:
            raise InputError(f"Widths of an autoencoder must be multiples of {NORM_GROUPS}, not {self.widths}.")
        for name, values in (("scale", self.scale), ("shift", self.shift)):
            if len(values) not in (1, self.channels) or not np.isfinite(values).all():
                raise InputError(
                    f"The {name} of latents must be one number, or one for each of {self.channels} channels, "
                    f"not {len(values)}: {some_of(map(str, values))}."
                )
        if 0 in self.scale:
            raise InputError(f"The scale of latents must not be 0: {self.scale}.")

    @property
    def factor(self) -> int:
        """Pixels along an image's side for each of its latent's."""
        return 2 ** (len(self.widths) - 1)

    def to_model(self, latents):
        """Turn latents z [...,C] into what a diffusion model sees."""
        return (latents - np.float32(self.shift)) * np.float32(self.scale)

    def from_model(self, latents):
        """Turn what a diffusion model draws [...,C] into latents z."""
        return latents / np.float32(self.scale) + np.float32(self.shift)


def _conv(inputs: int, outputs: int, size: int = 3, *, rngs, strides: int = 1, padding=1):
    return nnx.Conv(inputs, outputs, (size, size), strides, padding=padding if size > 1 else 0, rngs=rngs)


class Resnet(nnx.Module):
    """Two normalised convolutions beside a shortcut."""

    def __init__(self, inputs: int, outputs: int, *, rngs):
        self.norm1, self.conv1 = _norm(inputs, rngs=rngs), _conv(inputs, outputs, rngs=rngs)
        self.norm2, self.conv2 = _norm(outputs, rngs=rngs), _conv(outputs, outputs, rngs=rngs)
        self.conv_shortcut = _conv(inputs, outputs, 1, rngs=rngs) if inputs != outputs else None

    def __call__(self, x):
        """Transform x [B,h,w,inputs] into [B,h,w,outputs]."""
        hidden = self.conv1(jax.nn.silu(self.norm1(x)))
        hidden = self.conv2(jax.nn.silu(self.norm2(hidden)))
        return hidden + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class PixelAttention(nnx.Module):
    """Single-head attention over all pixels."""

    def __init__(self, width: int, *, rngs):
        self.group_norm = _norm(width, rngs=rngs)
        self.to_q, self.to_k, self.to_v = (nnx.Linear(width, width, rngs=rngs) for _ in range(3))
        self.to_out_0 = nnx.Linear(width, width, rngs=rngs)

    def __call__(self, x):
        """Attend within x [B,h,w,width]."""
        batch, height, width, channels = x.shape
        tokens = self.group_norm(x).reshape(batch, height * width, 1, channels)
        attended = jax.nn.dot_product_attention(self.to_q(tokens), self.to_k(tokens), self.to_v(tokens))
        return x + self.to_out_0(attended).reshape(x.shape)


class Middle(nnx.Module):
    """Resnet, attention, resnet at the lowest resolution."""

    def __init__(self, width: int, *, rngs):
        self.resnets_0 = Resnet(width, width, rngs=rngs)
        self.attentions_0 = PixelAttention(width, rngs=rngs)
        self.resnets_1 = Resnet(width, width, rngs=rngs)

    def __call__(self, x):
        """Transform x [B,h,w,width]."""
        return self.resnets_1(self.attentions_0(self.resnets_0(x)))


class Resampler(nnx.Module):
    """A convolution that follows a doubling of the resolution, or halves it."""

    def __init__(self, width: int, *, rngs, **convolution):
        self.conv = _conv(width, width, rngs=rngs, **convolution)

    def __call__(self, x):
        """Convolve x [B,h,w,width]."""
        return self.conv(x)


class Stage(nnx.Module):
    """Resnets at one resolution, each followed by attention if so configured."""

    def __init__(self, inputs: int, outputs: int, resnets: int, *, attention: bool, rngs):
        self.resnets, self.attention = resnets, attention
        for index in range(resnets):
            setattr(self, f"resnets_{index}", Resnet(inputs if index == 0 else outputs, outputs, rngs=rngs))
            if attention:
                setattr(self, f"attentions_{index}", PixelAttention(outputs, rngs=rngs))

    def __call__(self, x):
        """Transform x [B,h,w,inputs] into [B,h,w,outputs]."""
        for index in range(self.resnets):
            x = getattr(self, f"resnets_{index}")(x)
            if self.attention:
                x = getattr(self, f"attentions_{index}")(x)
        return x


class Encoder(nnx.Module):
    """Image to the moments of its latent."""

    def __init__(self, config: AutoencoderConfig, *, rngs):
        widths, last = config.widths, len(config.widths) - 1
        self.stages = len(widths)
        self.conv_in = _conv(3, widths[0], rngs=rngs)
        for index, (inputs, outputs) in enumerate(zip((widths[0], *widths), widths)):
            attention = config.attention and index == last
            stage = Stage(inputs, outputs, config.resnets, attention=attention, rngs=rngs)
            if index < last:
                # One row and column of zeros at the far side only, as the original pads.
                stage.downsamplers_0 = Resampler(outputs, rngs=rngs, strides=2, padding=((0, 1), (0, 1)))
            setattr(self, f"down_blocks_{index}", stage)
        self.mid_block = Middle(widths[-1], rngs=rngs)
        self.conv_norm_out = _norm(widths[-1], rngs=rngs)
        self.conv_out = _conv(widths[-1], 2 * config.channels, rngs=rngs)

    def __call__(self, x):
        """Turn x [B,side,side,3] into [B,side/f,side/f,2C]."""
        x = self.conv_in(x)
        for index in range(self.stages):
            stage = getattr(self, f"down_blocks_{index}")
            x = stage(x)
            if hasattr(stage, "downsamplers_0"):
                x = stage.downsamplers_0(x)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nnx.Module):
    """Latent to image."""

    def __init__(self, config: AutoencoderConfig, *, rngs):
        widths = config.widths[::-1]
        self.stages = len(widths)
        self.conv_in = _conv(config.channels, widths[0], rngs=rngs)
        self.mid_block = Middle(widths[0], rngs=rngs)
        for index, (inputs, outputs) in enumerate(zip((widths[0], *widths), widths)):
            attention = config.attention and index == 0
            stage = Stage(inputs, outputs, config.resnets + 1, attention=attention, rngs=rngs)
            if index < len(widths) - 1:
                stage.upsamplers_0 = Resampler(outputs, rngs=rngs)
            setattr(self, f"up_blocks_{index}", stage)
        self.conv_norm_out = _norm(widths[-1], rngs=rngs)
        self.conv_out = _conv(widths[-1], 3, rngs=rngs)

    def __call__(self, z):
        """Turn z [B,side/f,side/f,C] into [B,side,side,3]."""
        x = self.mid_block(self.conv_in(z))
        for index in range(self.stages):
            stage = getattr(self, f"up_blocks_{index}")
            x = stage(x)
            if hasattr(stage, "upsamplers_0"):
                x = stage.upsamplers_0(x.repeat(2, axis=1).repeat(2, axis=2))
        return self.conv_out(jax.nn.silu(self.conv_norm_out(x)))


class Network(nnx.Module):
    """Encoder, decoder and the 1 x 1 convolutions between them and the latent, where there are any."""

    def __init__(self, config: AutoencoderConfig, *, rngs):
        self.encoder, self.decoder = Encoder(config, rngs=rngs), Decoder(config, rngs=rngs)
        pointwise = lambda channels: _conv(channels, channels, 1, rngs=rngs) if config.quant_conv else None
        self.quant_conv, self.post_quant_conv = pointwise(2 * config.channels), pointwise(config.channels)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Autoencoder:
    """An autoencoder's parameters, a nested dict of float32 arrays, and its record; a tree of the former."""

    config: AutoencoderConfig = dataclasses.field(metadata=dict(static=True))
    params: dict


def init(key, config: AutoencoderConfig = AutoencoderConfig()) -> Autoencoder:
    """Make an autoencoder with random parameters."""
    return Autoencoder(config, nnx.to_pure_dict(nnx.state(Network(config, rngs=nnx.Rngs(key)), nnx.Param)))


def abstract_params(config: AutoencoderConfig) -> dict:
    """Return the parameter tree as shapes."""
    return _abstract(config)[1]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Moments:
    """The Gaussian of an image's latent, unscaled: mean and log-variance [B,side/f,side/f,C]."""

    mean: jax.Array
    log_variance: jax.Array


def encode(autoencoder: Autoencoder, images) -> Moments:
    """Encode images [B,side,side,3] in [-1, 1]; side a multiple of the factor."""
    network = _network(autoencoder)
    moments = network.encoder(images)
    if network.quant_conv is not None:
        moments = network.quant_conv(moments)
    mean, log_variance = jnp.split(moments, 2, axis=-1)
    return Moments(mean, jnp.clip(log_variance, *LOG_VARIANCE_RANGE))


def sample_latents(moments: Moments, config: AutoencoderConfig, key):
    """Draw latents as diffusion models see them, [B,side/f,side/f,C]; key None takes the mean."""
    if key is None:
        return config.to_model(moments.mean)
    noise = jax.random.normal(key, moments.mean.shape, jnp.float32)
    return config.to_model(moments.mean + jnp.exp(0.5 * moments.log_variance) * noise)


def decode(autoencoder: Autoencoder, latents):
    """Decode what a diffusion model draws [B,side/f,side/f,C] into images [B,side,side,3], about [-1, 1]."""
    network, z = _network(autoencoder), autoencoder.config.from_model(latents)
    if network.post_quant_conv is not None:
        z = network.post_quant_conv(z)
    return network.decoder(z)


def _network(autoencoder: Autoencoder) -> Network:
    return nnx.merge(_abstract(autoencoder.config)[0], nnx.State(autoencoder.params))


def _abstract(config: AutoencoderConfig) -> tuple:
    """Return the graph of a network and its parameters as shapes; tracing takes half a second, once per shape."""
    return _abstract_of_shape(dataclasses.replace(config, scale=(1.0,), shift=(0.0,)))


@functools.cache
def _abstract_of_shape(config: AutoencoderConfig) -> tuple:
    network = nnx.eval_shape(lambda: Network(config, rngs=nnx.Rngs(0)))
    return nnx.graphdef(network), nnx.to_pure_dict(nnx.state(network, nnx.Param))
