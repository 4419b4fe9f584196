"""Checkpoints in the forms that training tools write hold the same weights as a plain state dict, bit by bit."""

import argparse
import collections
import json
import pathlib

import numpy as np
import pytest
from conftest import CHECKPOINTS, GOLDEN

from dydit_jax.convert.conversion import Conversion, convert
from dydit_jax.convert.torch_files import read_tensors, read_torch_file, write_tensors
from dydit_jax.errors import InputError

torch = pytest.importorskip("torch")


def named(tensors: dict, start: str) -> dict:
    return {f"{start}{name}": tensor for name, tensor in tensors.items()}


def compiled_blocks(tensors: dict) -> dict:
    """Return the names that compiling every block by itself gives."""
    return {name.replace("blocks.1.", "blocks.1._orig_mod."): tensor for name, tensor in tensors.items()}


NUMBER, RANDOM = torch.tensor(7), torch.zeros(16, dtype=torch.uint8)
# Each makes a file's content of the averaged weights and of other ones.
FORMS = {
    "torch.compile": lambda ema, _: named(ema, "_orig_mod."),
    "DataParallel": lambda ema, _: named(ema, "module."),
    "compiled in DataParallel": lambda ema, _: named(ema, "module._orig_mod."),
    "DataParallel compiled": lambda ema, _: named(ema, "_orig_mod.module."),
    "compiled blocks": lambda ema, _: compiled_blocks(ema),
    "AveragedModel": lambda ema, _: {"n_averaged": NUMBER} | named(ema, "module."),
    "AveragedModel compiled": lambda ema, _: {"n_averaged": NUMBER} | named(ema, "module._orig_mod."),
    "ema_model alone": lambda ema, _: named(ema, "ema_model."),
    "ema_model beside": lambda ema, model: (
        named(ema, "ema_model.module.") | named(model, "online_model.") | {"initted": NUMBER > 0, "step": NUMBER}
    ),
    "Lightning": lambda ema, model: {"state_dict": named(model, "model.") | named(ema, "ema.")},
    "state_dict": lambda ema, _: {"state_dict": ema, "epoch": 3},
    "model_state_dict": lambda ema, _: {"model_state_dict": ema, "optimizer_state_dict": {"state": {}}},
    "both with state_dict": lambda ema, model: {"model_state_dict": model, "ema_state_dict": ema},
    "step and rng": lambda ema, model: {"model": model, "ema": ema, "step": NUMBER, "rng_state": RANDOM},
    "averaged in ema": lambda ema, model: {"model": model, "ema": {"n_averaged": NUMBER} | named(ema, "module.")},
}


@pytest.fixture(scope="module")
def ema(golden_v2) -> dict:
    return {name: torch.tensor(tensor) for name, tensor in golden_v2.state_dict.items()}


def require_equal(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_array_equal(found[name], tensor, err_msg=name)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_holds_the_plain_weights(golden_v2, ema, tmp_path, form):
    other = {name: tensor + 1 for name, tensor in ema.items()}
    torch.save(FORMS[form](ema, other), tmp_path / "a.pt")
    require_equal(read_tensors(tmp_path / "a.pt"), golden_v2.state_dict)


@pytest.mark.parametrize("form", ["ema_model beside", "Lightning", "both with state_dict", "step and rng"])
def test_where_both_weights_exist_the_flag_decides(golden_v2, ema, tmp_path, form):
    other = {name: tensor + 1 for name, tensor in ema.items()}
    torch.save(FORMS[form](ema, other), tmp_path / "a.pt")
    require_equal(read_tensors(tmp_path / "a.pt", weights="model"), {n: t.numpy() for n, t in other.items()})


@pytest.mark.parametrize(
    "content, weights, message",
    [
        ({"model": {"w": NUMBER}, "step": NUMBER}, "ema", r"holds \['model'\], but no 'ema'"),
        ({"ema_model.w": NUMBER}, "model", r"holds \['ema_model'\], but no 'model'"),
        ({"other": {"w": NUMBER}}, "ema", r"holds \['other'\], but no 'ema'"),
        ({"a.w": NUMBER, "a._orig_mod.w": NUMBER}, "ema", "two tensors of one name"),
        ({"n_averaged": NUMBER}, "ema", "holds no tensors by name"),
    ],
)
def test_files_without_the_weights_say_what_there_is(tmp_path, content, weights, message):
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(InputError, match=message):
        read_tensors(tmp_path / "a.pt", weights=weights)


def test_modules_within_modules_end_somewhere(tmp_path):
    torch.save({"module." * 100 + "w": NUMBER}, tmp_path / "a.pt")
    assert [*read_tensors(tmp_path / "a.pt")] == ["w"]
    torch.save({"module." * 100_000 + "w": NUMBER}, tmp_path / "b.pt")
    with pytest.raises(InputError, match="no tensor's name can be 'module.module.") as caught:
        read_tensors(tmp_path / "b.pt")
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("options", [{}, dict(pickle_protocol=4), dict(_use_new_zipfile_serialization=False)])
def test_harmless_values_beside_weights_are_read(tmp_path, options):
    extras = dict(
        loss=np.float64(0.25),
        steps=np.int32(-5),
        done=np.bool_(True),
        dtype=torch.float32,
        halves=[torch.bfloat16, torch.float16],
        device=torch.device("cuda", 1),
        milestones=collections.Counter({3: 1}),
        frozen={1, 2},
        folder=pathlib.PurePosixPath("/data/images"),
    )
    content = {"ema": {"w": torch.ones(2)}, "args": argparse.Namespace(**extras), **extras}
    torch.save(content, tmp_path / "a.pt", **options)
    file = read_torch_file(tmp_path / "a.pt")
    assert file.tensors["w"].tolist() == [1, 1]
    assert file.options == dict(loss=0.25, steps=-5, done=True)
    assert [type(value) for value in file.options.values()] == [float, int, bool]


SCALAR = b"cnumpy.core.multiarray\nscalar\n"
DTYPE = b"cnumpy\ndtype\n(X\x02\x00\x00\x00%b\x89\x88tR(K\x03X\x01\x00\x00\x00%bNNNNNK\x00tb"
ENCODED = b"c_codecs\nencode\n(X%b%bX\x06\x00\x00\x00latin1tR"


def scalar(kind: bytes = b"f4", order: bytes = b"<", length: int = 4) -> bytes:
    text = ENCODED % (length.to_bytes(4, "little"), b"a" * length)
    return SCALAR + b"(" + DTYPE % (kind, order) + text + b"tR"


@pytest.mark.parametrize(
    "value, message",
    [
        (scalar(b"O8", length=8), "uses 'numpy.dtype' as weights do not"),
        (scalar(b"V9"), "uses 'numpy.dtype' as weights do not"),
        (scalar(order=b">"), "another byte order"),
        (scalar(length=3), "a number of 3 bytes"),
        (scalar(length=1000), "a number of more than 8 bytes"),
        (b"cnumpy.core.multiarray\n_reconstruct\n.", "wants to use 'numpy.core.multiarray._reconstruct'"),
        (b"cnumpy\nload\n.", "wants to use 'numpy.load'"),
        (b"ctorch\nload\n.", "wants to use 'torch.load'"),
        (b"cpathlib\nPath\n.", "wants to use 'pathlib.Path'"),
        (b"ctorch\nfloat32\n)R", "uses 'torch.float32' as weights do not"),
    ],
)
def test_extras_that_are_no_plain_numbers_are_refused(tmp_path, value, message):
    import test_hostile_weights as hostile

    with pytest.raises(InputError, match=message):
        hostile.read(tmp_path / "a.pt", hostile.around(b"\x80\x02}X\x01\x00\x00\x00a" + value + b"s."))


@pytest.fixture
def shards(golden_v2, tmp_path):
    """The reference weights in two files with an index; returns the index's path."""
    halves = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    weight_map = {name: halves[number % 2] for number, name in enumerate(golden_v2.state_dict)}
    for half in halves:
        tensors = {name: golden_v2.state_dict[name] for name, file in weight_map.items() if file == half}
        write_tensors(tmp_path / half, tensors)
    return write_index(tmp_path, weight_map)


def write_index(folder, weight_map: dict):
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps(dict(metadata=dict(total_size=1), weight_map=weight_map), indent=2))
    return path


def test_shards_make_the_same_model_as_one_file(golden_v2, shards, tmp_path):
    require_equal(read_tensors(shards), golden_v2.state_dict)
    report = convert(Conversion(str(shards), str(tmp_path / "out")))
    plain = convert(Conversion(str(GOLDEN / CHECKPOINTS["v2"]), str(tmp_path / "plain")))
    assert report.checksum == plain.checksum


def test_missing_and_foreign_shards_are_named(shards, tmp_path):
    weight_map = json.loads(shards.read_text())["weight_map"]
    for name in ("../model-00001-of-00002.safetensors", "/etc/passwd", "..", "", "a/b"):
        write_index(tmp_path, dict(weight_map, pos_embed=name))
        with pytest.raises(InputError, match="which is not one in its folder"):
            read_tensors(shards)
    for wrong in (dict(weight_map, another="model-00001-of-00002.safetensors"), dict(list(weight_map.items())[1:])):
        write_index(tmp_path, wrong)
        with pytest.raises(InputError, match="and its files disagree about the tensor '"):
            read_tensors(shards)
    write_index(tmp_path, weight_map)
    (tmp_path / "model-00002-of-00002.safetensors").write_bytes(b"\x08")
    with pytest.raises(InputError, match="model-00002-of-00002.safetensors is broken"):
        read_tensors(shards)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(InputError, match="index.json lists model-00002-of-00002.safetensors, which is not in its fold"):
        read_tensors(shards)


@pytest.mark.parametrize("text", ["{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', '{"a":' * 10**5, "{"])
def test_indices_that_are_none_are_refused(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text + " " * 9)
    with pytest.raises(InputError, match="broken or cut short") as caught:
        read_tensors(tmp_path / "model.safetensors.index.json")
    assert "\n" not in str(caught.value)


def test_long_lists_of_names_are_cut(golden_v2, tmp_path):
    tensors = golden_v2.state_dict | {f"surplus.{number}": np.zeros(1, np.float32) for number in range(472)}
    write_tensors(tmp_path / "a.safetensors", tensors)
    with pytest.raises(InputError, match=r"\(472 problems\).*surplus.0 .*; and 468 more") as caught:
        convert(Conversion(str(tmp_path / "a.safetensors"), str(tmp_path / "out")))
    assert len(str(caught.value)) < 400
