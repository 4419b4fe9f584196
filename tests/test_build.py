"""Configs become checked records; every mistake is found before anything is compiled."""

import dataclasses
import importlib
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import DYNAMIC, ROOT, changed

from dydit_jax.cli.train import known_configs
from dydit_jax.errors import InputError
from dydit_jax.models.precision import resolve_precision, resolve_remat
from dydit_jax.training.experiment import config_sections, differences, read_experiment
from dydit_jax.training.optimizer import OptimizerConfig, build_learning_rate, build_optimizer

CONFIGS = [name for name in known_configs() if name != "default"]


def config_of(name: str) -> dict:
    return importlib.import_module(f"dydit_jax.configs.{name}").get_config().to_dict()


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_is_valid_and_explains_itself(name):
    config = config_of(name)
    if config["model"]["classes"] == -1:  # counted in the data
        config["model"]["classes"] = 3
    read_experiment(config)
    text = (ROOT / "dydit_jax" / "configs" / f"{name}.py").read_text()
    assert "python train.py --config" in text.split('"""')[1]


@pytest.mark.parametrize("rival", ["fashion_narrow", "fashion_shallow"])
def test_static_rivals_cost_what_the_dydit_costs_and_see_as_many_images(rival):
    ours, parent, theirs = (read_experiment(config_of(name)) for name in ("fashion_dydit", "fashion_dit", rival))
    macs = ours.model.macs
    blocks = macs.layers * (macs.attention + macs.mlp)
    dynamic = macs.fixed + macs.routers + ours.loss.budget * blocks
    assert theirs.model.macs.complete == pytest.approx(dynamic, rel=0.05)
    assert theirs.train.steps == theirs.optimizer.decay_steps == parent.train.steps + ours.train.steps
    assert theirs.data == parent.data == ours.data


def test_default_config_lists_every_knob():
    config = config_of("default")
    for section, cls in config_sections().items():
        extra = {"size"} if section == "model" else set()
        assert (
            set(config.get(section, {})) == {field.name for field in dataclasses.fields(cls)} | extra
        )  # a flow has none


@pytest.mark.parametrize(
    "section, key, value, message",
    [
        ("sampling", "sampler", "ddmi", "Unknown sampler 'ddmi'; known: ab4, ddim, ddpm"),
        ("sampling", "steps", "2000", "section of 1000"),
        ("model", "size", "M/2", "Unknown model size 'M/2'"),
        ("model", "size", "XL/2", "fixes depth, heads, patch, width"),
        ("model", "heads", 5, "must divide model.width"),
        ("model", "patch", 3, "must divide model.side"),
        ("data", "name", "digit", "Unknown dataset 'digit'; known: digits, idx, images, latents, synthetic, tfds"),
        ("data", "batch_size", 0, "from 1 to"),
        ("optimizer", "learning_rate", -1.0, "from 0.0 to 1000"),
        ("optimizer", "decay", "linear", "known: constant, cosine"),
        ("optimizer", "decay_steps", None, "needs optimizer.decay_steps"),
        ("train", "precision", "half", "known: auto, bfloat16, float32, highest"),
        ("train", "ema_decay", 1.5, "from 0.0 to 1.0"),
        ("loss", "budget", 2.0, "from 0.0 to 1.0"),
        ("loss", "terms", ("mse", "vbb"), "Unknown loss.terms 'vbb'; known: budget, mse, vb"),
        ("loss", "terms", ("mse", "mse"), "one term or more, each of them once"),
        ("loss", "terms", (), "one term or more"),
        ("loss", "weights", (1.0,), "one number for each of the 3 terms, or none, not 1"),
        ("model", "time_router", "mlp", "Unknown model.time_router 'mlp'; known: linear"),
        ("model", "time_router", "linear,mlp", "Unknown model.time_router 'mlp'; known: linear"),
        ("mesh", "fsdp", 0, "at least 1"),
        ("mesh", "fsdp", -1, "Only one of"),
        ("checkpoint", "keep", 0, "at least 1"),
        ("tracking", "every_steps", 0, "at least 1"),
        ("train", "steps", 10**19, "from 1 to 2147483647"),
        ("optimizer", "warmup_steps", 10**19, "from 0 to 2147483647"),
        ("optimizer", "decay_steps", 10**19, "at most 2147483647"),
        ("loss", "budget_warmup_steps", 10**19, "from 1 to 2147483647"),
        ("lora", "rank", 10**19, "from 1 to 65536"),
        ("lora", "experts", 10**19, "from 1 to 1024"),
        ("tracking", "stall_seconds", 1e12, "from 1.0 to 1000000000"),
        ("train", "stepz", 1, "Unknown key train.stepz; Did you mean train.steps"),
    ],
)
def test_mistakes_in_a_config_are_refused(section, key, value, message):
    config = config_of("digits_dit")
    config.setdefault(section, {})[key] = value
    with pytest.raises(InputError, match=message):
        read_experiment(config)


def test_unknown_section_is_refused():
    with pytest.raises(InputError, match="Unknown section 'modle'"):
        read_experiment(dict(config_of("digits_dit"), modle={}))


def test_runs_of_before_a_setting_go_on_with_its_default():
    new = dict(data=dict(name="digits", batch_size=8, flip=True, image_key="image", label_key="label"))
    old = dict(data=dict(name="digits", batch_size=8))
    assert differences(old, new) == []
    new["data"]["flip"] = False
    assert differences(old, new) == ["data.flip: True there, False here"]


def test_differences_leave_out_what_may_change():
    old, new = config_of("digits_dit"), config_of("digits_dit")
    new["train"]["steps"] += 1
    new["checkpoint"]["keep"] += 1
    new["data"]["path"], new["train"]["init_from"] = "moved/in256", "moved/base.safetensors"
    assert differences(old, new) == []
    new["data"]["batch_size"] = 7
    assert differences(old, new) == ["data.batch_size: 64 there, 7 here"]


def test_routers_have_their_own_learning_rate():
    config = OptimizerConfig(learning_rate=1e-3, router_multiplier=10.0)
    optimizer = build_optimizer(config)
    params = {"blocks": {"token_router": {"bias_in": jnp.ones(2)}, "mlp": {"up": jnp.ones(2)}}}
    params["head_router"] = {"kernel": jnp.ones(2)}
    updates, _ = optimizer.update(jax.tree.map(jnp.ones_like, params), optimizer.init(params), params)
    np.testing.assert_allclose(updates["blocks"]["mlp"]["up"], -1e-3, rtol=1e-4)
    np.testing.assert_allclose(updates["blocks"]["token_router"]["bias_in"], -1e-2, rtol=1e-4)
    np.testing.assert_allclose(updates["head_router"]["kernel"], -1e-2, rtol=1e-4)


def test_weight_decay_is_that_of_optax_and_leaves_a_stored_table_of_positions_alone():
    config = OptimizerConfig(learning_rate=1e-3, weight_decay=0.1)
    theirs = optax.adamw(config.learning_rate, weight_decay=config.weight_decay)
    params = {"patch_embed": {"positions": jnp.ones(2), "bias": jnp.full(2, 3.0)}}
    gradients = {"patch_embed": {"positions": jnp.zeros(2), "bias": jnp.ones(2)}}
    optimizer = build_optimizer(config)
    updates, state = optimizer.update(gradients, optimizer.init(params), params)
    wanted, layout = theirs.update(gradients, theirs.init(params), params)
    np.testing.assert_array_equal(updates["patch_embed"]["bias"], wanted["patch_embed"]["bias"])
    np.testing.assert_array_equal(updates["patch_embed"]["positions"], 0)
    # Checkpoints of earlier versions fit.
    layout = (layout[0], layout[1], optax.ScaleByScheduleState(layout[0].count))
    assert jax.tree.structure(state[1]) == jax.tree.structure(layout)


def test_limits_that_would_make_nan_are_refused():
    for name, value in (
        ("beta1", 1.0),
        ("beta2", 1.0),
        ("beta1", 1 - 1e-9),
        ("clip_norm", math.inf),
        ("skip_norm", 1e39),
    ):
        with pytest.raises(InputError, match=f"optimizer.{name} must be from"):
            OptimizerConfig(learning_rate=1e-3, **{name: value})


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("limit", [1.0, 100.0])
def test_clipping_is_that_of_optax(limit, known):
    optimizer = build_optimizer(OptimizerConfig(learning_rate=1.0, clip_norm=limit))
    gradients = dict(a=jnp.asarray([3.0, -4.0]), b=jnp.asarray(12.0))  # of norm 13
    extra = dict(norm=optax.tree.norm(gradients)) if known else {}
    _, state = optimizer.update(gradients, optimizer.init(gradients), gradients, **extra)
    clipped, _ = optax.clip_by_global_norm(limit).update(gradients, optax.EmptyState())
    # After one step the first moment is a tenth of what came in.
    jax.tree.map(
        lambda found, wanted: np.testing.assert_allclose(found, 0.1 * wanted, rtol=1e-6), state[1][0].mu, clipped
    )


def test_learning_rate_warms_up_and_decays():
    rate = build_learning_rate(OptimizerConfig(learning_rate=1.0, decay="cosine", warmup_steps=10, decay_steps=100))
    np.testing.assert_allclose([rate(0), rate(5), rate(10), rate(100)], [0, 0.5, 1, 0.05], atol=1e-6)


def test_products_are_kept_unless_the_config_says_otherwise():
    assert resolve_remat("auto") == "dots"
    assert [resolve_remat(name) for name in ("none", "dots", "block")] == ["none", "dots", "block"]
    with pytest.raises(InputError, match="remat"):
        resolve_remat("all")


def test_precision_follows_the_backend():
    assert resolve_precision("auto") == (jnp.dtype("float32"), "default")
    assert resolve_precision("bfloat16")[0] == jnp.dtype("bfloat16")
    assert resolve_precision("highest") == (jnp.dtype("float32"), "highest")


def test_configs_of_earlier_versions_are_read_and_continued():
    config = changed(DYNAMIC, model=dict(label_init_std=0.5))
    earlier = changed(DYNAMIC, model=dict(label_deviation=0.5, time_deviation=0.02))
    assert read_experiment(earlier) == read_experiment(config)
    assert differences(earlier, config) == []
    assert differences(changed(earlier, model=dict(label_deviation=0.4)), config) == [
        "model.label_init_std: 0.4 there, 0.5 here"
    ]
