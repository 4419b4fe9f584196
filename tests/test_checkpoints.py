"""Weights come back as they went; files that are not ours, and damaged ones, are refused in one line."""

import dataclasses
import hashlib
import json
import os
import stat
import tracemalloc

import jax
import numpy as np
import pytest
import safetensors.numpy
from conftest import ROOT

from dydit_jax.checkpoints import (
    FORMAT,
    Weights,
    checksum,
    format_of,
    load_weights,
    read_arrays,
    save_weights,
    write_arrays,
)
from dydit_jax.diffusion.process import Diffusion
from dydit_jax.diffusion.samplers import SamplingConfig
from dydit_jax.errors import InputError
from dydit_jax.labels import read_labels
from dydit_jax.loading import load_checkpoint


@pytest.fixture
def weights(tiny):
    model, params = tiny
    return Weights(model.config, Diffusion(), SamplingConfig(clip=1.0, steps="20"), params, {"step": 7})


def test_weights_describe_themselves(tmp_path, weights):
    save_weights(tmp_path / "deep" / "w.safetensors", weights)
    loaded = load_weights(tmp_path / "deep" / "w.safetensors")
    assert (loaded.model, loaded.process, loaded.sampling) == (weights.model, weights.process, weights.sampling)
    assert loaded.about == weights.about
    jax.tree.map(np.testing.assert_array_equal, loaded.params, weights.params)
    assert checksum(loaded.params) == checksum(weights.params)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["w.safetensors"]


def test_weights_in_half_precision_are_half_as_large_and_read_as_float32(tmp_path, weights):
    for dtype in ("float32", "float16"):
        save_weights(tmp_path / dtype, weights, dtype=dtype)
    sizes = [(tmp_path / dtype).stat().st_size for dtype in ("float32", "float16")]
    assert sizes[0] - sizes[1] >= 0.5 * 4 * sum(leaf.size for leaf in jax.tree.leaves(weights.params))
    loaded = load_weights(tmp_path / "float16").params
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded)} == {np.dtype("float32")}
    jax.tree.map(lambda new, old: np.testing.assert_array_equal(new, np.float16(old)), loaded, weights.params)


def test_checksum_sees_values_and_names(weights):
    changed = jax.tree.map(lambda leaf: leaf, weights.params)
    changed["label_embed"]["table"] = changed["label_embed"]["table"] + 1e-3
    assert checksum(changed) != checksum(weights.params)


def test_foreign_and_broken_files_are_refused(tmp_path, weights):
    path = tmp_path / "w.safetensors"
    save_weights(path, weights)
    whole = path.read_bytes()
    for name, content in (("empty", b""), ("cut", whole[: len(whole) // 2]), ("text", b"hello" * 100)):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match="not a readable .safetensors file"):
            load_weights(tmp_path / name)
    (tmp_path / "foreign").write_bytes(safetensors.numpy.save({"a": np.zeros(3)}))
    with pytest.raises(InputError, match="is not of the format"):
        load_weights(tmp_path / "foreign")


def test_file_of_another_shape_is_refused(tmp_path, weights):
    path = tmp_path / "w.safetensors"
    save_weights(path, weights)
    leaves, metadata = read_arrays(path, FORMAT)
    leaves["label_embed/table"] = leaves["label_embed/table"][:-1]
    write_arrays(path, leaves, metadata)
    with pytest.raises(InputError, match="does not hold the model that it describes.*label_embed/table"):
        load_weights(path)


def described(changes) -> str:
    """Return a description of weights, as JSON, with parts replaced."""
    return json.dumps(dict(model={}, sampling={}, about={}) | changes)


def trained_with(**train) -> str:
    return described(dict(about=dict(step=10**6, config=dict(train=train))))


@pytest.mark.parametrize(
    "description, message",
    [
        (None, "The description in .* is empty; take a copy"),
        ("x", "The description in .* is damaged or cut short"),
        ("[]", "The description in .* holds list, not a mapping"),
        ("[" * 100_000, "The description in .* is damaged or cut short"),
        ('{"a":' * 150 + "1" + "}" * 150, "The description in .* is nested more than 100 levels deep"),
        ("{}", "description lacks about, model, sampling"),
        (described(dict(about=[])), r"description.about must be a section with keys, not \[\]"),
        (described(dict(about=dict(config="x"))), "description.about.config must be a section"),
        (described(dict(about=dict(class_names=5))), "description.about.class_names must be a tuple, not 5"),
        (described(dict(about=dict(class_names=["a", 5]))), r"class_names\[1\] must be of type str, not 5"),
        (described(dict(about=dict(step="x"))), "description.about.step must be of type int, not 'x'"),
        (trained_with(ema_decay="x"), "train.ema_decay must be of type float, not 'x'"),
        (trained_with(ema_decay=2.0), "train.ema_decay must be from 0.0 to 1.0, not 2.0"),
        (trained_with(ema_decay=10**400), "train.ema_decay must be a finite number, not 1000"),
        (described(dict(model={"de\npth\33": 1})), r"Unknown key model.de\\npth\\x1b; Did"),
    ],
)
def test_description_of_a_stranger_is_one_line_that_names_the_file(tmp_path, description, message):
    metadata = dict(format=FORMAT) | ({} if description is None else dict(description=description))
    write_arrays(tmp_path / "w.safetensors", dict(a=np.zeros(1)), metadata)
    with pytest.raises(InputError, match=message) as caught:
        load_checkpoint(tmp_path / "w.safetensors")
    assert str(tmp_path / "w.safetensors") in str(caught.value) and str(caught.value).isprintable()


def test_what_a_description_says_beyond_what_is_read_is_kept(tmp_path, weights):
    about = dict(step=7, class_names=("a", "b"), source=[{"any": 1}], config=dict(train=dict(seed="x", ema_decay=1)))
    save_weights(tmp_path / "w.safetensors", dataclasses.replace(weights, about=about | dict(versions=None)))
    assert load_weights(tmp_path / "w.safetensors").about == about


def test_class_names_of_a_stranger_can_not_command_a_terminal(tmp_path, weights):
    about = dict(class_names=("\x1b[31mant\x1b]0;owned\x07", "two  words", "\u202egod"))
    save_weights(tmp_path / "w.safetensors", dataclasses.replace(weights, about=about))
    names = load_weights(tmp_path / "w.safetensors").class_names
    assert names == (r"\x1b[31mant\x1b]0;owned\x07", "two words", r"\u202egod")
    assert read_labels(about["class_names"], 3, names, "--labels").tolist() == [0, 1, 2]  # and still are found


def test_array_within_an_array_is_refused(tmp_path, weights):
    save_weights(tmp_path / "w", weights)
    _, metadata = read_arrays(tmp_path / "w", FORMAT)
    for names in (("a", "a/b"), ("a/b", "a"), ("a", "a/b/c")):
        path = tmp_path / "within.safetensors"
        write_arrays(path, dict.fromkeys(names, np.zeros(1)), metadata)
        with pytest.raises(InputError, match=r"within.safetensors: 'a' is an array and has arrays below it"):
            load_weights(path)


def test_names_of_many_parts_and_long_names_are_refused_in_a_short_line(tmp_path, weights):
    save_weights(tmp_path / "w", weights)
    _, metadata = read_arrays(tmp_path / "w", FORMAT)
    cases = {"a/" * 40_000 + "b": "has a name of 40001 parts", "a" * 40_000: "does not hold the model"}
    for name, message in cases.items():
        path = tmp_path / "long.safetensors"
        write_arrays(path, {name: np.zeros(1)}, metadata)
        tracemalloc.start()
        with pytest.raises(InputError, match=message) as caught:
            load_weights(path)
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert len(str(caught.value)) < 1000 and most < 20 * 2**20


@pytest.mark.parametrize("kind, size", [("F8_E4M3", 4), ("F8_E8M0", 4), ("F4", 2), ("C64", 32)])
def test_types_that_no_file_of_ours_has_are_refused(tmp_path, kind, size):
    tensor = dict(dtype=kind, shape=[4], data_offsets=[0, size])
    header = json.dumps({"__metadata__": dict(format="test 1"), "a": tensor}).encode()
    (tmp_path / "w").write_bytes(len(header).to_bytes(8, "little") + header + bytes(size))
    with pytest.raises(InputError, match=f"w has the tensor 'a' of type {kind}, which no file of ours has; known"):
        read_arrays(tmp_path / "w", "test 1")


def test_checksums_of_a_stranger_are_one_line_that_names_the_file(tmp_path):
    write_arrays(tmp_path / "w", dict(a=np.zeros(1)), dict(format="test 1"))
    content = (tmp_path / "w").read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    header["__metadata__"] |= dict(tensor_checksums="[]", header_checksum="0" * 64)
    text = json.dumps(header, separators=(",", ":")).encode()
    length = len(text).to_bytes(8, "little")
    text = text.replace(b"0" * 64, hashlib.sha256(length + text).hexdigest().encode())
    (tmp_path / "w").write_bytes(length + text + bytes(8))
    with pytest.raises(InputError, match="tensor_checksums in .*w holds list, not a mapping"):
        read_arrays(tmp_path / "w", "test 1")


# --- Every byte counts ---------------------------------------------------------------------------

SMALL = dict(
    f=np.arange(3, dtype=np.float32),
    h=np.arange(4, dtype=np.float16).reshape(2, 2),
    i=np.arange(2),
    none=np.zeros((0, 3), np.int32),
    one=np.float64(7),
    yes=np.asarray([True, False]),
)
METADATA = dict(format="test 1", about='quotes " and braces {}')


def test_arrays_of_every_type_come_back_and_the_library_reads_them(tmp_path):
    write_arrays(tmp_path / "w", SMALL, METADATA)
    ours, metadata = read_arrays(tmp_path / "w", "test 1")
    assert metadata == METADATA
    for found in (ours, safetensors.numpy.load_file(tmp_path / "w")):
        assert found.keys() == SMALL.keys()
        for name, array in SMALL.items():
            np.testing.assert_array_equal(found[name], array, strict=True)


def test_any_changed_byte_is_noticed_and_its_place_named(tmp_path):
    path = tmp_path / "w"
    write_arrays(path, SMALL, METADATA)
    whole = path.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    widths = sorted(((-np.asarray(a).dtype.itemsize, name, np.asarray(a).nbytes) for name, a in SMALL.items()))
    owner = [name for _, name, size in widths for _ in range(size)]
    assert len(owner) == len(whole) - start
    # 0x29 makes a tab of a space, which JSON does not mind: the header's last bytes.
    changes = [(place, (1, 0x80)[place % 2]) for place in range(len(whole))]
    for place, change in [*changes, *((place, 0x29) for place in range(start - 8, start))]:
        path.write_bytes(whole[:place] + bytes([whole[place] ^ change]) + whole[place + 1 :])
        part = "header|not a readable" if place < start else f"its tensor {owner[place - start]} is not as it was"
        with pytest.raises(InputError, match=part) as caught:
            read_arrays(path, "test 1")
        assert str(path) in str(caught.value)
    for cut in (whole[:-1], whole + b"\0"):
        path.write_bytes(cut)
        with pytest.raises(InputError, match="not a readable"):
            read_arrays(path, "test 1")


def test_files_from_before_checksums_are_read(tmp_path):
    path = tmp_path / "w"
    path.write_bytes(safetensors.numpy.save({"a": np.arange(3)}, dict(format="test 1")))
    np.testing.assert_array_equal(read_arrays(path, "test 1")[0]["a"], np.arange(3))
    assert format_of(ROOT / "assets" / "digits_dydit.safetensors") == FORMAT
    load_weights(ROOT / "assets" / "digits_dydit.safetensors")


def test_equal_content_gives_equal_bytes_in_any_order(tmp_path):
    for number in range(4):
        names, keys = np.random.default_rng(number).permutation([*"abcd"]), [*METADATA.items()]
        write_arrays(tmp_path / str(number), dict.fromkeys(names, np.ones(3)), dict(keys[:: (-1) ** number]))
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1


def test_umask_decides_who_may_read_weights(tmp_path):
    before = os.umask(0o027)
    try:
        write_arrays(tmp_path / "w", SMALL, METADATA)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "w").stat().st_mode) == 0o640
