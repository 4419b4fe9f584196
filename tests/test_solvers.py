"""Solvers are those of diffusers at every step, and converge as fast as their order says where the answer is known."""

import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conftest import relative_error
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    HeunDiscreteScheduler,
    LMSDiscreteScheduler,
    UniPCMultistepScheduler,
)

from dydit_jax.diffusion.process import Diffusion, Flow
from dydit_jax.diffusion.samplers import Sampler, SamplingConfig
from dydit_jax.diffusion.schedules import DiffusionConfig, make_schedule
from dydit_jax.diffusion.solvers import MOST_HISTORY, SOLVERS, Path, solver_table
from dydit_jax.sampling.table import make_table

STEPS = 10  # a divisor of 1000: diffusers' ddim knows no others
BETAS = dict(linear="linear", squared_cosine="squaredcos_cap_v2")
TO_ZERO = dict(final_sigmas_type="zero")
THIRD = dict(solver_order=3, lower_order_final=False, euler_at_final=True)
UNIPC = dict(TO_ZERO, solver_type="bh2", predict_x0=True)
# Of diffusers: the scheduler, its settings, and whether its samples are x / alpha.
ORACLES = {
    "ddim": (DDIMScheduler, dict(clip_sample=False, set_alpha_to_one=True), False),
    "dpmpp_2m": (DPMSolverMultistepScheduler, dict(TO_ZERO, solver_order=2), False),
    "dpmpp_3m": (DPMSolverMultistepScheduler, TO_ZERO | THIRD, False),
    "sde_dpmpp_2m": (DPMSolverMultistepScheduler, dict(TO_ZERO, algorithm_type="sde-dpmsolver++"), False),
    "unipc": (UniPCMultistepScheduler, dict(UNIPC, solver_order=2), False),
    "unipc_3": (UniPCMultistepScheduler, dict(UNIPC, solver_order=3), False),
    "heun": (HeunDiscreteScheduler, {}, True),
    "ab4": (LMSDiscreteScheduler, {}, True),
}


def formula(x, t):
    """Return a made-up prediction of the noise, far from linear."""
    return np.tanh(1.3 * x + 0.2 * np.sin(t / 100)) * (0.5 + t / 2000)


@pytest.fixture(scope="module", params=["formula", "golden"])
def network(request, golden_v2):
    """The network of both sides, (x, timestep) -> the noise, and the shape of x: the formula, or the original DyDiT."""
    if request.param == "formula":
        return formula, (2, 4, 4, 3)
    labels = jnp.arange(2)
    apply = lambda x, t: golden_v2.model.apply(golden_v2.params, x, jnp.full(2, t), labels, mode="gated")[0][..., :4]
    compiled = jax.jit(apply)
    predict = lambda x, t: np.asarray(compiled(jnp.float32(x), jnp.int32(t)), np.float64)
    return predict, (2, golden_v2.config.side, golden_v2.config.side, golden_v2.config.channels)


def steps_of_diffusers(network, name: str, kind: str, first, noises):
    """Return the timesteps that diffusers evaluates, and the state after each evaluation in our scale."""
    make, settings, scaled = ORACLES[name]
    scheduler = make(beta_schedule=BETAS[kind], beta_start=1e-4, timestep_spacing="trailing", **settings)
    # Of the same betas in float64: 1 - 0.999 in float32 is off by 4e-5.
    kept = make_schedule(DiffusionConfig(schedule=kind)).alphas_cumprod
    scheduler.alphas_cumprod = torch.tensor(kept)
    scheduler.set_timesteps(STEPS)
    timesteps = [int(t) for t in scheduler.timesteps]
    alphas = np.sqrt(kept[timesteps])
    x = torch.tensor(first / alphas[0] if scaled else first)
    states = []
    for i, t in enumerate(scheduler.timesteps):
        output = torch.tensor(network(x.double().numpy() * (alphas[i] if scaled else 1.0), timesteps[i]))
        if scaled:
            scheduler.scale_model_input(x, t)  # which it insists on
        own = dict(variance_noise=torch.tensor(noises[i])) if name.startswith("sde") else {}
        x = scheduler.step(output, t, x, **own).prev_sample.double()
        following = [*alphas[1:], 1.0][i] if scaled else 1.0
        states.append(x.numpy() * following)
    return timesteps, states


@pytest.mark.parametrize("kind", list(BETAS))
@pytest.mark.parametrize("name", list(ORACLES))
def test_every_step_is_that_of_diffusers(network, name, kind):
    network, shape = network
    first, *noises = np.random.default_rng(0).standard_normal((1 + STEPS, *shape))
    timesteps, expected = steps_of_diffusers(network, name, kind, first, noises)
    table = make_table(SamplingConfig(sampler=name, steps=f"trailing:{STEPS}"), Diffusion(schedule=kind))
    assert table.timestep.tolist() == timesteps
    sampler, state = Sampler(table.form), Sampler(table.form).init(jnp.float32(first))
    for i, wanted in enumerate(expected):
        row = jax.tree.map(operator.itemgetter(i), table)
        noise = network(np.asarray(state.xt, np.float64), timesteps[i])
        output = jnp.float32(np.concatenate([noise, np.full_like(noise, np.nan)], -1))  # the variance is not read
        state = sampler.step(state, output, row, None if table.form.noise == "none" else jnp.float32(noises[i]))
        assert relative_error(state.xt, wanted) < 1e-5, f"evaluation {i}"


# --- Order of convergence ------------------------------------------------------------------------

MEAN, VARIANCE = 0.5, 0.25
BEFORE = 4  # steps whose estimates are exact at the start


def even_path(steps: int) -> Path:
    """Return a path that is even in the log-SNR and ends before the image."""
    log_snr = np.linspace(-3.0, 1.0, steps + 1)
    return Path(1 / np.sqrt(1 + np.exp(-2 * log_snr)), 1 / np.sqrt(1 + np.exp(2 * log_snr)))


def exact_x(path: Path, i: int, z: float = 1.3):
    """Return the solution for data of N(MEAN, VARIANCE): its place z in the Gaussian never changes."""
    return path.alpha[i] * MEAN + np.sqrt(path.alpha[i] ** 2 * VARIANCE + path.sigma[i] ** 2) * z


def best_x0(path: Path, i: int, x):
    """Return the mean of x_0 given x, what a perfect network predicts."""
    gain = path.alpha[i] * VARIANCE / (path.alpha[i] ** 2 * VARIANCE + path.sigma[i] ** 2)
    return MEAN + gain * (x - path.alpha[i] * MEAN)


def final_error(name: str, steps: int) -> float:
    """Return the error at the end of a run that began with exact values."""
    path = even_path(steps)
    unit, base, *estimates = np.eye(2 + MOST_HISTORY)
    rows = list(SOLVERS[name](path, unit, base, estimates))
    evaluations = len(rows) // steps
    began, rows = (0, rows) if evaluations == 2 else (BEFORE, rows[BEFORE:])
    estimate = lambda row, i, x: row.estimate[0] * x + row.estimate[1] * best_x0(path, i, x)
    known = [] if evaluations == 2 else SOLVERS[name](path, unit, base, estimates)
    history = [estimate(row, row.time, exact_x(path, row.time)) for row, _ in zip(known, range(began))][::-1]
    history = [*history, *[0.0] * MOST_HISTORY]
    x, base = exact_x(path, began), exact_x(path, began - 1) if began else 0.0
    for row in rows:
        history = [estimate(row, row.time, x), *history][:MOST_HISTORY]
        state = np.array([x, base, *history])
        x, base = row.x @ state, base if row.base is None else row.base @ state
    return abs(x - exact_x(path, steps))


# dpmpp_3m has diffusers' weights, as the test above wants: with half of the second difference its order is 2.
@pytest.mark.parametrize(
    "name, order", dict(ddim=1, euler=1, dpmpp_2m=2, dpmpp_3m=2, unipc=2, unipc_3=3, heun=2, ab4=4).items()
)
def test_order_of_convergence(name, order):
    errors = np.array([final_error(name, steps) for steps in (40, 80, 160)])
    slopes = np.log2(errors[:-1] / errors[1:])
    assert (slopes > order - 0.25).all() and errors[0] < 0.05, (errors, slopes)


@pytest.mark.parametrize("process, steps", [(Diffusion(), "10"), (Flow(), "10"), (Flow(), "logsnr:10")], ids=str)
def test_full_noise_of_ddim_is_that_of_the_posterior(process, steps):
    path, timesteps = process.path(steps, "ddim", 1.0)
    noise = solver_table("ddim", path, timesteps).noise
    with np.errstate(divide="ignore"):
        kept = path.alpha[:-1] / path.alpha[1:]  # x_i = kept x_{i+1} + noise of this variance:
        variance = path.sigma[:-1] ** 2 - kept**2 * path.sigma[1:] ** 2
        posterior = 1 / (1 / path.sigma[1:] ** 2 + kept**2 / variance)  # of x_{i+1}, given x_i and x_0
    np.testing.assert_allclose(noise, np.sqrt(posterior), rtol=1e-5, atol=1e-7)


def test_orders_fall_back_where_history_is_missing():
    """At the first step every solver is the straight line in its own coordinates, and so it is into the image."""
    ddim, *others = (
        make_table(SamplingConfig(sampler=name, steps="trailing:8"), Diffusion())
        for name in ("ddim", "dpmpp_2m", "dpmpp_3m", "unipc", "unipc_3", "ab4")
    )

    def of_x_and_x0(table, i: int) -> np.ndarray:
        (p, q), weights = table.estimate_from_x0[i], table.weights[i, 0]
        np.testing.assert_array_equal(weights[3:] if i == 0 else 0, 0)
        return np.array([weights[0] + p * weights[2], q * weights[2]])

    for table in others:
        np.testing.assert_allclose(of_x_and_x0(table, 0), of_x_and_x0(ddim, 0), atol=1e-5)
    for table in others[:2]:
        np.testing.assert_array_equal(table.weights[-1, 0], [0, 0, 1, *[0] * (table.form.history - 1)])
