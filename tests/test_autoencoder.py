"""The autoencoder is diffusers', in both directions and both spellings of its weights."""

import jax
import numpy as np
import pytest

from dydit_jax.convert.autoencoders import convert_autoencoder, export_autoencoder, only_autoencoder
from dydit_jax.convert.conversion import Conversion, convert
from dydit_jax.convert.exporting import Export, export
from dydit_jax.convert.torch_files import read_tensors, write_tensors
from dydit_jax.errors import InputError
from dydit_jax.latents import decode_latents, encode_images
from dydit_jax.loading import load_autoencoder
from dydit_jax.models import autoencoder
from dydit_jax.models.autoencoder import Autoencoder, AutoencoderConfig
from dydit_jax.runtime.sharding import MeshConfig, make_mesh

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")


@pytest.fixture(scope="module")
def theirs():
    """Diffusers' autoencoder in the published configuration with random weights and norms."""
    torch.manual_seed(0)
    network = diffusers.AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=4,
        norm_num_groups=32,
        sample_size=256,
    ).eval()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "norm" in name:
                parameter.copy_(0.2 * torch.randn_like(parameter) + float(name.endswith("weight")))
    return network


@pytest.fixture(scope="module")
def params(theirs):
    return convert_autoencoder({name: tensor.numpy() for name, tensor in theirs.state_dict().items()})[1]


def compare(theirs, params, side: int) -> tuple[float, float, float]:
    """Return the largest differences of mean, log-variance and decoded image."""
    generator = np.random.default_rng(0)
    image = generator.uniform(-1, 1, (1, side, side, 3)).astype(np.float32)
    latent = generator.standard_normal((1, side // 8, side // 8, 4)).astype(np.float32)
    with torch.no_grad():
        expected = theirs.encode(torch.tensor(image).permute(0, 3, 1, 2)).latent_dist
        decoded = theirs.decode(torch.tensor(latent).permute(0, 3, 1, 2) / autoencoder.LATENT_SCALE).sample
    ours = Autoencoder(AutoencoderConfig(), params)
    moments = jax.jit(autoencoder.encode)(ours, image)
    channels_last = lambda tensor: tensor.permute(0, 2, 3, 1).numpy()
    return (
        np.abs(moments.mean - channels_last(expected.mean)).max(),
        np.abs(moments.log_variance - channels_last(expected.logvar)).max(),
        np.abs(jax.jit(autoencoder.decode)(ours, latent) - channels_last(decoded)).max(),
    )


def test_small_images_equal_diffusers(theirs, params):
    assert max(compare(theirs, params, 64)) < 2e-5


@pytest.mark.slow
def test_images_of_256_pixels_equal_diffusers(theirs, params):
    assert max(compare(theirs, params, 256)) < 2e-5


def test_size_is_the_published_one():
    assert sum(leaf.size for leaf in jax.tree.leaves(autoencoder.abstract_params(AutoencoderConfig()))) == 83_653_863


def test_there_and_back_is_bitwise_equal(theirs, params):
    exported = export_autoencoder(params)
    state = theirs.state_dict()
    assert exported.keys() == state.keys()
    for name, tensor in state.items():
        np.testing.assert_array_equal(exported[name], tensor.numpy(), err_msg=name)


def test_old_attention_names_and_shapes_are_read(theirs, params):
    new = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old = {}
    for name, tensor in theirs.state_dict().items():
        if "attentions" in name and "group_norm" not in name:
            for ours, theirs_then in new.items():
                name = name.replace(ours, theirs_then)
            tensor = tensor[..., None, None] if name.endswith("weight") else tensor
        old[name] = tensor.numpy()
    assert old.keys() != theirs.state_dict().keys()
    jax.tree.map(np.testing.assert_array_equal, convert_autoencoder(old)[1], params)


def compvis_names(levels: int) -> dict[str, str]:
    """Return diffusers' name of every module that there may be, by its name in CompVis's code."""
    inside = lambda theirs, ours, names: {f"{theirs}.{a}": f"{ours}.{b}" for a, b in names.items()}
    resnet = dict(norm1="norm1", conv1="conv1", norm2="norm2", conv2="conv2", nin_shortcut="conv_shortcut")
    attention = dict(norm="group_norm", q="to_q", k="to_k", v="to_v", proj_out="to_out.0")
    names = dict(quant_conv="quant_conv", post_quant_conv="post_quant_conv")
    for side in ("encoder", "decoder"):
        names |= {f"{side}.conv_in": f"{side}.conv_in", f"{side}.conv_out": f"{side}.conv_out"}
        names[f"{side}.norm_out"] = f"{side}.conv_norm_out"
        for number in (1, 2):
            names |= inside(f"{side}.mid.block_{number}", f"{side}.mid_block.resnets.{number - 1}", resnet)
        names |= inside(f"{side}.mid.attn_1", f"{side}.mid_block.attentions.0", attention)
    for level in range(levels):
        for theirs, ours in (
            (f"encoder.down.{level}", f"encoder.down_blocks.{level}"),
            (f"decoder.up.{level}", f"decoder.up_blocks.{levels - 1 - level}"),
        ):
            for number in range(3):
                names |= inside(f"{theirs}.block.{number}", f"{ours}.resnets.{number}", resnet)
                names |= inside(f"{theirs}.attn.{number}", f"{ours}.attentions.{number}", attention)
        names[f"encoder.down.{level}.downsample.conv"] = f"encoder.down_blocks.{level}.downsamplers.0.conv"
        names[f"decoder.up.{level}.upsample.conv"] = f"decoder.up_blocks.{levels - 1 - level}.upsamplers.0.conv"
    return names


def in_compvis_layout(state: dict, levels: int = 4) -> dict:
    """Return diffusers' weights as CompVis's code stores them: linear layers as 1 x 1 convolutions."""
    tensors = {}
    for name, other in compvis_names(levels).items():
        for kind in ("weight", "bias"):
            tensor = state.get(f"{other}.{kind}")
            if tensor is not None:
                is_matrix = "attn" in name and tensor.ndim == 2
                tensors[f"{name}.{kind}"] = tensor[..., None, None] if is_matrix else tensor
    assert len(tensors) == len(state)
    return tensors


def test_the_layout_of_compvis_makes_the_same_autoencoder(theirs, params):
    tensors = in_compvis_layout(theirs.state_dict())
    convert_theirs = pytest.importorskip("diffusers.loaders.single_file_utils").convert_ldm_vae_checkpoint
    assert convert_theirs(dict(tensors), theirs.config).keys() == theirs.state_dict().keys()
    ours = convert_autoencoder({name: tensor.numpy() for name, tensor in tensors.items()})
    assert ours[0] == AutoencoderConfig()
    jax.tree.map(np.testing.assert_array_equal, ours[1], params)


@pytest.mark.parametrize("start", ["", "first_stage_model."])
def test_what_lies_beside_an_autoencoder_is_left_out(start):
    inside = {f"{start}encoder.conv_in.bias": np.ones(2), f"{start}decoder.conv_in.bias": np.ones(2)}
    inside_training = {f"{start}loss.logvar": np.ones(1), f"{start}model_ema.decay": np.ones(1)}
    beside = {"model.diffusion_model.out.weight": np.ones(1), "cond_stage_model.position_ids": np.arange(3)}
    tensors = inside | inside_training | (beside if start else {})
    assert only_autoencoder(tensors).keys() == {"encoder.conv_in.bias", "decoder.conv_in.bias"}
    assert only_autoencoder(beside) == beside


def test_conversion_of_a_file_is_loaded_again(theirs, params, tmp_path):
    write_tensors(tmp_path / "vae.safetensors", {n: t.numpy() for n, t in theirs.state_dict().items()})
    report = convert(Conversion(str(tmp_path / "vae.safetensors"), str(tmp_path / "out")))
    assert report.kind == "autoencoder" and report.parameters == 83_653_863
    jax.tree.map(np.testing.assert_array_equal, load_autoencoder(tmp_path / "out").params, params)
    export(Export(tmp_path / "out", tmp_path / "back.bin"))
    back = read_tensors(tmp_path / "back.bin")
    for name, tensor in theirs.state_dict().items():
        np.testing.assert_array_equal(back[name], tensor.numpy(), err_msg=name)


def test_latents_are_drawn_from_the_moments():
    moments = autoencoder.Moments(
        np.full((1, 50, 50, 4), 2.0, np.float32), np.full((1, 50, 50, 4), np.log(9.0), np.float32)
    )
    config = AutoencoderConfig()
    latents = autoencoder.sample_latents(moments, config, jax.random.key(0)) / autoencoder.LATENT_SCALE
    assert abs(float(latents.mean()) - 2) < 0.1 and abs(float(latents.std()) - 3) < 0.1
    np.testing.assert_allclose(
        autoencoder.sample_latents(moments, config, None), 2 * autoencoder.LATENT_SCALE, rtol=1e-6
    )


@pytest.mark.slow
def test_batches_are_split_over_devices_and_slices(params, monkeypatch):
    monkeypatch.setattr("dydit_jax.latents.IMAGES_PER_DEVICE", 1)
    mesh, generator = make_mesh(MeshConfig()), np.random.default_rng(0)
    images = generator.uniform(-1, 1, (5, 16, 16, 3)).astype(np.float32)  # two slices of four, the second filled up
    ours = Autoencoder(AutoencoderConfig(), params)
    latents = encode_images(ours, images, mesh)
    expected = autoencoder.sample_latents(jax.jit(autoencoder.encode)(ours, images), ours.config, None)
    np.testing.assert_allclose(latents, expected, atol=1e-5)
    decoded = decode_latents(ours, latents, mesh)
    assert decoded.shape == images.shape
    np.testing.assert_allclose(decoded, jax.jit(autoencoder.decode)(ours, latents), atol=1e-5)


def test_incomplete_files_are_refused(theirs):
    tensors = {name: tensor.numpy() for name, tensor in theirs.state_dict().items()}
    del tensors["decoder.conv_in.bias"]
    tensors["decoder.extra"] = np.zeros(2)
    tensors["encoder.conv_in.bias"] = np.zeros(3, np.float32)
    with pytest.raises(
        InputError, match="3 problems.*missing decoder.conv_in.bias.*surplus decoder.extra.*conv_in.bias"
    ):
        convert_autoencoder(tensors)
