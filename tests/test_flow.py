"""A flow is the original's: forward passes, training, every step of sampling; and what has no meaning for it."""

import functools
import json
import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conftest import DYNAMIC_FLOW, GOLDEN, STATIC, changed, channels_last, read_torch, relative_error
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler
from runs import FLOW_SOLVERS

from dydit_jax.convert.tables import convert_state_dict, export_state_dict
from dydit_jax.diffusion.process import Diffusion, Flow, process_sections, read_process
from dydit_jax.diffusion.samplers import Sampler, SamplingConfig, run_sampler
from dydit_jax.diffusion.terms import LossConfig, LossInputs, weigh_terms
from dydit_jax.errors import InputError
from dydit_jax.models.config import DiTConfig
from dydit_jax.models.dit import Model
from dydit_jax.models.layers import time_features
from dydit_jax.sampling.guidance import guide
from dydit_jax.sampling.table import make_table
from dydit_jax.training.experiment import differences, read_experiment
from dydit_jax.training.objective import objective, run_passes


@pytest.fixture(scope="module")
def sit():
    """The reference SiT: (model, params)."""
    saved = json.loads(bytes(np.load(GOLDEN / "sit_forward.npz")["config"]))
    sizes = dict(depth=saved["depth"], width=saved["hidden_size"], heads=saved["num_heads"], patch=saved["patch_size"])
    config = DiTConfig(**sizes, side=saved["input_size"], channels=saved["in_channels"], classes=saved["num_classes"])
    params = convert_state_dict(read_torch(GOLDEN / "sit_plain.pt"), config)
    return Model(config, matmul_precision="highest"), params


# --- The network ---------------------------------------------------------------------------------


def test_forward_and_guided_forward_equal_the_original(sit):
    model, params = sit
    reference = np.load(GOLDEN / "sit_forward.npz")
    x, t, y = channels_last(reference["x"]), reference["t"], reference["y"]
    apply = jax.jit(functools.partial(model.apply, params, mode="complete"))
    assert relative_error(apply(x, t, y)[0], channels_last(reference["raw_out"])) < 1e-5
    assert relative_error(time_features(jnp.asarray(t)), reference["time_features"]) < 1e-6
    guided = channels_last(reference["cfg_out"])
    for i in range(len(t)):  # our guidance takes one time for the whole batch
        settings = dict(scale=float(reference["cfg_scale"]), guided_channels="first_three", config=model.config)
        output, _ = guide(lambda *inputs: apply(*inputs), x[i : i + 1], jnp.asarray(t[i]), y[i : i + 1], **settings)
        assert relative_error(output[..., :4], guided[i : i + 1]) < 1e-5


# --- Training ------------------------------------------------------------------------------------


def test_training_step_equals_the_original(sit):
    model, params = sit
    reference = np.load(GOLDEN / "sit_train.npz")
    examples = dict(
        x0=channels_last(reference["x1"]),
        noise=channels_last(reference["x0"]),
        t=reference["t"],
        labels=reference["y_used"],
        router_noise=None,
        beta=None,
    )
    settings = dict(model=model, loss=LossConfig(terms=("mse", "budget")), process=Flow(), passes=("complete",))

    @jax.jit
    def run(params):
        [inputs] = run_passes(params, examples, 0, **settings)
        of_images = inputs.xt, inputs.target, inputs.output, weigh_terms(inputs)["mse"]
        return of_images, jax.value_and_grad(objective, has_aux=True)(params, examples, 0, **settings)

    (xt, target, output, losses), ((total, metrics), gradients) = run(params)
    assert relative_error(xt, channels_last(reference["xt"])) < 1e-6
    assert relative_error(target, channels_last(reference["ut"])) < 1e-6
    assert relative_error(output[..., :4], channels_last(reference["pred"])) < 1e-5
    np.testing.assert_allclose(losses, reference["loss"], rtol=1e-5)
    np.testing.assert_allclose(total, reference["mean_loss"], rtol=1e-5)
    np.testing.assert_allclose(metrics["loss/complete_mse"], reference["mean_loss"], rtol=1e-5)
    found = export_state_dict(jax.device_get(gradients), model.config)
    recorded = {name.removeprefix("grad/"): reference[name] for name in reference.files if name.startswith("grad/")}
    assert set(found) - {"pos_embed"} == set(recorded)
    for name, expected in recorded.items():
        assert relative_error(found[name], expected) < 1e-4, name
    thrown_away = found["final_layer.linear.weight"].reshape(2, 2, 8, 40)[:, :, 4:]
    assert not thrown_away.any()  # the second half of the output


@pytest.mark.parametrize("batch", [1, 3, 4, 8])
def test_times_are_stratified_and_uniform(batch):
    keys = jax.random.split(jax.random.key(0), 2000)
    t = np.asarray(jax.vmap(lambda key: Flow().draw_times(key, batch, LossConfig()))(keys))
    assert t.dtype == np.float32 and t.min() >= 0 and t.max() <= 1
    counts = np.histogram(t, 10, (0, 1))[0]
    np.testing.assert_allclose(counts, t.size / 10, rtol=0.12)
    if batch % 4 == 0:
        np.testing.assert_array_equal((4 * t).astype(int), np.tile(np.arange(4), (len(t), batch // 4)))


def test_logit_normal_times_without_deviation_are_refused():
    with pytest.raises(InputError, match="loss.logit_normal.1. must be at least"):
        LossConfig(times="logit_normal", logit_normal=(0.0, 0.0))


def test_logit_normal_times_have_their_mean_and_deviation():
    loss = LossConfig(times="logit_normal", logit_normal=(-0.5, 0.8))
    t = np.float64(Flow().draw_times(jax.random.key(0), 100_000, loss))
    logits = np.log(t / (1 - t))
    np.testing.assert_allclose([logits.mean(), logits.std()], [-0.5, 0.8], atol=0.01)


def test_min_snr_weighs_the_squared_error_by_the_noise():
    shape, alpha = (3, 4, 4, 1), np.array([0.1, 0.6, 0.99], np.float32)
    sigma = np.sqrt(1 - alpha**2)
    by_image = lambda values: jnp.asarray(values).reshape(3, 1, 1, 1)
    fields = dict.fromkeys(("x0", "noise", "xt", "coefficients", "routing", "ratio", "step"))
    fields |= dict(output=jnp.ones(shape), target=jnp.zeros(shape), alpha=by_image(alpha), sigma=by_image(sigma))
    loss = LossConfig(terms=("mse",), weighting="min_snr")
    found = weigh_terms(LossInputs("complete", labels=jnp.zeros(3, int), config=loss, **fields))["mse"]
    snr = (alpha / sigma) ** 2
    assert snr[1] < 5 < snr[2]
    np.testing.assert_allclose(found, np.minimum(snr, 5) / snr, rtol=1e-5)


# --- Sampling ------------------------------------------------------------------------------------

RUNS = {
    "ode_euler": dict(sampler="euler", steps="9"),
    "ode_heun": dict(sampler="heun", steps="9"),
    "sde_euler": dict(sampler="euler_maruyama", steps="10"),
}


@pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
@pytest.mark.parametrize("name", list(RUNS))
def test_trajectory_equals_the_original_at_every_step(sit, name, guided):
    model, params = sit
    reference = np.load(GOLDEN / "sit_transport.npz")
    get = lambda array: reference[f"{name}/{'guided' if guided else 'plain'}/{array}"]
    z, labels = channels_last(reference["z"]), reference["y"]
    guidance = float(reference["cfg_scale"]) if guided else 1.0
    sampling = SamplingConfig(**RUNS[name], guidance=guidance)
    table = make_table(sampling, Flow())
    np.testing.assert_allclose(table.timestep, get("network_times"), rtol=0, atol=1e-7)
    sampler, network = Sampler(table.form), functools.partial(model.apply, params, mode="complete")
    settings = dict(guided_channels=sampling.guided_channels, config=model.config)

    def predict(x, row, _):
        output, _ = guide(network, x, row.timestep, labels, scale=row.guidance if guided else None, **settings)
        return output, (x, output[..., :4])

    # Of a doubled batch, the second half feeds nothing.
    noise = jnp.asarray(channels_last(reference["wiener"]))[:, : len(z)]
    noise_at = lambda step: noise[len(table) - 1 - step]
    run = jax.jit(functools.partial(run_sampler, sampler, predict=predict, noise_at=noise_at))
    state, (visited, velocities) = run(sampler.init(jnp.asarray(z)), table)
    for ours, theirs in zip(velocities, get("velocities"), strict=True):
        assert relative_error(ours, channels_last(theirs)[: len(z)]) < 1e-4
    each_step = visited[:: 2 if name == "ode_heun" else 1]
    states = [*each_step[1 if name.startswith("sde") else 0 :], state.xt]
    for ours, theirs in zip(states, get("states"), strict=True):
        assert relative_error(ours, channels_last(theirs)[: len(z)]) < 1e-4


def made_up_velocity(x, t):
    """Return a made-up velocity, far from linear."""
    return np.tanh(1.3 * x + np.sin(5 * t)) * (0.5 + t)


@pytest.mark.parametrize("sampler", ["euler", "heun"])
def test_every_step_is_that_of_diffusers(sampler):
    make = dict(euler=FlowMatchEulerDiscreteScheduler, heun=FlowMatchHeunDiscreteScheduler)[sampler]
    scheduler = make()
    scheduler.set_timesteps(6)
    noise_levels = scheduler.timesteps.double().numpy() / 1000
    first = np.random.default_rng(0).standard_normal((2, 4, 4, 1)).astype(np.float32)
    x, states = torch.tensor(first), []
    for t, level in zip(scheduler.timesteps, noise_levels):
        output = -made_up_velocity(x.double().numpy(), 1 - level)  # theirs points from image to noise
        x = scheduler.step(torch.tensor(output, dtype=torch.float32), t, x).prev_sample
        states.append(x.numpy())
    # They ask for both ends of a step; the levels of all steps are ours, counted from the noise.
    times = ",".join(repr(float(1 - level)) for level in dict.fromkeys(noise_levels))
    table = make_table(SamplingConfig(sampler=sampler, steps=f"list:{times}"), Flow())
    ours = Sampler(table.form)
    state = ours.init(jnp.asarray(first))
    # Theirs ends with a step of order 1, which is the first half of our last one.
    for i, theirs in enumerate(states):
        row = jax.tree.map(operator.itemgetter(i), table)
        output = made_up_velocity(np.asarray(state.xt, np.float64), np.float64(row.timestep))
        state = ours.step(state, jnp.asarray(output, jnp.float32), row, None)
        assert relative_error(state.xt, theirs) < 1e-5


def exact_velocity(x, t, mean=0.5, variance=0.25):
    """Return the velocity of the flow from N(0, 1) to N(mean, variance), which keeps every x at its place."""
    spread = t**2 * variance + (1 - t) ** 2
    return mean + (t * variance - (1 - t)) / spread * (x - t * mean)


@pytest.mark.parametrize("grid", ["uniform", "logsnr", "quadratic", "karras"])
@pytest.mark.parametrize("sampler", [name for name in FLOW_SOLVERS if name not in ("sde_dpmpp_2m", "euler_maruyama")])
def test_every_solver_and_grid_finds_the_flow_of_a_gaussian(sampler, grid):
    """Pure noise at the start, where the log-SNR is infinite, and the image at the end are no special cases outside."""
    z = np.array([-1.5, 0.2, 1.3])
    table = make_table(SamplingConfig(sampler=sampler, steps=f"{grid}:80"), Flow())
    x = base = z
    history = [np.zeros(3)] * (table.form.history - 1)
    for i, t in enumerate(np.float64(table.timestep)):
        newest = table.estimate_from_output[i] @ [x, exact_velocity(x, t)]
        x, base = table.weights[i] @ [x, base, newest, *history]
        history = [newest, *history][: table.form.history - 1]
    bound = 0.05 if sampler in ("euler", "ddim") else 0.006
    assert np.abs(x - (0.5 + 0.5 * z)).max() < (bound if grid in ("logsnr", "karras") else bound / 3)


# --- Configs -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sections, message",
    [
        (dict(loss=dict(terms=("mse", "vb"))), "loss.terms 'vb' has no meaning for the process flow: .* budget, mse"),
        (dict(loss=dict(weighting="min_snr")), "loss.weighting 'min_snr' has no meaning for .* one of: none"),
        (dict(sampling=dict(sampler="ddpm")), "sampling.sampler 'ddpm' has no meaning for the process flow: .* heun"),
        (dict(sampling=dict(clip=1.0)), "sampling.clip has no meaning for heun with the process flow"),
        (dict(sampling=dict(steps="ddim50")), "Unknown spacing 'ddim50' for the process flow"),
        (dict(sampling=dict(steps="list:0,0.5,1")), "from 0 to below 1, the image itself, not 1"),
        (dict(sampling=dict(steps="list:-0.1,0.5")), "from 0 to below 1, the image itself, not -0.1"),
        (dict(sampling=dict(steps="list:0,nan")), "from 0 to below 1, the image itself, not nan"),
        (dict(sampling=dict(steps="list:0,0.5,0.4")), "must ascend from noise to image: 0.4 follows 0.5"),
        (dict(sampling=dict(guidance_interval=(0.2, 1.5))), r"within the timesteps 0.0 to 1.0, not \(0.2, 1.5\)"),
        (dict(process=dict(name="flows")), "Unknown process.name 'flows'; known: diffusion, flow"),
        (dict(flow=dict(times="uniform")), "Unknown key flow.times"),
    ],
)
def test_what_has_no_meaning_for_a_flow_is_refused(sections, message):
    with pytest.raises(InputError, match=message):
        read_experiment(changed(DYNAMIC_FLOW, **sections))


def test_what_has_no_meaning_for_a_diffusion_is_refused():
    with pytest.raises(InputError, match="loss.times 'logit_normal' has no meaning for the process diffusion"):
        read_experiment(changed(STATIC, loss=dict(times="logit_normal")))
    with pytest.raises(InputError, match="'euler_maruyama' has no meaning for the process diffusion: .* ddim, ddpm"):
        read_experiment(changed(STATIC, sampling=dict(sampler="euler_maruyama")))


def test_sections_of_a_process_survive_and_old_ones_are_of_diffusion():
    for process in (Flow(), Diffusion("squared_cosine", 50)):
        assert read_process(json.loads(json.dumps(process_sections(process)))) == process
    old = dict(diffusion=dict(schedule="squared_cosine", train_steps=500))
    assert read_process(old) == Diffusion("squared_cosine", 500)
    assert read_experiment(changed(STATIC, **old)).process == Diffusion("squared_cosine", 500)
    assert not differences(dict(STATIC), changed(STATIC, process=dict(name="diffusion")))
    assert [
        line
        for line in differences(STATIC, DYNAMIC_FLOW)
        if line.startswith("process.name: 'diffusion' there, 'flow' here")
    ]
