"""DiTs go to diffusers' folders and come back: the same numbers, the same picture, one error for what does not fit."""

import dataclasses
import json
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import channels_last, relative_error

from dydit_jax.checkpoints import Weights, load_weights, read_autoencoder, save_autoencoder, save_weights
from dydit_jax.convert.conversion import Conversion, convert
from dydit_jax.convert.diffusers_layout import (
    OTHER_FEATURES,
    autoencoder_config,
    read_class_names,
    require_exportable,
    with_original_names,
)
from dydit_jax.convert.exporting import Export, export
from dydit_jax.diffusion.process import Diffusion, Flow
from dydit_jax.diffusion.samplers import Sampler, SamplingConfig
from dydit_jax.errors import InputError
from dydit_jax.models import autoencoder
from dydit_jax.models.config import DiTConfig
from dydit_jax.models.dit import Model
from dydit_jax.sampling.guidance import guide
from dydit_jax.sampling.table import make_table

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

CONFIG = DiTConfig(depth=2, width=32, heads=2, patch=2, side=8, classes=1000)


def as_in_dit(network):
    """Give diffusers' network the timestep's frequencies of DiT."""
    for block in network.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    return network.eval()


@pytest.fixture(scope="module")
def network():
    """Diffusers' DiT with random weights, equal embedders in all blocks, and the normalisation of DiT."""
    torch.manual_seed(0)
    made = diffusers.DiTTransformer2DModel(
        num_attention_heads=CONFIG.heads,
        attention_head_dim=CONFIG.width // CONFIG.heads,
        in_channels=4,
        out_channels=8,
        num_layers=CONFIG.depth,
        sample_size=CONFIG.side,
        norm_eps=1e-6,
    )
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(1.4 / CONFIG.width**0.5 * torch.randn_like(parameter))
    made.transformer_blocks[1].norm1.emb.load_state_dict(made.transformer_blocks[0].norm1.emb.state_dict())
    return as_in_dit(made)


@pytest.fixture(scope="module")
def ours():
    """Our model of the same sizes with random weights, and names for its classes."""
    generator = np.random.default_rng(0)
    filled = lambda leaf: 0.2 * generator.standard_normal(leaf.shape).astype(np.float32)
    params = jax.tree.map(filled, Model(CONFIG).abstract_params())
    names = [f"class {label}" for label in range(1000)]
    return Weights(CONFIG, Diffusion(), SamplingConfig(guidance=1.0), params, dict(class_names=names))


def run_theirs(network, x, t, labels):
    with torch.no_grad():
        given = torch.tensor(x).permute(0, 3, 1, 2), torch.tensor(t), torch.tensor(labels)
        return channels_last(network(given[0], timestep=given[1], class_labels=given[2]).sample)


def run_ours(weights, x, t, labels):
    apply = jax.jit(Model(weights.model, matmul_precision="highest").apply, static_argnames="mode")
    return np.asarray(apply(weights.params, x, t, labels, mode="complete")[0])


def require_same_function(network, weights) -> None:
    x = np.random.default_rng(1).standard_normal((3, 8, 8, 4)).astype(np.float32)
    given = x, np.array([0, 17, 803]), np.array([0, 207, 1000])
    assert relative_error(run_ours(weights, *given), run_theirs(network, *given)) < 1e-5


# --- In -------------------------------------------------------------------------------------------


def test_saved_model_computes_what_diffusers_does(network, tmp_path):
    network.save_pretrained(tmp_path / "transformer")
    report = convert(Conversion(str(tmp_path / "transformer"), str(tmp_path / "ours")))
    weights = load_weights(tmp_path / "ours" / "weights.safetensors")
    assert weights.model == CONFIG and not [doubt for doubt in report.doubts if "heads" in doubt or "row" in doubt]
    require_same_function(network, weights)


@pytest.mark.parametrize(
    "saved", ["sharded", "pickled", "half", "brain", "one file", "pipeline"], ids=lambda saved: saved.replace(" ", "_")
)
def test_every_form_of_files_gives_the_same_weights(network, saved, tmp_path):
    dtype = {"half": torch.float16, "brain": torch.bfloat16}.get(saved, torch.float32)
    settings = dict(
        sharded=dict(max_shard_size="100KB"), pickled=dict(safe_serialization=False), half=dict(variant="fp16")
    )
    folder = tmp_path / "model" / "transformer"
    twin = diffusers.DiTTransformer2DModel.from_config(network.config).to(dtype)
    twin.load_state_dict(network.state_dict())
    twin.save_pretrained(folder, **settings.get(saved, {}))
    source = folder
    if saved == "one file":
        source = folder / "diffusion_pytorch_model.safetensors"
    if saved == "pipeline":
        source = folder.parent
        index = dict(_class_name="DiTPipeline", id2label={str(n): f"a {n}, b {n}" for n in range(1000)})
        (source / "model_index.json").write_text(json.dumps(index))
    convert(Conversion(str(source), str(tmp_path / "ours.safetensors")))
    weights = load_weights(tmp_path / "ours.safetensors")
    assert weights.model == CONFIG
    expected = {name: tensor.to(dtype).float().numpy() for name, tensor in network.state_dict().items()}
    found = weights.params["blocks"]["mlp"]["up"]  # [L,D,H,F]
    np.testing.assert_array_equal(
        found[1].reshape(32, 128).T, expected["transformer_blocks.1.ff.net.0.proj.weight"].reshape(128, 32)
    )
    np.testing.assert_array_equal(
        found[0].reshape(32, 128).T, expected["transformer_blocks.0.ff.net.0.proj.weight"].reshape(128, 32)
    )
    assert weights.class_names == (tuple(f"a {n}, b {n}" for n in range(1000)) if saved == "pipeline" else ())
    assert len(list(folder.iterdir())) > 3 or saved != "sharded"


@pytest.mark.parametrize("quant_conv", [True, False])
def test_autoencoder_goes_there_and_back(quant_conv, tmp_path):
    made = small_autoencoder(quant_conv=quant_conv)
    save_autoencoder(tmp_path / "vae.safetensors", made, {})
    export(Export(str(tmp_path / "vae.safetensors"), str(tmp_path / "vae" / "diffusion_pytorch_model.safetensors")))
    (tmp_path / "vae" / "config.json").write_text(json.dumps(autoencoder_config(made.config, 8)))
    diffusers.AutoencoderKL.from_pretrained(tmp_path / "vae")  # raises where a tensor does not fit
    report = convert(Conversion(str(tmp_path / "vae"), str(tmp_path / "back.safetensors")))
    back = read_autoencoder(tmp_path / "back.safetensors")
    assert report.kind == "autoencoder" and back.config == made.config
    jax.tree.map(np.testing.assert_array_equal, back.params, made.params)


def small_autoencoder(**record):
    generator = np.random.default_rng(0)
    config = autoencoder.AutoencoderConfig(widths=(32, 32), resnets=1, **dict(dict(scale=(0.5,)), **record))
    filled = lambda leaf: generator.standard_normal(leaf.shape).astype(np.float32) / 8
    return autoencoder.Autoencoder(config, jax.tree.map(filled, autoencoder.abstract_params(config)))


def test_other_normalisation_is_named(network, tmp_path):
    network.save_pretrained(tmp_path / "transformer")
    path = tmp_path / "transformer" / "config.json"
    path.write_text(path.read_text().replace('"norm_eps": 1e-06', '"norm_eps": 1e-05'))
    report = convert(Conversion(str(tmp_path / "transformer"), str(tmp_path / "ours")))
    assert "config.json's norm_eps is 1e-05; here it is 1e-06, as in DiT" in report.doubts


@pytest.mark.parametrize("folder, known", [("DiT-XL-2-256", True), ("DiT-XL-2-512", True), ("flowers", False)])
def test_features_that_were_trained_on_are_doubted_unless_the_folder_is_known(network, folder, known, tmp_path, caplog):
    network.save_pretrained(tmp_path / folder / "transformer")
    report = convert(Conversion(str(tmp_path / folder / "transformer"), str(tmp_path / "ours")))
    assert (OTHER_FEATURES not in report.doubts) == known
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warnings == ([] if known else [OTHER_FEATURES])


def test_what_was_exported_here_comes_back_without_a_doubt(exported, tmp_path):
    report = convert(Conversion(str(exported), str(tmp_path / "back.safetensors")))
    assert OTHER_FEATURES not in report.doubts


def state_dict(network) -> dict:
    return {name: tensor.numpy().copy() for name, tensor in network.state_dict().items()}


def test_blocks_with_embedders_of_their_own_are_refused(network):
    tensors = state_dict(network)
    name = "transformer_blocks.1.norm1.emb.timestep_embedder.linear_2.weight"
    tensors[name][3, 5] += 1e-3
    with pytest.raises(
        InputError, match=f"differently .{name} differ from block 0's.; here, as in DiT, all blocks share"
    ):
        with_original_names(tensors)


@pytest.mark.parametrize(
    "damage, message",
    [
        ("pipeline", "model_index.json is of a 'StableDiffusionPipeline', which is none of DiTPipeline"),
        ("model", "config.json is of a 'PixArtTransformer2DModel', which is none of DiTTransformer2DModel"),
        ("empty", "holds no weights: none of diffusion_pytorch_model.safetensors, diffusion_pytorch_model.safe"),
        ("shard", r"index.json lists diffusion_pytorch_model-00002-of-0000\d.safetensors, which is not in its folder"),
        ("labels", "of diffusers', but of no DiTTransformer2DModel"),
        ("tensor", "missing blocks.1.mlp.fc2.bias"),
        ("names", "has an id2label whose labels are not 0 to 1"),
    ],
)
def test_folders_that_do_not_fit_end_in_one_error(network, damage, message, tmp_path):
    folder = tmp_path / "model" / "transformer"
    network.save_pretrained(folder, max_shard_size="100KB" if damage == "shard" else "1GB")
    index = dict(_class_name="DiTPipeline", id2label={"0": "a", "2": "b"} if damage == "names" else {})
    weights = folder / "diffusion_pytorch_model.safetensors"
    if damage == "pipeline":
        index["_class_name"] = "StableDiffusionPipeline"
    elif damage == "model":
        path = folder / "config.json"
        path.write_text(path.read_text().replace("DiTTransformer2DModel", "PixArtTransformer2DModel"))
    elif damage == "empty":
        weights.unlink()
    elif damage == "shard":
        next(folder.glob("*-00002-of-*")).unlink()
    elif damage in ("labels", "tensor"):
        gone = ".class_embedder." if damage == "labels" else "transformer_blocks.1.ff.net.2.bias"
        import safetensors.numpy

        kept = {name: tensor for name, tensor in state_dict(network).items() if gone not in name}
        safetensors.numpy.save_file(kept, weights)
    (folder.parent / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=message):
        convert(Conversion(str(folder.parent), str(tmp_path / "ours")))
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize(
    "listed",
    [["a"], "a", {"1": "a"}, {"0": "a", "x": "b"}, {"0": "a", "9" * 5000: "b"}],
    ids=lambda listed: str(listed)[:20],
)
def test_lists_of_classes_that_are_none_end_in_one_error(listed, tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps(dict(id2label=listed)))
    with pytest.raises(InputError, match="has an id2label whose labels are not 0 to"):
        read_class_names(tmp_path)


# --- Out ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(ours, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    save_weights(folder / "ours.safetensors", ours)
    export(Export(str(folder / "ours.safetensors"), str(folder / "pipeline"), layout="diffusers"))
    return folder / "pipeline"


def test_there_and_back_is_bitwise_equal(ours, exported, tmp_path):
    convert(Conversion(str(exported), str(tmp_path / "back.safetensors")))
    back = load_weights(tmp_path / "back.safetensors")
    assert (back.model, back.class_names) == (ours.model, ours.class_names)
    jax.tree.map(np.testing.assert_array_equal, back.params, ours.params)


def test_exported_pipeline_draws_our_picture(ours, exported):
    steps, scale, labels, shape = 10, 4.0, np.array([207, 360]), (2, 8, 8, 4)
    vae = diffusers.AutoencoderKL(block_out_channels=(8,), latent_channels=4, norm_num_groups=2).eval()
    pipe = diffusers.DiTPipeline.from_pretrained(exported, vae=vae)
    pipe.set_progress_bar_config(disable=True)
    as_in_dit(pipe.transformer)
    require_same_function(pipe.transformer, ours)
    assert json.loads((exported / "model_index.json").read_text())["vae"] == [None, None]
    assert pipe.get_label_ids(["class 207"]) == [207]
    settings = dict(guidance_scale=scale, num_inference_steps=steps, output_type="np")
    theirs = pipe(labels.tolist(), generator=torch.manual_seed(3), **settings).images

    model = Model(CONFIG, matmul_precision="highest")
    table = make_table(SamplingConfig(sampler="ddim", steps=f"ddim{steps}"), ours.process)
    sampler = Sampler(table.form, None)
    state = sampler.init(jnp.asarray(channels_last(torch.randn(2, 4, 8, 8, generator=torch.manual_seed(3)))))
    network = lambda x, t, labels: model.apply(ours.params, x, t, labels, mode="complete")
    run = jax.jit(
        lambda x, t: guide(network, x, t, jnp.asarray(labels), scale=scale, guided_channels="all", config=CONFIG)[0]
    )
    assert pipe.scheduler.timesteps.tolist() == np.asarray(table.timestep).tolist()
    for index in range(len(table)):
        row = jax.tree.map(lambda column, index=index: jnp.asarray(column[index]), table)
        state = sampler.step(state, run(state.xt, row.timestep), row, None)
    latents = torch.tensor(np.asarray(state.xt).reshape(shape)).permute(0, 3, 1, 2) / vae.config.scaling_factor
    with torch.no_grad():
        images = channels_last((vae.decode(latents).sample / 2 + 0.5).clamp(0, 1))
    assert images.std() > 0.01
    np.testing.assert_allclose(images, theirs, atol=1e-4)


def test_autoencoder_goes_into_the_folder_where_one_is_given(ours, tmp_path):
    made = small_autoencoder()
    save_autoencoder(tmp_path / "vae.safetensors", made, {})
    save_weights(tmp_path / "ours.safetensors", ours)
    request = Export(str(tmp_path / "ours.safetensors"), str(tmp_path / "out"), "diffusers")
    export(dataclasses.replace(request, autoencoder=str(tmp_path / "vae.safetensors")))
    pipe = diffusers.DiTPipeline.from_pretrained(tmp_path / "out")
    assert (pipe.vae.config.scaling_factor, pipe.vae.config.sample_size) == (0.5, 16)
    bias = made.params["decoder"]["conv_out"]["bias"]
    np.testing.assert_array_equal(pipe.vae.decoder.conv_out.bias.detach(), bias)


def test_autoencoders_that_the_pipeline_can_not_use_are_refused():
    for record in (dict(shift=(0.1,)), dict(scale=(1.0, 2.0, 3.0, 4.0)), dict(attention=True)):
        with pytest.raises(InputError, match="decodes latents of one scale, without a shift or attention"):
            autoencoder_config(autoencoder.AutoencoderConfig(**record), 32)


def test_what_is_lost_is_said(tiny, tmp_path, caplog):
    model, params = tiny
    save_weights(tmp_path / "w.safetensors", Weights(model.config, Diffusion(), SamplingConfig(), params, {}))
    with caplog.at_level(logging.WARNING):
        export(Export(str(tmp_path / "w.safetensors"), str(tmp_path / "out"), layout="diffusers"))
    assert "exported complete: its routing does not exist in diffusers" in caplog.text
    assert "takes class 1000 for no class, whatever the model; with 10 classes" in caplog.text
    assert "downscale_freq_shift = 0" in caplog.text and "holds no autoencoder" in caplog.text
    network = as_in_dit(diffusers.DiTTransformer2DModel.from_pretrained(tmp_path / "out" / "transformer"))
    x = np.random.default_rng(1).standard_normal((2, 8, 8, 1)).astype(np.float32)
    given = x, np.array([10, 900]), np.array([3, 10])
    weights = load_weights(tmp_path / "w.safetensors")
    assert relative_error(run_ours(weights, *given), run_theirs(network, *given)) < 1e-5


def test_exports_that_can_not_be_are_refused(ours, exported, tmp_path):
    path = str(tmp_path / "w.safetensors")
    before = sorted(exported.rglob("*"))
    save_weights(path, ours)
    with pytest.raises(InputError, match="is not empty; name a new folder, or give --overwrite"):
        export(Export(path, str(exported), layout="diffusers"))
    with pytest.raises(InputError, match="is not empty"):
        export(Export(path, str(tmp_path), layout="diffusers", overwrite=True))  # no export lies there
    assert sorted(exported.rglob("*")) == before
    with pytest.raises(InputError, match="Unknown --export 'flax'; known: diffusers, original"):
        Export(path, "out", layout="flax")
    with pytest.raises(InputError, match="--autoencoder is for --export diffusers"):
        Export(path, "out", autoencoder="vae")
    save_weights(path, dataclasses.replace(ours, process=Flow()))
    with pytest.raises(InputError, match="draws models that predict noise; this one's process is flow"):
        export(Export(path, str(tmp_path / "out"), layout="diffusers"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(positions="stored"), "computes its positions; this model stores its own"),
        (dict(mlp_ratio=2), "has model.mlp_ratio 4, not 2"),
    ],
)
def test_models_that_diffusers_can_not_hold_are_refused(change, message):
    with pytest.raises(InputError, match=message):
        require_exportable(dataclasses.replace(CONFIG, **change), Diffusion())
