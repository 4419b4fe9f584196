"""Schedules are the original's in float64, and bad spacings are refused."""

import numpy as np
import pytest
from conftest import GOLDEN

from dydit_jax.diffusion.schedules import DiffusionConfig, make_schedule, respace
from dydit_jax.errors import InputError

NAMES = {
    "betas": "betas",
    "alphas_cumprod": "alphas_cumprod",
    "posterior_variance": "posterior_variance",
    "posterior_log_variance_clipped": "posterior_log_variance",
    "posterior_mean_coef1": "posterior_mean_of_start",
    "posterior_mean_coef2": "posterior_mean_of_current",
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
