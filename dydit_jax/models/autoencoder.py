"""The Stable Diffusion autoencoder: images [B,side,side,3] in [-1, 1] to latents [B,side/8,side/8,4] and back.

Attributes bear the names of diffusers' `AutoencoderKL`, so that converting its weights is a matter of spelling. All is
float32: decoding is a small part of sampling.

Source: latent diffusion, https://arxiv.org/abs/2112.10752; configuration of sd-vae-ft-ema and sd-vae-ft-mse.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx

LATENT_SCALE = 0.18215  # brings the latents of natural images to unit variance
LATENT_CHANNELS = 4
DOWNSAMPLING = 8
WIDTHS = (128, 256, 512, 512)
RESNETS_PER_STAGE = 2
LOG_VARIANCE_RANGE = (-30.0, 20.0)

_norm = functools.partial(nnx.GroupNorm, num_groups=32, epsilon=1e-6)


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
    """Resnets at one resolution; subclasses change it afterwards."""

    def __init__(self, inputs: int, outputs: int, resnets: int, *, rngs):
        self.resnets = resnets
        for index in range(resnets):
            setattr(self, f"resnets_{index}", Resnet(inputs if index == 0 else outputs, outputs, rngs=rngs))

    def __call__(self, x):
        """Transform x [B,h,w,inputs] into [B,h,w,outputs]."""
        for index in range(self.resnets):
            x = getattr(self, f"resnets_{index}")(x)
        return x


class Encoder(nnx.Module):
    """Image to the moments of its latent."""

    def __init__(self, *, rngs):
        self.conv_in = _conv(3, WIDTHS[0], rngs=rngs)
        for index, (inputs, outputs) in enumerate(zip((WIDTHS[0], *WIDTHS), WIDTHS)):
            stage = Stage(inputs, outputs, RESNETS_PER_STAGE, rngs=rngs)
            if index < len(WIDTHS) - 1:
                # One row and column of zeros at the far side only, as the original pads.
                stage.downsamplers_0 = Resampler(outputs, rngs=rngs, strides=2, padding=((0, 1), (0, 1)))
            setattr(self, f"down_blocks_{index}", stage)
        self.mid_block = Middle(WIDTHS[-1], rngs=rngs)
        self.conv_norm_out = _norm(WIDTHS[-1], rngs=rngs)
        self.conv_out = _conv(WIDTHS[-1], 2 * LATENT_CHANNELS, rngs=rngs)

    def __call__(self, x):
        """Turn x [B,side,side,3] into [B,side/8,side/8,8]."""
        x = self.conv_in(x)
        for index in range(len(WIDTHS)):
            stage = getattr(self, f"down_blocks_{index}")
            x = stage(x)
            if hasattr(stage, "downsamplers_0"):
                x = stage.downsamplers_0(x)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nnx.Module):
    """Latent to image."""

    def __init__(self, *, rngs):
        widths = WIDTHS[::-1]
        self.conv_in = _conv(LATENT_CHANNELS, widths[0], rngs=rngs)
        self.mid_block = Middle(widths[0], rngs=rngs)
        for index, (inputs, outputs) in enumerate(zip((widths[0], *widths), widths)):
            stage = Stage(inputs, outputs, RESNETS_PER_STAGE + 1, rngs=rngs)
            if index < len(widths) - 1:
                stage.upsamplers_0 = Resampler(outputs, rngs=rngs)
            setattr(self, f"up_blocks_{index}", stage)
        self.conv_norm_out = _norm(widths[-1], rngs=rngs)
        self.conv_out = _conv(widths[-1], 3, rngs=rngs)

    def __call__(self, z):
        """Turn z [B,side/8,side/8,4] into [B,side,side,3]."""
        x = self.mid_block(self.conv_in(z))
        for index in range(len(WIDTHS)):
            stage = getattr(self, f"up_blocks_{index}")
            x = stage(x)
            if hasattr(stage, "upsamplers_0"):
                x = stage.upsamplers_0(x.repeat(2, axis=1).repeat(2, axis=2))
        return self.conv_out(jax.nn.silu(self.conv_norm_out(x)))


class Network(nnx.Module):
    """Encoder, decoder and the 1 x 1 convolutions between them and the latent."""

    def __init__(self, *, rngs):
        self.encoder, self.decoder = Encoder(rngs=rngs), Decoder(rngs=rngs)
        self.quant_conv = _conv(2 * LATENT_CHANNELS, 2 * LATENT_CHANNELS, 1, rngs=rngs)
        self.post_quant_conv = _conv(LATENT_CHANNELS, LATENT_CHANNELS, 1, rngs=rngs)


@functools.cache
def _graph():
    return nnx.graphdef(nnx.eval_shape(lambda: Network(rngs=nnx.Rngs(0))))


def init(key) -> dict:
    """Make random parameters, a nested dict of float32 arrays."""
    return nnx.to_pure_dict(nnx.state(Network(rngs=nnx.Rngs(key)), nnx.Param))


def abstract_params() -> dict:
    """Return the parameter tree as shapes."""
    return jax.eval_shape(init, jax.random.key(0))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Moments:
    """The Gaussian of an image's latent, unscaled: mean and log-variance [B,side/8,side/8,4]."""

    mean: jax.Array
    log_variance: jax.Array


def encode(params, images) -> Moments:
    """Encode images [B,side,side,3] in [-1, 1]; side a multiple of 8."""
    network = nnx.merge(_graph(), nnx.State(params))
    mean, log_variance = jnp.split(network.quant_conv(network.encoder(images)), 2, axis=-1)
    return Moments(mean, jnp.clip(log_variance, *LOG_VARIANCE_RANGE))


def sample_latents(moments: Moments, key):
    """Draw latents, scaled as diffusion models see them, [B,side/8,side/8,4]; key None takes the mean."""
    if key is None:
        return LATENT_SCALE * moments.mean
    noise = jax.random.normal(key, moments.mean.shape, jnp.float32)
    return LATENT_SCALE * (moments.mean + jnp.exp(0.5 * moments.log_variance) * noise)


def decode(params, latents):
    """Decode scaled latents [B,side/8,side/8,4] into images [B,side,side,3], about [-1, 1]."""
    network = nnx.merge(_graph(), nnx.State(params))
    return network.decoder(network.post_quant_conv(latents / LATENT_SCALE))
