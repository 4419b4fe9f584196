"""Whole runs in the kernels for GPUs and TPUs, interpreted, against `gated`; and what serves where there are none."""

import dataclasses
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import relative_error

from dydit_jax.diffusion.samplers import SamplingConfig
from dydit_jax.diffusion.schedules import DiffusionConfig
from dydit_jax.fast import autotune
from dydit_jax.fast.plan import Shares
from dydit_jax.fast.tokens import default_form, forms_of
from dydit_jax.models import fused, pooled
from dydit_jax.runtime.sharding import MeshConfig, make_mesh, replicated
from dydit_jax.sampling.generate import generate, plan_sampling

SETTINGS = dict(sampling=SamplingConfig(sampler="ddpm", steps="4", guidance=2.0), diffusion=DiffusionConfig())
GPU = pytest.mark.skipif(fused.triton is None, reason="This JAX has no Pallas for Triton.")
KERNELS = [pytest.param("gpu", "fused", marks=GPU), ("tpu", "pooled")]


@pytest.fixture(scope="module")
def run(tiny):
    """Return (mode, platform, plan) -> samples of the tiny model."""
    model, params = tiny

    def run(mode: str, platform: str, plan=None):
        return generate(dataclasses.replace(model, platform=platform), params, [1, 2], mode=mode, plan=plan, **SETTINGS)

    return run


@pytest.mark.parametrize("platform, form", [*KERNELS, ("gpu", "fixed")])
@pytest.mark.parametrize("calibrated", ["not", "well", "short"])
def test_a_run_is_the_gated_one(tiny, run, platform, form, calibrated):
    gated, plan = run("gated", "cpu"), plan_sampling(*tiny, segments=2, **SETTINGS)
    if calibrated != "not":
        none = np.zeros_like(gated.shares.mean)
        plan = plan.widened(gated.shares if calibrated == "well" else Shares(none, none, none, 2))
    fast = run("fast", platform, dataclasses.replace(plan, form=form))
    assert relative_error(fast.images, gated.images) < 1e-5
    np.testing.assert_array_equal(fast.routing.tokens, gated.routing.tokens)
    # What does not fit is computed in full, and counted.
    assert bool(fast.over.any()) == (calibrated == "short")


@GPU
def test_a_complete_run_for_gpus_is_the_complete_one(run):
    assert relative_error(run("complete", "gpu").images, run("complete", "cpu").images) < 1e-5


@pytest.mark.parametrize("platform, form", KERNELS)
def test_blocks_with_nothing_on_are_run(tiny, platform, form):
    """No head or no group is kept: what is added is a bias."""
    model, params = tiny
    closed = jax.tree.map(lambda leaf: leaf, params)
    for name in ("head_router", "group_router"):
        closed[name]["bias"] = closed[name]["bias"].at[1].set(-1e3)
    gated = generate(model, closed, [1, 2], mode="gated", **SETTINGS)
    plan = dataclasses.replace(plan_sampling(model, closed, **SETTINGS), form=form).widened(gated.shares)
    fast = generate(dataclasses.replace(model, platform=platform), closed, [1, 2], plan=plan, **SETTINGS)
    assert relative_error(fast.images, gated.images) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("platform, form", KERNELS)
def test_a_run_on_a_mesh_is_that_on_one_device(tiny, platform, form):
    model, params = tiny
    theirs, labels = dataclasses.replace(model, platform=platform), [1, 2, 3, 4]
    alone = generate(model, params, labels, mode="gated", **SETTINGS)
    plan = dataclasses.replace(plan_sampling(model, params, **SETTINGS), form=form).widened(alone.shares)
    mesh = make_mesh(MeshConfig())
    assert mesh.size == 4
    together = generate(theirs, params, labels, plan=plan, mesh=mesh, **SETTINGS)
    assert relative_error(together.images, alone.images) < 1e-5
    np.testing.assert_allclose(together.routing.tokens, alone.routing.tokens, atol=1e-6)


def test_forms_race_on_one_device_whatever_mesh_is_set(tiny, monkeypatch):
    """A TPU's compiler does not share kernels out over a mesh by itself."""
    model, params = tiny
    plan, mesh = plan_sampling(model, params, segments=2, **SETTINGS), make_mesh(MeshConfig())
    none = np.zeros(plan.heads.shape[:2])
    plan = plan.widened(Shares(none + 0.4, none, none, 2))
    race, seen = autotune._race, []

    def watched(model, params, *arguments, **settings):
        seen.append((jax.sharding.get_abstract_mesh().empty, {len(leaf.devices()) for leaf in jax.tree.leaves(params)}))
        return race(model, params, *arguments, **settings)

    monkeypatch.setattr(autotune, "_race", watched)
    with jax.set_mesh(mesh):
        theirs = dataclasses.replace(model, platform="tpu")
        form = autotune.fastest_form(theirs, jax.device_put(params, replicated(mesh)), plan, images=2, runs=2)
    assert mesh.size == 4 and seen == [(True, {1})] and form in forms_of(theirs, 4)


@GPU
def test_a_gpu_runs_in_kernels_by_default(tiny):
    assert default_form(dataclasses.replace(tiny[0], platform="gpu")) == "fused"


@pytest.mark.parametrize("form", ["fused", "pooled"])
def test_a_plan_of_the_kernels_serves_those_who_lack_them(tiny, run, form):
    plan = plan_sampling(*tiny, segments=2, **SETTINGS)
    kept = dataclasses.replace(plan, form=form)
    assert relative_error(run("fast", "cpu", kept).images, run("fast", "cpu", plan).images) == 0


@pytest.mark.parametrize(
    "kernels, sizes",
    [pytest.param(fused, (16, 64), marks=GPU), (pooled, (2, 16, 64, jnp.dtype("float32")))],
    ids=["fused", "pooled"],
)
def test_kernels_that_do_not_compile_are_told_once_and_not_used(monkeypatch, caplog, kernels, sizes):
    def refuse(*_, **__):
        raise NotImplementedError("this device lacks something")

    monkeypatch.setattr(kernels, "pack", refuse)
    kernels.accepts.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert not kernels.accepts(*sizes) and not kernels.accepts(*sizes)
    assert caplog.text.count("lacks something") == 1
    kernels.accepts.cache_clear()
