"""Every way to run tokens, on the same cases: the result is that of a product with the gates, or void and counted."""

import dataclasses
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import channels_last, relative_error
from runs import SAMPLING, draw, make_run

from dydit_jax.fast import autotune
from dydit_jax.fast.execution import mosaic, triton
from dydit_jax.fast.execution.registry import (
    EXECUTIONS,
    available_executions,
    default_execution,
    dense_execution,
    find_execution,
    layer_executions,
    whole_execution,
)
from dydit_jax.fast.narrow import narrow
from dydit_jax.fast.usage import TokenUsage
from dydit_jax.models.config import DiTConfig
from dydit_jax.models.dit import Layer, Model
from dydit_jax.models.execution import Dense, MLPStep
from dydit_jax.models.layers import layer_norm, modulate
from dydit_jax.runtime.sharding import MeshConfig, make_mesh, replicated
from dydit_jax.sampling.segment import bind_network

GPU = pytest.mark.skipif(triton.triton is None, reason="This JAX has no Pallas for Triton.")
KERNELS = [pytest.param("triton", "gpu", marks=GPU), ("mosaic", "tpu")]
ALL = [("switch", "cpu"), ("gather", "cpu"), ("gather", "gpu"), ("one_hot", "tpu"), ("masked", "cpu"), *KERNELS]
BATCH, TOKENS, WIDTH = 2, 16, 32


def test_all_that_are_registered_are_tested():
    tested = {getattr(case, "values", case)[0] for case in ALL}
    assert tested | {"triton_fused"} == set(EXECUTIONS)  # that one in test_triton.py


class Router:
    """Hands out given logits; its two layers are what kernels ask for."""

    def __init__(self, logits):
        self.given = logits

    def __call__(self, x):
        return self.given

    def hidden(self, x):
        return jnp.stack([self.given, jnp.zeros_like(self.given)], axis=-1)

    def last_layer(self):
        return jnp.asarray([1.0, 0.0]), jnp.zeros(1)


OPEN = {
    "all": np.ones((BATCH, TOKENS), bool),
    "none": np.zeros((BATCH, TOKENS), bool),
    "one token": np.arange(BATCH * TOKENS).reshape(BATCH, TOKENS) == 5,
    "one image": np.repeat([[True], [False]], TOKENS, axis=1),
    "mixed": np.random.default_rng(0).random((BATCH, TOKENS)) < 0.4,
}


@pytest.mark.parametrize("name, platform", ALL)
@pytest.mark.parametrize("case", OPEN)
@pytest.mark.parametrize("known", ["usage", "nothing", "too little"])
def test_update_is_the_product_with_the_gates(name, platform, case, known):
    gates, generator = OPEN[case], np.random.default_rng(1)
    numbers = lambda *shape: jnp.asarray(generator.standard_normal(shape), jnp.float32)
    x, attended, (gate_a, shift, scale, gate) = (
        numbers(BATCH, TOKENS, WIDTH),
        numbers(BATCH, TOKENS, WIDTH),
        numbers(4, BATCH, WIDTH),
    )
    mlp = lambda rows: jnp.exp(rows / 4) + 1
    execution = find_execution(name, platform)
    needed = np.asarray(execution.rows_needed(jnp.asarray(gates[:, None], jnp.float32)))  # [1]
    shares = dict(usage=needed, nothing=None, **{"too little": np.zeros(1)})[known]
    sizes = dict(images=BATCH, tokens=TOKENS)
    execution = execution.with_capacity(shares, **sizes)
    step = MLPStep(mlp, Router(jnp.where(gates, 1.0, -1.0)), shift, scale, gate, jnp.dtype("float32"))

    @jax.jit
    def run(x, attended):
        stream = execution.add(execution.enter(x), attended, gate_a)
        stream, found = execution.update(stream, step)
        return execution.leave(stream), found

    found, found_gates = run(x, attended)
    np.testing.assert_array_equal(found_gates, gates)
    after = x + gate_a[:, None] * attended
    wanted = after + gate[:, None] * gates[..., None] * mlp(modulate(layer_norm(after), shift, scale))
    [void] = execution.overflowed(needed, **sizes) & execution.may_overflow
    if void:
        assert known == "too little" and gates.any()
    else:
        assert relative_error(found, wanted) < 2e-6
    # Rows that were computed: at least one for each open token, at most all.
    [rows] = execution.rows_run(needed, **sizes)
    assert (void or gates.sum() <= rows) and rows <= BATCH * TOKENS


@pytest.mark.parametrize("open_rows", [0, 1, 7, 8, 9, 31, 32])
@pytest.mark.parametrize(
    "name, capacity",
    [("switch", (8, 16, 32)), ("switch", (0, 8, 32)), ("switch", (32,)), ("gather", (9,)), ("one_hot", (8,))],
)
def test_packed_tokens_equal_gated_ones_for_every_count(open_rows, name, capacity):
    generator = np.random.default_rng(open_rows)
    x = generator.standard_normal((2, 16, 4), np.float32)
    gates = np.zeros(32, np.float32)
    gates[generator.permutation(32)[:open_rows]] = 1
    gates = gates.reshape(2, 16)
    function = lambda rows: jnp.exp(rows) + 1
    execution = EXECUTIONS[name]("cpu", capacity)
    packed = jax.jit(lambda x, gates: execution.run(function, x, gates, None))(x, gates)
    fits = {"gather": open_rows <= 9, "one_hot": gates.sum(1).max() <= 8}.get(name, True)
    needed = np.asarray(execution.rows_needed(gates[:, None]))
    sizes = dict(images=2, tokens=16)
    assert (execution.overflowed(needed, **sizes) & execution.may_overflow).tolist() == [not fits]
    if name == "switch":  # the branch that the count takes
        assert execution.rows_run(needed, **sizes) == min(rows for rows in capacity if rows >= open_rows)
    if fits:
        np.testing.assert_allclose(packed, gates[..., None] * function(x), rtol=1e-6)


def test_capacities_are_chosen_by_usage():
    choose = lambda name, shares, images, tokens: find_execution(name, "cpu").choose_capacity(
        shares, images=images, tokens=tokens
    )
    assert choose("switch", None, 1, 64) == (8, 16, 24, 32, 40, 48, 56, 64)
    assert choose("switch", None, 1, 10) == (8, 10)
    shares = np.repeat([0.2, 0.5, 0.7], [10, 5, 5])
    assert choose("switch", shares, 1, 1000) == (200, 256, 504, 752, 1000)
    assert choose("switch", np.ones(4), 1, 1000) == (1000,)
    assert choose("switch", np.zeros(4), 1, 1000) == (0, 56, 1000)
    shares += 0.05
    assert choose("gather", shares, 4, 250) == (752,)
    assert choose("triton", shares - 0.001, 64, 256) == (12288,)  # 12272, to a multiple of 128
    assert choose("mosaic", shares, 16, 256) == (3072,)
    assert choose("one_hot", shares, 4, 256) == (192,)
    assert choose("one_hot", None, 4, 256) == (256,)
    assert choose("masked", shares, 4, 256) == ()


# --- Passes of the original's weights ------------------------------------------------------------


def whole_layers(golden, execution=None) -> list[Layer]:
    """Return the blocks taken apart, with everything kept."""
    config = golden.config
    every = (tuple(range(config.heads)),) * config.depth
    blocks = narrow(
        jax.tree.map(jnp.asarray, golden.params["blocks"]), heads=every, groups=every, dtype=jnp.dtype("float32")
    )
    executions = layer_executions(execution, config, None, images=1)
    return [Layer(block, None, None, own) for block, own in zip(blocks, executions)]


@pytest.mark.parametrize("name", ["switch", "masked", None])
def test_blocks_one_by_one_equal_the_original(golden, name):
    """Sampling runs its blocks so in every mode; None opens all gates."""
    if golden.config.routers == "none" and name:
        pytest.skip("The static model has no gates.")
    assert_equal_to_the_original(golden, name, "cpu")


@pytest.mark.parametrize("name, platform", [*KERNELS, pytest.param(None, "gpu", marks=GPU)])
def test_blocks_in_kernels_equal_the_original(golden_v2, name, platform):
    assert_equal_to_the_original(golden_v2, name, platform)


def assert_equal_to_the_original(golden, name, platform):
    model, config = dataclasses.replace(golden.model, platform=platform), golden.config
    execution = find_execution(name, platform) if name else dense_execution(model)
    layers, params = whole_layers(golden, execution), jax.tree.map(jnp.asarray, golden.params)

    def one(x, t, label):  # sampling has one timestep for all images, and gates [1,H]
        gates = [gate.swapaxes(0, 1) for gate in model.time_gates(params, t)] if name else [(None,) * config.depth] * 2
        return bind_network(model, params, layers, *gates)(x, t, label)

    images = range(len(golden.inputs[0]))
    each = [jax.jit(one)(*(jnp.asarray(array[i : i + 1]) for array in golden.inputs)) for i in images]
    output, tokens = (jnp.concatenate(parts) for parts in zip(*each, strict=True))
    wanted = "out" if name or config.routers == "none" else "complete_out"
    assert relative_error(output, channels_last(golden.arrays[wanted])) < 1e-5
    if name:
        np.testing.assert_array_equal(tokens, golden.arrays["token_mask"][..., 0])


# --- Whole runs ----------------------------------------------------------------------------------


def usage_of_none(usage: TokenUsage) -> TokenUsage:
    """Return the usage of images that had no open token."""
    none = np.zeros_like(usage.mean)
    return TokenUsage(none, none, none, usage.images)


@pytest.fixture(scope="module")
def gated(tiny):
    return draw(*tiny, [1, 2], mode="gated")


@pytest.mark.parametrize(
    "name, platform",
    [
        *[("switch", "cpu"), ("gather", "gpu"), ("one_hot", "tpu"), ("masked", "cpu"), KERNELS[0]],
        *(pytest.param(*case, marks=pytest.mark.slow) for case in [("gather", "cpu"), ("mosaic", "tpu")]),
    ],
)
def test_a_run_is_the_gated_one_whatever_is_known(tiny, gated, name, platform):
    model = dataclasses.replace(tiny[0], platform=platform)
    settings = dict(mode="fast", segments=1, execution=name)
    for usage in (gated.usage, usage_of_none(gated.usage)):
        fast = draw(model, tiny[1], [1, 2], **settings, usage=usage)
        assert relative_error(fast.images, gated.images) < 1e-5
        np.testing.assert_array_equal(fast.routing.tokens, gated.routing.tokens)
        if usage is gated.usage:
            assert name == "switch" or not fast.overflow_count.any()
            assert (fast.executed_macs >= fast.macs * (1 - 1e-6)).all()
            if name != "masked":
                assert fast.executed_macs.mean() < gated.executed_macs.mean()
    # Tokens that overflow their capacities are computed densely, counted, and paid for.
    assert bool(fast.overflow_count.any()) == (name != "masked")
    if find_execution(name, platform).may_overflow:
        assert fast.executed_macs.mean() > gated.executed_macs.mean()


@GPU
@pytest.mark.slow
def test_a_run_for_gpus_that_leaves_nothing_out_is_the_gated_one(tiny, gated):
    fast = draw(dataclasses.replace(tiny[0], platform="gpu"), tiny[1], [1, 2], mode="fast", segments=0)
    assert relative_error(fast.images, gated.images) < 1e-5
    np.testing.assert_array_equal(fast.routing.tokens, gated.routing.tokens)


@GPU
def test_a_complete_run_for_gpus_is_the_complete_one(tiny):
    theirs, ours = (
        draw(dataclasses.replace(tiny[0], platform=name), tiny[1], [1, 2], mode="complete") for name in ("gpu", "cpu")
    )
    assert relative_error(theirs.images, ours.images) < 1e-5


@pytest.mark.parametrize(
    "name, platform",
    [
        ("switch", "cpu"),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in [("triton", "gpu"), ("mosaic", "tpu")]),
    ],
)
def test_blocks_with_nothing_open_are_run(tiny, name, platform):
    """No head or no group is kept, and no token is open: what is added is a bias."""
    model, params = tiny
    closed = jax.tree.map(lambda leaf: leaf, params)
    for router in ("head_router", "group_router"):
        closed[router]["bias"] = closed[router]["bias"].at[1].set(-1e3)
    closed["blocks"]["token_router"]["bias_out"] = closed["blocks"]["token_router"]["bias_out"].at[1].set(-1e6)
    gated = draw(model, closed, [1, 2], mode="gated")
    assert not gated.routing.tokens[:, 1].any()
    fast = draw(dataclasses.replace(model, platform=platform), closed, [1, 2], execution=name, usage=gated.usage)
    assert relative_error(fast.images, gated.images) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name, platform", [("switch", "cpu"), ("one_hot", "tpu"), *KERNELS])
@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_one_image_with_and_without_guidance(tiny, name, platform, guidance):
    sampling = dataclasses.replace(SAMPLING, guidance=guidance)
    gated = draw(*tiny, [3], mode="gated", sampling=sampling)
    model = dataclasses.replace(tiny[0], platform=platform)
    fast = draw(model, tiny[1], [3], sampling=sampling, execution=name, usage=gated.usage)
    assert relative_error(fast.images, gated.images) < 1e-5


@pytest.mark.parametrize(
    "name, platform",
    [
        ("switch", "cpu"),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in [("one_hot", "tpu"), ("mosaic", "tpu")]),
    ],
)
def test_a_run_on_a_mesh_is_that_on_one_device(tiny, name, platform):
    model, params = tiny
    mesh, labels = make_mesh(MeshConfig()), [1, 2, 3, 4]
    assert mesh.size == 4
    alone = draw(model, params, labels, mode="gated")
    theirs = dataclasses.replace(model, platform=platform)
    together = draw(theirs, params, labels, execution=name, usage=alone.usage, mesh=mesh)
    assert relative_error(together.images, alone.images) < 1e-5
    np.testing.assert_allclose(together.routing.tokens, alone.routing.tokens, atol=1e-6)


# --- The choice ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_executions_are_timed_on_one_device_whatever_mesh_is_set(tiny, monkeypatch):
    """A TPU's compiler does not share kernels out over a mesh by itself."""
    model, params = tiny
    run, mesh = make_run(model, params), make_mesh(MeshConfig())
    none = np.zeros(run.time_gates[0].shape[:2])
    plan = run.plan(2).with_usage(TokenUsage(none + 0.4, none, none, 2))
    benchmark, seen = autotune._benchmark, []

    def watched(model, params, *arguments):
        seen.append((jax.sharding.get_abstract_mesh().empty, {len(leaf.devices()) for leaf in jax.tree.leaves(params)}))
        return benchmark(model, params, *arguments)

    monkeypatch.setattr(autotune, "_benchmark", watched)
    with jax.set_mesh(mesh):
        theirs = dataclasses.replace(model, platform="tpu")
        placed = jax.device_put(params, replicated(mesh))
        name = autotune.fastest_execution(theirs, placed, plan, images=2, evaluations=2)
    assert mesh.size == 4 and seen == [(True, {1})]
    assert name in {execution.name for execution in available_executions(theirs, 4)}


def test_each_platform_has_its_rule(tiny):
    rule = lambda platform: default_execution(dataclasses.replace(tiny[0], platform=platform)).name
    assert (rule("cpu"), rule("tpu")) == ("switch", "one_hot")
    assert rule("gpu") == ("gather" if triton.triton is None else "triton")
    whole = lambda platform: whole_execution(dataclasses.replace(tiny[0], platform=platform)).name
    assert (whole("cpu"), whole("tpu")) == ("masked", "masked")
    assert whole("gpu") == ("masked" if triton.triton is None else "triton_masked")


@pytest.mark.parametrize("name", ["triton", "mosaic"])
def test_a_plan_of_kernels_serves_machines_without_them(tiny, gated, name):
    fast = draw(*tiny, [1, 2], mode="fast", execution=name)
    assert relative_error(fast.images, gated.images) < 1e-5


def test_models_that_kernels_do_not_serve():
    config = DiTConfig(depth=1, width=32, heads=4, patch=2, side=8, channels=1, routers="free")
    names = lambda config, platform: {run.name for run in available_executions(Model(config, platform=platform), 2)}
    assert "mosaic" in names(config, "tpu") and "mosaic" not in names(config, "cpu")
    limited = dataclasses.replace(config, token_capacity=(0.5,))
    assert "mosaic" not in names(limited, "tpu") and "triton" not in names(limited, "gpu")
    assert "mosaic" not in names(dataclasses.replace(config, routers="none"), "tpu")
    narrow_config = dataclasses.replace(config, width=36)
    assert "triton" not in names(narrow_config, "gpu")
    assert type(dense_execution(Model(narrow_config, platform="gpu"))) is Dense


@pytest.mark.parametrize(
    "kernels, sizes",
    [pytest.param(triton, (16, 64), marks=GPU), (mosaic, (2, 16, 64, jnp.dtype("float32")))],
    ids=["triton", "mosaic"],
)
def test_kernels_that_do_not_compile_are_mentioned_once_and_not_used(monkeypatch, caplog, kernels, sizes):
    def refuse(*_, **__):
        raise NotImplementedError("this device lacks something")

    monkeypatch.setattr(kernels, "pack", refuse)
    kernels.accepts.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert not kernels.accepts(*sizes) and not kernels.accepts(*sizes)
    assert caplog.text.count("lacks something") == 1
    kernels.accepts.cache_clear()
