"""Reading weights that PyTorch wrote, without letting them run code, and writing them back.

A `.pt`, `.pth` or `.bin` file is a pickle, and a pickle can call anything. Zip files, which PyTorch has written since
2020, are read here by an unpickler that knows a few harmless names and refuses all others; tensors come out as
read-only views of the file, so that a 10.9 GB training file costs no memory until an array is used. Older files need
PyTorch itself and its weights-only reader. `.safetensors` files can hold nothing but arrays.
"""

import collections
import json
import mmap
import pickle
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np

from dydit_jax.errors import InputError

STORAGES = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}
SAFETENSORS_DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
ZIP_LOCAL_HEADER = 30  # bytes before the name of a zip entry
MAX_SAFETENSORS_HEADER = 100_000_000  # bytes; the format's own limit


def read_tensors(path, *, weights: str = "ema") -> dict[str, np.ndarray]:
    """Read the tensors of a PyTorch checkpoint by name.

    Args:
      path: a `.safetensors`, `.pt`, `.pth` or `.bin` file; its content decides, not its name.
      weights: which part of a training file: "ema" or "model".

    Returns:
      Arrays by name, views of the file where possible. A prefix `module.` on every name is removed.

    Raises:
      InputError: no such file, an unknown or broken format, a pickle that wants to call something, or no tensors.
    """
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{path} is a folder; name the file of weights in it.")
    if not path.is_file():
        raise InputError(f"There is no file {path}.")
    if path.stat().st_size == 0:
        raise InputError(f"{path} is empty.")
    content = _read(path)
    tensors = _tensors_of(content, weights, path)
    if all(name.startswith("module.") for name in tensors):
        tensors = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    return tensors


def _read(path: Path) -> Mapping:
    with path.open("rb") as file:
        start = file.read(9)
    if start[:4] == b"PK\x03\x04":
        return _read_zip(path)
    if start[8:9] == b"{":
        return _read_safetensors(path)
    if start[:1] == b"\x80":
        return _read_legacy(path)
    raise InputError(f"{path} is neither a .safetensors file nor one that torch.save wrote.")


def _tensors_of(content, weights: str, path: Path) -> dict[str, np.ndarray]:
    """Pick the state dict out of what a file holds."""
    if isinstance(content, Mapping) and not any(isinstance(value, np.ndarray) for value in content.values()):
        parts = [key for key in content if isinstance(content[key], Mapping)]
        key = weights if weights in content else "state_dict"
        if key not in content:
            raise InputError(f"{path} holds {sorted(map(str, parts))}, but no {weights!r}; choose one with --weights.")
        content = content[key]
    tensors = content if isinstance(content, Mapping) else {}
    tensors = {str(name): tensor for name, tensor in tensors.items() if isinstance(tensor, np.ndarray)}
    if not tensors:
        raise InputError(f"{path} holds no tensors by name.")
    return tensors


# --- Zip files -----------------------------------------------------------------------------------


class _Inert:
    """Stands for an `argparse.Namespace`: keeps nothing, does nothing."""

    def __init__(self, *_, **__):
        pass

    def __setstate__(self, state):
        pass


def _rebuild_tensor(storage, offset, size, stride, *_):
    """Make the view that torch._utils._rebuild_tensor_v2 would make, within its storage."""
    size, stride = tuple(size), tuple(stride)
    if any(n < 0 for n in size + stride) or offset < 0 or len(size) != len(stride):
        raise pickle.UnpicklingError("a tensor with negative sizes")
    if 0 in size:
        return np.zeros(size, storage.dtype)
    if offset + sum((n - 1) * step for n, step in zip(size, stride)) >= storage.size:
        raise pickle.UnpicklingError("a tensor larger than its storage")
    strides = [step * storage.itemsize for step in stride]
    return np.lib.stride_tricks.as_strided(storage[offset:], size, strides, writeable=False)


class _Unpickler(pickle.Unpickler):
    """Knows the names that a state dict needs, and no others; calls nothing of the file's choosing."""

    ALLOWED = {
        ("collections", "OrderedDict"): collections.OrderedDict,
        ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
        ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
        ("torch", "Size"): tuple,
        ("argparse", "Namespace"): _Inert,
        **{("torch", name): dtype for name, dtype in STORAGES.items()},
    }

    def __init__(self, file, storage_of):
        super().__init__(file)
        self._storage_of = storage_of

    def find_class(self, module, name):
        """Return a harmless stand-in, or refuse."""
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it wants to use {module}.{name}")
        return self.ALLOWED[module, name]

    def persistent_load(self, reference):
        """Return the storage that a tensor refers to."""
        kind, dtype, key, _, count = reference
        if kind != "storage":
            raise pickle.UnpicklingError(f"a reference of kind {kind!r}")
        return self._storage_of(dtype, key, count)


def _read_zip(path: Path):
    try:
        with zipfile.ZipFile(path) as archive:
            pickles = [name for name in archive.namelist() if name.endswith("/data.pkl") or name == "data.pkl"]
            if len(pickles) != 1:
                raise InputError(f"{path} is a zip file, but not one that torch.save wrote.")
            prefix = pickles[0].removesuffix("data.pkl")
            if f"{prefix}byteorder" in archive.namelist() and archive.read(f"{prefix}byteorder") != b"little":
                raise InputError(f"{path} was written on a big-endian machine, which is not supported.")
            storages = {}

            def storage_of(dtype, key, count):
                if key not in storages:
                    storages[key] = _storage(path, archive.getinfo(f"{prefix}data/{key}"), dtype, count)
                return storages[key]

            with archive.open(pickles[0]) as file:
                return _Unpickler(file, storage_of).load()
    except InputError:
        raise
    except pickle.UnpicklingError as error:
        raise InputError(f"{path} is refused: {error}. Weights need nothing of the kind.") from error
    except Exception as error:  # noqa: BLE001 (a broken pickle can raise anything)
        raise InputError(f"{path} is broken or cut short: {type(error).__name__}: {error}.") from error


def _storage(path: Path, entry: zipfile.ZipInfo, dtype, count: int) -> np.ndarray:
    """Map the bytes of one uncompressed entry."""
    if entry.compress_type != zipfile.ZIP_STORED:
        raise pickle.UnpicklingError("a compressed tensor")
    if entry.file_size != count * np.dtype(dtype).itemsize:
        raise pickle.UnpicklingError(f"a storage of {entry.file_size} bytes that should hold {count} numbers")
    if count == 0:
        return np.zeros(0, dtype)
    with path.open("rb") as file:
        file.seek(entry.header_offset + ZIP_LOCAL_HEADER - 4)
        name_length, extra_length = struct.unpack("<HH", file.read(4))
    offset = entry.header_offset + ZIP_LOCAL_HEADER + name_length + extra_length
    return np.memmap(path, dtype, "r", offset, (count,))


def release_pages(array) -> None:
    """Give back the memory that reading an array from its file has taken; it is read again when it is used again."""
    while array is not None and not isinstance(array, mmap.mmap):
        array = getattr(array, "base", None)
    if array is not None and hasattr(mmap, "MADV_DONTNEED"):
        array.madvise(mmap.MADV_DONTNEED)


# --- Other files ---------------------------------------------------------------------------------


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """Map the arrays of a `.safetensors` file, bfloat16 included."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(MAX_SAFETENSORS_HEADER, path.stat().st_size):
                raise ValueError("its header is longer than the file")
            header = json.loads(file.read(length))
        data = np.memmap(path, np.uint8, "r")[8 + length :]
        tensors = {}
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            first, last = entry["data_offsets"]
            if not 0 <= first <= last <= data.size:
                raise ValueError(f"{name} lies outside the file")
            tensors[name] = data[first:last].view(SAFETENSORS_DTYPES[entry["dtype"]]).reshape(entry["shape"])
        return tensors
    except (ValueError, KeyError, TypeError, struct.error) as error:
        raise InputError(f"{path} is broken or cut short: {error}.") from error


def _read_legacy(path: Path):
    """Read what torch.save wrote before 2020, with PyTorch's own weights-only reader."""
    try:
        import argparse

        import torch
    except ImportError as error:
        raise InputError(
            f"{path} has PyTorch's old format; reading it needs: pip install 'dydit-jax[torch]'."
        ) from error
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            # Named explicitly: an environment variable can turn the default into a reader that runs code.
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001 (a broken pickle can raise anything)
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"{path} is refused or broken: {reason}") from error
    return _to_numpy(content, torch)


def _to_numpy(content, torch):
    """Turn the tensors of nested dicts into arrays."""
    if isinstance(content, Mapping):
        return {key: _to_numpy(value, torch) for key, value in content.items()}
    if not isinstance(content, torch.Tensor):
        return content
    tensor = content.detach()
    return (
        tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16) if tensor.dtype == torch.bfloat16 else tensor.numpy()
    )


def write_tensors(path, tensors: Mapping[str, np.ndarray]) -> None:
    """Write arrays by name, as `.safetensors` or, where PyTorch is installed, as torch.save does.

    Args:
      path: ends in .safetensors, .pt, .pth or .bin.
      tensors: float32 arrays.

    Raises:
      InputError: another ending, or PyTorch is needed and not there.
    """
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    if path.suffix == ".safetensors":
        import safetensors.numpy

        safetensors.numpy.save_file(dict(tensors), partial)
    elif path.suffix in (".pt", ".pth", ".bin"):
        try:
            import torch
        except ImportError as error:
            raise InputError(f"Writing {path.suffix} needs PyTorch: pip install 'dydit-jax[torch]'.") from error
        state = collections.OrderedDict((name, torch.from_numpy(np.array(array))) for name, array in tensors.items())
        torch.save(state, partial)
    else:
        raise InputError(f"Can't tell the format of {path}; end it in .safetensors, .pt, .pth or .bin.")
    partial.replace(path)
