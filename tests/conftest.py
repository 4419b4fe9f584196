"""What tests share: four CPU devices, a tiny model, and the reference files."""

import argparse
import http.server
import importlib
import importlib.metadata
import json
import os
import pathlib
import sys
import threading
from unittest import mock

import jax
import numpy as np
import pytest
from hubs import Hub

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 4)
# Many tests compile the same small programs; scripts under test share them through the environment.
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(pathlib.Path(__file__).parents[1] / ".pytest_cache" / "jax")
os.environ["DYDIT_JAX_CACHE"] = str(pathlib.Path(__file__).parents[1] / ".pytest_cache" / "dydit-jax")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.5"
jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def pytest_configure(config):
    """Optimize programs less, where compiling is most of the time; what runs nightly is compiled as for users."""
    if config.option.markexpr == "not slow":
        os.environ["XLA_FLAGS"] = f"{quick_flags()} {os.environ.get('XLA_FLAGS', '')}"


def quick_flags() -> str:
    """Return the flags with which XLA compiles quickly; one that it does not know would end the process."""
    flags = "--xla_backend_optimization_level=0"
    jaxlib = tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2]))
    # Later versions have the fusion emitters alone, and no flag for them.
    return f"{flags} --xla_cpu_use_fusion_emitters=false" if jaxlib < (0, 11) else flags


from dydit_jax.convert.tables import convert_state_dict  # noqa: E402 (after the devices are fixed)
from dydit_jax.models.config import DiTConfig  # noqa: E402
from dydit_jax.models.dit import Model  # noqa: E402
from dydit_jax.runtime.aot import compiled  # noqa: E402

ROOT = pathlib.Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden"
LAYOUTS = {"dense": "none", "v1": "free", "v2": "first_on"}
CHECKPOINTS = {"dense": "dense_dit.pt", "v1": "dydit_v1.pth", "v2": "dydit_v2_train.pt"}


# A run of a few steps on the digits, and its dynamic twin.
STATIC = dict(
    model=dict(depth=1, width=32, heads=2, patch=4, side=8, channels=1, classes=10),
    data=dict(name="digits", batch_size=8),
    optimizer=dict(learning_rate=1e-3),
    train=dict(steps=4, ema_decay=0.9),
    mesh=dict(data=1, fsdp=4),
    checkpoint=dict(every_steps=2),
    tracking=dict(every_steps=2),
)


def changed(config: dict, **sections) -> dict:
    """Return the config with keys of sections replaced."""
    return {name: dict(config.get(name, {}), **sections.get(name, {})) for name in {*config, *sections}}


DYNAMIC = changed(STATIC, model=dict(routers="first_on"), mesh=dict(data=4, fsdp=1))
DYNAMIC_FLOW = changed(
    DYNAMIC,
    process=dict(name="flow"),
    loss=dict(terms=("mse", "budget")),
    sampling=dict(sampler="heun", steps="2", guidance=2.0, guidance_interval=(0.0, 0.6)),
)


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
        stored = json.loads(bytes(self.arrays["config"]))
        self.config = DiTConfig(
            depth=stored["depth"],
            width=stored["hidden_size"],
            heads=stored["num_heads"],
            patch=stored["patch_size"],
            side=stored["input_size"],
            channels=stored["in_channels"],
            classes=stored["num_classes"],
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


def diffusers_dit(config: DiTConfig):
    """Make diffusers' static DiT with random weights.

    Returns:
      Its forward pass as a function of arrays (x, t, labels), channels last, and the same parameters as our tree.
    """
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    network = diffusers.DiTTransformer2DModel(
        num_attention_heads=config.heads,
        attention_head_dim=config.width // config.heads,
        in_channels=config.channels,
        out_channels=2 * config.channels,
        num_layers=config.depth,
        sample_size=config.side,
        patch_size=config.patch,
        num_embeds_ada_norm=config.classes,
    ).eval()
    for block in network.transformer_blocks:
        # Diffusers divides the exponent by 127 here, DiT by 128.
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(1.4 / config.width**0.5 * torch.randn_like(parameter))

    def forward(x, t, labels):
        arguments = dict(timestep=torch.tensor(t), class_labels=torch.tensor(labels))
        with torch.no_grad():
            return channels_last(network(torch.tensor(x).permute(0, 3, 1, 2), **arguments).sample)

    return forward, _from_diffusers({name: tensor.numpy() for name, tensor in network.state_dict().items()}, config)


def _from_diffusers(theirs: dict, config: DiTConfig) -> dict:
    """Arrange diffusers' tensors as our tree; every block of theirs has its own, equal-sized condition embedder."""
    # Diffusers embeds timestep and label anew in each block. Ours does so once: take block 0's embedder everywhere.
    block = "transformer_blocks"
    for layer in range(1, config.depth):
        for name in [n for n in theirs if n.startswith(f"{block}.{layer}.norm1.emb.")]:
            theirs[name][:] = theirs[name.replace(f"{block}.{layer}.", f"{block}.0.")]
    embedder = f"{block}.0.norm1.emb"
    source = {
        "x_embedder.proj": "pos_embed.proj",
        "t_embedder.mlp.0": f"{embedder}.timestep_embedder.linear_1",
        "t_embedder.mlp.2": f"{embedder}.timestep_embedder.linear_2",
        "final_layer.adaLN_modulation.1": "proj_out_1",
        "final_layer.linear": "proj_out_2",
    }
    for layer in range(config.depth):
        ours, other = f"blocks.{layer}", f"{block}.{layer}"
        source |= {
            f"{ours}.attn.proj": f"{other}.attn1.to_out.0",
            f"{ours}.mlp.fc1": f"{other}.ff.net.0.proj",
            f"{ours}.mlp.fc2": f"{other}.ff.net.2",
            f"{ours}.adaLN_modulation.1": f"{other}.norm1.linear",
        }
    renamed = {f"{a}.{kind}": theirs[f"{b}.{kind}"] for a, b in source.items() for kind in ("weight", "bias")}
    renamed["y_embedder.embedding_table.weight"] = theirs[f"{embedder}.class_embedder.embedding_table.weight"]
    for layer in range(config.depth):
        for kind in ("weight", "bias"):
            parts = [theirs[f"{block}.{layer}.attn1.to_{part}.{kind}"] for part in "qkv"]
            renamed[f"blocks.{layer}.attn.qkv.{kind}"] = np.concatenate(parts)
    return convert_state_dict(renamed, config)


def fidelity_network():
    """Make torch-fidelity's Inception network with random weights, its own file is not needed, and its resize."""
    torch = pytest.importorskip("torch")
    # It imports torchvision for datasets alone.
    names = ("torchvision", "torchvision.datasets", "torchvision.transforms", "torchvision.transforms.functional")
    with mock.patch.dict(sys.modules, {name: mock.MagicMock() for name in names}):
        module = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    torch.manual_seed(0)
    with (
        mock.patch.object(torch, "load", lambda *_, **__: {}),
        mock.patch.object(torch.nn.Module, "load_state_dict", lambda *_, **__: None),
    ):
        network = module.FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"], "none").eval()
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            if name.endswith(("running_var", "bn.weight")):
                tensor.uniform_(0.5, 1.5)
            elif name.endswith(("running_mean", "bias")):
                tensor.normal_(0, 0.1)
            elif tensor.dtype.is_floating_point:
                torch.nn.init.kaiming_normal_(tensor)
    return network, module.interpolate_bilinear_2d_like_tensorflow1x


@pytest.fixture(scope="module")
def benchmark():
    """Return a function from the name of a benchmark's module, which is no part of the package, to it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        yield importlib.import_module


@pytest.fixture
def program_folder(tmp_path):
    """Keep compiled programs, however short they took, in a new folder; return it."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    for name, value in zip(names, (str(tmp_path), 0.0)):
        jax.config.update(name, value)
    compiled.cache_clear()
    yield tmp_path / "ready"
    for name, value in before.items():
        jax.config.update(name, value)
    compiled.cache_clear()


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The server's address, in the place of Hugging Face's, and an empty cache."""
    from huggingface_hub import constants

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setenv("DYDIT_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(Hub, "repositories", {})
    monkeypatch.setattr(Hub, "asked", [])
    monkeypatch.setattr(Hub, "commits", [])
    yield address
    server.shutdown()
    server.server_close()
