"""PyTorch files are read without running anything of theirs, and whatever is wrong with one is said in a line."""

import argparse
import collections
import io
import os
import pickle
import zipfile

import numpy as np
import pytest
from buckets import memory_for_buckets

from dydit_jax.convert.torch_files import read_tensors, write_tensors
from dydit_jax.errors import InputError

torch = pytest.importorskip("torch")


class Bomb:
    """Leaves a file behind if anybody unpickles it."""

    def __init__(self, trace):
        self.trace = str(trace)

    def __reduce__(self):
        return os.system, (f"touch {self.trace}",)


@pytest.mark.parametrize("zipped", [True, False])
def test_tensors_of_every_kind_equal_torchs(tmp_path, zipped):
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    tensors = {
        "plain": base,
        "half": base.half(),
        "bfloat": base.bfloat16(),
        "double": base.double(),
        "integer": base.long(),
        "flags": base > 3,
        "transposed": base.t(),
        "strided": base[::2, 1::2],
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 4),
        "parameter": torch.nn.Parameter(base + 1),
        "shared": base[1],
    }
    torch.save(tensors, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    read = read_tensors(tmp_path / "a.pt")
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(
            np.asarray(read[name], np.float64), tensor.detach().double().numpy(), err_msg=name
        )


@pytest.mark.parametrize("zipped", [True, False])
def test_training_files_give_the_part_that_is_asked_for(tmp_path, zipped):
    part = lambda value: collections.OrderedDict({"module.w": torch.full((2,), value)})
    content = {
        "model": part(1.0),
        "ema": part(2.0),
        "opt": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-4, "params": [0]}]},
        "args": argparse.Namespace(model="DiT-XL/2", lr=1e-4),
    }
    torch.save(content, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    assert read_tensors(tmp_path / "a.pt")["w"].tolist() == [2.0, 2.0]
    assert read_tensors(tmp_path / "a.pt", weights="model")["w"].tolist() == [1.0, 1.0]


def test_files_without_the_part_that_is_asked_for_say_what_there_is(tmp_path):
    torch.save({"model": {"w": torch.zeros(1)}}, tmp_path / "a.pt")
    with pytest.raises(InputError, match=r"holds \['model'\], but no 'ema'"):
        read_tensors(tmp_path / "a.pt")


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_what_is_written_is_read_again(tmp_path, suffix):
    tensors = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b.c": np.ones(4, np.float32)}
    write_tensors(tmp_path / f"w{suffix}", tensors)
    read = read_tensors(tmp_path / f"w{suffix}")
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(read[name], tensor)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_what_is_written_to_a_bucket_lies_there(tmp_path, monkeypatch, suffix):
    monkeypatch.chdir(tmp_path)
    with memory_for_buckets() as bucket:
        write_tensors(f"gs://bucket/out/w{suffix}", {"a": np.ones(4, np.float32)})
        [path] = bucket.find("gs://bucket")
        (tmp_path / f"copy{suffix}").write_bytes(bucket.cat(path))
    np.testing.assert_array_equal(read_tensors(tmp_path / f"copy{suffix}")["a"], 1)
    assert path.endswith(f"bucket/out/w{suffix}") and [file.name for file in tmp_path.iterdir()] == [f"copy{suffix}"]


def test_bfloat16_safetensors_are_read(tmp_path):
    from safetensors.torch import save_file

    tensor = torch.randn(3, 5).bfloat16()
    save_file({"w": tensor}, tmp_path / "a.safetensors")
    np.testing.assert_array_equal(np.asarray(read_tensors(tmp_path / "a.safetensors")["w"], np.float32), tensor.float())


def raw_zip(path, payload):
    """Write a zip file that looks like torch.save's, around any pickle."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", payload)


def dangerous_files(folder, bomb):
    """Write a bomb in every container that a checkpoint may come in."""
    with_state = {"w": torch.zeros(2)}
    torch.save(bomb, folder / "zip.pt")
    torch.save({**with_state, "extra": bomb}, folder / "nested.pt")
    torch.save({"model": with_state, "ema": with_state, "args": argparse.Namespace(lr=bomb)}, folder / "args.pt")
    torch.save({**with_state, "list": [[{"deep": bomb}]]}, folder / "deep.pt")
    torch.save({"w": bomb}, folder / "legacy.pt", _use_new_zipfile_serialization=False)
    (folder / "pickle.bin").write_bytes(pickle.dumps({"w": bomb}, protocol=2))
    (folder / "old.pth").write_bytes(pickle.dumps({"w": bomb}, protocol=0))
    raw_zip(folder / "raw.pt", pickle.dumps(bomb))
    raw_zip(folder / "getattr.pt", b"\x80\x02cbuiltins\ngetattr\ncos\nsystem\n\x86R.")
    return sorted(folder.iterdir())


@pytest.mark.parametrize("force", [False, True])
def test_pickles_that_would_run_code_are_refused_and_never_run(tmp_path, monkeypatch, force):
    if force:  # asks torch to load without its safeguard
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    trace = tmp_path / "ran"
    (tmp_path / "files").mkdir()
    files = dangerous_files(tmp_path / "files", Bomb(trace))
    assert len(files) == 9
    for path in files:
        with pytest.raises(InputError):
            read_tensors(path)
        assert not trace.exists(), path


def test_storages_that_lie_about_their_size_are_refused(tmp_path):
    torch.save({"w": torch.zeros(100)}, tmp_path / "a.pt")
    buffer = io.BytesIO()
    with zipfile.ZipFile(tmp_path / "a.pt") as source, zipfile.ZipFile(buffer, "w") as target:
        for entry in source.infolist():
            content = source.read(entry)
            target.writestr(entry.filename, content[:10] if entry.filename.endswith("data/0") else content)
    (tmp_path / "b.pt").write_bytes(buffer.getvalue())
    with pytest.raises(InputError, match="10 bytes that should hold 100 numbers"):
        read_tensors(tmp_path / "b.pt")


def test_broken_and_foreign_files_are_refused(tmp_path):
    torch.save({"w": torch.zeros(1000)}, tmp_path / "whole.pt")
    whole = (tmp_path / "whole.pt").read_bytes()
    write_tensors(tmp_path / "whole.safetensors", {"w": np.zeros(1000, np.float32)})
    tensors = (tmp_path / "whole.safetensors").read_bytes()
    cases = {
        "cut.pt": (whole[: len(whole) // 2], "broken or cut short"),
        "empty.pt": (b"", "is empty"),
        "text.pt": (b"hello, I am not a checkpoint\n" * 10, "neither"),
        "cut.safetensors": (tensors[:-100], "broken or cut short"),
        "header.safetensors": (b"\xff" * 8 + b"{" + b"x" * 50, "broken or cut short"),
        "image.png": (b"\x89PNG\r\n\x1a\n" + b"\0" * 50, "neither"),
    }
    for name, (content, message) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=message):
            read_tensors(tmp_path / name)
    raw_zip(tmp_path / "number.pt", pickle.dumps(7))
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("readme.txt", "hello")
    for name, message in (
        ("number.pt", "no tensors"),
        ("other.zip", "not one that torch.save wrote"),
        ("none.pt", "no file"),
    ):
        with pytest.raises(InputError, match=message):
            read_tensors(tmp_path / name)
    with pytest.raises(InputError, match="is a folder"):
        read_tensors(tmp_path)


def test_unknown_endings_are_not_written(tmp_path):
    with pytest.raises(InputError, match="Can't tell the format"):
        write_tensors(tmp_path / "w.onnx", {})
