"""How many segments a job is worth: a pure function of what it depends on, and of nothing else."""

import dataclasses

import numpy as np
import pytest
from conftest import ROOT
from runs import make_run

from dydit_jax.diffusion.samplers import SamplingConfig
from dydit_jax.fast.plan import make_plan
from dydit_jax.fast.segmentation import OPEN_TOKENS, PLATFORMS, Job, Platform, choose_segments, expected_macs
from dydit_jax.loading import load_checkpoint
from dydit_jax.models.config import DiTConfig
from dydit_jax.models.dit import Model
from dydit_jax.runtime.sharding import MeshConfig, make_mesh

MACS = DiTConfig(depth=3, width=64, heads=4, patch=2, side=8, routers="free").macs
COUNTS = [10**power for power in range(10)]


@pytest.fixture(scope="module")
def digits():
    """A run of the digits model: DDIM with 50 steps."""
    weights = load_checkpoint(ROOT / "assets" / "digits_dydit.safetensors")
    sampling = SamplingConfig(sampler="ddim", steps="50", clip=1.0)
    return make_run(Model(weights.model), weights.params, sampling=sampling, process=weights.process)


def test_seconds_are_those_of_compiling_and_running(monkeypatch):
    """By hand: blocks of 1 and 2 seconds; 10 MACs a second, narrowed at half that speed."""
    monkeypatch.setitem(PLATFORMS, "cpu", Platform(1.0, 2.0, 10.0, half_speed_width=64))
    # Two blocks: 2 + 10 n, 4 + 8 n, 8 + 4 n, 16 + 3.8 n seconds for n images.
    choose = lambda images: choose_segments([100, 40, 20, 19], [1, 1, 2, 4], layers=2, job=Job(images, "cpu", 64))
    assert [choose(images) for images in (1, 2, 39, 41)] == [0, 2, 2, 3]
    assert choose_segments([100, np.inf, 20], [2, 1, 2], layers=2, job=Job(10**6, "cpu", 64)) == 2  # no cut into one


@pytest.mark.parametrize("platform", list(PLATFORMS))
def test_more_images_never_get_fewer_segments_nor_more_than_a_job_without_end(platform):
    phase = np.random.default_rng(0).uniform(0, 48, (1, 3, 4))
    heads, groups = (np.abs(np.arange(48)[:, None, None] - units) < 12 for units in (phase, phase[..., ::-1]))
    settings = dict(execution="switch", evaluations=np.repeat([1, 2, 1], [10, 30, 8]))
    chosen = [
        make_plan(heads, groups, MACS, **settings, job=Job(images, platform, 1152)).narrowed_segments
        for images in np.geomspace(1, 10**9, 20).astype(int).tolist()
    ]
    most = make_plan(heads, groups, MACS, **settings).narrowed_segments
    assert chosen == sorted(chosen) and chosen[0] == 0 and set(chosen) <= {0, *range(3, most + 1)}
    endless = make_plan(heads, groups, MACS, **settings, job=Job(10**15, platform, 1152)).narrowed_segments
    assert endless == most


def test_one_digit_gets_no_segments_and_very_many_get_all(digits):
    chosen = [digits.plan(images=images).narrowed_segments for images in COUNTS]
    endless = digits.plan()
    assert chosen == sorted(chosen) and chosen[:4] == [0, 0, 0, 0] and chosen[-1] == endless.narrowed_segments == 9
    for segment, wanted in zip(digits.plan(images=10**9).segments, endless.segments, strict=True):
        assert (segment.start, segment.kept) == (wanted.start, wanted.kept)


def test_a_number_that_is_given_wins(digits):
    for segments in (0, 4):
        assert digits.plan(segments, images=10**9).narrowed_segments == segments


def test_devices_do_not_change_the_plan(digits):
    settings = dict(sampling=digits.sampling, process=digits.process, mesh=make_mesh(MeshConfig()))
    shared = make_run(digits.model, digits.params, **settings)
    for images in COUNTS:
        assert shared.plan(images=images).summary() == digits.plan(images=images).summary()


def test_narrowed_programs_are_expected_to_pack_tokens():
    assert expected_macs(MACS, Job(1, "cpu", 64)).mlp == OPEN_TOKENS * MACS.mlp
    assert expected_macs(MACS, Job(1, "cpu", 64, token_share=0.25)).mlp == 0.25 * MACS.mlp
    static = dataclasses.replace(MACS, token_router=0, time_routers=0)
    assert expected_macs(static, Job(1, "cpu", 64)) == static


def test_a_static_model_is_never_narrowed(tiny_config):
    config = dataclasses.replace(tiny_config, routers="none")
    gates = np.ones((20, config.depth, config.heads), bool)
    assert make_plan(gates, gates, config.macs, execution="switch", job=Job(10**12, "cpu", config.width)).whole
