"""Reading the pickle in which torch.save lists its tensors, without Python's unpickler.

A pickle is a program, and Python's unpickler runs it. The small machine here knows the few operations that torch.save
writes, makes nothing but plain values and views of storages, and refuses the rest. Names in the file are
compared with a list and never looked up, nothing of the file's is called, and the sizes that it states are compared
with the bytes that it has before memory is taken.
"""

import math
import pickletools
from collections.abc import Callable

import ml_dtypes
import numpy as np

MAX_LIST_BYTES = 8 << 20  # of what lists the tensors, about 50 000; a training file of XL/2 has 2 600
MAX_AXES = 32
MAX_INTEGER_KEY = 2**31  # larger ones could be chosen to collide in a dict

STORAGE_DTYPES = {
    "torch DoubleStorage": np.dtype(np.float64),
    "torch FloatStorage": np.dtype(np.float32),
    "torch HalfStorage": np.dtype(np.float16),
    "torch BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "torch LongStorage": np.dtype(np.int64),
    "torch IntStorage": np.dtype(np.int32),
    "torch ShortStorage": np.dtype(np.int16),
    "torch CharStorage": np.dtype(np.int8),
    "torch ByteStorage": np.dtype(np.uint8),
    "torch BoolStorage": np.dtype(np.bool_),
    "torch.storage UntypedStorage": np.dtype(np.uint8),
}
# Dtypes that came after the typed storages: these tensors name their dtype, and their storage is bytes.
TENSOR_DTYPES = {
    "torch float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
    "torch float8_e4m3fnuz": np.dtype(ml_dtypes.float8_e4m3fnuz),
    "torch float8_e5m2": np.dtype(ml_dtypes.float8_e5m2),
    "torch float8_e5m2fnuz": np.dtype(ml_dtypes.float8_e5m2fnuz),
    "torch uint16": np.dtype(np.uint16),
    "torch uint32": np.dtype(np.uint32),
    "torch uint64": np.dtype(np.uint64),
}
ORDERED_DICT, NAMESPACE, SIZE = "collections OrderedDict", "argparse Namespace", "torch Size"
TENSOR, TENSOR_WITH_DTYPE = "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_tensor_v3"
PARAMETERS = ("torch._utils _rebuild_parameter", "torch._utils _rebuild_parameter_with_state")
# A scalar of numpy, as a loss or a step that was stored beside the weights: its dtype, and its bytes as a text.
SCALAR = ("numpy.core.multiarray scalar", "numpy._core.multiarray scalar")
SCALAR_DTYPE, BYTES = "numpy dtype", "_codecs encode"
SCALAR_DTYPES = ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8")
MAX_SCALAR_BYTES = 8
# What stands beside weights and says nothing about them: dtypes, devices, counters, sets and paths. None is made.
INERT_VALUES = tuple(
    f"torch {name}"
    for name in ("float16", "bfloat16", "float32", "float64", "complex64", "complex128", "bool")
    + ("int8", "int16", "int32", "int64", "uint8")
)
INERT_CALLS = ("torch device", "collections Counter", "__builtin__ set", "builtins set")
INERT_CALLS += tuple(
    f"{module} {kind}"
    for module in ("pathlib", "pathlib._local")
    for kind in ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")
)
NAMES = {ORDERED_DICT, NAMESPACE, SIZE, TENSOR, TENSOR_WITH_DTYPE, *PARAMETERS, *STORAGE_DTYPES, *TENSOR_DTYPES}
NAMES |= {*SCALAR, SCALAR_DTYPE, BYTES, *INERT_VALUES, *INERT_CALLS}


class RefusedError(ValueError):
    """A pickle with something that weights do not need; the message says what."""


class Namespace:
    """Stands for an `argparse.Namespace`: the options of the training that wrote a file."""

    def __init__(self):
        self.state = {}

    def plain_values(self) -> dict:
        """Return the options that are texts, numbers, booleans or None, by name."""
        plain = (str, int, float, bool, type(None))
        return {name: value for name, value in self.state.items() if type(name) is str and type(value) in plain}


class _Name(str):
    """The name of a class or function, "module name", as the file spells it."""


class _ScalarDtype(str):
    """The dtype of a numpy scalar: a kind and a size, such as "f8"."""


class Inert:
    """Stands for a value that says nothing about weights."""


INERT = Inert()


class _Storage:
    """The numbers that tensors are views of."""

    def __init__(self, numbers: np.ndarray):
        self.numbers = numbers


class _LimitedFile:
    """A file of which at most `MAX_LIST_BYTES` are read."""

    def __init__(self, file):
        self._file, self._left = file, MAX_LIST_BYTES

    def read(self, count: int) -> bytes:
        """Return the next bytes, or refuse before taking memory for them."""
        self._take(count)
        return self._file.read(count)

    def readline(self) -> bytes:
        """Return the next line."""
        line = self._file.readline(self._left + 1)
        self._take(len(line))
        return line

    def _take(self, count: int) -> None:
        self._left -= count
        if self._left < 0:
            raise RefusedError(f"its list of tensors takes more than {MAX_LIST_BYTES} bytes")


def read_pickle(file, storage_of: Callable[[str, np.dtype, int], np.ndarray] | None = None):
    """Read one pickle and return what it describes.

    Args:
      file: an open binary file; it is left just behind the pickle.
      storage_of: (key, dtype, count) -> the numbers [count] that are stored under that key; None: there are no
        storages.

    Returns:
      Dicts, lists, tuples, plain values, `Namespace`, and tensors as read-only views of their storages.

    Raises:
      RefusedError: something that weights have no need of.
      ValueError, LookupError: a broken pickle.
    """
    machine = _Machine(storage_of)
    for operation, argument, _ in pickletools.genops(_LimitedFile(file)):
        if operation.name == "STOP":
            return machine.pop()
        machine.run(operation.name, argument)
    raise ValueError("a pickle without an end")


class _Machine:
    """The stack and the memo of a pickle, and what its operations do to them."""

    MARK = object()  # where on the stack a group of values begins
    CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
    VALUES = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "SHORT_BINBYTES"}

    def __init__(self, storage_of):
        self._storage_of, self._stack, self._memo = storage_of, [], {}

    def run(self, operation: str, argument) -> None:
        """Do one operation."""
        push, pop = self._stack.append, self.pop
        match operation:
            case "PROTO" | "FRAME":
                pass
            case _ if operation in self.CONSTANTS:
                push(self.CONSTANTS[operation])
            case _ if operation in self.VALUES:
                push(argument)
            case "EMPTY_LIST":
                push([])
            case "EMPTY_DICT":
                push({})
            case "EMPTY_SET":  # what is in a set is read, and no set is made
                push(INERT)
            case "ADDITEMS":
                self._pop_group()
            case "MARK":
                push(self.MARK)
            case "TUPLE":
                push(tuple(self._pop_group()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                push(tuple([pop() for _ in range(int(operation[-1]))][::-1]))
            case "APPEND" | "APPENDS":
                values = [pop()] if operation == "APPEND" else self._pop_group()
                _require(self._top(), list).extend(values)
            case "SETITEM" | "SETITEMS":
                pairs = [pop(), pop()][::-1] if operation == "SETITEM" else self._pop_group()
                _require(self._top(), dict).update(zip(map(_checked_key, pairs[::2]), pairs[1::2], strict=True))
            case "BINPUT" | "LONG_BINPUT" | "MEMOIZE":
                self._memo[len(self._memo) if operation == "MEMOIZE" else argument] = self._top()
            case "BINGET" | "LONG_BINGET":
                push(self._memo[argument])
            case "GLOBAL":
                push(_checked_name(argument))
            case "STACK_GLOBAL":
                name, module = pop(), pop()
                push(_checked_name(f"{_require(module, str)} {_require(name, str)}"))
            case "BINPERSID":
                push(self._load_storage(pop()))
            case "REDUCE" | "NEWOBJ":
                arguments, function = pop(), pop()
                push(_make(_require(function, _Name), _require(arguments, tuple)))
            case "BUILD":
                _set_state(state=pop(), target=self._top())
            case _:
                raise RefusedError(f"its pickle uses the operation {operation}")

    def pop(self):
        """Take the topmost value."""
        value = self._top()
        self._stack.pop()
        return value

    def _top(self):
        if not self._stack or self._stack[-1] is self.MARK:
            raise ValueError("a pickle that takes more values than there are")
        return self._stack[-1]

    def _pop_group(self) -> list:
        """Take all values above the last mark, and the mark."""
        values = []
        while self._stack and self._stack[-1] is not self.MARK:
            values.append(self._stack.pop())
        if not self._stack:
            raise ValueError("a pickle with a group that begins nowhere")
        self._stack.pop()
        return values[::-1]

    def _load_storage(self, reference) -> _Storage:
        """Return the storage that a reference ("storage", type, key, device, count) means."""
        if self._storage_of is None or type(reference) is not tuple or reference[:1] != ("storage",):
            raise RefusedError("it refers to something other than a storage")
        _, kind, key, _, count, *view = reference
        if type(kind) is not _Name or kind not in STORAGE_DTYPES:
            raise RefusedError("it has a storage of a type that is none")
        if type(key) is not str or type(count) is not int or count < 0 or any(part is not None for part in view):
            raise RefusedError("it has a storage without a name or a size, or one that is a view of another")
        return _Storage(self._storage_of(key, STORAGE_DTYPES[kind], count))


def _require(value, kind: type):
    if type(value) is not kind:
        raise RefusedError(f"it uses a {type(value).__name__} as a {kind.__name__}")
    return value


def _checked_name(name: str) -> _Name:
    if name not in NAMES:
        raise RefusedError(f"it wants to use {name.replace(' ', '.')!r}")
    return _Name(name)


def _checked_key(key):
    """Return a key of a dict: a text or a small number, so that hashing it takes no time worth naming."""
    if type(key) is str or (type(key) is int and 0 <= key < MAX_INTEGER_KEY):
        return key
    raise RefusedError(f"it has a {type(key).__name__} as the key of a dict")


def _make(name: _Name, arguments: tuple):
    """Make what calling `name` would make in Python."""
    if name == ORDERED_DICT and not arguments:
        return {}
    if name == NAMESPACE and not arguments:
        return Namespace()
    if name == SIZE and len(arguments) == 1:
        return _require(arguments[0], tuple)
    if name in PARAMETERS and arguments:
        return _require(arguments[0], np.ndarray)
    if name in INERT_CALLS:
        return INERT
    if name == SCALAR_DTYPE and arguments and arguments[0] in SCALAR_DTYPES:
        return _ScalarDtype(arguments[0])
    if name == BYTES and len(arguments) == 2 and arguments[1] == "latin1":
        return _scalar_bytes(_require(arguments[0], str))
    if name in SCALAR and len(arguments) == 2:
        return _scalar(_require(arguments[0], _ScalarDtype), _require(arguments[1], bytes))
    if name == TENSOR and len(arguments) >= 4:
        storage, offset, size, stride = arguments[:4]
        return _view(_require(storage, _Storage).numbers, offset, size, stride)
    if name == TENSOR_WITH_DTYPE and len(arguments) >= 7:
        storage, offset, size, stride, _, _, dtype = arguments[:7]
        if type(dtype) is not _Name or dtype not in TENSOR_DTYPES:
            raise RefusedError("it has a tensor of a type that is none")
        return _view(_require(storage, _Storage).numbers.view(TENSOR_DTYPES[dtype]), offset, size, stride)
    raise RefusedError(f"it uses {name.replace(' ', '.')!r} as weights do not")


def _scalar_bytes(text: str) -> bytes:
    """Return a scalar's bytes; of longer texts none are made, since a file could ask for them again and again."""
    if len(text) > MAX_SCALAR_BYTES:
        raise RefusedError(f"it has a number of more than {MAX_SCALAR_BYTES} bytes")
    return text.encode("latin1")


def _scalar(dtype: _ScalarDtype, content: bytes):
    """Return a numpy scalar as a number or truth of Python."""
    if len(content) != np.dtype(dtype).itemsize:
        raise RefusedError(f"it has a number of {len(content)} bytes, which should be one of {dtype}")
    return np.frombuffer(content, f"<{dtype}")[0].item()


def _view(storage: np.ndarray, offset: int, size: tuple, stride: tuple) -> np.ndarray:
    """Make the view of a storage [n] that a tensor is, which must not have more numbers than the storage."""
    for axes in (size, stride):
        if type(axes) is not tuple or len(axes) > MAX_AXES or any(type(n) is not int or n < 0 for n in axes):
            raise RefusedError("it has a tensor without sizes, or with negative ones")
    if type(offset) is not int or offset < 0 or len(size) != len(stride):
        raise RefusedError("it has a tensor that begins nowhere")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride))
    if math.prod(size) > storage.size or max(size, default=0) > max(storage.size, 1) * MAX_AXES:
        raise RefusedError("it has a tensor larger than its storage")
    if 0 in size:
        return np.zeros(size, storage.dtype)
    if last >= storage.size:
        raise RefusedError("it has a tensor that reaches beyond its storage")
    strides = [step * storage.itemsize for step in stride]
    return np.lib.stride_tricks.as_strided(storage[offset:], size, strides, writeable=False)


def _set_state(target, state) -> None:
    """Give an object the state that the pickle has for it, where that means anything to weights."""
    if type(target) is Namespace:
        target.state = _require(state, dict)
    elif type(target) is _ScalarDtype:  # the tuple that numpy describes a dtype with: version, byte order and more
        if _require(state, tuple)[1:2] not in (("<",), ("|",)):
            raise RefusedError("it has a number in another byte order")
    elif type(target) is not dict:  # PyTorch's notes on a state dict are left out
        raise RefusedError(f"it sets the state of a {type(target).__name__}")
