"""Arrays and text in one `.safetensors` file, with a checksum for each tensor and one for the header.

The format has none of its own: a bit that flips on a disk or on the way is another weight, or another name, and no
reader notices. So the metadata hold the SHA-256 of every tensor's bytes (`tensor_checksums`), and of the whole header
with zeros in the place of that sum (`header_checksum`). Files from before have neither and are read as they are.

Equal content gives equal bytes: the library writes metadata in an order that changes with every call, so the header is
written here, sorted. Reading is the library's. What checking costs is measured by `benchmarks/checksums.py`.
"""

import contextlib
import hashlib
import json
import pathlib
import struct
import tempfile
from collections.abc import Iterator

import numpy as np
import safetensors
from etils import epath

from dydit_jax.errors import DamageError, InputError, some_of
from dydit_jax.runtime.files import is_local, parse_json, write_atomically
from dydit_jax.runtime.progress import counted_bytes

DTYPES = {
    **{f"float{bits}": f"F{bits}" for bits in (16, 32, 64)},
    **{f"int{bits}": f"I{bits}" for bits in (8, 16, 32, 64)},
    **{f"uint{bits}": f"U{bits}" for bits in (8, 16, 32, 64)},
    "bfloat16": "BF16",
    "bool": "BOOL",
}
TENSORS_KEY, HEADER_KEY = "tensor_checksums", "header_checksum"
DIGITS = 64
REMEDY = "take a copy, or make the file again"
_BEFORE_SUM = f'"{HEADER_KEY}":"'.encode()  # quotes inside a value are escaped, so this is the key itself


def write_arrays(path, leaves: dict, metadata: dict[str, str]) -> None:
    """Write arrays and metadata as `.safetensors`; a file half written never bears the name.

    Raises:
      InputError: a place that can't be written to, or a disk that is full.
    """
    arrays = {name: np.asarray(leaf, order="C") for name, leaf in leaves.items()}
    # Wide types first: each tensor then lies at a multiple of its own width.
    arrays = dict(sorted(arrays.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])))
    found = counted_bytes(arrays, f"checksums of {epath.Path(path).name}")
    checksums = {name: _checksum(_as_bytes(array)) for name, array in found}
    metadata = metadata | {TENSORS_KEY: json.dumps(checksums, sort_keys=True), HEADER_KEY: "0" * DIGITS}
    header = _header(arrays, metadata)
    header = header.replace(_BEFORE_SUM + b"0" * DIGITS, _BEFORE_SUM + _checksum(header).encode())
    with write_atomically(path) as partial, partial.open("wb") as file:
        file.write(header)
        for _, array in counted_bytes(arrays, f"writing {epath.Path(path).name}"):
            file.write(_as_bytes(array))


def read_arrays(path, wanted_format: str) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Read arrays by name and metadata from a `.safetensors` file of one of this project's formats.

    Raises:
      InputError: no such file, or one of another format.
      DamageError: a damaged one, with the tensor that is not as it was written.
    """
    with _opened(path) as file:
        metadata = file.metadata() or {}
        if metadata.get("format") != wanted_format:
            raise InputError(
                f"{path} is not of the format {wanted_format!r}, but {metadata.get('format')!r}; "
                "convert files of other programs with convert_torch_weights.py."
            )
        arrays = {name: _read_tensor(path, file, name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    checksums = parse_json(metadata.pop(TENSORS_KEY, "{}"), f"{TENSORS_KEY} in {path}", remedy=REMEDY)
    for name, array in counted_bytes(arrays, f"checking {epath.Path(path).name}"):
        if name in checksums and _checksum(_as_bytes(array)) != checksums[name]:
            raise _damaged(path, f"tensor {name:.80}")
    metadata.pop(HEADER_KEY, None)
    return arrays, metadata


def require_arrays(leaves: dict, expected: dict[str, tuple], holder, kind: str) -> None:
    """Raise unless arrays have the expected names and shapes.

    Args:
      leaves: arrays by name.
      expected: shapes by name.
      holder: of the arrays, for the message.
      kind: what they should make, for the message.

    Raises:
      InputError: with those that are missing, left over or of another shape.
    """
    wrong = sorted({(name, leaf.shape) for name, leaf in leaves.items()} ^ set(expected.items()))
    if wrong:
        shown = some_of(f"{name!r:.80} {shape}" for name, shape in wrong)
        raise InputError(f"{holder} does not hold the {kind} that it describes: {shown}.")


def format_of(path) -> str | None:
    """Return which format of this project a `.safetensors` file has, None for a foreign one.

    Raises:
      InputError: no such file, or a broken one.
    """
    return read_metadata(path).get("format")


def read_metadata(path) -> dict[str, str]:
    """Read the metadata of a `.safetensors` file, {} where it has none.

    Raises:
      InputError: no such file, or a broken one.
    """
    with _opened(path) as file:
        return file.metadata() or {}


def _header(arrays: dict[str, np.ndarray], metadata: dict[str, str]) -> bytes:
    """Return what precedes the data: the length of a JSON text, and that text, padded to a multiple of 8 bytes."""
    described, end = {"__metadata__": dict(sorted(metadata.items()))}, 0
    for name, array in arrays.items():
        start, end = end, end + array.nbytes
        described[name] = dict(dtype=DTYPES[array.dtype.name], shape=array.shape, data_offsets=(start, end))
    text = json.dumps(described, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _read_tensor(path, file, name: str) -> np.ndarray:
    kind = file.get_slice(name).get_dtype()
    if kind not in DTYPES.values():  # numpy has not all of them
        known = ", ".join(DTYPES.values())
        raise InputError(
            f"{path} has the tensor {name!r:.80} of type {kind}, which no file of ours has; known: {known}."
        )
    return file.get_tensor(name)


def _as_bytes(array: np.ndarray) -> np.ndarray:
    return array.reshape(-1).view(np.uint8)


def _checksum(content) -> str:
    return hashlib.sha256(content).hexdigest()


def _damaged(path, part: str) -> DamageError:
    return DamageError(f"{path} is damaged: its {part} is not as it was written; {REMEDY}.")


@contextlib.contextmanager
def _opened(path) -> Iterator:
    """Open a `.safetensors` file on any kind of path, its header checked; what is not on this machine is copied."""
    path = epath.Path(path)
    if not path.is_file():
        raise InputError(f"There is no file {path}.")
    with contextlib.ExitStack() as stack:
        local = path
        if not is_local(path):
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            local = path.copy(epath.Path(folder) / path.name)
        try:
            file = stack.enter_context(safetensors.safe_open(local, framework="numpy"))
            _require_header(path, local, file.metadata() or {})
            yield file
        except (OSError, safetensors.SafetensorError) as error:
            raise DamageError(f"{path} is not a readable .safetensors file: {error}.") from error


def _require_header(path, local, metadata: dict[str, str]) -> None:
    """Raise unless the header is as it was written; one from before checksums, or another program's, passes.

    Raises:
      InputError: a damaged header, or one with half of what `write_arrays` puts there.
    """
    if not metadata.keys() & {TENSORS_KEY, HEADER_KEY}:
        return
    with pathlib.Path(local).open("rb") as file:
        length = file.read(8)
        header = length + file.read(*struct.unpack("<Q", length))
    before, _, after = header.partition(_BEFORE_SUM)
    written = _checksum(before + _BEFORE_SUM + b"0" * DIGITS + after[DIGITS:])
    if not metadata.keys() >= {TENSORS_KEY, HEADER_KEY} or written != metadata[HEADER_KEY]:
        raise _damaged(path, "header")
