"""What tensors leave open is said by someone or called a guess, and those who disagree end a conversion."""

import argparse
import dataclasses
import json

import ml_dtypes
import numpy as np
import pytest
from conftest import CHECKPOINTS, GOLDEN, read_torch

from dydit_jax.convert.conversion import Conversion, compare_with_torch, convert
from dydit_jax.convert.detect import detect_config
from dydit_jax.convert.evidence import Evidence, gather_evidence
from dydit_jax.convert.tables import convert_state_dict, source_shapes
from dydit_jax.convert.torch_files import write_tensors
from dydit_jax.diffusion.process import Diffusion
from dydit_jax.errors import InputError
from dydit_jax.loading import load_checkpoint
from dydit_jax.models.config import DiTConfig, published_config
from dydit_jax.models.layers import position_table
from dydit_jax.sampling.guidance import require_trained

torch = pytest.importorskip("torch")


def shapes_of(config: DiTConfig, positions: bool = True) -> dict:
    """Return tensors of a model's shapes that take no memory, with the position table if asked for."""
    tensors = {name: np.broadcast_to(np.float32(0), shape) for name, shape in source_shapes(config).items()}
    table = {"pos_embed": position_table(config.side // config.patch, config.width)[None]}
    return tensors | (table if positions else {})


def hear(options=(), **flags) -> Evidence:
    return gather_evidence("weights.pt", dict(options), flags)


SMALL = published_config("S/2", side=32)  # 6 heads, as S has
TWELVE = dataclasses.replace(SMALL, heads=12)  # a training's own choice, of which the tensors show nothing


def test_heads_of_a_published_size_are_a_guess_that_is_called_one():
    evidence = hear()
    assert detect_config(shapes_of(TWELVE), evidence).heads == 6
    assert any(doubt.startswith("heads 6 is a guess") and "--heads" in doubt for doubt in evidence.doubts)


@pytest.mark.parametrize("said", [dict(heads=12), dict(options={"num_heads": 12})])
def test_heads_that_someone_says_are_taken_without_a_doubt(said):
    evidence = hear(**said)
    assert detect_config(shapes_of(TWELVE), evidence).heads == 12
    assert not any("heads" in doubt for doubt in evidence.doubts)


def test_heads_of_the_size_that_the_training_names_are_taken():
    evidence = hear({"model": "DiT-S/2"})
    assert detect_config(shapes_of(SMALL), evidence).heads == 6
    assert evidence.sources["heads"] == "the training's name for its model, S/2,"


def test_a_size_that_the_tensors_do_not_have_is_not_believed():
    evidence = hear({"model": "DiT-XL/2"})
    assert detect_config(shapes_of(SMALL), evidence) == SMALL
    assert any("calls its model XL/2" in doubt for doubt in evidence.doubts)


ROUTED = dataclasses.replace(TWELVE, routers="free")


@pytest.mark.parametrize("layout", ["free", "first_on"])
def test_routers_show_how_many_heads_there_are(layout):
    config, evidence = dataclasses.replace(TWELVE, routers=layout), hear()
    assert detect_config(shapes_of(config), evidence) == config
    assert "heads" not in " ".join(evidence.doubts)


@pytest.mark.parametrize(
    "config, options, flags, message",
    [
        (SMALL, {"num_heads": 6}, dict(heads=12), "option num_heads says heads 6, but --heads says 12"),
        (SMALL, {"depth": 24}, {}, "tensors says depth 12, but the training's option depth says 24"),
        (SMALL, {"hidden_size": 768}, {}, "option hidden_size says 768"),
        (SMALL, {"patch_size": 4}, {}, "option patch_size says 4"),
        (SMALL, {"in_channels": 3}, {}, "option in_channels says 3"),
        (SMALL, {"mlp_ratio": 2.0}, {}, "option mlp_ratio says 2"),
        (SMALL, {"image_size": 512}, {}, "option image_size says image_size 512, .*side 32: images of 32 .* or of 256"),
        (SMALL, {}, dict(image_size=128), "--image_size says image_size 128"),
        (SMALL, {"num_classes": 10}, {}, "option num_classes says classes 10; .* has 1001 rows"),
        (SMALL, {"num_classes": 1000}, dict(classes=1001), "option num_classes says classes 1000, but --classes says"),
        (SMALL, {"class_dropout_prob": 0.0}, dict(classes=1000), "says null_row True, but .*class_dropout_prob says"),
        (SMALL, {"vae": "ema"}, dict(space="pixels"), "option vae says space latent, but --space says pixels"),
        (SMALL, {"image_size": 256}, dict(space="pixels"), "says space latent, but --space says pixels"),
        (SMALL, {}, dict(routers="free"), "--routers is for a model with routers"),
        (ROUTED, {}, dict(heads=6), r"fit no layout with heads 6 \(--heads\)"),
        (ROUTED, {}, dict(routers="first_on"), "fit no layout"),
        (dataclasses.replace(SMALL, channels=16), {}, {}, "input of 16 channels may be anything; give --space"),
    ],
)
def test_those_who_disagree_are_named(config, options, flags, message):
    with pytest.raises(InputError, match=message):
        detect_config(shapes_of(config), hear(options, **flags))


PIXELS = DiTConfig(depth=2, width=32, heads=2, patch=4, side=64, channels=3, classes=10)


@pytest.mark.parametrize(
    "config, flags, side",
    [
        (PIXELS, dict(image_size=64), 64),
        (PIXELS, dict(image_size=512, space="latent"), 64),
        (dataclasses.replace(SMALL), dict(image_size=256, heads=6), 32),
        (dataclasses.replace(SMALL), dict(image_size=32, heads=6, space="pixels"), 32),
    ],
)
def test_image_size_is_divided_for_models_in_latents_alone(config, flags, side):
    flags = dict(heads=2) | flags
    assert detect_config(shapes_of(config, positions=False), hear(**flags)).side == side


def test_image_size_of_a_model_in_latents_is_a_multiple_of_eight():
    with pytest.raises(InputError, match="must be a multiple of 8, not 100"):
        detect_config(shapes_of(SMALL, positions=False), hear(image_size=100))


@pytest.mark.parametrize("numbers", [["0", "2"], ["0", "999999999"], ["0", "x"]])
def test_blocks_are_numbered_without_gaps(numbers):
    config = dataclasses.replace(SMALL, depth=1)
    tensors = shapes_of(config) | {f"blocks.{n}.attn.qkv.bias": np.zeros(1) for n in numbers}
    with pytest.raises(InputError, match="must be numbered from 0 to 1"):
        detect_config(tensors, hear(heads=6))


STRANGE = [0, -1, 3, 8, 64, 1e300, float("nan"), 10**400, None, True, [], {}, "", "x" * 5000, "DiT-S/2", "DiT-\n/9"]
BLOCKS = ["blocks..x", "blocks.7.x", "blocks.-1.x", "blocks.\u00b2.x", "blocks.\u0661.x"]
OPTIONS = ["num_heads", "depth", "image_size", "input_size", "num_classes", "mlp_ratio", "class_dropout_prob", "model"]


def test_strange_shapes_names_and_options_end_in_one_line_or_a_config():
    random = np.random.default_rng(0)
    config = DiTConfig(depth=2, width=32, heads=4, patch=2, side=8, classes=10, routers="first_on")
    shapes = {name: tensor.shape for name, tensor in shapes_of(config).items()}
    pick, accepted = lambda values: values[random.integers(len(values))], 0
    for _ in range(1000):
        changed = dict(shapes)
        for name in (pick(list(shapes)[:12]), pick(list(shapes))):
            shape = list(shapes[name])
            shape[random.integers(len(shape))] = pick([0, 1, 3, 7, 2**20, *shape, *shape, *shape])
            changed[name] = tuple(shape[1:] if random.integers(8) == 0 else shape)
        changed |= {pick(BLOCKS): (1,)} if random.integers(4) == 0 else {}
        tensors = {name: np.broadcast_to(np.float32(0), shape) for name, shape in changed.items()}
        try:
            detect_config(tensors, hear({pick([*OPTIONS, "vae", "prediction", "path_type"]): pick(STRANGE)}))
            accepted += 1
        except InputError as error:
            assert "\n" not in str(error) and len(str(error)) < 800
    assert 50 < accepted < 950


# --- Through files -------------------------------------------------------------------------------

DENSE = GOLDEN / CHECKPOINTS["dense"]  # 11 rows of labels, 4 heads


@pytest.fixture
def dense(tmp_path):
    """Return a copy of the static model's tensors as a file, in a folder of its own."""
    write_tensors(tmp_path / "in" / "w.safetensors", read_torch(DENSE))
    return tmp_path / "in" / "w.safetensors"


def training_file(tmp_path, name="w.pt", **options):
    tensors = {name: torch.tensor(array) for name, array in read_torch(DENSE).items()}
    torch.save({"ema": tensors, "args": argparse.Namespace(**options)}, tmp_path / name)
    return str(tmp_path / name)


def test_table_without_a_row_for_no_class_keeps_its_last_class(dense, tmp_path):
    report = convert(Conversion(str(dense), str(tmp_path / "out"), heads=4, classes=11))
    weights, theirs = load_checkpoint(tmp_path / "out"), read_torch(DENSE)["y_embedder.embedding_table.weight"]
    table = weights.params["label_embed"]["table"]
    assert weights.model.classes == 11
    np.testing.assert_array_equal(table[:11], theirs)
    np.testing.assert_array_equal(table[11:], np.zeros((1, 64)))
    assert weights.sampling.guidance == 1.0
    with pytest.raises(InputError, match="needs a model that has seen no class"):
        require_trained(weights.about["config"], dataclasses.replace(weights.sampling, guidance=1.5))
    assert report.sources["classes"] == "--classes" and not any("null_row" in doubt for doubt in report.doubts)


def test_the_last_row_of_labels_is_a_guess_unless_someone_says(dense, tmp_path):
    guessed = convert(Conversion(str(dense), str(tmp_path / "a"), heads=4))
    assert guessed.config["classes"] == 10
    assert any("null_row True is a guess" in doubt and "--classes=11" in doubt for doubt in guessed.doubts)
    said = convert(Conversion(str(dense), str(tmp_path / "b"), heads=4, classes=10))
    assert said.config["classes"] == 10 and not any("null_row" in doubt for doubt in said.doubts)


def test_config_beside_the_file_is_read(dense, tmp_path):
    (dense.parent / "config.json").write_text(json.dumps({"num_heads": 4, "class_dropout_prob": 0.0, "depth": 3}))
    report = convert(Conversion(str(dense), str(tmp_path / "out")))
    assert (report.config["heads"], report.config["classes"]) == (4, 11)
    assert report.sources["heads"] == "config.json's num_heads"
    with pytest.raises(InputError, match="config.json's num_heads says heads 4, but --heads says 8"):
        convert(Conversion(str(dense), str(tmp_path / "other"), heads=8))


@pytest.mark.parametrize("content, message", [("{", "damaged"), ("[1]", "not a mapping"), (" " * 2**21, "more than")])
def test_damaged_config_beside_the_file_ends_the_conversion(dense, tmp_path, content, message):
    (dense.parent / "config.json").write_text(content)
    with pytest.raises(InputError, match=message):
        convert(Conversion(str(dense), str(tmp_path / "out"), heads=4))


def test_options_of_the_training_settle_what_they_say(tmp_path):
    source = training_file(tmp_path, model="DiT-XL/2", num_heads=4, num_classes=10, image_size=64, vae="mse", lr=1e-4)
    report = convert(Conversion(source, str(tmp_path / "out")))
    weights = load_checkpoint(tmp_path / "out")
    assert (weights.model.heads, weights.model.classes) == (4, 10)
    assert weights.sampling.autoencoder == "sd-vae-ft-mse"
    assert ["calls its model XL/2" in doubt for doubt in report.doubts] == [True, False, False]
    assert [doubt.split()[0] for doubt in report.doubts[1:]] == ["schedule", "train_steps"]


def test_report_names_every_guess(dense, tmp_path):
    report = convert(Conversion(str(dense), str(tmp_path / "out"), heads=4))
    written = json.loads((tmp_path / "out" / "report.json").read_text())
    fields = [doubt.split()[0] for doubt in report.doubts]
    assert sorted(fields) == ["autoencoder", "null_row", "process", "schedule", "space", "train_steps"]
    assert written["doubts"] == report.doubts and written["sources"]["heads"] == "--heads"
    assert all(doubt in report.in_words() for doubt in report.doubts)


def test_schedule_is_what_the_flags_say_and_a_flow_has_none(dense, tmp_path):
    request = Conversion(str(dense), str(tmp_path / "out"), heads=4, schedule="squared_cosine", train_steps=500)
    report = convert(request)
    assert load_checkpoint(tmp_path / "out").process == Diffusion("squared_cosine", 500)
    assert report.sources["schedule"] == "--schedule" and "schedule" not in " ".join(report.doubts)
    with pytest.raises(InputError, match="--schedule is about the schedule of a diffusion; .* is flow"):
        convert(dataclasses.replace(request, process="flow", overwrite=True))
    for wrong, message in ((dict(schedule="cosine"), "known: linear"), (dict(train_steps=2), "train_steps must be")):
        with pytest.raises(InputError, match=message):
            dataclasses.replace(request, **wrong)


@pytest.mark.parametrize("name, prediction", [("visit.pt", None), ("transit2.pt", "noise")])
def test_other_names_and_predictions_of_noise_are_converted(tmp_path, name, prediction):
    convert(Conversion(training_file(tmp_path, name, prediction=prediction), str(tmp_path / "out"), heads=4))


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int64, np.bool_, ml_dtypes.float8_e4m3fn, np.uint16])
def test_codes_of_quantised_weights_are_refused_by_name(tmp_path, dtype):
    tensors = {name: torch.tensor(array) for name, array in read_torch(DENSE).items()}
    coded = torch.ones(192)
    tensors["blocks.0.attn.qkv.bias"] = coded.to(getattr(torch, np.dtype(dtype).name))
    torch.save(tensors, tmp_path / "w.pt")
    with pytest.raises(InputError, match=rf"1 tensors hold .* blocks.0.attn.qkv.bias \({np.dtype(dtype).name}\)"):
        convert(Conversion(str(tmp_path / "w.pt"), str(tmp_path / "out"), heads=4))


def test_guessed_heads_are_not_verified():
    evidence = hear()
    detect_config(shapes_of(SMALL), evidence)
    with pytest.raises(InputError, match="can't know the number of heads, 6 is a guess; give --heads"):
        compare_with_torch(shapes_of(SMALL), {}, SMALL, evidence)


def test_the_other_network_is_what_the_file_says_not_what_was_converted():
    tensors, evidence = read_torch(DENSE), hear(heads=4)
    config = detect_config(tensors, evidence)
    for heads in (4, 2):
        converted = dataclasses.replace(config, heads=heads)
        difference = compare_with_torch(tensors, convert_state_dict(tensors, converted), converted, evidence)
        assert (difference < 1e-5) == (heads == 4)


@pytest.mark.parametrize(
    "wrong, message",
    [
        (dict(heads=0), "--heads must be from 1 to 4096, not 0"),
        (dict(heads=10**9), "--heads must be from 1 to 4096"),
        (dict(classes=-1), "--classes must be from 1"),
        (dict(image_size=10**9), "--image_size must be from 1 to 16384"),
        (dict(latent_scale=(0.2, float("nan"))), "--latent_scale must be from"),
        (dict(space="wavelets"), "Unknown space 'wavelets'; known: latent, pixels"),
    ],
)
def test_absurd_numbers_are_refused_at_once(wrong, message):
    with pytest.raises(InputError, match=message):
        Conversion("a.pt", "out", **wrong)
