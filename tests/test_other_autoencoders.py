"""Autoencoders of other channels, scales and shapes equal diffusers'; the record belongs to the file."""

import functools
import json

import jax
import numpy as np
import pytest
from conftest import CHECKPOINTS, GOLDEN
from stand_ins import small_autoencoder
from test_autoencoder import in_compvis_layout

from dydit_jax.checkpoints import read_autoencoder_config, save_autoencoder, write_arrays
from dydit_jax.convert.autoencoders import convert_autoencoder
from dydit_jax.convert.conversion import Conversion, convert
from dydit_jax.convert.exporting import Export, export
from dydit_jax.convert.torch_files import read_tensors, write_tensors
from dydit_jax.errors import InputError
from dydit_jax.latents import require_channels
from dydit_jax.loading import find_autoencoder_config, load_autoencoder
from dydit_jax.models import autoencoder
from dydit_jax.models.autoencoder import LATENT_SCALE, AutoencoderConfig

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

FLUX = dict(latent_channels=16, scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False)
SDXL = dict(latent_channels=4, scaling_factor=0.13025)
STATISTICS = dict(
    latent_channels=32,
    scaling_factor=1.0,
    latents_mean=[0.1 * number - 1 for number in range(32)],
    latents_std=[0.5 + 0.1 * number for number in range(32)],
)


def theirs_like(*, stages: int = 4, attention: bool = False, **settings):
    """Return diffusers' network of one resnet and 32 channels per stage, with random weights and norms."""
    torch.manual_seed(0)
    kinds = lambda plain, attending: [*[plain] * (stages - 1), attending if attention else plain]
    if "use_quant_conv" in settings:
        settings["use_post_quant_conv"] = settings["use_quant_conv"]
    network = diffusers.AutoencoderKL(
        down_block_types=kinds("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        up_block_types=kinds("UpDecoderBlock2D", "AttnUpDecoderBlock2D")[::-1],
        block_out_channels=(32,) * stages,
        layers_per_block=1,
        **settings,
    ).eval()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "norm" in name:
                parameter.copy_(0.2 * torch.randn_like(parameter) + float(name.endswith("weight")))
    return network


def saved(theirs, folder):
    """Save a network as diffusers does; return its file of weights."""
    theirs.save_pretrained(folder)
    return folder / "diffusion_pytorch_model.safetensors"


def per_channel(values, default: float) -> np.ndarray:
    return np.float32(default if values is None else values)


@pytest.mark.parametrize(
    "settings, shape",
    [
        (SDXL, dict(factor=8)),
        (FLUX, dict(factor=8, quant_conv=False)),
        (STATISTICS | dict(stages=5, attention=True), dict(factor=16, attention=True)),
    ],
    ids=["sdxl", "flux", "vavae"],
)
def test_networks_and_latents_equal_diffusers(settings, shape, tmp_path):
    theirs = theirs_like(**settings)
    convert(Conversion(str(saved(theirs, tmp_path / "in")), str(tmp_path / "out")))
    ours = load_autoencoder(tmp_path / "out")
    assert {name: getattr(ours.config, name) for name in shape} == shape
    generator, side = np.random.default_rng(0), 2 * ours.config.factor
    image = generator.uniform(-1, 1, (1, side, side, 3)).astype(np.float32)
    latent = generator.standard_normal((1, 2, 2, ours.config.channels)).astype(np.float32)
    # As its pipelines shift and scale, of which none does both ways of it.
    config = theirs.config
    std, mean = per_channel(config.latents_std, 1.0), per_channel(config.latents_mean, config.shift_factor or 0.0)
    channels_last = lambda tensor: tensor.permute(0, 2, 3, 1).numpy()
    with torch.no_grad():
        encoded = channels_last(theirs.encode(torch.tensor(image).permute(0, 3, 1, 2)).latent_dist.mean)
        z = torch.tensor(latent * std / config.scaling_factor + mean).permute(0, 3, 1, 2)
        decoded = channels_last(theirs.decode(z).sample)
    encoded = (encoded - mean) * config.scaling_factor / std
    found = autoencoder.sample_latents(jax.jit(autoencoder.encode)(ours, image), ours.config, None)
    np.testing.assert_allclose(found, encoded, atol=2e-5)
    np.testing.assert_allclose(jax.jit(autoencoder.decode)(ours, latent), decoded, atol=2e-5)
    export(Export(tmp_path / "out", tmp_path / "back.bin"))
    back, state = read_tensors(tmp_path / "back.bin"), theirs.state_dict()
    assert back.keys() == state.keys()
    for name, tensor in state.items():
        np.testing.assert_array_equal(back[name], tensor.numpy(), err_msg=name)


def test_vavae_in_compvis_layout_is_read_without_what_it_was_aligned_with(tmp_path):
    state = theirs_like(stages=5, attention=True, latent_channels=32).state_dict()
    config, params = convert_autoencoder({name: tensor.numpy() for name, tensor in state.items()})
    theirs = {name: tensor.numpy() for name, tensor in in_compvis_layout(state, levels=5).items()}
    beside = {
        "foundation_model.model.norm.weight": np.ones(3, np.float32),
        "linear_proj.weight": np.ones(3, np.float32),
    }
    write_tensors(tmp_path / "vavae.safetensors", theirs | beside)
    flags = dict(latent_scale=tuple(range(1, 33)), latent_shift=(0.5,))
    convert(Conversion(str(tmp_path / "vavae.safetensors"), str(tmp_path / "out"), **flags))
    ours = load_autoencoder(tmp_path / "out")
    assert ours.config.scale == tuple(map(float, range(1, 33))) and ours.config.shift == (0.5,)
    assert (ours.config.widths, ours.config.attention) == (config.widths, True)
    jax.tree.map(np.testing.assert_array_equal, ours.params, params)


def test_latents_of_stable_diffusion_are_bitwise_those_of_the_constant():
    latents = np.random.default_rng(0).standard_normal((64, 4, 4, 4), np.float32)
    config = AutoencoderConfig()
    pairs = ((config.to_model, lambda z: LATENT_SCALE * z), (config.from_model, lambda z: z / LATENT_SCALE))
    for compiled in (lambda function: function, jax.jit):
        for ours, before in pairs:
            np.testing.assert_array_equal(compiled(ours)(latents), compiled(before)(latents), strict=True)


def test_files_without_a_record_are_read_as_stable_diffusions(tmp_path):
    write_arrays(tmp_path / "old.safetensors", dict(x=np.zeros(1)), dict(format="dydit-jax autoencoder 1"))
    found = read_autoencoder_config(tmp_path / "old.safetensors")
    assert found == AutoencoderConfig(channels=4, scale=(0.18215,), shift=(0.0,)) and found.factor == 8
    with pytest.raises(InputError, match="does not hold the autoencoder that it describes"):
        load_autoencoder(tmp_path / "old.safetensors")  # its tensors must be those of that network


def test_records_are_found_without_the_weights(tmp_path):
    ours = small_autoencoder(channels=2, scale=(1 / 3, 0.1), shift=(0.1, -2.0))
    save_autoencoder(tmp_path / "vae.safetensors", ours, {})
    assert find_autoencoder_config(str(tmp_path / "vae.safetensors")) == ours.config
    assert find_autoencoder_config("sd-vae-ft-mse") == AutoencoderConfig()
    assert find_autoencoder_config("nowhere") is None and find_autoencoder_config("") is None
    with pytest.raises(InputError, match="holds no autoencoder of ours, but 'dydit-jax weights 1'"):
        find_autoencoder_config("assets/digits_dydit.safetensors")
    with pytest.raises(InputError, match="draws 4 channels, but the latents of the autoencoder vae have 2"):
        require_channels(ours.config, 4, "vae")


@pytest.mark.parametrize(
    "record, message",
    [
        (dict(channels=0), "channels of an autoencoder must be from 1 to 1024"),
        (dict(widths=(32, 48)), r"must be multiples of 32, not \(32, 48\)"),
        (dict(widths=()), "stages of an autoencoder must be from 1"),
        (dict(scale=(1.0, 2.0)), "scale of latents must be one number, or one for each of 4 channels, not 2"),
        (dict(shift=(float("nan"),)), "shift of latents must be one number"),
        (dict(scale=(0.0,)), "scale of latents must not be 0"),
    ],
)
def test_absurd_records_are_refused(record, message):
    with pytest.raises(InputError, match=message):
        AutoencoderConfig(**record)


@pytest.mark.parametrize(
    "record, message",
    [
        ("{", "The record in .*vae.safetensors is damaged or cut short"),
        ("[" * 10_000, "The record in .*vae.safetensors is damaged or cut short"),
        ('{"scales": [1.0]}', "vae.safetensors: Unknown key autoencoder.scales"),
        ('{"channels": 8}', "does not hold the autoencoder that it describes"),
    ],
)
def test_files_with_a_damaged_record_are_one_line(tmp_path, record, message):
    metadata = {"format": "dydit-jax autoencoder 2", "autoencoder": record}
    write_arrays(tmp_path / "vae.safetensors", dict(x=np.zeros(1)), metadata)
    with pytest.raises(InputError, match=message) as raised:
        load_autoencoder(tmp_path / "vae.safetensors")
    assert "\n" not in str(raised.value)


@functools.cache
def tensors_of(channels: int) -> dict:
    """Return an autoencoder of two stages of 32 channels, as a state dict."""
    state = theirs_like(stages=2, latent_channels=channels, use_quant_conv=channels == 4).state_dict()
    return {name: tensor.numpy() for name, tensor in state.items()}


@pytest.mark.parametrize(
    "channels, config, flags, message",
    [
        (
            4,
            {"_class_name": "AutoencoderKL", "scaling_factor": 0.13025},
            dict(latent_scale=(0.18215,)),
            "says latent_scale",
        ),
        (4, {}, dict(heads=4), "--heads is for DiTs"),
        (4, {}, dict(verify=True), "--verify is for DiTs"),
        (4, {"_class_name": "AutoencoderDC"}, {}, "_class_name says AutoencoderDC; .* must be an AutoencoderKL"),
        (4, {"norm_num_groups": 16}, {}, "norm_num_groups says 16; norms must have 32"),
        (4, {"latent_channels": 8}, {}, "tensors says latent_channels 4, but config.json's latent_channels says 8"),
        (4, {"latents_std": [1.0, 2.0]}, {}, "latents_std must be one number or 4"),
        (4, {"latents_std": [1.0, 2.0, 0.0, 1.0]}, {}, "latents_std must be .* a deviation above 0"),
        (4, {"latents_mean": [1.0] * 4, "shift_factor": 0.1}, {}, "shift_factor and .*latents_mean say both"),
        (16, {}, {}, "16 channels: Stable Diffusion 3's has 16 channels, scale 1.5305 and shift 0.0609; FLUX's"),
        (16, {}, dict(latent_scale=(1.0, 2.0)), "--latent_scale must be one number or 16"),
    ],
)
def test_autoencoders_that_are_something_else_are_refused(tmp_path, channels, config, flags, message):
    write_tensors(tmp_path / "w.safetensors", tensors_of(channels))
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=message):
        convert(Conversion(str(tmp_path / "w.safetensors"), str(tmp_path / "out"), **flags))
    assert not (tmp_path / "out").exists()


def test_other_kinds_of_autoencoders_are_refused_by_what_they_are():
    with pytest.raises(InputError, match="an autoencoder of another kind: only those built as Stable Diffusion's"):
        convert_autoencoder({"decoder.conv_in.conv.weight": np.zeros((8, 4, 3, 3)), "encoder.stages.0.op": np.zeros(3)})
    tensors = tensors_of(4) | {"quantize.embedding.weight": np.zeros((256, 4), np.float32)}
    with pytest.raises(InputError, match=r"surplus quantize.embedding.weight \(256, 4\)"):
        convert_autoencoder(tensors)


@pytest.mark.parametrize(
    "config, flags, record, guessed",
    [
        ({"scaling_factor": 0.13025}, {}, ((0.13025,), (0.0,)), False),
        ({"_class_name": "AutoencoderKL"}, {}, ((LATENT_SCALE,), (0.0,)), False),  # diffusers' default
        (None, {}, ((LATENT_SCALE,), (0.0,)), True),
        (None, dict(latent_scale=(2.0,), latent_shift=(1.0, 2.0, 3.0, 4.0)), ((2.0,), (1.0, 2.0, 3.0, 4.0)), False),
        (
            {"latents_std": [1, 2, 4, 8], "latents_mean": [0.5, 0, 0, 0]},
            {},
            ((1, 0.5, 0.25, 0.125), (0.5, 0, 0, 0)),
            False,
        ),
        ({"latents_std": [1, 2, 4, 8], "scaling_factor": 3}, {}, ((3, 1.5, 0.75, 0.375), (0.0,)), False),
    ],
)
def test_scale_and_shift_of_an_autoencoder_are_said_or_a_guess(tmp_path, config, flags, record, guessed):
    write_tensors(tmp_path / "w.safetensors", tensors_of(4))
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    report = convert(Conversion(str(tmp_path / "w.safetensors"), str(tmp_path / "out"), **flags))
    found = load_autoencoder(tmp_path / "out").config
    assert (found.scale, found.shift) == record
    assert any("latent_scale" in doubt for doubt in report.doubts) == guessed


@pytest.mark.parametrize("flags", [dict(latent_scale=(0.2,)), dict(latent_shift=(0.0,))])
def test_scale_and_shift_are_not_for_dits(flags, tmp_path):
    source = str(GOLDEN / CHECKPOINTS["dense"])
    with pytest.raises(InputError, match=f"--{next(iter(flags))} is for autoencoders"):
        convert(Conversion(source, str(tmp_path / "out"), heads=4, **flags))
