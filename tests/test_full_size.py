"""The published size, on this machine: slow, run by name."""

import jax
import numpy as np
import pytest
from conftest import diffusers_dit, relative_error
from test_scripts import call

from dydit_jax.checkpoints import Weights, save_autoencoder, save_weights
from dydit_jax.diffusion.process import Diffusion
from dydit_jax.diffusion.samplers import SamplingConfig
from dydit_jax.models import autoencoder
from dydit_jax.models.config import published_config
from dydit_jax.models.dit import Model

pytestmark = pytest.mark.slow


def test_dydit_xl2_at_256_pixels_is_sampled_and_decoded(tmp_path):
    config = published_config("XL/2", side=32, routers="first_on")
    params = jax.jit(Model(config).init)(jax.random.key(0))
    vae = jax.jit(autoencoder.init)(jax.random.key(1))
    save_autoencoder(tmp_path / "vae.safetensors", vae, {})
    sampling = SamplingConfig(steps="2", guidance=4.0, autoencoder=str(tmp_path / "vae.safetensors"))
    save_weights(tmp_path / "xl2.safetensors", Weights(config, Diffusion(), sampling, params, {}))
    del params, vae
    # In a process of its own: the four devices of the tests would each hold a copy of the weights.
    call("sample.py", f"--checkpoint={tmp_path}/xl2.safetensors", f"--out={tmp_path}/out", "--num_images=4")
    images = np.load(tmp_path / "out" / "samples.npz")["arr_0"]
    assert images.shape == (4, 256, 256, 3) and images.std() > 0


def test_dit_xl2_at_512_pixels_equals_diffusers():
    config = published_config("XL/2", side=64)
    theirs, params = diffusers_dit(config)
    x = np.random.default_rng(0).standard_normal((1, 64, 64, 4), np.float32)
    t, labels = np.array([417]), np.array([207])
    ours, _ = jax.jit(Model(config).apply, static_argnames="mode")(params, x, t, labels, mode="complete")
    assert relative_error(ours, theirs(x, t, labels)) < 1e-5
