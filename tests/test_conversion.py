"""Files in the published layouts become models that are provably the same, through the real command's job."""

import dataclasses
import json
import resource

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import CHECKPOINTS, GOLDEN, channels_last, read_torch, relative_error

from dydit_jax.checkpoints import Weights, save_weights
from dydit_jax.convert.conversion import Conversion, convert
from dydit_jax.convert.detect import detect_config
from dydit_jax.convert.diffusers_layout import with_diffusers_names
from dydit_jax.convert.exporting import Export, export
from dydit_jax.convert.ordering import order_by_magnitude
from dydit_jax.convert.publishing import push
from dydit_jax.convert.tables import source_shapes
from dydit_jax.convert.torch_files import read_tensors, write_tensors
from dydit_jax.diffusion.process import Diffusion
from dydit_jax.diffusion.samplers import SamplingConfig
from dydit_jax.errors import InputError
from dydit_jax.loading import load_checkpoint
from dydit_jax.models.config import DiTConfig, published_config
from dydit_jax.models.dit import Model
from dydit_jax.models.layers import position_table

torch = pytest.importorskip("torch")


def source_of(golden) -> str:
    name = next(
        n
        for n, path in CHECKPOINTS.items()
        if read_torch(GOLDEN / path).keys() == golden.state_dict.keys()
        and all(np.array_equal(a, golden.state_dict[k]) for k, a in read_torch(GOLDEN / path).items())
    )
    return str(GOLDEN / CHECKPOINTS[name])


def test_converted_model_equals_the_original(golden, tmp_path):
    heads = 4 if golden.config.routers == "none" else None
    report = convert(Conversion(source_of(golden), str(tmp_path / "out"), heads=heads, verify=True))
    weights = load_checkpoint(tmp_path / "out")
    assert weights.model == golden.config
    model = Model(weights.model, matmul_precision="highest")
    prediction, _ = model.apply(weights.params, *golden.inputs, mode="gated")
    assert relative_error(prediction, channels_last(golden.arrays["out"])) < 1e-5
    assert report.largest_difference < 1e-5
    assert report.tensors == len(golden.state_dict)
    assert report.parameters == sum(tensor.size for tensor in golden.state_dict.values())
    assert json.loads((tmp_path / "out" / "report.json").read_text())["checksum"] == report.checksum
    for part in ("parameters in", "each used once", "MACs", "Largest difference"):
        assert part in report.in_words()


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_there_and_back_is_bitwise_equal(golden, tmp_path, suffix):
    convert(Conversion(source_of(golden), str(tmp_path / "ours.safetensors"), heads=4))
    export(Export(tmp_path / "ours.safetensors", tmp_path / f"back{suffix}"))
    back = read_tensors(tmp_path / f"back{suffix}")
    assert back.keys() == golden.state_dict.keys()
    for name, tensor in golden.state_dict.items():
        np.testing.assert_array_equal(back[name], tensor, err_msg=name)


def test_what_the_original_has_no_place_for_is_refused_or_said(tiny, tmp_path, caplog):
    model, params = tiny
    path, out = str(tmp_path / "w.safetensors"), str(tmp_path / "back.safetensors")
    weights = Weights(model.config, Diffusion("squared_cosine", 500), SamplingConfig(), params, {})
    save_weights(path, dataclasses.replace(weights, model=dataclasses.replace(model.config, token_capacity=(0.5,))))
    with pytest.raises(InputError, match=r"has model.token_capacity \(0.5,\); the original's layout has no place"):
        export(Export(path, out))
    save_weights(path, weights)
    export(Export(path, out))
    assert "on the way in give --schedule=squared_cosine --train_steps=500" in caplog.text
    static = {name: leaf for name, leaf in params.items() if "router" not in name}  # as with routers of one's own
    assert with_diffusers_names(static, model.config).keys() == with_diffusers_names(params, model.config).keys()


@pytest.mark.parametrize(
    "read",
    [
        lambda place: read_tensors(place),
        lambda place: convert(Conversion(place, "out")),
        lambda place: push(place, "hf://me/it"),
    ],
)
@pytest.mark.parametrize("place", ["gs://bucket/x.pt", "hf://me/x", "https://host/x.pt"])
def test_what_is_not_on_this_machine_is_named_as_it_was_typed(read, place):
    with pytest.raises(InputError, match=f"^{place} is not on this machine, and this can only be read from a disk"):
        read(place)


def test_model_weights_differ_from_the_ema(tmp_path):
    source = str(GOLDEN / CHECKPOINTS["v2"])
    convert(Conversion(source, str(tmp_path / "ema")))
    convert(Conversion(source, str(tmp_path / "model"), weights="model"))
    ema, model = load_checkpoint(tmp_path / "ema"), load_checkpoint(tmp_path / "model")
    assert np.abs(ema.params["label_embed"]["table"] - model.params["label_embed"]["table"]).max() > 0
    assert ema.about["weights"] == "ema" and model.about["weights"] == "model"


def test_position_table_of_its_own_is_kept(tmp_path):
    """The unaveraged weights of this file have another table than the sine-cosine one."""
    source = str(GOLDEN / CHECKPOINTS["v2"])
    report = convert(Conversion(source, str(tmp_path / "ours"), weights="model", verify=True))
    assert report.config["positions"] == "stored" and report.largest_difference < 1e-5
    export(Export(tmp_path / "ours", tmp_path / "back.pt"))
    back, theirs = read_tensors(tmp_path / "back.pt"), read_tensors(source, weights="model")
    assert back.keys() == theirs.keys()
    for name, tensor in theirs.items():
        np.testing.assert_array_equal(back[name], tensor, err_msg=name)


@pytest.mark.parametrize("dtype, limit", [("float16", 1e-3), ("bfloat16", 1e-2)])
def test_half_precision_and_prefixed_files_are_read(golden_v2, tmp_path, dtype, limit):
    halved = {f"module.{n}": torch.tensor(t).to(getattr(torch, dtype)) for n, t in golden_v2.state_dict.items()}
    torch.save(halved, tmp_path / "half.pt")
    report = convert(Conversion(str(tmp_path / "half.pt"), str(tmp_path / "out")))
    weights = load_checkpoint(tmp_path / "out")
    assert report.dtypes == [dtype]
    difference = jax.tree.map(lambda a, b: np.abs(a - b).max(), weights.params, golden_v2.params)
    assert max(jax.tree.leaves(difference)) < limit * 40  # router biases are the largest numbers


@pytest.mark.parametrize("name, side", [("S/2", 32), ("B/4", 32), ("L/8", 64), ("XL/2", 64)])
@pytest.mark.parametrize("routers", ["none", "free", "first_on"])
def test_every_published_size_is_recognised(name, side, routers):
    config = published_config(name, side=side, routers=routers)
    empty = {n: np.broadcast_to(np.float32(0), shape) for n, shape in source_shapes(config).items()}
    empty["pos_embed"] = position_table(side // config.patch, config.width)[None]
    assert detect_config(empty) == config


def test_fresh_routers_leave_the_function_as_it_was(tmp_path):
    source = str(GOLDEN / CHECKPOINTS["dense"])
    convert(Conversion(source, str(tmp_path / "static"), heads=4))
    convert(Conversion(source, str(tmp_path / "dynamic"), heads=4, add_routers="first_on", order=True))
    static, dynamic = load_checkpoint(tmp_path / "static"), load_checkpoint(tmp_path / "dynamic")
    assert dynamic.model == dataclasses.replace(static.model, routers="first_on")
    assert (np.asarray(dynamic.params["head_router"]["bias"]) == 15).all()
    x, t, labels = np.ones((2, 8, 8, 4), np.float32), np.array([10, 900]), np.array([1, 2])
    apply = lambda weights: Model(weights.model, matmul_precision="highest").apply(
        weights.params, x, t, labels, mode="gated"
    )
    (before, _), (after, routing) = apply(static), apply(dynamic)
    assert relative_error(after, before) < 1e-5
    assert all(bool((gates == 1).all()) for gates in jax.tree.leaves(routing))


def test_ordering_puts_the_strongest_first_and_changes_nothing():
    config = DiTConfig(depth=2, width=32, heads=4, patch=2, side=8, classes=10)
    model = Model(config, matmul_precision="highest")
    params = jax.tree.map(
        lambda leaf: np.random.default_rng(0).standard_normal(leaf.shape, np.float32) / 4, model.abstract_params()
    )
    ordered = order_by_magnitude(params)
    strength = lambda up, down: np.abs(up).sum(1).reshape(2, -1) + np.abs(down).sum(-1).reshape(2, -1)
    channels = strength(ordered["blocks"]["mlp"]["up"], ordered["blocks"]["mlp"]["down"])
    heads = np.abs(ordered["blocks"]["attention"]["qkv"]).sum((1, 2, 4)) + np.abs(
        ordered["blocks"]["attention"]["out"]
    ).sum((2, 3))
    assert (np.diff(channels) <= 1e-4).all() and (np.diff(heads) <= 1e-4).all()
    x, t, labels = jnp.ones((2, 8, 8, 4)), jnp.asarray([3, 700]), jnp.asarray([0, 5])
    before, _ = model.apply(params, x, t, labels, mode="complete")
    after, _ = model.apply(ordered, x, t, labels, mode="complete")
    assert relative_error(after, before) < 1e-5
    assert np.abs(ordered["blocks"]["mlp"]["up"] - params["blocks"]["mlp"]["up"]).max() > 0.1


def broken(golden_v2, tmp_path, **changes):
    tensors = {k: v for k, v in golden_v2.state_dict.items() if k not in changes or changes[k] is not None}
    tensors |= {k: v for k, v in changes.items() if v is not None}
    write_tensors(tmp_path / "broken.safetensors", tensors)
    return Conversion(str(tmp_path / "broken.safetensors"), str(tmp_path / "out"))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"blocks.0.attn.qkv.bias": None}, r"missing blocks.0.attn.qkv.bias \(192,\)"),
        ({"surplus.weight": np.zeros(3, np.float32)}, r"surplus surplus.weight \(3,\)"),
        ({"blocks.1.mlp.fc1.bias": np.zeros(7, np.float32)}, r"blocks.1.mlp.fc1.bias is \(7,\), must be \(256,\)"),
        ({"blocks.1.mlp.fc1.bias": np.full(256, np.nan, np.float32)}, r"blocks.1.mlp.fc1.bias \(256 of 256\)"),
        ({"t_embedder.mlp.0.bias": np.full(64, np.inf, np.float32)}, r"NaN or infinite.*t_embedder.mlp.0.bias"),
        ({"pos_embed": np.zeros((1, 16, 63), np.float32)}, r"pos_embed is \(1, 16, 63\); this model has"),
        ({"pos_embed": None}, "give --image_size"),
        ({"x_embedder.proj.weight": None}, "not the weights of a DiT"),
        # Routers of both layouts in one file.
        ({"blocks.1.attn_rate.router.weight": np.zeros((4, 64), np.float32)}, r"attn_rate.router.weight is \(4, 64\)"),
    ],
)
def test_files_that_do_not_fit_are_refused_and_nothing_is_written(golden_v2, tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        convert(broken(golden_v2, tmp_path, **changes))
    assert not (tmp_path / "out").exists()


def test_missing_position_table_is_replaced_by_a_flag(golden_v2, tmp_path):
    request = broken(golden_v2, tmp_path, pos_embed=None)
    convert(dataclasses.replace(request, image_size=64))
    assert load_checkpoint(tmp_path / "out").model.side == 8


def test_unknown_number_of_heads_is_asked_for(tmp_path):
    with pytest.raises(InputError, match="give --heads"):
        convert(Conversion(str(GOLDEN / CHECKPOINTS["dense"]), str(tmp_path / "out")))


def test_output_that_exists_is_kept_unless_told_otherwise(tmp_path):
    request = Conversion(str(GOLDEN / CHECKPOINTS["v1"]), str(tmp_path / "w.safetensors"))
    convert(request)
    before = (tmp_path / "w.safetensors").stat().st_mtime_ns
    with pytest.raises(InputError, match="exists; give --overwrite"):
        convert(request)
    with pytest.raises(InputError, match="exists; give --overwrite"):
        export(Export(tmp_path / "w.safetensors", tmp_path / "w.safetensors"))
    assert (tmp_path / "w.safetensors").stat().st_mtime_ns == before
    convert(dataclasses.replace(request, overwrite=True))
    assert (tmp_path / "w.safetensors").stat().st_mtime_ns != before


def test_disk_that_takes_no_more_is_left_without_a_file_that_looks_whole(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(InputError, match="Can't write .*File too large"):
            convert(Conversion(str(GOLDEN / CHECKPOINTS["v1"]), str(tmp_path / "out")))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list((tmp_path / "out").iterdir()) == []


def test_routers_are_not_added_twice(tmp_path):
    with pytest.raises(InputError, match="has routers already"):
        convert(Conversion(str(GOLDEN / CHECKPOINTS["v1"]), str(tmp_path / "out"), add_routers="free"))
