"""One update: bad batches leave no trace, the EMA follows, parts add up, terms have their weights."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import DYNAMIC, STATIC, changed

from dydit_jax.data.batches import examples
from dydit_jax.data.sources import open_source
from dydit_jax.diffusion.process import Diffusion
from dydit_jax.diffusion.terms import LossConfig
from dydit_jax.errors import InputError
from dydit_jax.models.config import published_config
from dydit_jax.models.dit import Model
from dydit_jax.runtime.sharding import MeshConfig, make_mesh
from dydit_jax.training.experiment import build_update, read_experiment
from dydit_jax.training.objective import draw_examples, objective, passes_at, run_passes
from dydit_jax.training.optimizer import build_learning_rate, build_optimizer
from dydit_jax.training.update import accumulate_gradients, all_finite, batch_shapes, compile_update, init_state


@pytest.fixture(scope="module", params=["cpu", pytest.param("gpu", marks=pytest.mark.slow)])
def update_parts(request):
    """An update as it is written for a platform, run here."""
    settings = dict(skip_norm=1e3, decay="cosine", decay_steps=9)
    experiment = read_experiment(changed(DYNAMIC, mesh=dict(data=4), optimizer=settings))
    model = Model(experiment.model, platform=request.param)
    optimizer = build_optimizer(experiment.optimizer)
    state = init_state(jax.jit(model.init)(jax.random.key(0)), optimizer)
    return experiment, jax.jit(build_update(experiment, model, ("gated", "complete"))), state


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, 1e10])
def test_bad_batch_is_skipped_counted_and_leaves_no_trace(update_parts, bad):
    _, update, state = update_parts
    good = dict(image=jnp.ones((8, 8, 8, 1)), label=jnp.arange(8))
    state, metrics = update(state, good)
    assert int(state.skipped) == 0 and float(metrics["optimizer/gradient_norm"]) < 1e3
    after, metrics = update(state, dict(good, image=good["image"] * bad))
    assert int(after.skipped) == int(metrics["optimizer/skipped_batches"]) == 1
    assert int(after.step) == int(state.step) + 1
    assert int(after.skipped_in_a_row) == 1 and int(update(after, good)[0].skipped_in_a_row) == 0
    for name in ("params", "ema", "opt_state"):
        jax.tree.map(np.testing.assert_array_equal, getattr(after, name), getattr(state, name))


def test_reported_learning_rate_is_the_one_in_use_also_after_skipped_batches(update_parts):
    experiment, update, state = update_parts
    schedule, reported, in_use = build_learning_rate(experiment.optimizer), [], []
    for value in (1.0, jnp.nan, jnp.nan, 1.0):
        in_use.append(float(schedule(state.opt_state[1][2].count)))
        state, metrics = update(state, dict(image=value * jnp.ones((8, 8, 8, 1)), label=jnp.arange(8)))
        reported.append(float(metrics["optimizer/learning_rate"]))
    assert int(state.skipped) == 2 and in_use[0] > in_use[1] == in_use[2] == in_use[3]
    assert reported == pytest.approx(in_use)


def test_parameters_that_a_step_could_take_out_of_float32_are_not_moved():
    """Neither is what they and the gradient come from: a rate that could do it is refused by the settings."""
    experiment = read_experiment(changed(STATIC, optimizer=dict(learning_rate=1e3, router_multiplier=1e6)))
    model = Model(experiment.model)
    params = jax.jit(model.init)(jax.random.key(0))
    update = jax.jit(build_update(experiment, model, ("complete",)))
    batch = dict(image=jnp.ones((8, 8, 8, 1)), label=jnp.arange(8))
    state = init_state(params, build_optimizer(experiment.optimizer))
    after, _ = update(state, batch)
    assert int(after.skipped) == 0 and bool(all_finite((after.params, after.ema, after.opt_state)))
    params["output"]["bias"] = jnp.full_like(params["output"]["bias"], 1e19)
    state = init_state(params, build_optimizer(experiment.optimizer))
    after, _ = update(state, batch)
    assert int(after.skipped_in_a_row) == 1
    for name in ("params", "ema", "opt_state"):
        jax.tree.map(np.testing.assert_array_equal, getattr(after, name), getattr(state, name))


@pytest.mark.parametrize("name", ["learning_rate", "router_multiplier", "weight_decay"])
def test_rates_too_large_to_stay_finite_are_refused(name):
    with pytest.raises(InputError, match=f"optimizer.{name} must be from 0.0 to 1"):
        read_experiment(changed(STATIC, optimizer={name: 1e7}))


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
def test_one_value_that_is_not_finite_is_found(bad):
    tree = dict(step=jnp.int32(3), params=[jnp.ones((5, 3)), jnp.full(2, 3e38)])
    assert bool(all_finite(tree))
    tree["params"][0] = tree["params"][0].at[4, 1].set(bad)
    assert not bool(all_finite(tree))


def test_ema_follows_the_parameters(update_parts):
    experiment, update, state = update_parts
    after, _ = update(state, dict(image=jnp.ones((8, 8, 8, 1)), label=jnp.arange(8)))
    decay = experiment.train.ema_decay
    expected = jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, state.ema, after.params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7), after.ema, expected)


def test_loss_weighs_its_terms(update_parts):
    """Against sums of squares in float64: three times both passes' errors, and half the budget's penalty."""
    experiment, _, state = update_parts
    loss = LossConfig(terms=("budget", "mse"), weights=(0.5, 3.0), budget_hold_steps=0, budget=0.25)
    settings = dict(model=Model(experiment.model), loss=loss, process=Diffusion(), passes=("gated", "complete"))
    batch = dict(image=jnp.ones((8, 8, 8, 1)) / 2, label=jnp.arange(8))
    examples = draw_examples(batch, jax.random.key(0), **settings)
    params = jax.tree.map(lambda leaf: leaf + 0.02, state.params)  # the first output is zero

    def run(params):
        errors = [inputs.output[..., :1] - inputs.noise for inputs in run_passes(params, examples, 10**6, **settings)]
        return objective(params, examples, 10**6, **settings), errors

    (total, metrics), errors = jax.jit(run)(params)
    mean_squares = [np.square(np.float64(error)).mean() for error in errors]
    assert float(metrics["cost/ratio"]) == 1.0  # the routers start open
    np.testing.assert_allclose(metrics["loss/budget"], 0.5 * 2.0 * (1.0 - 0.25) ** 2, rtol=1e-6)
    np.testing.assert_allclose(total, 3 * sum(mean_squares) + 0.5 * 2.0 * (1.0 - 0.25) ** 2, rtol=1e-6)
    assert not any("vb" in name for name in metrics)


def test_a_model_without_classes_is_trained_without_labels():
    experiment = read_experiment(changed(STATIC, model=dict(classes=0)))
    data, model = open_source(experiment.data, experiment.model), Model(experiment.model)
    batch = examples(data, count=8)
    assert batch["label"].max() > 0
    settings = dict(model=model, loss=experiment.loss, process=Diffusion(), passes=("complete",))
    np.testing.assert_array_equal(draw_examples(batch, jax.random.key(0), **settings)["labels"], 0)


def test_parts_of_a_batch_add_up_to_it():
    """Of a static model: the budget's penalty of parts is not that of the whole."""
    config = changed(STATIC, data=dict(batch_size=16))
    batch = dict(image=np.random.default_rng(0).uniform(-1, 1, (16, 8, 8, 1)), label=np.arange(16) % 10)
    experiment, after = read_experiment(config), {}
    model = Model(experiment.model)
    state = init_state(jax.jit(model.init)(jax.random.key(0)), build_optimizer(experiment.optimizer))
    for parts in (1, 4):
        experiment = read_experiment(changed(config, train=dict(accumulate=parts)))
        after[parts] = jax.jit(build_update(experiment, model, ("complete",)))(state, batch)
    for name, value in after[1][1].items():
        np.testing.assert_allclose(after[4][1][name], value, rtol=1e-5, atol=1e-7, err_msg=name)
    near = functools.partial(np.testing.assert_allclose, atol=2e-6)
    jax.tree.map(near, after[4][0].opt_state[1][0].mu, after[1][0].opt_state[1][0].mu)


def test_each_part_holds_easy_and_hard_timesteps():
    examples = dict(t=jnp.arange(32) % 4)
    squares = lambda part: (jnp.square(jnp.bincount(part["t"], length=4) / 8), {})
    shares, _ = accumulate_gradients(squares, examples, parts=4)
    np.testing.assert_allclose(shares, 0.25**2)  # the mean of squares is that of a quarter only if all are quarters


@pytest.mark.parametrize("size, parts, run", [(6, 3, 2), (6, 2, 1), (12, 2, 2), (4, 4, 1), (5, 5, 1), (8, 2, 4)])
def test_parts_of_any_size_share_out_the_batch(size, parts, run):
    place = jnp.arange(size, dtype=jnp.float32)
    seen = lambda part: (jnp.ones(size).at[part["t"].astype(int)].add(1.0), jnp.diff(part["t"])[: run - 1])
    counts, distances = accumulate_gradients(seen, dict(t=place), parts=parts)
    np.testing.assert_allclose(counts, 1 + 1 / parts)  # each example is in one part
    np.testing.assert_allclose(distances, 1)


@pytest.mark.parametrize("size, parts", [(1, 1), (2, 1), (5, 1), (6, 1), (6, 3), (6, 6), (8, 2)])
def test_an_update_weighs_every_quarter_of_the_timesteps_alike(size, parts):
    """Over many steps, of a static model, whatever the batch and its parts."""
    experiment = read_experiment(changed(STATIC, data=dict(batch_size=size), train=dict(accumulate=parts)))
    records = dict(loss=experiment.loss, process=experiment.process)
    settings = dict(model=Model(experiment.model), passes=("complete",), **records)
    batch = dict(image=jnp.zeros((size, 8, 8, 1)), label=jnp.zeros(size, jnp.int32))

    def shares(key):
        seen = lambda part: ({}, jax.nn.one_hot(part["t"] // 250, 4).mean(0))
        return accumulate_gradients(seen, draw_examples(batch, key, **settings), parts)[1]

    found = np.asarray(jax.vmap(shares)(jax.random.split(jax.random.key(0), 4000))).mean(0)
    # Of B draws a step, the share of a quarter deviates by less than 0.5 / sqrt(4000) after 4000 steps.
    np.testing.assert_allclose(found, 0.25, atol=4 * 0.5 / np.sqrt(4000))


def test_configuration_decides_the_passes():
    static, dynamic = read_experiment(STATIC), read_experiment(DYNAMIC)
    two_stages = dataclasses.replace(dynamic, loss=dataclasses.replace(dynamic.loss, complete_steps=30))
    passes = lambda step, experiment: passes_at(step, model=experiment.model, loss=experiment.loss)
    assert passes(0, static) == ("complete",)
    assert passes(10**6, dynamic) == ("gated", "complete")
    assert passes(29, two_stages) == ("gated", "complete")
    assert passes(30, two_stages) == ("gated",)


@pytest.mark.slow
def test_full_size_dit_s2_trains_a_step():
    experiment = read_experiment(
        changed(STATIC, model=dict(), data=dict(name="synthetic", batch_size=8), mesh=dict(data=1, fsdp=1))
        | dict(model=dict(size="S/2", side=32, routers="first_on"))
    )
    mesh = make_mesh(MeshConfig(1, 1, 1), devices=jax.devices()[:1])
    model = Model(published_config("S/2", side=32, routers="first_on"))
    state = init_state(model.init(jax.random.key(0)), build_optimizer(experiment.optimizer))
    update = build_update(experiment, model, ("gated", "complete"))
    update = compile_update(update, state, batch_shapes(model.config, 8), mesh)
    image = np.random.default_rng(0).standard_normal((8, 32, 32, 4), np.float32)
    state, metrics = update(state, dict(image=image, label=np.arange(8, dtype=np.int32)))
    assert int(state.skipped) == 0 and bool(jnp.isfinite(metrics["loss/total"]))
