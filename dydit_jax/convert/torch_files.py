"""Reading weights that PyTorch wrote, without letting them run code, and writing them back.

A `.pt`, `.pth` or `.bin` file lists its tensors in a pickle, which `pickles` reads without running it; their numbers
are stored beside it, as members of a zip file or, before 2020, one after the other. A `.safetensors` file lists them in
JSON. Tensors come out as read-only views of the file, so that a 10.9 GB training file costs no memory until an array is
used. What a file states about itself is compared with its bytes before it is used. A `.safetensors.index.json` lists
the files over which the tensors of one network are spread.
"""

import collections
import dataclasses
import io
import json
import math
import mmap
import struct
import tempfile
import textwrap
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np

from dydit_jax.convert.pickles import MAX_AXES, MAX_LIST_BYTES, Namespace, RefusedError, read_pickle
from dydit_jax.convert.state_dicts import pick_state_dict
from dydit_jax.errors import InputError
from dydit_jax.runtime.files import is_local, locate, require_local, write_atomically

SAFETENSORS_DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
ZIP_LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, then the lengths of the name and of the extra field
ZIP_SIGNATURE = b"PK\x03\x04"
ZIP_ENCRYPTED = 1  # bit of a member's flags
# Times the bytes of its files that a network may have. Tensors may be tied, as an embedding and a last layer are, which
# doubles it at the most; more than this is one storage under many names, which a small file could have without end.
MOST_SHARING = 4
LEGACY_START = [0x1950A86A20F9469CFC6C, 1001]  # what the first two pickles of a file from before 2020 hold


@dataclasses.dataclass(frozen=True)
class TorchFile:
    """What a PyTorch file holds.

    Attributes:
      tensors: arrays by name, views of the file.
      options: of the training that wrote it, plain values by name; empty where it does not say.
    """

    tensors: dict[str, np.ndarray]
    options: dict


def read_tensors(path, *, weights: str = "ema") -> dict[str, np.ndarray]:
    """Read the tensors of a PyTorch checkpoint by name; for the rest see `read_torch_file`."""
    return read_torch_file(path, weights=weights).tensors


def read_torch_file(path, *, weights: str = "ema") -> TorchFile:
    """Read the tensors of a PyTorch checkpoint by name, and the options of the training that wrote it.

    Args:
      path: a `.safetensors`, `.pt`, `.pth` or `.bin` file, or the index of several; its content decides, not its name.
      weights: which part of a training file: "ema" or "model".

    Returns:
      The content, under the network's own names: see `state_dicts`.

    Raises:
      InputError: no such file on this machine, an unknown or broken format, something that weights have no need of, or
        no tensors; or tensors that share their numbers until they are much larger than the file.
    """
    path = require_local(path)
    try:
        if path.is_dir():
            raise InputError(f"{path} is a folder; name the file of weights in it.")
        if not path.is_file():
            raise InputError(f"There is no file {path}.")
        if path.stat().st_size == 0:
            raise InputError(f"{path} is empty.")
        content = _read(path)
    except OSError as error:
        raise InputError(f"{path} can't be read ({error.strerror or error}).") from error
    tensors = pick_state_dict(content, weights, path)
    _require_stored(tensors, path)
    options = content.get("args")
    return TorchFile(tensors, options.plain_values() if isinstance(options, Namespace) else {})


def _require_stored(tensors: dict[str, np.ndarray], path) -> None:
    """Raise where tensors together are much larger than the files that they are views of."""
    needed = sum(tensor.nbytes for tensor in tensors.values())
    stored = sum({id(file): len(file) for file in map(_file_of, tensors.values()) if file is not None}.values())
    if needed > MOST_SHARING * stored:
        raise InputError(
            f"{path} is refused: its {len(tensors)} tensors share numbers so often that they take {needed} bytes, "
            f"its file has {stored}; at most {MOST_SHARING} times that is read. Save a copy of each tensor."
        )


def _read(path: Path):
    """Read a file in the format that its first bytes show."""
    with path.open("rb") as file:
        start = file.read(9)
    if start[:4] == ZIP_SIGNATURE:
        read = _read_zip
    elif start[:1] == b"{" and b"\0" not in start:
        read = _read_index
    elif start[8:9] == b"{":
        read = _read_safetensors
    elif start[:1] == b"\x80":
        read = _read_legacy
    else:
        raise InputError(f"{path} is neither a .safetensors file nor one that torch.save wrote.")
    try:
        return read(path)
    except RefusedError as error:
        raise InputError(f"{path} is refused: {_short(error)}. Weights need nothing of the kind.") from error
    except (InputError, OSError):
        raise
    except Exception as error:  # noqa: BLE001 (a broken file can raise anything)
        raise InputError(f"{path} is broken or cut short: {type(error).__name__}: {_short(error)}.") from error


def _short(error: Exception) -> str:
    """Return an error's message as one short line; it may quote a file at length."""
    return textwrap.shorten(str(error), 300)


# --- Pickles with the numbers beside them --------------------------------------------------------


class _Storages:
    """The storages of a file by key: each of one dtype, and as long as its numbers are."""

    def __init__(self, bytes_of: Callable[[str, int], np.ndarray]):
        self._bytes_of, self._loaded = bytes_of, {}

    def __getitem__(self, key: str) -> np.ndarray:
        return self._loaded[key]

    def load(self, key: str, dtype: np.dtype, count: int) -> np.ndarray:
        """Return the numbers [count] of a storage as a view of its bytes."""
        size = count * dtype.itemsize
        if key not in self._loaded:
            stored = self._bytes_of(key, size)
            if stored.size != size:
                raise RefusedError(f"it has a storage of {stored.size} bytes that should hold {count} numbers")
            self._loaded[key] = stored.view(dtype)
        if (self[key].dtype, self[key].size) != (dtype, count):
            raise RefusedError("it has a storage of two dtypes or sizes")
        return self[key]


class _ShortReads(io.FileIO):
    """A file that refuses to be read in large pieces, as `zipfile` would read a list of millions of members."""

    def read(self, size: int = -1) -> bytes:
        if size > MAX_LIST_BYTES:
            raise RefusedError(f"its list of members takes more than {MAX_LIST_BYTES} bytes")
        return super().read(size)


def _read_zip(path: Path):
    """Read what torch.save has written since 2020: a zip file of members that are not compressed."""
    with _ShortReads(path) as file, zipfile.ZipFile(file) as archive:
        members = {entry.filename: entry for entry in archive.infolist()}
        if len(members) < len(archive.infolist()):
            raise RefusedError("it is a zip file with two members of one name")
        lists = [name for name in members if name.endswith("/data.pkl") or name == "data.pkl"]
        if len(lists) != 1:
            raise InputError(f"{path} is a zip file, but not one that torch.save wrote.")
        data, prefix = np.memmap(path, np.uint8, "r"), lists[0].removesuffix("data.pkl")
        byte_order = members.get(f"{prefix}byteorder")
        if byte_order and _member(data, byte_order)[:8].tobytes() != b"little":
            raise InputError(f"{path} was written on a big-endian machine, which is not supported.")
        if _member(data, members[lists[0]]).size > MAX_LIST_BYTES:
            raise RefusedError(f"its list of tensors takes more than {MAX_LIST_BYTES} bytes")
        storages = _Storages(lambda key, _: _member(data, members[f"{prefix}data/{key}"]))
        return read_pickle(io.BytesIO(archive.read(lists[0])), storages.load)


def find_damage(path: Path) -> str:
    """Return what is damaged in a file that begins as a zip, by the checksums in it; "" where nothing is, or elsewhere.

    Nothing is unpacked: members that are compressed are passed over here, and refused by whoever reads them.
    """
    with path.open("rb") as file:
        if file.read(len(ZIP_SIGNATURE)) != ZIP_SIGNATURE:
            return ""
    try:
        with _ShortReads(path) as file, zipfile.ZipFile(file) as archive:
            data, entries = np.memmap(path, np.uint8, "r"), archive.infolist()
    except RefusedError:
        return ""
    except Exception as error:  # noqa: BLE001 (a broken file can raise anything)
        return _short(error)
    if sum(entry.compress_size for entry in entries) > data.size:
        return "its parts are larger than it"
    for entry in entries:
        try:
            found = zlib.crc32(_member(data, entry))
        except RefusedError:
            continue
        except (ValueError, struct.error) as error:
            return str(error)
        if found != entry.CRC:
            return f"its part {entry.filename:.80} has another checksum"
    release_pages(data)
    return ""


def _member(data: np.ndarray, entry: zipfile.ZipInfo) -> np.ndarray:
    """Return the bytes of one member of a zip file as a view of the file's bytes."""
    if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
        raise RefusedError(f"its member {entry.filename!r} is compressed")
    if entry.flag_bits & ZIP_ENCRYPTED:
        raise RefusedError(f"its member {entry.filename!r} is encrypted")
    begin = entry.header_offset + ZIP_LOCAL_HEADER.size
    signature, *lengths = ZIP_LOCAL_HEADER.unpack(data[max(entry.header_offset, 0) : max(begin, 0)].tobytes())
    begin += sum(lengths)
    if signature != ZIP_SIGNATURE or begin + entry.file_size > data.size:
        raise ValueError(f"its member {entry.filename!r} lies outside the file")
    return data[begin : begin + entry.file_size]


def _read_legacy(path: Path):
    """Read what torch.save wrote before 2020: five pickles, then the storages one after the other."""
    data = np.memmap(path, np.uint8, "r")
    with path.open("rb") as file:
        if [read_pickle(file) for _ in LEGACY_START] != LEGACY_START:
            raise InputError(f"{path} is a pickle, but not one that torch.save wrote.")
        if not read_pickle(file)["little_endian"]:
            raise InputError(f"{path} was written on a big-endian machine, which is not supported.")
        begin = file.tell()
        # Where the storages are shows behind the pickle that needs them. It is read twice: first with any bytes as the
        # storages, for their sizes.
        sized = _Storages(lambda _, size: data[:size])
        read_pickle(file, sized.load)
        keys, places = read_pickle(file), {}
        position = file.tell()
        for key in keys:
            if type(key) is not str:
                raise ValueError(f"a {type(key).__name__} as the name of a storage")
            numbers, position = sized[key], position + 8
            if int.from_bytes(data[position - 8 : position].tobytes(), "little") != numbers.size:
                raise ValueError(f"a storage of another size than {numbers.size} numbers")
            places[key] = data[position : position + numbers.nbytes]
            position += numbers.nbytes
        file.seek(begin)
        return read_pickle(file, _Storages(lambda key, _: places[key]).load)


# --- Other files ---------------------------------------------------------------------------------


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """Map the arrays of a `.safetensors` file, which are stored one after the other."""
    data = np.memmap(path, np.uint8, "r")
    length = int.from_bytes(data[:8].tobytes(), "little")
    if length > data.size - 8:
        raise ValueError("its header is longer than the file")
    if length > MAX_LIST_BYTES:
        raise RefusedError(f"its list of tensors takes more than {MAX_LIST_BYTES} bytes")
    header = json.loads(data[8 : 8 + length].tobytes().decode(), object_pairs_hook=_unrepeated)
    header.pop("__metadata__", None)
    data, tensors, end = data[8 + length :], {}, 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        first, last = entry["data_offsets"]
        if first != end or last > data.size:
            raise ValueError(f"{name!r} does not begin where the tensor before it ends, or lies outside the file")
        tensors[name], end = _safetensor(name, data[first:last], entry["dtype"], entry["shape"]), last
    if end != data.size:
        raise ValueError(f"it has {data.size - end} bytes that belong to no tensor")
    return {name: tensors[name] for name in header}


def _safetensor(name: str, stored: np.ndarray, dtype: str, shape: list[int]) -> np.ndarray:
    """Return the bytes of a tensor in its dtype and shape."""
    if dtype not in SAFETENSORS_DTYPES:
        raise RefusedError(f"{name!r} has the dtype {dtype!r}; known: {', '.join(SAFETENSORS_DTYPES)}")
    if len(shape) > MAX_AXES or any(type(n) is not int or n < 0 for n in shape):
        raise ValueError(f"{name!r} can't have the shape {shape}")
    dtype = np.dtype(SAFETENSORS_DTYPES[dtype])
    if math.prod(shape) * dtype.itemsize != stored.size:
        raise ValueError(f"{name!r} has {stored.size} bytes, its shape {shape} needs another number")
    return stored.view(dtype).reshape(shape)


def _read_index(path: Path) -> dict[str, np.ndarray]:
    """Map the arrays of all `.safetensors` files that an index lists; they lie in its own folder."""
    if path.stat().st_size > MAX_LIST_BYTES:
        raise RefusedError(f"its list of tensors takes more than {MAX_LIST_BYTES} bytes")
    files = json.loads(path.read_text(), object_pairs_hook=_unrepeated)["weight_map"]
    shards = {name: _read_shard(path, name) for name in sorted(set(files.values()))}
    held = [(tensor, name) for name, shard in shards.items() for tensor in shard]
    if sorted(held) != sorted(files.items()):
        wrong = sorted({*held} ^ {*files.items()})[0][0]
        raise InputError(f"{path} and its files disagree about the tensor {wrong!r:.80}; copy all of them again.")
    return {tensor: shards[name][tensor] for tensor, name in files.items()}


def _read_shard(index: Path, name: str) -> dict[str, np.ndarray]:
    if not name.isprintable() or Path(name).name != name or name in ("", ".."):
        raise RefusedError(f"it lists the file {name[:80]!a}, which is not one in its folder")
    path = index.with_name(name)
    if not path.is_file():
        raise InputError(f"{index} lists {name}, which is not in its folder; put it there.")
    try:
        return _read_safetensors(path)
    except (InputError, RefusedError, OSError):
        raise
    except Exception as error:  # noqa: BLE001 (a broken file can raise anything)
        raise InputError(f"{path} is broken or cut short: {type(error).__name__}: {_short(error)}.") from error


def _unrepeated(pairs: list[tuple]) -> dict:
    """Make a dict of a JSON object, where no key may come twice."""
    if len(dict(pairs)) < len(pairs):
        raise ValueError("it names a tensor twice")
    return dict(pairs)


def release_pages(array) -> None:
    """Free the memory that reading an array from its file has taken; it is read again at its next use."""
    file = _file_of(array)
    if file is not None and hasattr(mmap, "MADV_DONTNEED"):
        file.madvise(mmap.MADV_DONTNEED)


def _file_of(array) -> mmap.mmap | None:
    """Return the mapped file that an array is a view of."""
    while array is not None and not isinstance(array, mmap.mmap):
        array = getattr(array, "base", None)
    return array


def write_tensors(path, tensors: Mapping[str, np.ndarray]) -> None:
    """Write arrays by name, as `.safetensors` or, where PyTorch is installed, as torch.save does.

    Args:
      path: of this machine or a bucket; ends in .safetensors, .pt, .pth or .bin.
      tensors: float32 arrays.

    Raises:
      InputError: another ending, PyTorch is needed and not there, or a place that can't be written to.
    """
    path = locate(path)
    if path.suffix == ".safetensors":
        import safetensors.numpy

        save = lambda file: safetensors.numpy.save_file(dict(tensors), file)
    elif path.suffix in (".pt", ".pth", ".bin"):
        try:
            import torch
        except ImportError as error:
            raise InputError(f"Writing {path.suffix} needs PyTorch: pip install 'dydit-jax[torch]'.") from error
        state = collections.OrderedDict((name, torch.from_numpy(np.array(array))) for name, array in tensors.items())
        save = lambda file: torch.save(state, file)
    else:
        raise InputError(f"Can't tell the format of {path}; end it in .safetensors, .pt, .pth or .bin.")
    with write_atomically(path) as partial, tempfile.TemporaryDirectory() as folder:
        if is_local(partial):
            save(partial)
            return
        local = locate(folder) / partial.name  # neither library writes to a bucket
        save(local)
        local.copy(partial)
