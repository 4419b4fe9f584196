"""No file of weights from a stranger does more than be read or refused: no code, no crash, no memory, no time."""

import argparse
import io
import json
import pathlib
import pickle
import struct
import tracemalloc
import warnings
import zipfile

import numpy as np
import pytest

from dydit_jax.convert.torch_files import read_torch_file
from dydit_jax.errors import InputError

torch = pytest.importorskip("torch")


def training_content() -> dict:
    """Return a small training file's content, with tensors of several dtypes and forms."""
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    part = {"w": base, "half": base.half(), "brain": base.bfloat16(), "t": base.t(), "p": torch.nn.Parameter(base)}
    return {
        "model": part,
        "ema": part | {"eight": base.to(torch.float8_e4m3fn), "empty": torch.zeros(0, 4)},
        "opt": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-4, "betas": (0.9, 0.99)}]},
        "args": argparse.Namespace(model="DiT-S/2", lr=1e-4, ckpt=None, global_batch_size=256),
        "extras": [np.float64(0.25), np.int16(3), torch.float32, torch.device("cpu"), pathlib.PurePosixPath("a/b")],
    }


def saved(content, **options) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def safetensors_file(header, data: bytes) -> bytes:
    """Put a header, given as JSON or as bytes, before data."""
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(header)) + header + data


def zip_file(members: dict[str, bytes], **options) -> bytes:
    """Make a zip file as torch.save lays it out; options are those of `ZipFile`."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", **options) as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about a name that comes twice
        for name, content in members.items():
            archive.writestr(f"archive/{name.rstrip('+')}", content)
    return buffer.getvalue()


def reference(kind="torch FloatStorage", key="0", count=6) -> bytes:
    """Return the operations that put a storage on the stack."""
    module, name = kind.split()
    return b"(" + text("storage") + f"c{module}\n{name}\n".encode() + text(key) + text("cpu") + integer(count) + b"tQ"


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def integer(value: int) -> bytes:
    length = value.bit_length() // 8 + 1
    return b"\x8a" + bytes([length]) + value.to_bytes(length, "little", signed=True)


def numbers(values) -> bytes:
    return b"(" + b"".join(map(integer, values)) + b"t"


def tensor(offset=0, size=(6,), stride=(1,), storage=None) -> bytes:
    """Return the operations that put a tensor on the stack."""
    arguments = (storage or reference()) + integer(offset) + numbers(size) + numbers(stride) + b"\x89N"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + arguments + b"tR"


def state_dict(*values: bytes) -> bytes:
    return b"\x80\x02}(" + b"".join(text(f"w{i}") + value for i, value in enumerate(values)) + b"u."


def around(payload: bytes, data: bytes = bytes(24), **members: bytes) -> bytes:
    return zip_file({"data.pkl": payload, "byteorder": b"little", "data/0": data} | members)


def read(path, content: bytes):
    path.unlink(missing_ok=True)  # an array may still be a view of the last file of that name
    path.write_bytes(content)
    return read_torch_file(path)


TENSORS = {
    "negative stride": (tensor(offset=5, stride=(-1,)), "negative"),
    "negative size": (tensor(size=(-6,)), "negative"),
    "negative offset": (tensor(offset=-1), "begins nowhere"),
    "offset beyond": (tensor(offset=1), "beyond its storage"),
    "offset far beyond": (tensor(offset=2**70), "beyond its storage"),
    "stride beyond": (tensor(size=(2, 3), stride=(4, 1)), "beyond its storage"),
    "stride far beyond": (tensor(size=(2, 3), stride=(2**62, 1)), "beyond its storage"),
    "stride of zero": (tensor(size=(2**40,), stride=(0,)), "larger than its storage"),
    "strides of zero": (tensor(size=(2**20, 2**20), stride=(0, 0)), "larger than its storage"),
    "size that wraps around": (tensor(size=(2**33, 2**33), stride=(1, 1)), "larger than its storage"),
    "two thousand bits": (tensor(size=(2**1900,), stride=(0,)), "larger than its storage"),
    "many axes": (tensor(size=(1,) * 65, stride=(0,) * 65), "without sizes"),
    "missing stride": (tensor(size=(2, 3)), "begins nowhere"),
    "size of truths": (tensor(size=()).replace(b"(t(", b"(\x88t("), "without sizes"),
    "objects as dtype": (tensor(storage=reference("collections OrderedDict")), "a type that is none"),
    "a function as dtype": (tensor(storage=reference("torch._utils _rebuild_tensor_v2")), "a type that is none"),
    "a namespace as dtype": (tensor(storage=reference("argparse Namespace")), "a type that is none"),
    "numpy's objects": (tensor(storage=reference("numpy object_")), "wants to use 'numpy.object_'"),
    "fewer numbers": (tensor(storage=reference(count=5)), "24 bytes that should hold 5 numbers"),
    "more numbers": (tensor(storage=reference(count=2**62)), "24 bytes that should hold"),
    "a negative count": (tensor(storage=reference(count=-6)), "without a name or a size"),
    "wider numbers": (tensor(storage=reference("torch DoubleStorage")), "24 bytes that should hold 6 numbers"),
    "no such member": (tensor(storage=reference(key="7")), "broken or cut short"),
    "a tensor of a tensor": (tensor(storage=tensor()), "uses a ndarray as a _Storage"),
    "a tensor of a number": (tensor(storage=integer(7)), "uses a int as a _Storage"),
}


@pytest.mark.parametrize("name", TENSORS)
def test_tensors_outside_their_storages_are_refused(tmp_path, name):
    value, message = TENSORS[name]
    with pytest.raises(InputError, match=message):
        read(tmp_path / "a.pt", around(state_dict(value)))


def test_the_same_file_without_the_lie_is_read(tmp_path):
    data = np.arange(6, dtype=np.float32)
    content = around(state_dict(tensor(), tensor(1, (2, 2), (3, 1)), tensor(5, (), ())), data.tobytes())
    tensors = read(tmp_path / "a.pt", content).tensors
    np.testing.assert_array_equal(tensors["w0"], data)
    np.testing.assert_array_equal(tensors["w1"], [[1, 2], [4, 5]])
    assert tensors["w2"] == 5


def test_small_files_of_large_networks_are_refused(tmp_path):
    data = bytes(2**15)
    whole = tensor(size=(2**13,), storage=reference(count=2**13))
    assert len(read(tmp_path / "a.pt", around(state_dict(*[whole] * 4), data)).tensors) == 4
    again = [whole + b"q\x00"] + [b"h\x00"] * 9  # the same tensor from the memo
    for values in ([whole] * 10, again):
        with pytest.raises(InputError, match=r"10 tensors share .* 327680 bytes, its file has 3\d{4}; at most 4 times"):
            read(tmp_path / "a.pt", around(state_dict(*values), data))


PICKLES = {
    "memo index of 2^31": (b"\x80\x02}r" + struct.pack("<I", 2**31) + b".", "no tensors|holds"),
    "memo index that is not there": (b"\x80\x02j" + struct.pack("<I", 2**31) + b".", "broken"),
    "text of 8 TB": (b"\x80\x04\x8d" + struct.pack("<Q", 2**43) + b"a.", "takes more than"),
    "bytes of 8 TB": (b"\x80\x04\x8e" + struct.pack("<Q", 2**43) + b"a.", "takes more than"),
    "byte array of 8 TB": (b"\x80\x05\x96" + struct.pack("<Q", 2**43) + b"a.", "takes more than"),
    "number of 2 GB": (b"\x80\x02\x8b" + struct.pack("<i", 2**31 - 1) + b"a.", "takes more than"),
    "frame of 8 TB": (b"\x80\x04\x95" + struct.pack("<Q", 2**43) + b"}.", "no tensors|holds"),
    "number of a million digits": (b"\x80\x02L" + b"9" * 10**6 + b"L\n.", "broken"),
    "call of print": (b"\x80\x02cbuiltins\nprint\n)R.", "wants to use 'builtins.print'"),
    "call of a stacked name": (b"\x80\x04\x8c\x02os\x8c\x06system\x93)R.", "wants to use 'os.system'"),
    "name with code for the terminal": (b"\x80\x02c\x1b[2J\nx\n.", r"'\\x1b\[2J.x'"),
    "call of a number": (b"\x80\x02K\x01)R.", "uses a int as a _Name"),
    "instance": (b"\x80\x02(ios\nsystem\n.", "operation INST"),
    "extension": (b"\x80\x02\x82\x01.", "operation EXT1"),
    "state of a function": (b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}b.", "state of a _Name"),
    "size of a list of everything": (b"\x80\x02ctorch\nSize\n]\x85R.", "uses a list as a tuple"),
    "huge numbers as keys": (b"\x80\x02}" + integer(2**61 - 1) + b"Ns.", "a int as the key"),
    "stack without values": (b"\x80\x020.", "operation POP|broken"),
    "group without a beginning": (b"\x80\x02t.", "broken"),
    "odd pairs": (b"\x80\x02}(" + text("a") + b"u.", "broken"),
    "no end": (b"\x80\x02}", "broken"),
    "name of a tensor in two lines": (b"\x80\x02}" + text("a\nb") + tensor() + b"s.", r"name can be 'a\\nb'"),
    "dict in itself": (b"\x80\x02}q\x00" + text("ema") + b"h\x00s.", "no tensors"),
}


@pytest.mark.parametrize("name", PICKLES)
def test_pickles_of_everything_else_are_refused_without_taking_memory(tmp_path, name):
    payload, message = PICKLES[name]
    content = around(payload)
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match=message) as caught:
            read(tmp_path / "a.pt", content)
        assert tracemalloc.get_traced_memory()[1] < 10 * len(payload) + (1 << 20)
    finally:
        tracemalloc.stop()
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600 + len(str(tmp_path))


@pytest.mark.parametrize("end, message", [(b".", "no tensors"), (b"Ns.", "tuple as the key of a dict")])
def test_tuples_within_tuples_do_not_overflow_the_stack(tmp_path, end, message):
    with pytest.raises(InputError, match=message):
        read(tmp_path / "a.pt", around(b"\x80\x02})" + b"\x85" * 200_000 + end))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: zip_file({"data.pkl": bytes(1 << 24)}, compression=zipfile.ZIP_DEFLATED), "is compressed"),
        (lambda: around(state_dict(tensor())[:-1] + bytes(9 << 20)), "takes more than"),
        (lambda: around(state_dict(tensor()), **{"data/0+": bytes(24)}), "two members of one name"),
        (lambda: around(state_dict(tensor()), **{"data.pkl+": b"x"}), "two members of one name"),
        (
            lambda: around(state_dict(tensor(), tensor(storage=reference("torch IntStorage")))),
            "storage of two dtypes",
        ),
    ],
    ids=["packed list", "long list", "two storages", "two lists", "two dtypes"],
)
def test_bombs_and_double_members_are_refused(tmp_path, make, message):
    content = make()
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match=message):
            read(tmp_path / "a.pt", content)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


def test_packed_byte_order_is_refused_before_it_is_unpacked(tmp_path):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", state_dict(tensor()))
        archive.writestr("archive/data/0", bytes(24))
        archive.writestr("archive/byteorder", bytes(1 << 24), zipfile.ZIP_DEFLATED)
    with pytest.raises(InputError, match="'archive/byteorder' is compressed"):
        read(tmp_path / "a.pt", buffer.getvalue())


ENTRY = dict(dtype="F32", shape=[2, 3], data_offsets=[0, 24])
HEADERS = {
    "overlapping": ({"a": ENTRY, "b": ENTRY}, "does not begin where"),
    "one twice": (b'{"a": {}, "a": {}}', "names a tensor twice"),
    "beyond the file": ({"a": ENTRY | dict(shape=[7], data_offsets=[0, 28])}, "outside the file"),
    "a hole before": ({"a": ENTRY | dict(shape=[5], data_offsets=[4, 24])}, "does not begin where"),
    "a hole behind": ({"a": ENTRY | dict(shape=[5], data_offsets=[0, 20])}, "belong to no tensor"),
    "backwards": ({"a": ENTRY | dict(data_offsets=[24, 0])}, "does not begin where"),
    "negative": ({"a": ENTRY | dict(shape=[-2, -3])}, "can't have the shape"),
    "wraps around": ({"a": ENTRY | dict(shape=[2**33, 2**33])}, "needs another number"),
    "truth as a size": ({"a": ENTRY | dict(shape=[True, 6])}, "can't have the shape"),
    "many axes": ({"a": ENTRY | dict(shape=[1] * 65)}, "can't have the shape"),
    "unknown dtype": ({"a": ENTRY | dict(dtype="F4")}, "'a' has the dtype 'F4'; known: F64"),
    "list as dtype": ({"a": ENTRY | dict(dtype=[])}, "broken"),
    "no offsets": ({"a": {}}, "broken"),
    "list": (b"{}".replace(b"{}", b'{"a": []}'), "broken"),
    "nested": (b'{"a":' * 10**5, "broken"),
    "no JSON": (b"{" + b"\xff" * 40, "broken"),
    "sixteen bits": ('{"a": 1}'.encode("utf-16"), "neither|broken"),
    "number of a million digits": (b'{"a": ' + b"9" * 10**6 + b"}", "broken"),
    "unprintable name": ({"a\x1b[2J": ENTRY}, r"name can be 'a\\x1b\[2J'"),
    "metadata only": ({"__metadata__": {"a": "b"}}, "belong to no tensor"),
}


@pytest.mark.parametrize("name", HEADERS)
def test_safetensors_that_lie_are_refused(tmp_path, name):
    header, message = HEADERS[name]
    with pytest.raises(InputError, match=message) as caught:
        read(tmp_path / "a.safetensors", safetensors_file(header, bytes(24)))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 800


def test_long_headers_are_refused_before_they_are_read(tmp_path):
    with pytest.raises(InputError, match="takes more than"):
        read(tmp_path / "a.safetensors", safetensors_file(b"{" + b" " * (9 << 20) + b"}", b""))


# --- Mutations -----------------------------------------------------------------------------------

INTERESTING = [0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**64 - 1]


def mutated(content: bytes, random: np.random.Generator) -> bytes:
    """Flip bits, cut, repeat, move, or write numbers of a kind that overflows."""
    content = bytearray(content)
    for _ in range(random.integers(1, 4)):
        if not content:
            return b""
        at, other = sorted(random.integers(0, len(content), 2))
        match random.integers(6):
            case 0:
                content[at] ^= 1 << random.integers(8)
            case 1:
                content[at] = random.integers(256)
            case 2:
                size = int(random.choice([1, 2, 4, 8]))
                number = INTERESTING[random.integers(len(INTERESTING))] % 256**size
                content[at : at + size] = int(number).to_bytes(size, "little")
            case 3:
                del content[at : at + random.integers(1, 16)]
            case 4:
                content[at:at] = content[other : other + random.integers(1, 64)]
            case 5:
                content = content[:other] if random.integers(4) == 0 else content
    return bytes(content)


def mutated_files(count: int):
    """Yield whole files: mutated as they are, or in what lists their tensors, with everything around it in order."""
    random = np.random.default_rng(0)
    content = training_content()
    whole = saved(content)
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        members = {name.removeprefix("archive/"): archive.read(name) for name in archive.namelist()}
    legacy = saved(dict(content, ema=content["model"]), _use_new_zipfile_serialization=False)
    arrays = {"a": ENTRY, "b.c": dict(dtype="BF16", shape=[4], data_offsets=[24, 32])}
    header = json.dumps(arrays).encode()
    for turn in range(count):
        match turn % 5:
            case 0:
                yield mutated(whole, random)
            case 1 | 2:
                yield zip_file(members | {"data.pkl": mutated(members["data.pkl"], random)})
            case 3:
                yield mutated(legacy, random)
            case 4:
                yield safetensors_file(mutated(header, random), bytes(32))


def use(path, content: bytes) -> bool:
    """Read a file and every number in it; return whether it was accepted."""
    try:
        file = read(path, content)
    except InputError as error:
        assert "\n" not in str(error)
        return False
    for name, value in file.tensors.items():
        assert isinstance(name, str) and value.dtype != object and value.size <= len(content)
        np.asarray(value, np.float64).sum()
    assert all(isinstance(value, (str, int, float, bool, type(None))) for value in file.options.values())
    return True


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # sums of what a flipped bit made infinite
@pytest.mark.parametrize("count", [2000, pytest.param(40_000, marks=pytest.mark.slow)])
def test_mutated_files_are_read_or_refused_and_nothing_else(tmp_path, count):
    accepted = sum(use(tmp_path / "a.pt", content) for content in mutated_files(count))
    assert count / 20 < accepted < count * 19 / 20  # both ends are seen


def test_mutations_begin_with_files_that_are_accepted(tmp_path):
    assert use(tmp_path / "a.pt", saved(training_content()))
    legacy = dict(training_content(), ema=training_content()["model"])
    assert use(tmp_path / "a.pt", saved(legacy, _use_new_zipfile_serialization=False))
    assert use(tmp_path / "a.pt", saved(training_content(), pickle_protocol=4))
    assert not use(tmp_path / "a.pt", around(pickle.dumps(7)))


def test_options_of_a_training_are_read(tmp_path):
    for zipped in (True, False):
        content = dict(training_content(), ema=training_content()["model"])
        file = read(tmp_path / "a.pt", saved(content, _use_new_zipfile_serialization=zipped))
        assert file.options == dict(model="DiT-S/2", lr=1e-4, ckpt=None, global_batch_size=256)
