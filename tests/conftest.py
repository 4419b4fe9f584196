"""What tests share: four CPU devices, a tiny model, and the reference files."""

import argparse
import json
import os
import pathlib

import jax
import numpy as np
import pytest

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 4)
# Many tests compile the same small programs; scripts under test share them through the environment.
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(pathlib.Path(__file__).parents[1] / ".pytest_cache" / "jax")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.5"
jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)

from dydit_jax.convert.tables import convert_state_dict  # noqa: E402 (after the devices are fixed)
from dydit_jax.models.dit import DiTConfig, Model  # noqa: E402

ROOT = pathlib.Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden"
LAYOUTS = {"dense": "none", "v1": "free", "v2": "first_on"}
CHECKPOINTS = {"dense": "dense_dit.pt", "v1": "dydit_v1.pth", "v2": "dydit_v2_train.pt"}


def read_torch(path) -> dict:
    """Read a PyTorch checkpoint as numpy arrays by name; of a training file, its EMA."""
    torch = pytest.importorskip("torch")
    with torch.serialization.safe_globals([argparse.Namespace]):
        content = torch.load(path, map_location="cpu", weights_only=True)
    return {name: tensor.numpy() for name, tensor in content.get("ema", content).items()}


def channels_last(array):
    """Turn N C H W, or any such last three axes, into N H W C."""
    return np.moveaxis(np.asarray(array), -3, -1)


def relative_error(actual, expected) -> float:
    """Return the largest difference in units of the expected array's largest value."""
    return float(np.abs(np.asarray(actual) - expected).max() / np.abs(expected).max())


class Golden:
    """One reference model: its arrays, its configuration, our model and parameters."""

    def __init__(self, name: str):
        self.arrays = np.load(GOLDEN / f"{name}_forward.npz")
        told = json.loads(bytes(self.arrays["config"]))
        self.config = DiTConfig(
            depth=told["depth"],
            width=told["hidden_size"],
            heads=told["num_heads"],
            patch=told["patch_size"],
            side=told["input_size"],
            channels=told["in_channels"],
            classes=told["num_classes"],
            routers=LAYOUTS[name],
        )
        self.model = Model(self.config, matmul_precision="highest")
        self.state_dict = read_torch(GOLDEN / CHECKPOINTS[name])
        self.params = convert_state_dict(self.state_dict, self.config)
        self.inputs = channels_last(self.arrays["x"]), self.arrays["t"], self.arrays["y"]


@pytest.fixture(scope="session", params=list(LAYOUTS))
def golden(request) -> Golden:
    """Each of the three reference models in turn."""
    return Golden(request.param)


@pytest.fixture(scope="session")
def golden_v2() -> Golden:
    """The reference DyDiT of the second layout."""
    return Golden("v2")


@pytest.fixture(scope="session")
def tiny_config() -> DiTConfig:
    """A DyDiT that compiles in seconds."""
    return DiTConfig(depth=2, width=32, heads=4, patch=2, side=8, channels=1, classes=10, routers="first_on")


@pytest.fixture(scope="session")
def tiny(tiny_config):
    """The tiny model with parameters that are not at their initial zeros: (model, params)."""
    model = Model(tiny_config)
    params = jax.jit(model.init)(jax.random.key(0))
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noisy = [leaf + 0.1 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys)]
    params = jax.tree.unflatten(structure, noisy)
    # Logits around the threshold, so that gates are mixed.
    for router in ("head_router", "group_router"):
        params[router]["bias"] = params[router]["bias"] - 15.0
    params["blocks"]["token_router"]["bias_out"] = params["blocks"]["token_router"]["bias_out"] - 35.0
    return model, params
