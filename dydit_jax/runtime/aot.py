"""Compiled programs: several are made at once, ahead of their turn, and kept for the next start.

JAX keeps compiled programs too, but finds one only after it was traced and lowered, which takes longer than reading it.
Here a program is named by all that it is made of - this package's code, versions, devices, settings, shapes - and found
by that name. A program with a user's code in it, a router for instance, is not kept here: no name could hold all that
such code imports and reads. JAX's own cache, which compares what was lowered, serves it.

The files lie in the folder `ready` of JAX's own cache, and like that cache they are code. So they are read only where
this user alone can write (see `cache` for what that means for JAX's own), and only if they still have the checksum that
they begin with: a program with one wrong bit may crash, or compute something else.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import logging
import os
import pathlib
import pickle
import platform
import threading
import time
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
from jax.experimental import serialize_executable

from dydit_jax.errors import InputError
from dydit_jax.registry import is_built_in
from dydit_jax.runtime.cache import belongs_to_user, is_private, make_private, warn_once
from dydit_jax.runtime.files import is_local, write_atomically
from dydit_jax.runtime.settings import own_settings

logger = logging.getLogger(__name__)

THREADS = 8  # compilers of large programs want much memory
KEPT_IN_MEMORY = 128
# Products of queries, keys and values merged into one, and kernels of XLA's own in the race with the library's: either
# keeps bias and GELU from riding on a product, as passes over its result.
OPTIONS = {"gpu": {"xla_gpu_dot_merger_threshold_mb": 0, "xla_gpu_enable_triton_gemm": False}}
PACKAGES = ("jax", "jaxlib", "flax", "numpy")
ENVIRONMENT = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
PROCESSORS = pathlib.Path("/proc/cpuinfo")


@dataclasses.dataclass(frozen=True)
class CompileRequest:
    """A call of a jitted function, without its arrays.

    Attributes:
      name: what the program is made of, as a checksum; calls of one name are one program.
      devices: that run it.
      lower: makes the program, uncompiled.
      kept: whether the name holds everything, so that the program may be kept for the next start.
    """

    name: str
    devices: tuple[jax.Device, ...]
    lower: Callable = dataclasses.field(compare=False)
    kept: bool = True


def describe_call(function, arguments: tuple, settings: dict, *, code: Iterable[type] = ()) -> CompileRequest:
    """Describe a call.

    Args:
      function: jitted.
      arguments: arrays or shapes.
      settings: static; the `repr` of each must say all that it is, but for the code of classes.
      code: classes from registries that the program contains; with one of a user it is not kept.
    """
    shapes = jax.tree.map(shape_of, arguments)
    leaves, structure = jax.tree.flatten(shapes)
    devices = _devices_of([leaf.sharding for leaf in leaves if leaf.sharding is not None])
    default = jax.config.jax_default_device  # a context of the caller's does not reach the thread that compiles

    @own_settings()
    def lower():
        with jax.default_device(default):
            return function.lower(*shapes, **settings)

    arrays = [(leaf.shape, _name_of(leaf.dtype), leaf.sharding) for leaf in leaves]
    # Two classes may have one name, one after the other: `lower` keeps each alive, so that the numbers differ.
    of_user = [id(cls) for cls in code if not is_built_in(cls)]
    described = (function.__qualname__, arrays, structure, sorted(settings.items()), devices, of_user, _surroundings())
    return CompileRequest(hashlib.sha256(repr(described).encode()).hexdigest(), devices, lower, kept=not of_user)


_name_of = functools.cache(str)


def _devices_of(shardings: list) -> tuple[jax.Device, ...]:
    """Return the devices of arrays, which all lie on the same, or the default one where none is fixed to any."""
    meshes = [sharding.mesh for sharding in shardings if isinstance(sharding, jax.sharding.NamedSharding)]
    if meshes:
        return tuple(meshes[0].devices.flat)
    if shardings:
        return tuple(shardings[0].device_set)
    return tuple(jnp.zeros(()).devices())


def shape_of(leaf, placed_as=None) -> jax.ShapeDtypeStruct:
    """Return the shape and dtype of an array, and where it lies, if that is fixed: it, or the array `placed_as`."""
    if placed_as is None and isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf
    placed = leaf if placed_as is None else placed_as
    # Shapes and arrays of numpy are not placed anywhere, arrays of JAX need not be.
    sharding = placed.sharding if getattr(placed, "committed", isinstance(placed, jax.ShapeDtypeStruct)) else None
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


@contextlib.contextmanager
def compiled_ahead(calls: Iterable[CompileRequest]):
    """Compile calls in their order, the first by itself, so that it is there soon, the others while it runs.

    Args:
      calls: read as far as the first, until the second is asked for: describing them all takes as long as a short run.

    Yields:
      An iterator of futures, one for each call; its result takes the arrays.
    """
    calls, programs = iter(calls), {}

    def submit(call: CompileRequest) -> concurrent.futures.Future:
        if call.name not in programs:
            programs[call.name] = pool.submit(compiled, call)
        return programs[call.name]

    def in_turn():
        first = next(calls)
        yield submit(first)
        others = list(calls)
        futures = [submit(call) for call in others]
        # Behind them all in the queue: nobody waits for a file.
        for call in {call.name: call for call in (first, *others)}.values():
            pool.submit(_keep, call, programs[call.name])
        yield from futures

    with concurrent.futures.ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as pool:
        try:
            yield in_turn()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


@functools.lru_cache(maxsize=KEPT_IN_MEMORY)
def compiled(call: CompileRequest) -> "Executable":
    """Return a compiled program: from memory, from its file, or newly compiled."""
    path = _path_of(call)
    if path is not None and path.exists():
        try:
            return Executable(_read(path, call), worth_keeping=False)
        except Exception as error:  # whatever a damaged file makes of it
            logger.warning("Compiled again: %s cannot be used (%s).", path, " ".join(str(error).split()))
            with contextlib.suppress(OSError):
                path.unlink()
    began, _thread.found_by_jax = time.perf_counter(), False
    run = compile_for(call.devices[0].platform, call.lower())
    worth_it = time.perf_counter() - began >= jax.config.jax_persistent_cache_min_compile_time_secs
    # What JAX has read from its own cache lacks its functions when it is written again.
    return Executable(run, worth_keeping=worth_it and not _thread.found_by_jax)


def compile_for(platform: str, lowered):
    """Compile what `jax.jit(...).lower(...)` made, with the options for a platform as far as this XLA knows them."""
    try:
        return lowered.compile(compiler_options=OPTIONS.get(platform))
    except jax.errors.JaxRuntimeError as error:
        if "compile option" not in str(error):
            raise
        warn_once(f"Compiled without this package's options, which this XLA does not know: {error}")
        return lowered.compile()


@dataclasses.dataclass(frozen=True)
class Executable:
    """A compiled program.

    Attributes:
      run: takes the arrays of a call, without its static settings.
      worth_keeping: whether it is new, and took long enough.
    """

    run: Callable
    worth_keeping: bool

    def __call__(self, *arguments):
        """Run it."""
        return self.run(*arguments)


_thread = threading.local()


def _note_what_jax_finds(event: str, **_) -> None:
    if event == "/jax/compilation_cache/cache_hits":
        _thread.found_by_jax = True


jax.monitoring.register_event_listener(_note_what_jax_finds)


def _read(path: pathlib.Path, call: CompileRequest):
    """Load a program from its file.

    Raises:
      ValueError: a file of somebody else, or one that is not as it was written.
    """
    with path.open("rb") as file:
        if not belongs_to_user(os.fstat(file.fileno())):
            raise ValueError("others can write to it, or own it")
        digest, content = file.read(hashlib.sha256().digest_size), file.read()
    if _digest(call, content) != digest:
        raise ValueError("it is damaged")
    program, inputs, outputs = pickle.loads(content)
    places = dict(backend=call.devices[0].client, execution_devices=call.devices)
    return serialize_executable.deserialize_and_load(program, inputs, outputs, **places)


def _keep(call: CompileRequest, future: concurrent.futures.Future) -> None:
    """Write a program to its file, unless it is there or not worth it."""
    path = _path_of(call)
    if future.exception() is not None or not future.result().worth_keeping or path is None or path.exists():
        return
    try:
        content = pickle.dumps(serialize_executable.serialize(future.result().run))
    except Exception as error:  # some backends, and on a CPU some sorts, cannot be written, and say so in many ways
        logger.debug("A compiled program is not kept: %s", error)
        return
    try:
        make_private(path.parent)
        with write_atomically(path) as partial:
            partial.write_bytes(_digest(call, content) + content)
    except (InputError, OSError) as error:
        warn_once(f"Compiled programs are not kept in {path.parent} ({error.__cause__ or error}).")


def _digest(call: CompileRequest, content: bytes) -> bytes:
    """Return the checksum of a program's file; under another call's name it is wrong as well."""
    return hashlib.sha256(call.name.encode() + content).digest()


def _path_of(call: CompileRequest) -> pathlib.Path | None:
    """Return where a program is kept.

    Returns:
      None where its name does not hold everything, JAX keeps none, several processes share it, or others could have
      put it there: a folder of somebody else or that others can write to, and a bucket, of which that is not known.
    """
    if not call.kept:
        return None
    folder = jax.config.jax_compilation_cache_dir
    if not folder or not jax.config.jax_enable_compilation_cache or jax.process_count() > 1 or not is_local(folder):
        return None
    folder = pathlib.Path(folder)
    if not (is_private(folder) and is_private(folder / "ready")):
        return None
    return folder / "ready" / f"{call.name}.program"


def _surroundings() -> tuple:
    """Return what a program depends on beside its code and arguments."""
    options = {name: value for name, value in jax.config.values.items() if "cache" not in name and "log" not in name}
    environment = [os.environ.get(name) for name in ENVIRONMENT]
    return _code_and_machine(), environment, sorted(options.items())


@functools.cache
def _code_and_machine() -> tuple:
    """Return this package's checksum, versions, the kinds of devices, and what the processor can do."""
    code = hashlib.sha256()
    for file in sorted(pathlib.Path(__file__).parents[1].rglob("*.py")):
        code.update(file.read_bytes())
    versions = [importlib.metadata.version(name) for name in PACKAGES]
    backend = jax.devices()[0].client.platform_version
    devices = [device.device_kind for device in jax.devices()]
    processor = [platform.machine(), platform.processor()]
    if PROCESSORS.exists():
        lines = PROCESSORS.read_text().splitlines()
        processor += sorted({line for line in lines if line.lower().startswith(("flags", "features", "model name"))})
    return code.hexdigest(), versions, backend, devices, processor
