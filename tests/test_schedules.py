"""Schedules are the original's in float64, and bad spacings are refused."""

import numpy as np
import pytest
from conftest import GOLDEN

from dydit_jax.diffusion.grids import GRIDS
from dydit_jax.diffusion.schedules import DiffusionConfig, make_schedule, respace
from dydit_jax.errors import InputError

NAMES = {
    "betas": "betas",
    "alphas_cumprod": "alphas_cumprod",
    "posterior_variance": "posterior_variance",
    "posterior_log_variance_clipped": "posterior_log_variance",
    "posterior_mean_coef1": "posterior_mean_coef_x0",
    "posterior_mean_coef2": "posterior_mean_coef_xt",
}


@pytest.mark.parametrize("spacing", ["full", "250", "100", "50", "20", "ddim50", "ddim25", "10,20,30"])
def test_respaced_schedule_equals_the_original(spacing):
    reference = np.load(GOLDEN / "schedules.npz")
    schedule = make_schedule(DiffusionConfig())
    schedule = schedule if spacing == "full" else respace(schedule, spacing)
    np.testing.assert_array_equal(schedule.timesteps, reference[f"{spacing}/timestep_map"])
    for theirs, ours in NAMES.items():
        np.testing.assert_allclose(getattr(schedule, ours), reference[f"{spacing}/{theirs}"], rtol=1e-10, atol=1e-10)


def test_squared_cosine_betas_equal_the_original():
    reference = np.load(GOLDEN / "schedules.npz")
    schedule = make_schedule(DiffusionConfig(schedule="squared_cosine"))
    np.testing.assert_allclose(schedule.betas, reference["squaredcos_cap_v2/betas"], atol=1e-10)


def kept_by_the_original(total: int, counts: list[int]) -> list[int]:
    """State the published rule in plain Python: one stride is added to the other, the sum is rounded."""
    kept, start = [], 0
    for section, count in enumerate(counts):
        size = total // len(counts) + (1 if section < total % len(counts) else 0)
        stride, place = (size - 1) / (count - 1) if count > 1 else 1, 0.0
        for _ in range(count):
            kept.append(start + round(place))
            place += stride
        start += size
    return kept


def test_every_number_of_steps_keeps_the_timesteps_of_the_original():
    schedule = make_schedule(DiffusionConfig())
    for count in range(1, 1001):
        kept = kept_by_the_original(1000, [count])
        assert respace(schedule, str(count)).timesteps.tolist() == kept == sorted(set(kept)), count


@pytest.mark.parametrize("counts", [[21, 23, 31], [1, 1, 1, 1], [334, 333, 333], [100, 1, 61, 39], [7] * 13, [1] * 50])
def test_every_list_of_sections_keeps_the_timesteps_of_the_original(counts):
    schedule = make_schedule(DiffusionConfig())
    spacing = ",".join(map(str, counts))
    assert respace(schedule, spacing).timesteps.tolist() == kept_by_the_original(1000, counts)


@pytest.mark.parametrize("total", [4, 37, 999, 4000])
def test_schedules_of_other_lengths_keep_the_timesteps_of_the_original(total):
    schedule = make_schedule(DiffusionConfig("squared_cosine", total))
    for count in {1, 2, 3, total // 3, total // 2 + 1, total - 1, total} - {0}:
        assert respace(schedule, str(count)).timesteps.tolist() == kept_by_the_original(total, [count]), count


def test_every_stride_of_ddim_is_the_smallest_that_keeps_that_many():
    schedule = make_schedule(DiffusionConfig())
    smallest = {}
    for stride in range(1, 1001):
        smallest.setdefault(len(range(0, 1000, stride)), stride)
    for count, stride in smallest.items():
        assert respace(schedule, f"ddim{count}").timesteps.tolist() == list(range(0, 1000, stride))


def test_respacing_to_all_steps_changes_nothing():
    schedule = make_schedule(DiffusionConfig())
    np.testing.assert_allclose(respace(schedule, "1000").betas, schedule.betas, atol=1e-12)


def test_one_step_keeps_one_timestep():
    assert respace(make_schedule(DiffusionConfig()), "1").timesteps.tolist() == [0]


@pytest.mark.parametrize(
    "spacing, message",
    [
        ("fast", "Unknown spacing 'fast'"),
        ("ddim", "Unknown spacing"),
        ("0", "Unknown spacing"),
        ("-5", "Unknown spacing"),
        ("10,,20", "Unknown spacing"),
        ("1001", "section of 1000"),
        ("600,600", "section of 500"),
        ("ddim300", "No whole stride"),
        ("ddim50,20", "ddim takes one number, as in 'ddim50'"),
        ("trailing", "Unknown spacing 'trailing'"),
        ("trailing:", "Unknown spacing"),
        ("trailing:0", "Unknown spacing"),
        ("tailing:20", "Unknown spacing 'tailing:20'; .*list:999"),
        ("trailing:10,20", "several numbers"),
        ("trailing:1001", "trailing:1001 has more timesteps than the 1000"),
        ("karras:999999999", "more timesteps than the 1000"),
        ("list:", "Unknown spacing"),
        ("list:-1", "Unknown spacing"),
        ("list:1000,5", "from 0 to 999, not 1000"),
        ("list:5,500", "descend from the noisiest: 500 follows 5"),
        ("list:500,5,5", "5 follows 5"),
    ],
)
def test_impossible_spacings_are_refused(spacing, message):
    with pytest.raises(InputError, match=message):
        respace(make_schedule(DiffusionConfig()), spacing)


def test_unknown_schedule_lists_the_known_ones():
    with pytest.raises(InputError, match="'cosine'; known: linear, squared_cosine"):
        DiffusionConfig(schedule="cosine")


def test_too_few_steps_for_a_linear_schedule_are_refused():
    with pytest.raises(InputError, match="outside"):
        make_schedule(DiffusionConfig(train_steps=10))


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("kind", ["linear", "squared_cosine"])
def test_named_grids_ascend_within_the_schedule(kind, name):
    schedule = make_schedule(DiffusionConfig(schedule=kind))
    for count in (1, 2, 5, 10, 50, 1000):
        timesteps = respace(schedule, f"{name}:{count}").timesteps
        assert len(timesteps) == count and (np.diff(timesteps) > 0).all()
        assert timesteps[0] >= 0 and timesteps[-1] <= 999
        if name != "leading":
            assert timesteps[-1] == 999


def test_named_grids_are_even_in_what_they_say():
    schedule = make_schedule(DiffusionConfig())
    of = lambda spacing: respace(schedule, spacing).timesteps
    assert of("trailing:4").tolist() == [249, 499, 749, 999]
    assert of("trailing:3").tolist() == [332, 666, 999]
    assert of("leading:3").tolist() == [0, 333, 666]
    assert of("quadratic:4").tolist() == [0, 111, 444, 999]
    assert of("list:999,600,0").tolist() == [0, 600, 999]
    assert of("quadratic:64")[:5].tolist() == [0, 1, 2, 3, 4]  # of 0, 0.25, 1, 2.3 and 4
    log_snr = np.log(schedule.alphas_cumprod / (1 - schedule.alphas_cumprod))
    steps = np.diff(log_snr[of("logsnr:8")][1:])  # the timesteps near 0 are too coarse to tell
    np.testing.assert_allclose(steps, steps.mean(), rtol=0.05)
    ratio = (1 / schedule.alphas_cumprod - 1) ** (1 / 14)
    steps = np.diff(ratio[of("karras:8")][1:])
    np.testing.assert_allclose(steps, steps.mean(), rtol=0.05)
