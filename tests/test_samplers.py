"""Sampling trajectories are the original's, and every registered sampler keeps its promises."""

import dataclasses
import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDEN, channels_last, relative_error

from dydit_jax.diffusion.gaussian import coefficients
from dydit_jax.diffusion.samplers import SAMPLERS, SamplingConfig, make_sampler, run_sampler
from dydit_jax.diffusion.schedules import DiffusionConfig, make_schedule, respace
from dydit_jax.errors import InputError
from dydit_jax.sampling.guidance import guide

GUIDANCE = 2.0
RUNS = {
    "ddpm10": SamplingConfig(sampler="ddpm", steps="10", guidance=GUIDANCE),
    "ddim10": SamplingConfig(sampler="ddim", steps="ddim10", guidance=GUIDANCE),
    "ddpm_sections": SamplingConfig(sampler="ddpm", steps="2,3,5", guidance=GUIDANCE),
}


def descending(spacing: str):
    """Return the coefficients of a spacing from the most noise to the least."""
    table = coefficients(respace(make_schedule(DiffusionConfig()), spacing))
    return jax.tree.map(lambda column: column[::-1], table)


@pytest.mark.parametrize("name", list(RUNS))
def test_guided_trajectory_equals_the_original_at_every_step(golden_v2, name):
    reference = np.load(GOLDEN / "v2_sampling.npz")
    get = lambda array: channels_last(reference[f"{name}/{array}"])
    sampling, labels = RUNS[name], jnp.asarray(reference[f"{name}/y"])
    # The file holds conditional and unconditional images; the original's second half feeds nothing.
    half = len(labels) // 2
    noise = jnp.asarray(get("noise"))[:, :half]
    steps = descending(sampling.steps)
    np.testing.assert_array_equal(steps.timestep[::-1], reference[f"{name}/timestep_map"])

    run = functools.partial(golden_v2.model.apply, golden_v2.params, mode="gated")

    def predict(x, c, _):
        output, _ = guide(run, x, c.timestep, labels[:half], sampling=sampling, config=golden_v2.config)
        return output, x

    state = make_sampler(sampling).init(jnp.asarray(get("z"))[:half])
    count = len(steps.step)
    state, visited = run_sampler(
        make_sampler(sampling), state, steps, predict=predict, noise_at=lambda step: noise[count - 1 - step]
    )
    trajectory = [*visited[1:], state.xt]
    for ours, theirs in zip(trajectory, get("samples"), strict=True):
        assert relative_error(ours, theirs[:half]) < 1e-4
    assert relative_error(state.x0, get("last_pred_xstart")[:half]) < 1e-4


def perfect_output(current, c, start, log_variance_share=1.0):
    """Return what a network that knows x_0 would predict."""
    noise = (current - c.sqrt_alpha_cumprod * start) / c.sqrt_one_minus_alpha_cumprod
    return jnp.concatenate([noise, jnp.full_like(noise, log_variance_share)], axis=-1)


@pytest.mark.parametrize("name", list(SAMPLERS))
def test_sampler_finds_the_image_that_a_perfect_network_knows(name):
    start = jnp.linspace(-1, 1, 2 * 16).reshape(2, 4, 4, 1)
    sampler = make_sampler(SamplingConfig(sampler=name))
    state = sampler.init(jax.random.normal(jax.random.key(0), start.shape))
    steps = descending("20")
    for row in range(20):
        c = jax.tree.map(operator.itemgetter(row), steps)
        noise = jax.random.normal(jax.random.key(row), start.shape)
        state = sampler.step(state, perfect_output(state.xt, c, start), c, noise)
    np.testing.assert_allclose(state.xt, start, atol=1e-4)


@pytest.mark.parametrize("name", list(SAMPLERS))
def test_sampler_state_survives_a_cut(name):
    sampler = make_sampler(SamplingConfig(sampler=name))
    first = jax.random.normal(jax.random.key(0), (2, 4, 4, 1))
    steps = descending("12")
    predict = lambda x, c, _: (jnp.concatenate([0.5 * x, jnp.zeros_like(x)], axis=-1), ())
    noise_at = lambda step: jax.random.normal(jax.random.fold_in(jax.random.key(1), step), first.shape)
    run = lambda state, rows: run_sampler(sampler, state, rows, predict=predict, noise_at=noise_at)[0]
    whole = run(sampler.init(first), steps)
    state = run(sampler.init(first), jax.tree.map(lambda column: column[:5], steps))
    state = run(state, jax.tree.map(lambda column: column[5:], steps))
    np.testing.assert_array_equal(state.xt, whole.xt)


def test_ddim_with_full_noise_has_the_variance_of_ddpms_posterior():
    schedule = respace(make_schedule(DiffusionConfig()), "10")
    c = jax.tree.map(lambda column: jnp.asarray(column)[5], coefficients(schedule))
    sampler = make_sampler(SamplingConfig(sampler="ddim", eta=1.0))
    state = sampler.init(jnp.zeros((1, 2, 2, 1)))
    output = jnp.zeros((1, 2, 2, 2))
    spread = sampler.step(state, output, c, jnp.ones((1, 2, 2, 1))).xt - (
        sampler.step(state, output, c, jnp.zeros((1, 2, 2, 1))).xt
    )
    np.testing.assert_allclose(spread**2, schedule.posterior_variance[5], rtol=1e-4)


def test_clipping_bounds_the_estimate(tiny):
    sampler = make_sampler(SamplingConfig(sampler="ddim", clip=1.0))
    state = sampler.init(100 * jnp.ones((1, 2, 2, 1)))
    c = jax.tree.map(lambda column: jnp.asarray(column)[3], coefficients(make_schedule(DiffusionConfig())))
    assert float(sampler.step(state, jnp.zeros((1, 2, 2, 2)), c, 0.0).x0.max()) == 1.0


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(sampler="ddmi"), "Unknown sampler 'ddmi'; known: ddim, ddpm."),
        (dict(guided_channels="three"), "known: all, first_three"),
        (dict(sampler="ddim", eta=2.0), "from 0.0 to 1.0"),
        (dict(sampler="ddpm", eta=0.5), "belongs to ddim"),
        (dict(guidance=-1.0), "at least 0"),
    ],
)
def test_impossible_settings_are_refused(fields, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(SamplingConfig(), **fields)
