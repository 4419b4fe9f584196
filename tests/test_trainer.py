"""Runs train, stop, go on exactly, skip bad batches, and refuse foreign work directories."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dydit_jax.build import build_optimizer, read_experiment
from dydit_jax.errors import InputError
from dydit_jax.loading import load_checkpoint
from dydit_jax.models.dit import Model, published_config
from dydit_jax.sharding import MeshConfig, make_mesh
from dydit_jax.trainer import (
    compile_update,
    first_params,
    init_state,
    make_update_fn,
    objective,
    passes_at,
    starting_leaves,
    train_and_evaluate,
)

STATIC = dict(
    model=dict(depth=1, width=32, heads=2, patch=4, side=8, channels=1, classes=10),
    data=dict(name="digits", batch_size=8),
    optimizer=dict(learning_rate=1e-3),
    train=dict(steps=4, ema_decay=0.9),
    mesh=dict(data=1, fsdp=4),
    checkpoint=dict(every_steps=2),
    tracking=dict(every_steps=2),
)


def changed(config: dict, **sections) -> dict:
    """Return the config with keys of sections replaced."""
    return {name: dict(config.get(name, {}), **sections.get(name, {})) for name in {*config, *sections}}


DYNAMIC = changed(STATIC, model=dict(routers="first_on"), mesh=dict(data=4, fsdp=1))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A work directory with four finished steps of the static model."""
    workdir = tmp_path_factory.mktemp("runs") / "static"
    train_and_evaluate(STATIC, workdir)
    return workdir


def lines(workdir) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_run_leaves_metrics_config_and_weights(trained):
    metrics = lines(trained)
    assert [line["step"] for line in metrics] == [2, 4]
    assert {"loss/total", "loss/complete_mse", "loss/complete_vb", "time/steps_per_second"} <= set(metrics[0])
    assert json.loads((trained / "config.json").read_text()) == STATIC
    from_run, from_file = load_checkpoint(trained), load_checkpoint(trained / "weights.safetensors")
    jax.tree.map(np.testing.assert_array_equal, from_run.params, from_file.params)
    assert from_run.about["step"] == from_file.about["step"] == 4


def test_resumed_run_equals_the_uninterrupted_one(tmp_path):
    whole = train_and_evaluate(DYNAMIC, tmp_path / "whole")
    train_and_evaluate(changed(DYNAMIC, train=dict(steps=2)), tmp_path / "parts")
    parts = train_and_evaluate(DYNAMIC, tmp_path / "parts")
    jax.tree.map(np.testing.assert_array_equal, whole, parts)
    assert [line["loss/total"] for line in lines(tmp_path / "whole")] == [
        line["loss/total"] for line in lines(tmp_path / "parts")
    ]


def test_finished_run_is_not_trained_further(trained):
    before = load_checkpoint(trained).params
    state = train_and_evaluate(STATIC, trained)
    assert int(state.step) == 4
    jax.tree.map(np.testing.assert_array_equal, before, load_checkpoint(trained).params)


def test_fine_tuning_starts_from_the_static_weights_with_fresh_routers(trained):
    experiment = read_experiment(changed(DYNAMIC, train=dict(init_from=str(trained))))
    model = Model(experiment.model)
    params = first_params(model, experiment, make_mesh(experiment.mesh), starting_leaves(model, experiment))
    source = load_checkpoint(trained).params
    np.testing.assert_array_equal(params["blocks"]["mlp"]["up"], source["blocks"]["mlp"]["up"])
    assert bool((params["head_router"]["bias"] == 15).all())
    # With every gate open, the DyDiT is the DiT that it starts from.
    x, t, labels = jnp.ones((2, 8, 8, 1)), jnp.asarray([10, 900]), jnp.asarray([1, 2])
    dynamic, _ = model.apply(params, x, t, labels, mode="gated")
    static, _ = Model(load_checkpoint(trained).model).apply(source, x, t, labels, mode="complete")
    np.testing.assert_array_equal(dynamic, static)


def test_weights_of_another_shape_are_not_started_from(trained):
    workdir = trained.parent / "wider"
    with pytest.raises(InputError, match="is another model: .*attention/out"):
        train_and_evaluate(changed(DYNAMIC, model=dict(width=64), train=dict(init_from=str(trained))), workdir)
    with pytest.raises(InputError, match="no published model"):
        train_and_evaluate(changed(DYNAMIC, train=dict(init_from="nowhere")), workdir)
    assert not workdir.exists()


def test_work_directory_of_another_run_is_left_alone(trained):
    before = sorted(path.name for path in trained.iterdir())
    with pytest.raises(InputError, match="another configuration: optimizer.learning_rate: 0.001 there, 0.1 here"):
        train_and_evaluate(changed(STATIC, optimizer=dict(learning_rate=0.1)), trained)
    assert json.loads((trained / "config.json").read_text()) == STATIC
    assert sorted(path.name for path in trained.iterdir()) == before


@pytest.mark.parametrize("prepare", ["file", "folder", "empty name", "unwritable"])
def test_unusable_work_directories_are_refused(tmp_path, prepare):
    workdir = tmp_path / "run"
    if prepare == "file":
        workdir.write_text("mine")
    elif prepare == "folder":
        workdir.mkdir()
        (workdir / "thesis.tex").write_text("mine")
    elif prepare == "empty name":
        workdir = ""
    else:
        workdir = "/proc/run"
    with pytest.raises(InputError, match="workdir|work directory|write"):
        train_and_evaluate(STATIC, workdir)
    if prepare == "folder":
        assert [path.name for path in workdir.iterdir()] == ["thesis.tex"]


def test_data_that_does_not_fit_the_model_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"images \(8, 8, 1\) and 10 classes; the model is made for \(8, 8, 3\)"):
        train_and_evaluate(changed(STATIC, model=dict(channels=3)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def update_parts():
    experiment = read_experiment(changed(DYNAMIC, mesh=dict(data=4), optimizer=dict(skip_norm=1e3)))
    model = Model(experiment.model)
    optimizer = build_optimizer(experiment.optimizer)
    state = init_state(jax.jit(model.init)(jax.random.key(0)), optimizer)
    return experiment, jax.jit(make_update_fn(model, experiment, ("gated", "complete"))), state


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, 1e10])
def test_bad_batch_is_skipped_counted_and_leaves_no_trace(update_parts, bad):
    _, update, state = update_parts
    good = dict(image=jnp.ones((8, 8, 8, 1)), label=jnp.arange(8))
    state, metrics = update(state, good)
    assert int(state.skipped) == 0 and float(metrics["optimizer/gradient_norm"]) < 1e3
    after, metrics = update(state, dict(good, image=good["image"] * bad))
    assert int(after.skipped) == int(metrics["optimizer/skipped_batches"]) == 1
    assert int(after.step) == int(state.step) + 1
    for name in ("params", "ema", "opt_state"):
        jax.tree.map(np.testing.assert_array_equal, getattr(after, name), getattr(state, name))


def test_ema_follows_the_parameters(update_parts):
    experiment, update, state = update_parts
    after, _ = update(state, dict(image=jnp.ones((8, 8, 8, 1)), label=jnp.arange(8)))
    decay = experiment.train.ema_decay
    expected = jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, state.ema, after.params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7), after.ema, expected)


def test_loss_is_the_sum_of_its_terms(update_parts):
    experiment, _, state = update_parts
    batch = dict(image=jnp.ones((8, 8, 8, 1)) / 2, label=jnp.arange(8))
    arguments = dict(model=Model(experiment.model), experiment=experiment)
    loss, metrics = objective(state.params, batch, jax.random.key(0), 0, passes=("gated", "complete"), **arguments)
    terms = ("gated_mse", "gated_vb", "complete_mse", "complete_vb", "budget")
    np.testing.assert_allclose(loss, sum(metrics[f"loss/{name}"] for name in terms), rtol=1e-6)
    assert float(metrics["cost/ratio"]) == pytest.approx(1.0)  # the routers start open


def test_configuration_decides_the_passes():
    static, dynamic = read_experiment(STATIC), read_experiment(DYNAMIC)
    two_stages = dataclasses.replace(dynamic, loss=dataclasses.replace(dynamic.loss, complete_steps=30))
    assert passes_at(0, static) == ("complete",)
    assert passes_at(10**6, dynamic) == ("gated", "complete")
    assert passes_at(29, two_stages) == ("gated", "complete")
    assert passes_at(30, two_stages) == ("gated",)


@pytest.mark.slow
def test_full_size_dit_s2_trains_a_step():
    experiment = read_experiment(
        changed(STATIC, model=dict(), data=dict(name="synthetic", batch_size=8), mesh=dict(data=1, fsdp=1))
        | dict(model=dict(size="S/2", side=32, routers="first_on"))
    )
    mesh = make_mesh(MeshConfig(1, 1, 1), devices=jax.devices()[:1])
    model = Model(published_config("S/2", side=32, routers="first_on"))
    state = init_state(model.init(jax.random.key(0)), build_optimizer(experiment.optimizer))
    update = compile_update(model, experiment, ("gated", "complete"), mesh, state)
    image = np.random.default_rng(0).standard_normal((8, 32, 32, 4), np.float32)
    state, metrics = update(state, dict(image=image, label=np.arange(8, dtype=np.int32)))
    assert int(state.skipped) == 0 and bool(jnp.isfinite(metrics["loss/total"]))
