"""Which form of running tokens is fastest on this device: a short race between two narrowed blocks in each form."""

import concurrent.futures
import dataclasses
import functools
import logging
import time

import jax
import jax.numpy as jnp
import numpy as np

from dydit_jax.fast.narrow import narrow
from dydit_jax.fast.plan import Plan
from dydit_jax.fast.tokens import capacities_of, counted_shares, forms_of, run_on_open_tokens
from dydit_jax.models.dit import Model
from dydit_jax.runtime.aot import compile_for
from dydit_jax.runtime.settings import own_settings

logger = logging.getLogger(__name__)

TRIAL_LAYERS = 2
ROUNDS = 5


def fastest_form(model: Model, params, plan: Plan, *, images: int, runs: int) -> str:
    """Time every form on the first blocks of a plan's longest segment, with as many tokens on as its calibration saw.

    One of this process's devices runs it, whatever mesh is set: kernels cannot be shared out but under `shard_map`.

    Args:
      model, params: the network, the parameters on one device or replicated.
      plan: calibrated.
      images: of one pass on one device.
      runs: of the network on each of them, two with guidance.

    Returns:
      One of `tokens.forms_of`.
    """
    params = jax.tree.map(lambda leaf: leaf.addressable_data(0) if isinstance(leaf, jax.Array) else leaf, params)
    with concurrent.futures.ThreadPoolExecutor(1) as alone:  # where a mesh of the caller is not known
        return alone.submit(_race, model, params, plan, images=images, runs=runs).result()


@own_settings()
def _race(model: Model, params, plan: Plan, *, images: int, runs: int) -> str:
    depth, rows = min(TRIAL_LAYERS, model.config.depth), images * runs
    config = dataclasses.replace(model.config, depth=depth, token_capacity=())
    segment = max(plan.segments, key=len)
    blocks = jax.tree.map(lambda leaf: leaf[:depth], params["blocks"])
    layers = narrow(blocks, heads=segment.heads[:depth], groups=segment.groups[:depth], dtype=model.dtype)
    steps = slice(segment.start, segment.stop)
    keys = jax.random.split(jax.random.key(0), depth)
    gates = [
        jax.random.bernoulli(key, float(plan.shares.mean[steps, layer].mean()), (rows, config.tokens))
        for layer, key in enumerate(keys)
    ]
    # Not zeros, on which products are faster.
    x = jax.random.normal(jax.random.key(1), (rows, config.side, config.side, config.channels))
    zeros = jnp.zeros(rows, jnp.int32)

    small = dataclasses.replace(model, config=config)

    def racer(form: str):
        of_layers = counted_shares(form, plan.shares, images)[steps, :depth].T
        capacities = [capacities_of(form, layer, images=rows, tokens=config.tokens) for layer in of_layers]

        def on_these(layer, function, x, _):
            return run_on_open_tokens(form, capacities[layer], function, x, gates[layer].astype(jnp.float32))

        everything = dict(heads=(None,) * depth, groups=(None,) * depth)
        kernels = dict(fused=small.apply_fused, pooled=functools.partial(small.apply_pooled, **everything))
        if form in kernels:  # whose capacities take as long whatever is on
            network = functools.partial(kernels[form], capacities=[capacity for (capacity,) in capacities])
        else:
            run_on_tokens = [functools.partial(on_these, layer) for layer in range(depth)]
            network = functools.partial(small.apply_layers, **everything, run_on_tokens=run_on_tokens)
        run = jax.jit(lambda params, layers: network(params, layers, x, zeros, zeros)[0])
        return compile_for(model.platform, run.lower(params, layers))

    racers = {}
    for form in forms_of(small, rows):
        try:
            racers[form] = racer(form)
        except jax.errors.JaxRuntimeError as error:  # kernels may find too little memory beside the rest of a program
            logger.warning("Tokens, without %s, which cannot be compiled here: %s", form, str(error).splitlines()[0])
    seconds = {form: [] for form in racers}
    for _ in range(1 + ROUNDS):  # the first is not counted
        for form, run in racers.items():
            began = time.perf_counter()
            jax.block_until_ready(run(params, layers))
            seconds[form].append(time.perf_counter() - began)
    median = {form: float(np.median(taken[1:])) for form, taken in seconds.items()}
    told = ", ".join(f"{form} {1e3 * taken:.2f}" for form, taken in sorted(median.items(), key=lambda item: item[1]))
    logger.info("Tokens, milliseconds for %d blocks: %s.", depth, told)
    return min(median, key=median.get)
