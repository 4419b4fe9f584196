"""Trajectories of ddpm and ddim are the original's, and every registered solver keeps its promises."""

import dataclasses
import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDEN, channels_last, relative_error
from runs import DIFFUSION_SOLVERS

from dydit_jax.diffusion.process import Diffusion
from dydit_jax.diffusion.samplers import Sampler, SamplingConfig, run_sampler
from dydit_jax.diffusion.schedules import DiffusionConfig, make_schedule, respace
from dydit_jax.diffusion.solvers import SOLVERS, Row, Solver, SolverForm
from dydit_jax.errors import InputError
from dydit_jax.registry import Registry
from dydit_jax.sampling.guidance import guide
from dydit_jax.sampling.table import make_table

GUIDANCE = 2.0
RUNS = {
    "ddpm10": SamplingConfig(sampler="ddpm", steps="10", guidance=GUIDANCE),
    "ddim10": SamplingConfig(sampler="ddim", steps="ddim10", guidance=GUIDANCE),
    "ddpm_sections": SamplingConfig(sampler="ddpm", steps="2,3,5", guidance=GUIDANCE),
}


def prepare(**settings):
    """Return the table of a run, and the step that runs it."""
    sampling = SamplingConfig(**settings)
    table = make_table(sampling, Diffusion())
    return table, Sampler(table.form, sampling.clip)


@pytest.mark.parametrize("name", list(RUNS))
def test_guided_trajectory_equals_the_original_at_every_step(golden_v2, name):
    reference = np.load(GOLDEN / "v2_sampling.npz")
    get = lambda array: channels_last(reference[f"{name}/{array}"])
    sampling, labels = RUNS[name], jnp.asarray(reference[f"{name}/y"])
    # The file holds conditional and unconditional images; the original's second half feeds nothing.
    half = len(labels) // 2
    noise = jnp.asarray(get("noise"))[:, :half]
    table, sampler = prepare(**vars(sampling))
    np.testing.assert_array_equal(table.timestep[::-1], reference[f"{name}/timestep_map"])

    run = functools.partial(golden_v2.model.apply, golden_v2.params, mode="gated")
    guidance = dict(guided_channels=sampling.guided_channels, config=golden_v2.config)

    def predict(x, row, _):
        output, _ = guide(run, x, row.timestep, labels[:half], scale=row.guidance, **guidance)
        return output, x

    state, count = sampler.init(jnp.asarray(get("z"))[:half]), len(table)
    noise_at = lambda step: noise[count - 1 - step]
    state, visited = run_sampler(sampler, state, table, predict=predict, noise_at=noise_at)
    trajectory = [*visited[1:], state.xt]
    for ours, theirs in zip(trajectory, get("samples"), strict=True):
        assert relative_error(ours, theirs[:half]) < 1e-4
    assert relative_error(state.x0, get("last_pred_xstart")[:half]) < 1e-4


def perfect_output(xt, row, x0):
    """Return what a network that knows x_0 would predict."""
    noise = (row.x0_from_xt * xt - x0) / row.x0_from_output
    return jnp.concatenate([noise, jnp.ones_like(noise)], axis=-1)


@pytest.mark.parametrize("steps", ["20", "4", "trailing:10"])
@pytest.mark.parametrize("name", DIFFUSION_SOLVERS)
def test_every_solver_finds_the_image_that_a_perfect_network_knows(name, steps):
    x0 = jnp.linspace(-1, 1, 2 * 16).reshape(2, 4, 4, 1)
    table, sampler = prepare(sampler=name, steps=steps, clip=1.0)
    predict = lambda x, row, _: (perfect_output(x, row, x0), ())
    noise_at = lambda step: jax.random.normal(jax.random.fold_in(jax.random.key(1), step), x0.shape)
    state = sampler.init(jax.random.normal(jax.random.key(0), x0.shape))
    state, _ = jax.jit(functools.partial(run_sampler, sampler, predict=predict, noise_at=noise_at))(state, table)
    np.testing.assert_allclose(state.xt, x0, atol=1e-4)


@pytest.mark.parametrize("name", DIFFUSION_SOLVERS)
def test_sampler_state_survives_a_cut(name):
    table, sampler = prepare(sampler=name, steps="12")
    first = jax.random.normal(jax.random.key(0), (2, 4, 4, 1))
    predict = lambda x, row, _: (jnp.concatenate([0.5 * x, jnp.zeros_like(x)], axis=-1), ())
    noise_at = lambda step: jax.random.normal(jax.random.fold_in(jax.random.key(1), step), first.shape)
    run = lambda state, rows: run_sampler(sampler, state, rows, predict=predict, noise_at=noise_at)[0]
    whole = run(sampler.init(first), table)
    state = run(sampler.init(first), jax.tree.map(lambda column: column[:5], table))
    state = run(state, jax.tree.map(lambda column: column[5:], table))
    np.testing.assert_array_equal(state.xt, whole.xt)


def test_a_state_holds_no_more_than_its_solver_needs():
    arrays = lambda **settings: len(
        jax.tree.leaves(jax.eval_shape(prepare(**settings)[1].init, jnp.zeros((1, 2, 2, 1))))
    )
    known = {name: arrays(sampler=name, steps="10") for name in DIFFUSION_SOLVERS}
    expected = dict(ddpm=2, ddim=2, dpmpp_2m=3, dpmpp_3m=4, sde_dpmpp_2m=3, unipc=5, unipc_3=6, heun=4, ab4=5)
    assert {name: known[name] for name in expected} == expected
    noises = {name: prepare(sampler=name, steps="10")[0].form.noise for name in expected}
    assert {name: noise for name, noise in noises.items() if noise != "none"} == dict(
        ddpm="learned", sde_dpmpp_2m="fixed"
    )
    assert prepare(sampler="ddim", eta=0.5)[0].form.noise == "fixed"


def test_the_variance_half_is_ignored_where_it_has_no_use():
    table, sampler = prepare(sampler="dpmpp_2m", steps="10")
    row = jax.tree.map(operator.itemgetter(3), table)
    state = sampler.init(jnp.ones((1, 2, 2, 1)))
    output = jnp.concatenate([jnp.ones((1, 2, 2, 1)), jnp.full((1, 2, 2, 1), jnp.nan)], axis=-1)
    assert np.isfinite(sampler.step(state, output, row, None).xt).all()


def test_ddim_with_full_noise_has_the_variance_of_ddpms_posterior():
    schedule = respace(make_schedule(DiffusionConfig()), "10")
    table, sampler = prepare(sampler="ddim", steps="10", eta=1.0)
    row = jax.tree.map(operator.itemgetter(4), table)
    assert row.step == 5
    state, output = sampler.init(jnp.zeros((1, 2, 2, 1))), jnp.zeros((1, 2, 2, 2))
    noisy, mean = (sampler.step(state, output, row, noise * jnp.ones((1, 2, 2, 1))).xt for noise in (1, 0))
    np.testing.assert_allclose((noisy - mean) ** 2, schedule.posterior_variance[5], rtol=1e-4)


@pytest.mark.parametrize("name", DIFFUSION_SOLVERS)
def test_clipping_bounds_the_estimate_of_every_solver(name):
    table, sampler = prepare(sampler=name, steps="10", clip=1.0)
    state = sampler.init(100 * jnp.ones((1, 2, 2, 1)))
    for index in range(len(table)):
        row = jax.tree.map(operator.itemgetter(index), table)
        state = sampler.step(state, jnp.zeros((1, 2, 2, 2)), row, jnp.zeros((1, 2, 2, 1)))
        assert float(state.x0.max()) == 1.0
    np.testing.assert_allclose(state.xt, 1.0, rtol=1e-4)  # constant estimates lead every solver to them


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(sampler="ddmi"), "Unknown sampler 'ddmi'; known: ab4, ddim, ddpm, "),
        (dict(guided_channels="three"), "known: all, first_three"),
        (dict(sampler="ddim", eta=2.0), "from 0.0 to 1.0"),
        (dict(sampler="ddpm", eta=0.5), "belongs to ddim; ddpm has none"),
        (dict(sampler="heun", eta=0.5), "belongs to ddim; heun has none"),
        (dict(guidance=-1.0), "from 0.0 to"),
        (dict(guidance_interval=(700, 100)), "low <= high, not .700, 100."),
        (dict(guidance_scales=(1.0, float("nan"))), "from 0.0 to 1000000.0, not nan"),
        (dict(guidance_scales=(1.0, 2.0), guidance=2.0), "says all about guidance; set sampling.guidance to 1"),
        (dict(guidance_scales=(1.0, 2.0), guidance_interval=(0, 5)), "says all about guidance"),
        (dict(guidance_scales=(1.0, -2.0)), "from 0.0 to 1000000.0, not -2.0"),
    ],
)
def test_impossible_settings_are_refused(fields, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(SamplingConfig(), **fields)


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(sampler="ab4", steps="3"), "needs at least 4 steps, not 3"),
        (dict(sampler="dpmpp_3m", steps="trailing:2"), "needs at least 3 steps, not 2"),
        (dict(steps="10", guidance_interval=(-1, 5)), "within the timesteps 0 to 999, not .-1, 5."),
        (dict(steps="10", guidance_interval=(0, 1000)), "within the timesteps 0 to 999"),
        (dict(steps="3", guidance_scales=(1.0, 2.0)), "one scale for each of the 3 evaluations of the network, not 2"),
        (dict(sampler="heun", steps="3", guidance_scales=(1.0, 2.0, 3.0)), "each of the 5 evaluations"),
    ],
)
def test_impossible_tables_are_refused(fields, message):
    with pytest.raises(InputError, match=message):
        make_table(SamplingConfig(**fields), Diffusion())


def test_a_solver_of_ones_own_runs_by_its_name(monkeypatch):
    monkeypatch.setattr("dydit_jax.diffusion.samplers.SOLVERS", own := Registry("solver", Solver, SOLVERS))
    monkeypatch.setattr("dydit_jax.diffusion.solvers.SOLVERS", own)

    @own.register("own_euler")
    def euler(path, x, base, m):
        """The straight line in sigma / alpha, which is ddim."""
        for i in range(path.steps):
            moved = x / path.alpha[i] + (path.noise_ratio[i + 1] - path.noise_ratio[i]) * m[0]
            yield Row(i, path.alpha[i + 1] * moved, estimate=path.noise_estimate(i))

    table, sampler = prepare(sampler="own_euler", steps="10")
    assert sampler.form == SolverForm(history=1)
    known, _ = prepare(sampler="ddim", steps="10")
    as_x0 = lambda table: table.weights[:, 0, 0] + table.estimate_from_x0[:, 0] * table.weights[:, 0, 2]
    np.testing.assert_allclose(as_x0(table), as_x0(known), atol=1e-6)

    @own.register("broken")
    def broken(path, x, base, m):
        yield Row(0, np.nan * x)

    with pytest.raises(InputError, match="broken has weights that are not finite"):
        prepare(sampler="broken", steps="10")
    with pytest.raises(InputError, match="is no solver: it needs __call__"):
        own.register("worse")(lambda path: [])
    with pytest.raises(InputError, match="Solver 'ddim' is built in"):
        own.register("ddim")(euler)
