"""Kernels that are lowered once and used in many programs."""

import concurrent.futures
import functools

import jax

from dydit_jax.runtime.settings import own_settings

CUSTOM_CALLS = ("__gpu$xla.gpu.triton",)  # the name of a kernel in XLA


def lowered_once(*static_argnames: str):
    """Lower a function once per shapes and settings, and share the result between all programs that call it.

    Lowering a kernel takes JAX longer than the rest of a block, and a run has many programs of many blocks.

    Args:
      static_argnames: of the settings, all given by name.
    """

    def decorate(function):
        jitted = jax.jit(function, static_argnames=static_argnames)

        @functools.cache
        @own_settings()
        def lowered(structure, shapes, settings):
            arguments = jax.tree.unflatten(structure, [jax.ShapeDtypeStruct(*shape) for shape in shapes])
            checks = [jax.export.DisabledSafetyCheck.custom_call(name) for name in CUSTOM_CALLS]  # it is never stored
            return jax.jit(jax.export.export(jitted, disabled_checks=checks)(*arguments, **dict(settings)).call)

        @functools.wraps(function)
        def call(*arguments, **settings):
            leaves, structure = jax.tree.flatten(arguments)
            shapes = tuple((leaf.shape, leaf.dtype) for leaf in leaves)
            key = structure, shapes, tuple(settings.items())
            return _lowering.submit(lowered, *key).result()(*arguments)

        return call

    return decorate


# A thread of its own, which does not know the mesh that a caller is traced for, and in which nothing is lowered twice.
_lowering = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="kernels")
