"""Compiling this package's programs for a GPU that need not exist, with XLA's compiler for CUDA.

    pip install "jax[cuda12]"

XLA compiles for a described GPU. What comes out is the optimised program: every launch, with its shapes, and the
memory. No time is estimated, libraries choose no algorithms, and nothing can be run. Import this module before JAX
starts: it hides a GPU that is there.
"""

import contextlib
import dataclasses
import functools
import os
import time
from collections.abc import Iterator
from unittest import mock

os.environ["JAX_PLATFORMS"] = "cpu"

import jax  # noqa: E402  after the platform

jax.config.update("jax_enable_compilation_cache", False)  # every program is to be compiled
from jax.experimental import topologies  # noqa: E402

from dydit_jax.fast.execution import triton  # noqa: E402
from dydit_jax.models import attention  # noqa: E402
from dydit_jax.runtime.aot import compile_for  # noqa: E402

GPU = "h200"
BANDWIDTH, PEAK_FLOPS = 4.8e12, 989e12  # bytes and dense bfloat16 FLOPs per second, as its maker states them
# An H200 for XLA: limits of compute capability 9.0, its multiprocessors, memory, cache and clock.
DESCRIPTION = """
gpu_device_info {
  name: "NVIDIA H200" device_vendor: "NVIDIA Corporation" cuda_compute_capability { major: 9 }
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  device_memory_size: 151397597184 memory_bandwidth: 4800000000000 l2_cache_size: 52428800
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  shared_memory_per_core: 233472 shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448
  driver_version: "12.8.0" runtime_version: "12.8.0" compile_time_toolkit_version: "12.8.0" dnn_version: "9.10.0"
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 10 } device_description_str: "NVIDIA H200"
"""


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A program: its text, bytes of temporaries, and the processor's seconds to lower and to compile it."""

    text: str
    temporary_bytes: int
    lowering_seconds: float
    compiling_seconds: float


@functools.cache
def device():
    """Return the GPU that need not exist.

    Raises:
      RuntimeError: JAX's plugin for CUDA is not installed, or too old.
    """
    settings = dict(target_config=DESCRIPTION, topology="1x1x1")
    return topologies.get_topology_desc(GPU, "cuda", **settings).devices[0]


@contextlib.contextmanager
def as_if_on_a_gpu() -> Iterator[None]:
    """Let the package take the kernels and the attention that it would take on such a GPU, where it would try them."""
    export = functools.partial(jax.export.export, platforms=["cuda"])
    with (
        mock.patch.object(jax, "default_backend", lambda: "gpu"),
        mock.patch.object(jax.export, "export", export),
        mock.patch.object(triton, "accepts", lambda tokens, width: True),
        mock.patch.object(triton, "accepts_routing", lambda tokens, width: True),
        mock.patch.object(attention, "_cudnn_accepts", lambda size, dtype: jax.numpy.dtype(dtype).itemsize == 2),
    ):
        yield


def compile_for_gpu(function, *arguments, **settings) -> Compiled:
    """Compile a function.

    Args:
      function: to be compiled, jitted or not.
      arguments: trees of arrays or `jax.ShapeDtypeStruct`.
      settings: static, of a jitted function.
    """
    function = function if hasattr(function, "lower") else jax.jit(function)
    sharding = jax.sharding.SingleDeviceSharding(device())
    place = lambda leaf: jax.ShapeDtypeStruct(jax.numpy.shape(leaf), leaf.dtype, sharding=sharding)
    with as_if_on_a_gpu():
        began = time.process_time()
        lowered = function.lower(*jax.tree.map(place, arguments), **settings)
        between = time.process_time()
        compiled = compile_for("gpu", lowered)
        ended = time.process_time()
    temporary = compiled.memory_analysis().temp_size_in_bytes
    return Compiled(compiled.as_text(), temporary, between - began, ended - between)
