"""The fast path computes less and gives the same: plans, narrowed weights, packed tokens, whole trajectories."""

import dataclasses
import gc
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, channels_last, relative_error

from dydit_jax.diffusion.samplers import SAMPLERS, SamplingConfig
from dydit_jax.diffusion.schedules import DiffusionConfig
from dydit_jax.errors import InputError
from dydit_jax.fast.narrow import NarrowedBlocks, Unnarrowed, cast_for_products, narrow
from dydit_jax.fast.plan import Plan, Shares, make_plan, whole_segments
from dydit_jax.fast.tokens import (
    FORMS,
    capacities_of,
    counted_shares,
    overflows,
    places_needed,
    run_on_open_tokens,
    runners,
)
from dydit_jax.loading import load_checkpoint
from dydit_jax.models.dit import DiTConfig, Model
from dydit_jax.runtime.sharding import MeshConfig, make_mesh
from dydit_jax.sampling.generate import generate, images_of_pass, plan_sampling


@pytest.fixture(scope="module")
def gates():
    """Gates of heads and groups over twelve steps that drift, with a layer that has none on at times."""
    generator = np.random.default_rng(0)
    phase = generator.uniform(0, 12, (1, 3, 4))
    heads = np.abs(np.arange(12)[:, None, None] - phase) < 4
    groups = np.abs(np.arange(12)[:, None, None] - phase[..., ::-1]) < 3
    heads[:, 1], groups[6:, 2] = False, False
    return heads, groups


MACS = DiTConfig(depth=3, width=64, heads=4, patch=2, side=8, routers="free").macs


def padded_cost(heads, groups, ends) -> float:
    """Count the MACs of a cut by hand."""
    total = 0.0
    for start, stop in zip(ends[:-1], ends[1:]):
        kept = heads[start:stop].any(0).sum() * MACS.attention / 4 + groups[start:stop].any(0).sum() * MACS.mlp / 4
        total += (stop - start) * (kept + MACS.fixed + MACS.routers)
    return total


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_plan_is_the_cheapest_of_all_cuts(gates, count):
    plan = make_plan(*gates, MACS, segments=count)
    ends = [segment.start for segment in plan.segments] + [12]
    cheapest = min(padded_cost(*gates, [0, *cuts, 12]) for cuts in itertools.combinations(range(1, 12), count - 1))
    assert ends[0] == 0 and len(plan.segments) == count
    assert padded_cost(*gates, ends) == pytest.approx(cheapest)
    exact = padded_cost(*gates, list(range(13)))
    assert plan.padding == pytest.approx(cheapest / exact - 1)


def test_plan_keeps_every_gate(gates):
    heads, groups = gates
    for segment in make_plan(heads, groups, MACS, segments=3).segments:
        for kept, residual, all_gates in (
            (segment.heads, segment.head_gates, heads),
            (segment.groups, segment.group_gates, groups),
        ):
            for layer, units in enumerate(kept):
                rebuilt = np.zeros((len(segment), 4), bool)
                rebuilt[:, list(units)] = True if residual[layer] is None else residual[layer]
                np.testing.assert_array_equal(rebuilt, all_gates[segment.start : segment.stop, layer])


def test_plan_takes_few_segments_within_the_tolerance(gates):
    slow = [np.repeat(gate, 4, axis=0) for gate in gates]
    plan = make_plan(*slow, MACS)
    assert plan.padding <= 0.02
    assert make_plan(*slow, MACS, segments=len(plan.segments) - 1).padding > 0.02
    assert "segments of" in plan.in_words()
    assert len(make_plan(*gates, MACS).segments) == 3  # four steps for each
    constant = np.ones((12, 3, 4), bool)
    assert len(make_plan(constant, constant, MACS).segments) == 1


@pytest.mark.parametrize("count", [0, 13])
def test_impossible_numbers_of_segments_are_refused(gates, count):
    with pytest.raises(InputError, match="from 1 to the 12 steps"):
        make_plan(*gates, MACS, segments=count)


def test_narrowed_weights_have_what_is_kept(tiny, gates):
    model, params = tiny
    segment = make_plan(gates[0][:, :2], gates[1][:, :2], model.config.macs, segments=2).segments[0]
    layers = narrow(params["blocks"], heads=segment.heads, groups=segment.groups, dtype=jnp.dtype("float32"))
    attention, mlp = (jax.tree.map(np.asarray, params["blocks"][name]) for name in ("attention", "mlp"))
    for layer, narrowed in enumerate(layers):
        heads, groups = list(segment.heads[layer]), list(segment.groups[layer])
        wanted = dict(
            attention=dict(
                qkv=tuple(attention["qkv"][layer][:, :, heads]),
                qkv_bias=tuple(attention["qkv_bias"][layer][:, heads]),
                out=attention["out"][layer][heads],
                out_bias=attention["out_bias"][layer],
            ),
            mlp=dict(
                up=mlp["up"][layer][:, groups],
                up_bias=mlp["up_bias"][layer][groups],
                down=mlp["down"][layer][groups],
                down_bias=mlp["down_bias"][layer],
            ),
        )
        chex.assert_trees_all_equal({name: narrowed[name] for name in wanted}, wanted)


def test_only_what_products_read_is_in_their_dtype(tiny):
    _, params = tiny
    half, single = jnp.dtype("bfloat16"), jnp.dtype("float32")
    dtypes = jax.tree.map(lambda leaf: leaf.dtype, cast_for_products(params["blocks"], half))
    assert dtypes["modulation"] == dict(kernel=half, bias=single)
    assert {*dtypes["attention"].values(), *dtypes["mlp"].values()} == {half}
    assert set(dtypes["token_router"].values()) == {single}
    unchanged = cast_for_products(params["blocks"], single)
    assert all(new is old for new, old in zip(jax.tree.leaves(unchanged), jax.tree.leaves(params["blocks"])))


def test_the_next_segment_takes_over_what_it_shares_with_the_last(tiny):
    model, params = tiny
    narrowed = NarrowedBlocks(params["blocks"], dtype=jnp.dtype("float32"), platform="cpu")
    every, fewer = tuple(range(model.config.heads)), tuple(range(1, model.config.heads))
    depth = model.config.depth
    before = [dict(layer) for layer in narrowed.keep((every,) * depth, (every,) * depth)]
    wanted = dict(heads=(fewer,) + (every,) * (depth - 1), groups=(every,) * (depth - 1) + (fewer,))
    shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), narrowed.shapes(**wanted))
    layers = narrowed.keep(**wanted)
    assert layers[0]["attention"] is not before[0]["attention"]
    assert layers[0]["mlp"] is before[0]["mlp"]
    assert layers[-1]["attention"] is before[-1]["attention"]
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), layers) == shapes
    chex.assert_trees_all_equal(layers, narrow(params["blocks"], dtype=jnp.dtype("float32"), **wanted))


def test_on_an_accelerator_the_program_narrows(tiny):
    model, params = tiny
    depth, units = model.config.depth, model.config.heads
    wanted = dict(heads=((0, 2), *[()] * (depth - 1)), groups=(*[(1,)] * (depth - 1), tuple(range(units))))
    given = NarrowedBlocks(params["blocks"], dtype=jnp.dtype("float32"), platform="gpu")
    chex.assert_trees_all_equal_shapes_and_dtypes(given.shapes(**wanted), given.keep(**wanted))
    layers = jax.jit(Unnarrowed.narrowed)(given.keep(**wanted))
    chex.assert_trees_all_equal(layers, narrow(params["blocks"], dtype=jnp.dtype("float32"), **wanted))
    # Where nothing is left out, the blocks are cut apart once for all segments.
    everything = dict.fromkeys(("heads", "groups"), (tuple(range(units)),) * depth)
    cut = given.keep(**everything)
    chex.assert_trees_all_equal(cut, narrow(params["blocks"], dtype=jnp.dtype("float32"), **everything))
    chex.assert_trees_all_equal_shapes_and_dtypes(given.shapes(**everything), cut)
    assert given.keep(**everything)[0]["mlp"] is cut[0]["mlp"]


@pytest.mark.parametrize("open_rows", [0, 1, 7, 8, 9, 31, 32])
@pytest.mark.parametrize(
    "form, capacities",
    [
        ("switch", (8, 16, 32)),
        ("switch", (0, 8, 32)),
        ("switch", (32,)),
        ("fixed", (9,)),
        ("one_hot", (8,)),
        ("multiply", (32,)),
    ],
)
def test_packed_tokens_equal_gated_ones_for_every_count(open_rows, form, capacities):
    generator = np.random.default_rng(open_rows)
    x = generator.standard_normal((2, 16, 4), np.float32)
    gates = np.zeros(32, np.float32)
    gates[generator.permutation(32)[:open_rows]] = 1
    gates = gates.reshape(2, 16)
    function = lambda rows: jnp.exp(rows) + 1
    packed = jax.jit(lambda x, gates: run_on_open_tokens(form, capacities, function, x, gates))(x, gates)
    fits = {"fixed": open_rows <= 9, "one_hot": gates.sum(1).max() <= 8}.get(form, True)
    if form != "switch":
        needed = places_needed(form, gates[:, None])  # [1]
        assert overflows(form, (capacities,), needed, images=2, tokens=16).tolist() == [not fits]
    if fits:
        np.testing.assert_allclose(packed, gates[..., None] * function(x), rtol=1e-6)


def test_capacities_are_chosen_by_what_calibration_saw():
    switch = lambda shares, tokens: capacities_of("switch", shares, images=1, tokens=tokens)
    assert switch(None, 64) == (8, 16, 24, 32, 40, 48, 56, 64)
    assert switch(None, 10) == (8, 10)
    shares = np.repeat([0.2, 0.5, 0.7], [10, 5, 5])
    assert switch(shares, 1000) == (200, 256, 504, 752, 1000)
    assert switch(np.ones(4), 1000) == (1000,)
    assert switch(np.zeros(4), 1000) == (0, 56, 1000)
    shares += 0.05
    assert capacities_of("fixed", shares, images=4, tokens=250) == (752,)
    assert capacities_of("fused", shares - 0.001, images=64, tokens=256) == (12288,)  # 12272, to a multiple of 128
    assert capacities_of("pooled", shares, images=16, tokens=256) == (3072,)
    assert capacities_of("one_hot", shares, images=4, tokens=256) == (192,)
    assert capacities_of("one_hot", None, images=4, tokens=256) == (256,)
    assert capacities_of("multiply", shares, images=4, tokens=256) == (1024,)


def seen(shares) -> Shares:
    """Return what images [images,S,L] had on, each packed by itself."""
    return Shares(shares.mean(0), shares.std(0, ddof=1), shares.max(0), len(shares))


def calibration(shares) -> Shares:
    return dataclasses.replace(seen(shares), most=np.zeros(shares.shape[1:]))


def nothing(shares: Shares) -> Shares:
    """Return a calibration that saw no token on."""
    none = np.zeros_like(shares.mean)
    return Shares(none, none, none, shares.images)


def test_hardly_any_batch_has_more_on_than_the_bound_of_a_few_images():
    images = np.random.default_rng(0).normal(0.6, 0.08, (4000, 1, 1))
    few, others = images[:2000].reshape(250, 8, 1, 1), images[2000:].reshape(125, 16, 1, 1)
    bounds = np.array([calibration(shares).bound(16).item() for shares in few])
    # Of a normal distribution beyond four deviations, with one that eight values only estimate.
    assert (others.mean(1).ravel() > bounds[:, None]).mean() < 5e-3
    assert bounds.mean() < 0.6 + 5 * 0.08 * np.sqrt(1 / 8 + 1 / 16)
    # What they need is nearer to their mean the more images pack together, and the more were seen.
    assert calibration(images).bound(1) > calibration(images).bound(16) > calibration(images).bound(64)
    assert bounds.mean() > calibration(images).bound(16)
    assert calibration(np.full((8, 1, 1), 0.6)).bound(16) == pytest.approx(0.62)  # alike, by chance perhaps
    assert seen(images).bound(64) == images.max()


def test_shares_of_more_images_are_those_of_all():
    images = np.random.default_rng(0).random((12, 2, 3))
    joined, whole = seen(images[:4]).with_more(seen(images[4:])), seen(images)
    np.testing.assert_allclose(joined.mean, whole.mean)
    np.testing.assert_allclose(
        joined.deviation, whole.deviation, rtol=0.1
    )  # weights are counts, not degrees of freedom
    np.testing.assert_array_equal(joined.most, whole.most)
    assert joined.images == 12


def test_plan_is_kept_and_read_again(tmp_path, gates):
    plan = make_plan(*gates, MACS, segments=3)
    shares = seen(np.random.default_rng(0).uniform(0.4, 0.6, (8, 12, 3)))
    dataclasses.replace(plan.calibrated(shares), form="fixed").save(tmp_path / "plans" / "plan.npz")
    read = Plan.load(tmp_path / "plans" / "plan.npz", MACS)
    assert read.in_words() == plan.in_words() and read.form == "fixed"
    kept = lambda plan: [(segment.start, segment.heads, segment.groups) for segment in plan.segments]
    assert kept(read) == kept(plan)
    np.testing.assert_array_equal(read.shares.mean, shares.mean)
    np.testing.assert_array_equal(read.shares.bound(4), plan.calibrated(shares).shares.bound(4))
    assert read.shares.images == 8 and not read.shares.most.any()
    with np.load(tmp_path / "plans" / "plan.npz") as arrays:
        np.savez(tmp_path / "earlier.npz", **{name: arrays[name] for name in arrays if name != "deviation"})
    assert Plan.load(tmp_path / "earlier.npz", MACS).shares is None  # of a version that knew less: calibrated anew
    fuller = seen(np.full((4, 12, 3), 0.9))
    assert not read.calibrated(fuller).shares.most.any() and read.widened(fuller).shares.most.min() == 0.9
    for form in ("switch", "fixed", "one_hot"):  # nothing that fell short once does so again
        assert counted_shares(form, read.widened(fuller).shares, 64).min() >= 0.9
    assert len(plan.table(np.arange(12)).splitlines()) == 4


def test_whole_segments_are_alike(gates):
    segments = whole_segments(*gates, pieces=3)
    assert [(s.start, s.stop) for s in segments] == [(0, 4), (4, 8), (8, 12)]
    assert all(segment.heads == ((0, 1, 2, 3),) * 3 for segment in segments)
    np.testing.assert_array_equal(np.concatenate([s.group_gates[2] for s in segments]), gates[1][:, 2])
    open_gates = np.ones((4, 1, 2), bool)
    assert whole_segments(open_gates, open_gates, pieces=1)[0].head_gates == (None,)


SAMPLING = SamplingConfig(sampler="ddpm", steps="6", guidance=2.0)


def draw(model, params, labels, **settings):
    settings = dict(dict(sampling=SAMPLING, diffusion=DiffusionConfig(), segments=2), **settings)
    segments, form, shares = settings.pop("segments"), settings.pop("form", None), settings.pop("shares", None)
    if settings["mode"] == "fast":
        run = dict(sampling=settings["sampling"], diffusion=settings["diffusion"], segments=segments)
        plan = plan_sampling(model, params, **run)
        settings["plan"] = dataclasses.replace(plan, form=form, shares=shares)
    return generate(model, params, labels, **settings)


def assert_same(fast, gated):
    for name in ("heads", "groups", "tokens"):
        np.testing.assert_array_equal(getattr(fast.routing, name), getattr(gated.routing, name))
    assert relative_error(fast.images, gated.images) < 1e-5
    np.testing.assert_allclose(fast.macs, gated.macs, rtol=1e-5)


@pytest.mark.parametrize(
    "sampler", [pytest.param(name, marks=() if name == "ddpm" else pytest.mark.slow) for name in SAMPLERS]
)
def test_fast_trajectory_equals_the_gated_one(tiny, sampler):
    sampling = SamplingConfig(sampler=sampler, steps="6", guidance=2.0 if sampler == "ddpm" else 1.0, clip=1.0)
    gated = draw(*tiny, [1, 2, 3], mode="gated", sampling=sampling)
    assert_same(draw(*tiny, [1, 2, 3], mode="fast", sampling=sampling), gated)
    assert 0.1 < gated.shares.mean.mean() < 0.9


@pytest.mark.slow
def test_number_of_segments_changes_nothing(tiny):
    gated = draw(*tiny, [1, 2], mode="gated")
    assert_same(draw(*tiny, [1, 2], mode="fast", segments=None), gated)


def test_batches_can_share_their_narrowed_blocks(tiny):
    model, params = tiny
    blocks = NarrowedBlocks(params["blocks"], dtype=model.dtype, platform=model.platform)
    for mode in ("fast", "gated", "fast"):
        shared, alone = (draw(model, params, [1, 2], mode=mode, **given) for given in (dict(blocks=blocks), {}))
        np.testing.assert_array_equal(shared.images, alone.images)


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


@pytest.mark.parametrize("form", FORMS)
def test_form_of_tokens_and_calibration_change_nothing(tiny, form):
    gated = draw(*tiny, [1, 2], mode="gated")
    known = draw(*tiny, [1, 2], mode="fast", segments=1, form=form, shares=gated.shares)
    assert_same(known, gated)
    assert form == "switch" or not known.over.any()
    # A wrong calibration: tokens overflow its capacities, their steps are computed in full, and counted.
    wrong = draw(*tiny, [1, 2], mode="fast", form=form, shares=nothing(gated.shares))
    assert_same(wrong, gated)
    assert bool(wrong.over.any()) == (form != "multiply")


def test_a_run_written_for_tpus_is_the_same(tiny):
    """It takes one-hot products, and its host works a segment ahead. Runs in kernels: test_kernel_forms.py."""
    model, params = tiny
    theirs, reports = dataclasses.replace(model, platform="tpu"), []
    gated = draw(model, params, [1, 2], mode="gated")
    known = dict(segments=3, shares=gated.shares, report=reports.append)
    assert_same(draw(theirs, params, [1, 2], mode="fast", **known), gated)
    assert len(reports) == 3 and sum(reports) == 6
    # What was started on a segment that overflowed is dropped, and every step is reported once.
    reports.clear()
    short = dict(known, shares=nothing(gated.shares))
    assert_same(draw(theirs, params, [1, 2], mode="fast", **short), gated)
    assert sum(reports) == 6


def test_on_a_tpu_images_go_through_in_passes(tiny):
    model, params = tiny
    # So many tokens that the scores of two images fill what they may of the fast memory.
    model = dataclasses.replace(model, config=dataclasses.replace(model.config, side=64))
    theirs = dataclasses.replace(model, platform="tpu")
    sampling = dataclasses.replace(SAMPLING, steps="2", guidance=1.0)
    sizes = {images: images_of_pass(theirs, sampling, images) for images in (1, 2, 6, 7)}
    assert sizes == {1: 1, 2: 2, 6: 2, 7: 7}  # seven would go one by one
    assert images_of_pass(theirs, SAMPLING, 6) == 1
    assert images_of_pass(model, sampling, 6) == 6
    labels = np.arange(6)
    gated = draw(model, params, labels, mode="gated", sampling=sampling)
    whole = draw(theirs, params, labels, mode="fast", segments=1, sampling=sampling, shares=gated.shares)
    assert relative_error(whole.images, gated.images) < 1e-5
    # Means of means, of which the last digit may differ.
    np.testing.assert_allclose(whole.routing.tokens, gated.routing.tokens, rtol=1e-6)
    assert whole.shares.images == 6 and not whole.over.any()
    np.testing.assert_allclose(whole.shares.deviation, gated.shares.deviation, atol=1e-3)
    # What the fullest pass needed is remembered, not the mean over passes.
    short = dict(form="fixed", segments=1, sampling=sampling, shares=nothing(gated.shares))
    most = draw(theirs, params, labels, mode="fast", **short).shares.most
    pairs = [dict(labels=labels[first : first + 2], indices=labels[first : first + 2]) for first in (0, 2, 4)]
    means = [draw(model, params, **pair, mode="gated", sampling=sampling).shares.mean for pair in pairs]
    np.testing.assert_allclose(most, np.max(means, 0), rtol=1e-5)
    assert (most > gated.shares.mean + 1e-3).any()
    # Where too few places are planned, all passes are run in full.
    short = dict(segments=1, sampling=sampling, shares=nothing(gated.shares))
    again = draw(theirs, params, labels, mode="fast", **short)
    assert relative_error(again.images, gated.images) < 1e-5
    assert whole.over.sum() == 0 and again.over.max() == 3  # passes, of two images each


@pytest.mark.parametrize("form", ["switch", "multiply", None])
def test_blocks_one_by_one_equal_the_original(golden, form):
    """Sampling runs its blocks so in every mode; None opens all gates."""
    if golden.config.routers == "none" and form:
        pytest.skip("The static model has no gates.")
    model, config = golden.model, golden.config
    every = (tuple(range(config.heads)),) * config.depth
    layers = narrow(golden.params["blocks"], heads=every, groups=every, dtype=jnp.dtype("float32"))
    routed = {}
    if form:
        capacities = capacities_of(form, None, images=1, tokens=config.tokens)
        routed = dict(run_on_tokens=runners(form, (capacities,) * config.depth))

    def one(x, t, label):  # sampling has one timestep for all images, and gates [1,H]
        if form:
            gates = [gate.swapaxes(0, 1) for gate in model.time_gates(golden.params, t)]
        else:
            gates = ((None,) * config.depth,) * 2
        return model.apply_layers(golden.params, layers, x, t, label, heads=gates[0], groups=gates[1], **routed)

    images = range(len(golden.inputs[0]))
    each = [jax.jit(one)(*(jnp.asarray(array[i : i + 1]) for array in golden.inputs)) for i in images]
    output, tokens = (jnp.concatenate(parts) if parts[0] is not None else None for parts in zip(*each, strict=True))
    name = "out" if form or config.routers == "none" else "complete_out"
    assert relative_error(output, channels_last(golden.arrays[name])) < 1e-5
    if form:
        np.testing.assert_array_equal(tokens, golden.arrays["token_mask"][..., 0])


def test_fast_equals_gated_on_the_original_weights(golden):
    if golden.config.routers == "none":
        pytest.skip("The static model has nothing to leave out.")
    arguments = (Model(golden.config), jax.tree.map(jnp.asarray, golden.params), [1, 2])
    assert_same(draw(*arguments, mode="fast"), draw(*arguments, mode="gated"))


def test_fast_equals_gated_on_the_digits():
    weights = load_checkpoint(ROOT / "assets" / "digits_dydit.safetensors")
    arguments = (Model(weights.model), jax.tree.map(jnp.asarray, weights.params), np.arange(10))
    settings = dict(sampling=weights.sampling, diffusion=weights.diffusion)
    assert_same(draw(*arguments, mode="fast", **settings), draw(*arguments, mode="gated", **settings))


def test_static_model_runs_fast_as_one_segment(tiny_config):
    model = Model(DiTConfig(**{**vars(tiny_config), "routers": "none"}))
    params = jax.jit(model.init)(jax.random.key(0))
    assert_same(draw(model, params, [1], mode="fast", segments=None), draw(model, params, [1], mode="complete"))


def test_blocks_with_nothing_on_are_run(tiny):
    model, params = tiny
    free = Model(DiTConfig(**{**vars(model.config), "routers": "free"}))
    fresh = jax.jit(free.init)(jax.random.key(0))
    shut = {name: jax.tree.map(jnp.zeros_like, fresh[name]) for name in ("head_router", "group_router")}
    params = dict(params, **shut)  # a logit of zero is not above the threshold
    gated = draw(free, params, [1, 2], mode="gated")
    assert not gated.routing.heads.any() and not gated.routing.groups.any()
    assert_same(draw(free, params, [1, 2], mode="fast"), gated)


@pytest.mark.parametrize("form", ["switch", "one_hot"])
def test_fast_on_a_mesh_equals_one_device(tiny, form):
    model, params = tiny
    mesh = make_mesh(MeshConfig())
    alone = draw(model, params, [1, 2, 3, 4], mode="gated")
    together = draw(model, params, [1, 2, 3, 4], mode="fast", form=form, shares=alone.shares, mesh=mesh)
    assert relative_error(together.images, alone.images) < 1e-5
    np.testing.assert_allclose(together.routing.tokens, alone.routing.tokens, atol=1e-6)
