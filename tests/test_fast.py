"""The fast path computes less and gives the same: whole trajectories against `gated`."""

import dataclasses
import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, relative_error
from runs import DIFFUSION_SOLVERS, FLOW_SOLVERS, SAMPLING, draw, make_run
from test_executions import usage_of_none

from dydit_jax.diffusion.process import Diffusion, Flow
from dydit_jax.diffusion.samplers import SamplingConfig
from dydit_jax.loading import load_checkpoint
from dydit_jax.models.config import DiTConfig
from dydit_jax.models.dit import Model
from dydit_jax.runtime.sharding import MeshConfig, make_mesh
from dydit_jax.sampling.segment import microbatch_size


def assert_same(fast, gated):
    # Gates as the segments executed them, so one that a segment leaves out by mistake is seen here.
    for name in ("heads", "groups", "tokens"):
        np.testing.assert_array_equal(getattr(fast.routing, name), getattr(gated.routing, name))
    assert relative_error(fast.images, gated.images) < 1e-5
    np.testing.assert_allclose(fast.macs, gated.macs, rtol=1e-5)


RUNS = [(Diffusion(), name) for name in DIFFUSION_SOLVERS] + [(Flow(), name) for name in FLOW_SOLVERS]
IN_EVERY_RUN = ("diffusion", "unipc_3"), ("flow", "euler_maruyama")


@pytest.mark.parametrize(
    "process, sampler",
    [
        pytest.param(*run, marks=() if (run[0].name, run[1]) in IN_EVERY_RUN else pytest.mark.slow, id=str(run))
        for run in RUNS
    ],
)
def test_fast_trajectory_equals_the_gated_one(tiny, process, sampler):
    clip = None if (process.name, sampler) == ("flow", "heun") else 1.0
    sampling = SamplingConfig(sampler=sampler, steps="6", guidance=2.0 if sampler == "ddpm" else 1.0, clip=clip)
    gated = draw(*tiny, [1, 2, 3], mode="gated", sampling=sampling, process=process)
    assert_same(draw(*tiny, [1, 2, 3], mode="fast", sampling=sampling, process=process), gated)
    assert 0.1 < gated.usage.mean.mean() < 0.9


@pytest.mark.parametrize(
    "process, sampler, low, high",
    [
        (Diffusion(), "ddim", 300, 700),
        pytest.param(Diffusion(), "heun", 300, 700, marks=pytest.mark.slow),
        pytest.param(Flow(), "euler", 0.2, 0.6, marks=pytest.mark.slow),
    ],
)
def test_outside_the_interval_of_guidance_the_network_runs_once(tiny, process, sampler, low, high):
    """In what was compiled and recorded, not only in the table."""
    model, params = tiny
    sampling = SamplingConfig(sampler=sampler, steps="4", guidance=2.0, guidance_interval=(low, high), clip=1.0)
    theirs = dataclasses.replace(model, platform="tpu")  # one-hot products: rows follow the number of images
    for network in (model, theirs):
        run = make_run(network, params, sampling=sampling, process=process)
        guided = ((run.table.timestep >= low) & (run.table.timestep <= high)).tolist()
        assert run.evaluations.tolist() == [1 + inside for inside in guided] and any(guided) and not all(guided)
        plan = run.plan()
        for planned in (plan, run.plan(0)):
            assert [segment.evaluations for segment in planned.segments] == [1, 2, 1]
        gated = run.draw([1, 2, 3], mode="gated")
        assert_same(run.draw([1, 2, 3], plan=run.plan(0)), gated)
        for usage in (None, gated.usage):
            fast = run.draw([1, 2, 3], plan=dataclasses.replace(plan, usage=usage))
            assert_same(fast, gated)
            assert fast.evaluations.tolist() == run.evaluations.tolist()
        programs, _ = run.programs(3, plan=plan)
        assert [program.images for program in programs] == [3, 6, 3]
    # Two programs of two and one: where no step is guided, one of one.
    alone = dataclasses.replace(sampling, guidance=1.0)
    plain = draw(model, params, [1, 2, 3], mode="gated", sampling=alone, process=process)
    everywhere = dataclasses.replace(sampling, guidance_interval=None)
    everywhere = draw(model, params, [1, 2, 3], mode="gated", sampling=everywhere, process=process)
    assert relative_error(gated.images, plain.images) > 1e-3 < relative_error(gated.images, everywhere.images)


@pytest.mark.slow
@pytest.mark.parametrize("process, sampler", RUNS, ids=str)
def test_fast_equals_gated_on_a_mesh_with_an_interval_of_guidance(tiny, process, sampler):
    interval = (300, 700) if process.name == "diffusion" else (0.2, 0.6)
    clip = None if (process.name, sampler) == ("flow", "heun") else 1.0
    sampling = SamplingConfig(sampler=sampler, steps="4", guidance=2.0, guidance_interval=interval, clip=clip)
    settings = dict(sampling=sampling, process=process)
    gated = draw(*tiny, [1, 2, 3, 4], mode="gated", **settings)
    fast = draw(*tiny, [1, 2, 3, 4], segments=3, usage=gated.usage, mesh=make_mesh(MeshConfig()), **settings)
    for name in ("heads", "groups"):
        np.testing.assert_array_equal(getattr(fast.routing, name), getattr(gated.routing, name))
    np.testing.assert_allclose(fast.routing.tokens, gated.routing.tokens, atol=1e-6)  # means of means
    assert relative_error(fast.images, gated.images) < 1e-5
    np.testing.assert_array_equal(fast.evaluations, gated.evaluations)


def test_a_scale_per_evaluation_is_an_interval_written_out(tiny):
    settings = dict(sampler="ddim", steps="4", clip=1.0)
    interval = SamplingConfig(**settings, guidance=2.0, guidance_interval=(300, 700))
    scales = SamplingConfig(**settings, guidance_scales=(1.0, 2.0, 2.0, 1.0))
    images = [draw(*tiny, [1, 2], mode="gated", sampling=sampling).images for sampling in (interval, scales)]
    np.testing.assert_array_equal(*images)


@pytest.mark.parametrize(
    "segments", [0, pytest.param(3, marks=pytest.mark.slow), pytest.param(None, marks=pytest.mark.slow)]
)
def test_number_of_segments_changes_nothing(tiny, segments):
    gated = draw(*tiny, [1, 2], mode="gated")
    assert_same(draw(*tiny, [1, 2], mode="fast", segments=segments), gated)


@pytest.mark.parametrize("images", [1, pytest.param(10**9, marks=pytest.mark.slow)])
def test_the_plan_that_suits_a_job_changes_nothing(tiny, images):
    run = make_run(*tiny)
    plan = run.plan(images=images)
    assert plan.narrowed_segments == (0 if images == 1 else run.plan().narrowed_segments)
    gated = run.draw([1, 2], mode="gated")
    assert_same(run.draw([1, 2], plan=plan), gated)
    assert_same(run.draw([1, 2]), gated)  # its own choice


def test_without_segments_fast_is_the_program_of_gated(tiny):
    run = make_run(*tiny)
    described = lambda programs: [(program.executions, program.images, program.segment.kept) for program in programs]
    of_fast, of_gated = (run.programs(2, **settings)[0] for settings in (dict(plan=run.plan(0)), dict(mode="gated")))
    assert described(of_fast) == described(of_gated)


def test_batches_of_a_run_share_their_narrowed_blocks(tiny):
    run = make_run(*tiny)
    for mode, plan in (("fast", run.plan(2)), ("gated", None), ("fast", run.plan(2)), ("fast", run.plan(0))):
        settings = dict(mode=mode, plan=plan)
        np.testing.assert_array_equal(
            run.draw([1, 2], **settings).images, make_run(*tiny).draw([1, 2], **settings).images
        )


def test_a_run_leaves_no_weights_behind(tiny):
    """Not even until Python looks for cycles: those of several runs would fill the memory before it does."""
    draw(*tiny, [1, 2], mode="fast")
    gc.collect()
    gc.disable()
    try:
        before = len(jax.live_arrays())
        draw(*tiny, [1, 2], mode="fast")
        assert len(jax.live_arrays()) == before
    finally:
        gc.enable()


@pytest.mark.slow
def test_a_run_written_for_tpus_is_the_same(tiny):
    """It takes one-hot products, and its host works a segment ahead. Runs in kernels: test_kernel_forms.py."""
    model, params = tiny
    theirs, reports = dataclasses.replace(model, platform="tpu"), []
    gated = draw(model, params, [1, 2], mode="gated")
    known = dict(segments=3, usage=gated.usage, report=reports.append)
    assert_same(draw(theirs, params, [1, 2], mode="fast", **known), gated)
    assert len(reports) == 3 and sum(reports) == 6
    # What was started on a segment that overflowed is dropped, and every step is reported once.
    reports.clear()
    short = dict(known, usage=usage_of_none(gated.usage))
    assert_same(draw(theirs, params, [1, 2], mode="fast", **short), gated)
    assert sum(reports) == 6


@pytest.mark.slow
def test_on_a_tpu_images_go_through_in_passes(tiny):
    model, params = tiny
    # So many tokens that the scores of two images fill what they may of the fast memory.
    model = dataclasses.replace(model, config=dataclasses.replace(model.config, side=64))
    theirs = dataclasses.replace(model, platform="tpu")
    sampling = dataclasses.replace(SAMPLING, steps="2", guidance=1.0)
    sizes = {images: microbatch_size(theirs, 1, images) for images in (1, 2, 6, 7)}
    assert sizes == {1: 1, 2: 2, 6: 2, 7: 7}  # seven would go one by one
    assert microbatch_size(theirs, 2, 6) == 1
    assert microbatch_size(model, 1, 6) == 6
    labels = np.arange(6)
    gated = draw(model, params, labels, mode="gated", sampling=sampling)
    whole = draw(theirs, params, labels, mode="fast", segments=1, sampling=sampling, usage=gated.usage)
    assert relative_error(whole.images, gated.images) < 1e-5
    # Means of means, of which the last digit may differ.
    np.testing.assert_allclose(whole.routing.tokens, gated.routing.tokens, rtol=1e-6)
    assert whole.usage.images == 6 and not whole.overflow_count.any()
    np.testing.assert_allclose(whole.usage.deviation, gated.usage.deviation, atol=1e-3)
    # What the fullest pass needed is remembered, not the mean over passes.
    short = dict(execution="gather", segments=1, sampling=sampling, usage=usage_of_none(gated.usage))
    max_rows = draw(theirs, params, labels, mode="fast", **short).usage.max_rows
    pairs = [dict(labels=labels[first : first + 2], indices=labels[first : first + 2]) for first in (0, 2, 4)]
    means = [draw(model, params, **pair, mode="gated", sampling=sampling).usage.mean for pair in pairs]
    np.testing.assert_allclose(max_rows, np.max(means, 0), rtol=1e-5)
    assert (max_rows > gated.usage.mean + 1e-3).any()
    # Where too few rows are planned, all passes are run in full.
    short = dict(segments=1, sampling=sampling, usage=usage_of_none(gated.usage))
    again = draw(theirs, params, labels, mode="fast", **short)
    assert relative_error(again.images, gated.images) < 1e-5
    assert whole.overflow_count.sum() == 0 and again.overflow_count.max() == 3  # passes, of two images each


def test_fast_equals_gated_on_the_original_weights(golden):
    if golden.config.routers == "none":
        pytest.skip("The static model has nothing to leave out.")
    arguments = (Model(golden.config), jax.tree.map(jnp.asarray, golden.params), [1, 2])
    assert_same(draw(*arguments, mode="fast"), draw(*arguments, mode="gated"))


def test_fast_equals_gated_on_the_digits():
    weights = load_checkpoint(ROOT / "assets" / "digits_dydit.safetensors")
    arguments = (Model(weights.model), jax.tree.map(jnp.asarray, weights.params), np.arange(10))
    settings = dict(sampling=weights.sampling, process=weights.process)
    assert_same(draw(*arguments, mode="fast", **settings), draw(*arguments, mode="gated", **settings))


def test_static_model_runs_fast_as_one_segment(tiny_config):
    model = Model(DiTConfig(**{**vars(tiny_config), "routers": "none"}))
    params = jax.jit(model.init)(jax.random.key(0))
    assert_same(draw(model, params, [1], mode="fast", segments=None), draw(model, params, [1], mode="complete"))
