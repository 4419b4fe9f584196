"""Which execution is fastest on this device: a short benchmark of narrowed blocks under each of them."""

import dataclasses
import functools
import logging
import time

import jax
import jax.numpy as jnp
import numpy as np

from dydit_jax.fast.execution.registry import available_executions
from dydit_jax.fast.narrow import narrow
from dydit_jax.fast.plan import Plan
from dydit_jax.models.dit import Layer, Model
from dydit_jax.models.execution import TokenExecution
from dydit_jax.models.lora import without_updates
from dydit_jax.runtime.aot import compile_for
from dydit_jax.runtime.seeds import make_key
from dydit_jax.runtime.sharding import run_without_mesh

logger = logging.getLogger(__name__)

BENCHMARK_LAYERS = 2
ROUNDS = 5


def fastest_execution(model: Model, params, plan: Plan, *, images: int, evaluations: int) -> str:
    """Time every execution on the first blocks of a plan's longest segment, with its usage of tokens.

    One of this process's devices runs it, whatever mesh is set: only under `shard_map` can kernels be split.

    Args:
      model, params: the network, the parameters on one device or replicated.
      plan: with usage.
      images: of one pass on one device.
      evaluations: of the network on each of them, two with guidance.

    Returns:
      The name of one of `available_executions`.
    """
    params = jax.tree.map(lambda leaf: leaf.addressable_data(0) if isinstance(leaf, jax.Array) else leaf, params)
    return run_without_mesh(functools.partial(_benchmark, model, params, plan, images, evaluations))


def _benchmark(model: Model, params, plan: Plan, images: int, evaluations: int) -> str:
    depth = min(BENCHMARK_LAYERS, model.config.depth)
    small = dataclasses.replace(model, config=dataclasses.replace(model.config, depth=depth, token_capacity=()))
    segment = max(plan.segments, key=len)
    blocks = without_updates(jax.tree.map(lambda leaf: leaf[:depth], params["blocks"]))  # which are folded
    layers = narrow(blocks, heads=segment.heads[:depth], groups=segment.groups[:depth], dtype=model.dtype)
    runs = {}
    found = available_executions(small, images * evaluations)
    logger.info("Compiling the %d ways to run the open tokens.", len(found))
    for execution in found:
        try:
            runs[execution.name] = _compile(small, params, layers, plan, segment, execution, (images, evaluations))
        except jax.errors.JaxRuntimeError as error:  # kernels may find too little memory beside the rest of a program
            logger.warning("Tokens, without %s, which cannot be compiled here: %s", execution.name, _line(error))
    seconds = {name: [] for name in runs}
    for _ in range(1 + ROUNDS):  # the first is not counted
        for name, run in runs.items():
            began = time.perf_counter()
            jax.block_until_ready(run(params, layers))
            seconds[name].append(time.perf_counter() - began)
    median = {name: float(np.median(taken[1:])) for name, taken in seconds.items()}
    summary = ", ".join(f"{name} {1e3 * taken:.2f}" for name, taken in sorted(median.items(), key=lambda item: item[1]))
    logger.info("Tokens, milliseconds for %d blocks: %s.", depth, summary)
    return min(median, key=median.get)


def _compile(model: Model, params, layers: list, plan: Plan, segment, execution: TokenExecution, batch: tuple):
    """Compile a few blocks under one execution, with the share of open tokens that the plan's usage says."""
    images, evaluations = batch
    config, rows = model.config, images * evaluations
    steps = slice(segment.start, segment.stop)
    shares = execution.required_shares(plan.usage, images)[steps, : config.depth].T
    keys = jax.random.split(make_key(0), config.depth)
    open_tokens = [
        jax.random.bernoulli(key, float(plan.usage.mean[steps, layer].mean()), (rows, config.tokens))
        for layer, key in enumerate(keys)
    ]
    # Not zeros, on which products are faster.
    x = jax.random.normal(make_key(1), (rows, config.side, config.side, config.channels), jnp.float32)
    zeros = jnp.zeros(rows, jnp.int32)
    executions = [
        _with_gates(execution.with_capacity(share, images=rows, tokens=config.tokens), gates)
        for share, gates in zip(shares, open_tokens)
    ]

    def run(params, layers):
        of_layers = [Layer(layer, None, None, execution) for layer, execution in zip(layers, executions)]
        return model.apply_layers(params, of_layers, x, zeros, zeros)[0]

    return compile_for(model.platform, jax.jit(run).lower(params, layers))


def _with_gates(execution: TokenExecution, gates):
    """Return the execution with the gates of its tokens given, where it takes them; kernels route by themselves.

    The time of kernels depends on the capacity, not on which tokens are open.
    """
    if type(execution).update is not TokenExecution.update:
        return execution
    given = type(execution.name, (type(execution),), {"route": lambda self, tokens, step: (jnp.float32(gates), None)})
    return given(execution.platform, execution.capacity)


def _line(error: Exception) -> str:
    return str(error).splitlines()[0]
