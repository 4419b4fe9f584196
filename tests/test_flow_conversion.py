"""Files of SiTs become flows that are provably the same, and what they leave open is said or guessed aloud."""

import argparse
import dataclasses

import jax
import numpy as np
import pytest
from conftest import GOLDEN, channels_last, read_torch, relative_error

from dydit_jax import Pipeline
from dydit_jax.checkpoints import load_weights, save_weights
from dydit_jax.convert.conversion import Conversion, convert
from dydit_jax.convert.exporting import Export, export
from dydit_jax.convert.torch_files import read_tensors, write_tensors
from dydit_jax.diffusion.process import Diffusion, Flow
from dydit_jax.errors import InputError
from dydit_jax.models.dit import Model

torch = pytest.importorskip("torch")

PLAIN, TRAINING = GOLDEN / "sit_plain.pt", GOLDEN / "sit.pt"


def as_file(path, tensors: dict, **options) -> str:
    """Write a training file of tensors, with the options of its training."""
    tensors = {name: torch.tensor(array) for name, array in tensors.items()}
    torch.save({"ema": tensors, "args": argparse.Namespace(**options)}, path)
    return str(path)


def with_c_channels(tensors: dict) -> dict:
    """Return a network of C output channels, the first half of one of 2C."""
    narrow = lambda array: array.reshape(2, 2, 8, *array.shape[1:])[:, :, :4].reshape(16, *array.shape[1:])
    names = ("final_layer.linear.weight", "final_layer.linear.bias")
    return tensors | {name: narrow(tensors[name]) for name in names}


@pytest.mark.parametrize("source", [PLAIN, TRAINING], ids=["plain", "training"])
def test_converted_sit_is_a_flow_and_equals_the_original(source, tmp_path):
    report = convert(Conversion(str(source), str(tmp_path / "out"), heads=4))
    weights, reference = load_weights(tmp_path / "out" / "weights.safetensors"), np.load(GOLDEN / "sit_forward.npz")
    assert weights.process == Flow() and report.process == "flow"
    assert (weights.sampling.sampler, weights.sampling.steps) == ("euler_maruyama", "250")
    assert "static SiT, process flow" in report.in_words()
    inputs = channels_last(reference["x"]), reference["t"], reference["y"]
    apply = jax.jit(Model(weights.model, matmul_precision="highest").apply, static_argnames="mode")
    output, _ = apply(weights.params, *inputs, mode="complete")
    assert relative_error(output, channels_last(reference["raw_out"])) < 1e-5
    assert relative_error(output[..., :4], channels_last(reference["velocity"])) < 1e-5


def test_training_file_of_a_sit_says_so_and_its_name_alone_is_a_guess(tmp_path):
    said = convert(Conversion(str(TRAINING), str(tmp_path / "a"), heads=4))
    assert said.sources["process"] == "the training's option model"
    assert not [doubt for doubt in said.doubts if doubt.startswith("process")]
    guessed = convert(Conversion(str(PLAIN), str(tmp_path / "b"), heads=4))
    assert "process flow is a guess: sit_plain.pt is named like a SiT; --process decides" in guessed.doubts
    forced = convert(Conversion(str(PLAIN), str(tmp_path / "c"), heads=4, process="diffusion"))
    assert forced.process == "diffusion" and forced.sources["process"] == "--process"


def test_file_that_can_not_tell_is_a_diffusion_unless_a_flag_says(tmp_path):
    source = as_file(tmp_path / "w.pt", read_torch(PLAIN))
    guessed = convert(Conversion(source, str(tmp_path / "a"), heads=4))
    assert guessed.process == "diffusion" and load_weights(guessed.out).process == Diffusion()
    [doubt] = [doubt for doubt in guessed.doubts if doubt.startswith("process")]
    assert doubt.startswith("process diffusion is a guess") and "--process decides" in doubt
    said = convert(Conversion(source, str(tmp_path / "b"), heads=4, process="flow"))
    assert load_weights(said.out).process == Flow() and said.sources["process"] == "--process"


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_sit_there_and_back_is_bitwise_equal(suffix, tmp_path):
    convert(Conversion(str(PLAIN), str(tmp_path / "ours.safetensors"), heads=4))
    export(Export(str(tmp_path / "ours.safetensors"), str(tmp_path / f"back{suffix}")))
    back, theirs = read_tensors(tmp_path / f"back{suffix}"), read_torch(PLAIN)
    assert back.keys() == theirs.keys()
    for name, tensor in theirs.items():
        np.testing.assert_array_equal(back[name], tensor, err_msg=name)


def test_verify_runs_a_flow_at_its_own_times(tmp_path):
    tensors = with_c_channels(read_torch(PLAIN))
    write_tensors(tmp_path / "narrow.safetensors", tensors)
    request = Conversion(str(tmp_path / "narrow.safetensors"), str(tmp_path / "out"), heads=4, process="flow")
    assert convert(dataclasses.replace(request, verify=True)).largest_difference < 1e-5


def test_output_of_c_channels_is_a_flow_s_with_a_half_of_zeros(tmp_path):
    theirs = read_torch(PLAIN)
    source = as_file(tmp_path / "w.pt", with_c_channels(theirs))
    with pytest.raises(InputError, match="has 16 rows; a diffusion, which learns its variance, has 32.*--process=flow"):
        convert(Conversion(source, str(tmp_path / "out"), heads=4))
    convert(Conversion(source, str(tmp_path / "out"), heads=4, process="flow"))
    export(Export(str(tmp_path / "out"), str(tmp_path / "back.pt")))
    back = read_tensors(tmp_path / "back.pt")
    for name, tensor in theirs.items():
        expected = tensor
        if name.startswith("final_layer.linear"):
            expected = tensor.reshape(2, 2, 8, -1).copy()
            expected[:, :, 4:] = 0
        np.testing.assert_array_equal(back[name], expected.reshape(tensor.shape), err_msg=name)


def test_broken_output_layers_are_named(tmp_path):
    narrow = with_c_channels(read_torch(PLAIN))
    for changes, message in (
        ({"final_layer.linear.bias": np.zeros(7, np.float32)}, r"final_layer.linear.bias is \(7,\), must be \(32,\)"),
        ({"final_layer.linear.weight": np.zeros((17, 40), np.float32)}, "has 17 rows; this model's would be 32, or 16"),
    ):
        source = as_file(tmp_path / "w.pt", narrow | changes)
        with pytest.raises(InputError, match=message):
            convert(Conversion(source, str(tmp_path / "out"), heads=4, process="flow"))


def test_routers_make_a_dysit(tmp_path):
    report = convert(Conversion(str(PLAIN), str(tmp_path / "out"), heads=4, add_routers="first_on", order=True))
    weights = load_weights(report.out)
    assert weights.process == Flow() and weights.model.routers == "first_on"
    assert "DySiT with routers 'first_on', process flow" in report.in_words()


@pytest.mark.parametrize(
    "options, process",
    [
        (dict(path_type="Linear", prediction="velocity"), "flow"),
        (dict(prediction="velocity"), "flow"),
        (dict(model="SiT-XL/2"), "flow"),
        (dict(model="DySiT-S/2"), "flow"),
        (dict(prediction="noise"), "diffusion"),
        (dict(model="DiT-XL/2"), "diffusion"),
    ],
)
def test_options_of_the_training_say_the_process(tmp_path, options, process):
    report = convert(Conversion(as_file(tmp_path / "w.pt", read_torch(PLAIN), **options), str(tmp_path / "o"), heads=4))
    assert report.process == process and report.sources["process"].startswith("the training's option")
    other = {"flow": "diffusion", "diffusion": "flow"}[process]
    with pytest.raises(InputError, match=f"says process {process}, but --process says {other}"):
        convert(Conversion(str(tmp_path / "w.pt"), str(tmp_path / "p"), heads=4, process=other))


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(path_type="GVP", prediction="velocity"), "path_type says 'GVP'; .* has path_type 'Linear'"),
        (dict(path_type="linear", prediction="v"), "path_type says 'linear'"),  # its time runs the other way
        (dict(path_type="Linear", prediction="noise"), "prediction says 'noise'; .* has prediction 'velocity'"),
        (dict(model="SiT-S/2", prediction="score"), "prediction says 'score'"),
    ],
)
def test_other_flows_are_refused(tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        convert(Conversion(as_file(tmp_path / "w.pt", read_torch(PLAIN), **options), str(tmp_path / "out"), heads=4))
    assert not (tmp_path / "out").exists()


def test_process_must_be_known():
    with pytest.raises(InputError, match="Unknown process 'flows'; known: diffusion, flow"):
        Conversion("a.pt", "out", process="flows")


# --- The checkpoint says what it is ---------------------------------------------------------------


@pytest.mark.parametrize(
    "process, settings, message",
    [
        (Flow(), dict(sampler="ddpm"), "'ddpm' has no meaning for the process flow: it needs the learned variance"),
        (Flow(), dict(sampler="heun", steps="ddim50"), "Unknown spacing 'ddim50' for the process flow"),
        (Diffusion(), dict(sampler="euler_maruyama"), "no meaning for the process diffusion: it is the stochastic"),
        (Diffusion(), dict(sampler="ddim", steps="list:0.5,0.2"), "list:0.5,0.2"),
    ],
)
def test_sampling_as_another_process_is_refused_with_the_reason(process, settings, message, tmp_path):
    report = convert(Conversion(str(PLAIN), str(tmp_path / "w.safetensors"), heads=4, process=process.name))
    weights = load_weights(report.out)
    weights = dataclasses.replace(weights, sampling=dataclasses.replace(weights.sampling, autoencoder=""))
    save_weights(tmp_path / "w.safetensors", weights)
    with pytest.raises(InputError, match=message):
        Pipeline.load(str(tmp_path / "w.safetensors"))([0], guidance=1.0, **settings)
