"""A training step's terms and gradients are the original's; the budget and the draws do what they say."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDEN, channels_last, relative_error
from scipy import special, stats

from dydit_jax.convert.tables import export_state_dict
from dydit_jax.diffusion.gaussian import at_steps, coefficients
from dydit_jax.diffusion.losses import drop_labels, stratified_timesteps, variational_bound
from dydit_jax.diffusion.process import Diffusion
from dydit_jax.diffusion.schedules import DiffusionConfig, make_schedule
from dydit_jax.diffusion.terms import LossConfig, budget_penalty, budget_target, weigh_terms
from dydit_jax.models.config import DiTConfig
from dydit_jax.models.cost import ModelMacs
from dydit_jax.models.routing import Routing
from dydit_jax.training.objective import objective, run_passes


@pytest.fixture(scope="module")
def reference():
    return np.load(GOLDEN / "v2_train_step.npz")


@pytest.fixture(scope="module")
def step(golden_v2, reference):
    """What the training step makes of the recorded batch and noise: losses of each image, metrics, gradients."""
    config, batch = golden_v2.config, len(reference["t"])

    def recorded(name, units):
        noise = np.stack(
            [reference[f"logistic_{name}_block{layer}"].reshape(batch, -1) for layer in range(config.depth)], 1
        )
        # The first unit is always on and draws nothing; its place is filled with zeros.
        return np.concatenate([np.zeros((batch, config.depth, units - noise.shape[-1]), np.float32), noise], axis=-1)

    examples = dict(
        {name: jnp.asarray(channels_last(reference[name])) for name in ("x0", "noise")},
        t=jnp.asarray(reference["t"]),
        labels=jnp.asarray(reference["y"]),
        router_noise=Routing(
            recorded("head", config.heads), recorded("group", config.heads), recorded("token", config.tokens)
        ),
        beta=None,
    )
    settings = dict(
        model=golden_v2.model,
        loss=LossConfig(budget=0.5, budget_weight=2.0, budget_hold_steps=0, budget_warmup_steps=1),
        process=Diffusion(),
        passes=("gated", "complete"),
    )

    def run(params):
        differentiate = jax.value_and_grad(objective, has_aux=True)
        gated, complete = run_passes(params, examples, 1, **settings)
        of_images = dict(gated=weigh_terms(gated), complete=weigh_terms(complete))
        return *differentiate(params, examples, 1, **settings), of_images, gated.routing

    with pytest.MonkeyPatch.context() as patch:
        # The recorded cost counts the attention of a block as 1 and its MLP as 1.7.
        units = ModelMacs(attention=10, mlp=17, token_router=0, time_routers=0, fixed=0, layers=config.depth)
        patch.setattr(DiTConfig, "macs", units)
        (total, metrics), gradients, of_images, routing = jax.jit(run)(golden_v2.params)
    return dict(total=total, metrics=metrics, of_images=of_images, routing=routing, gradients=gradients)


def test_training_gates_equal_the_original(step, reference):
    np.testing.assert_array_equal(step["routing"].heads, reference["head_mask"])
    np.testing.assert_array_equal(step["routing"].groups, reference["group_mask"])
    np.testing.assert_array_equal(step["routing"].tokens, reference["token_mask"][..., 0])


@pytest.mark.parametrize("mode, recorded", [("gated", ""), ("complete", "complete_")])
@pytest.mark.parametrize("name", ["mse", "vb"])
def test_loss_terms_equal_the_original(step, reference, mode, recorded, name):
    ours, theirs = step["of_images"][mode][name], reference[f"loss_{recorded}{name}"]
    noisy = (reference["t"] == 0) & (name == "vb")
    np.testing.assert_allclose(ours[~noisy], theirs[~noisy], rtol=1e-5)
    # At t = 0 the original subtracts two float32 probabilities near 1: its recorded value is 2.2e-5 (vb) and 1.4e-5
    # (complete_vb) away from the same formula in float64, ours 1.3e-6 (see the next test).
    np.testing.assert_allclose(ours[noisy], theirs[noisy], rtol=3e-5)
    np.testing.assert_allclose(step["metrics"][f"loss/{mode}_{name}"], theirs.mean(), rtol=3e-5 if any(noisy) else 1e-5)


def test_bound_at_step_zero_is_accurate_to_float32():
    """Compare with the plain formula in float64, where the difference of probabilities keeps its digits."""
    generator = np.random.default_rng(0)
    start, noise = generator.uniform(-1, 1, (2, 8, 8, 4)), generator.standard_normal((2, 8, 8, 4))
    start[0, 0, 0], start[0, 0, 1] = 1.0, -1.0  # the open outer bins
    output = np.concatenate([noise + 0.3 * generator.standard_normal(noise.shape), 0.3 * noise], -1)
    schedule = make_schedule(DiffusionConfig())
    c = at_steps(coefficients(schedule), np.zeros(2, int))
    current = np.sqrt(schedule.alphas_cumprod[0]) * start + np.sqrt(1 - schedule.alphas_cumprod[0]) * noise
    actual = variational_bound(*(jnp.asarray(a, jnp.float32) for a in (output, start, current)), c)

    predicted = (
        np.sqrt(1 / schedule.alphas_cumprod[0]) * current
        - np.sqrt(1 / schedule.alphas_cumprod[0] - 1) * output[..., :4]
    )
    share = (output[..., 4:] + 1) / 2
    log_variance = share * np.log(schedule.betas[0]) + (1 - share) * schedule.posterior_log_variance[0]
    mean = schedule.posterior_mean_coef_x0[0] * predicted + schedule.posterior_mean_coef_xt[0] * current
    cdf = lambda x: 0.5 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    above, below = (cdf((start - mean + side / 255) * np.exp(-0.5 * log_variance)) for side in (1, -1))
    probability = np.where(start < -0.999, above, np.where(start > 0.999, 1 - below, above - below))
    expected = -np.log(np.maximum(probability, 1e-12)).mean(axis=(1, 2, 3)) / np.log(2)
    np.testing.assert_allclose(actual, expected, rtol=1e-5)


def bound_in_float64(output, start, current) -> np.ndarray:
    """State the bound at t = 0 in float64, bits [B,...], by tails that keep their digits however small they are."""
    schedule = make_schedule(DiffusionConfig())
    noise, v = np.split(np.float64(output), 2, axis=-1)
    start, current, share = np.float64(start), np.float64(current), (v + 1) / 2
    log_variance = share * np.log(schedule.betas[0]) + (1 - share) * schedule.posterior_log_variance[0]
    predicted = np.sqrt(1 / schedule.alphas_cumprod[0]) * current - np.sqrt(1 / schedule.alphas_cumprod[0] - 1) * noise
    mean = schedule.posterior_mean_coef_x0[0] * predicted + schedule.posterior_mean_coef_xt[0] * current
    argument = lambda x: 2 * np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)  # (1 + tanh(u)) / 2 = expit(2 u)
    above, below = (argument((start - mean + side / 255) * np.exp(-0.5 * log_variance)) for side in (1, -1))
    left, right = special.expit(above) - special.expit(below), special.expit(-below) - special.expit(-above)
    inside = np.where(above < 0, left, right)
    probability = np.where(start < -0.999, special.expit(above), np.where(start > 0.999, special.expit(-below), inside))
    return -np.log2(np.maximum(probability, 1e-12))


@pytest.fixture(scope="module")
def single_pixels():
    """Pixels whose predicted noise is off by up to nine deviations, as images of one: output, start, current."""
    schedule = make_schedule(DiffusionConfig())
    off, start, v = np.meshgrid(np.linspace(-9, 9, 181), [-1.0, -0.9, 0.2, 1.0], [-0.9, 0.0, 0.9], indexing="ij")
    off, start, v = (column.reshape(-1, 1, 1, 1) for column in (off, start, v))
    noise = np.random.default_rng(0).standard_normal(off.shape)
    current = np.sqrt(schedule.alphas_cumprod[0]) * start + np.sqrt(1 - schedule.alphas_cumprod[0]) * noise
    return tuple(np.float32(array) for array in (np.concatenate([noise + off, v], -1), start, current))


def test_bound_at_step_zero_is_that_of_float64_however_small_the_probability(single_pixels):
    output, start, current = single_pixels
    expected = bound_in_float64(*single_pixels).reshape(-1)
    # Some at the floor of 1e-12, many below 1e-7, where a difference of float32 probabilities has no digits left.
    assert (expected == -np.log2(1e-12)).sum() > 50 and (expected > -np.log2(1e-7)).sum() > 500
    c = at_steps(coefficients(make_schedule(DiffusionConfig())), np.zeros(len(start), int))
    found = variational_bound(output, start, current, c)
    # The mean of a single pixel is known to 1e-7, which is 2e-5 of a deviation: 3e-5 bits, whatever the formula.
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=4e-5)
    assert abs(float(found.mean()) / expected.mean() - 1) < 1e-6


def test_gradient_of_the_bound_at_step_zero_is_that_of_float64(single_pixels):
    output, start, current = single_pixels
    near = lambda shift: bound_in_float64(output + np.array([0, shift]), start, current)
    expected = ((near(1e-5) - near(-1e-5)) / 2e-5).reshape(-1)
    c = at_steps(coefficients(make_schedule(DiffusionConfig())), np.zeros(len(start), int))
    found = jax.grad(lambda output: variational_bound(output, start, current, c).sum())(output)[..., 1].reshape(-1)
    assert relative_error(found, expected) < 1e-5


def test_total_loss_equals_the_original(step, reference):
    np.testing.assert_allclose(step["total"], reference["total_loss"], rtol=1e-5)
    metrics, penalty = step["metrics"], reference["flops_loss_weighted_attn1_mlp1p7_target0p5"]
    np.testing.assert_allclose(metrics["cost/ratio"], reference["flops_ratio_attn1_mlp1p7"], rtol=1e-5)
    np.testing.assert_allclose(metrics["loss/budget"], penalty, rtol=1e-5)


def test_every_gradient_equals_the_original(step, reference, golden_v2):
    gradients = export_state_dict(jax.tree.map(np.asarray, step["gradients"]), golden_v2.config)
    names = [name.removeprefix("grad/") for name in reference.files if name.startswith("grad/")]
    assert set(names) == set(gradients) - {"pos_embed"}
    errors = {name: relative_error(gradients[name], reference[f"grad/{name}"]) for name in names}
    assert max(errors.values()) < 1e-4, max(errors, key=errors.get)


def test_bound_has_no_gradient_in_the_noise_channels():
    c = at_steps(coefficients(make_schedule(DiffusionConfig())), jnp.asarray([0, 500]))
    image = jnp.full((2, 4, 4, 1), 0.3)
    output = jax.random.normal(jax.random.key(0), (2, 4, 4, 2))
    gradient = jax.grad(lambda output: variational_bound(output, image, image, c).sum())(output)
    assert not gradient[..., :1].any() and bool(gradient[..., 1:].all())


def test_bound_is_finite_far_from_the_truth():
    c = at_steps(coefficients(make_schedule(DiffusionConfig())), jnp.zeros(1, jnp.int32))
    image = jnp.full((1, 4, 4, 1), 0.3)
    loss = lambda output: variational_bound(output, image, image, c).sum()
    value, gradient = jax.value_and_grad(loss)(jnp.full((1, 4, 4, 2), 300.0))
    assert bool(jnp.isfinite(value)) and bool(jnp.isfinite(gradient).all())


def drawn_timesteps(batch: int, train_steps: int = 1000, steps: int = 4000) -> np.ndarray:
    """Draw the timesteps of many steps, [steps,B]."""
    keys = jax.random.split(jax.random.key(0), steps)
    return np.asarray(jax.vmap(lambda key: stratified_timesteps(key, batch, train_steps))(keys))


def assert_uniform(t, train_steps: int, bins: int) -> None:
    """Fail where numbers so uneven come up once in ten thousand times; seeds are fixed."""
    counts = np.bincount(t.reshape(-1) * bins // train_steps, minlength=bins)
    assert stats.chisquare(counts).pvalue > 1e-4, counts


@pytest.mark.parametrize("batch", [4, 8, 12])
def test_timesteps_are_stratified_where_four_divides_the_batch(batch):
    quarters = drawn_timesteps(batch, steps=500) // 250
    np.testing.assert_array_equal(quarters, np.tile(np.arange(batch) % 4, (500, 1)))


@pytest.mark.parametrize("batch", [*range(1, 9), 10, 13])
def test_every_timestep_is_equally_likely_at_every_batch_size(batch):
    t = drawn_timesteps(batch)
    assert_uniform(t, 1000, bins=40)
    for example in range(batch if batch % 4 else 0):
        assert_uniform(t[:, example], 1000, bins=20)


@pytest.mark.parametrize("batch", [1, 2, 3, 5, 6, 7, 10])
def test_quarters_are_seen_as_evenly_as_the_batch_size_allows(batch):
    counts = [np.bincount(row // 250, minlength=4) for row in drawn_timesteps(batch, steps=200)]
    assert np.min(counts) == batch // 4 and np.max(counts) == batch // 4 + 1


@pytest.mark.parametrize("train_steps", [4, 5, 6, 7, 10])
@pytest.mark.parametrize("batch", [1, 3, 4])
def test_every_timestep_is_equally_likely_at_every_length_of_the_schedule(train_steps, batch):
    t = drawn_timesteps(batch, train_steps)
    assert t.min() == 0 and t.max() == train_steps - 1
    assert_uniform(t, train_steps, bins=train_steps)


def test_timesteps_of_a_batch_of_eight_are_those_of_earlier_runs():
    """A run that goes on draws as it did."""
    key, quarter = jax.random.key(7), jnp.arange(8) % 4
    expected = jax.random.randint(key, (8,), quarter * 1000 // 4, (quarter + 1) * 1000 // 4)
    np.testing.assert_array_equal(stratified_timesteps(key, 8, 1000), expected)


def test_labels_are_dropped_at_the_given_rate():
    labels = drop_labels(jax.random.key(0), jnp.zeros(10_000, int), null_label=10, probability=0.1)
    assert set(np.unique(labels)) == {0, 10}
    assert abs(float((labels == 10).mean()) - 0.1) < 0.01


def test_budget_holds_then_falls_then_stays():
    config = LossConfig(budget=0.5, budget_hold_steps=100, budget_warmup_steps=1000)
    targets = [float(budget_target(step, config)) for step in (0, 99, 100, 500, 1000, 5000)]
    np.testing.assert_allclose(targets, [1.0, 1.0, 0.95, 0.75, 0.5, 0.5], rtol=1e-6)


def test_penalty_is_zero_at_the_target_only():
    assert float(budget_penalty(jnp.asarray([0.4, 0.6]), 0.5, weight=2.0)) == pytest.approx(0.0, abs=1e-12)
    assert float(budget_penalty(jnp.asarray([0.7]), 0.5, weight=2.0)) == pytest.approx(0.08, rel=1e-5)
