"""Low-rank updates: zero at the start, equal beside and inside the kernels, narrowed with them, small."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import relative_error
from runs import draw, make_run

from dydit_jax.checkpoints import Weights
from dydit_jax.diffusion.process import Diffusion
from dydit_jax.diffusion.samplers import SamplingConfig
from dydit_jax.errors import InputError
from dydit_jax.models.config import published_config
from dydit_jax.models.dit import Model
from dydit_jax.models.lora import TARGETS, LoRAConfig, fold_block, fold_constant, is_low_rank, names_of
from dydit_jax.models.trainable import PARTS, join_params, split_params
from dydit_jax.pipeline import Pipeline
from dydit_jax.sampling.noise import first_noise, image_keys
from dydit_jax.trees import flatten, unflatten

SLOW = functools.partial(pytest.param, marks=pytest.mark.slow)
KINDS = {
    "constant": LoRAConfig(rank=3, alpha=6.0),
    "some targets": LoRAConfig(rank=2, targets=("qkv", "down")),
    "of the timestep": LoRAConfig(rank=2, alpha=8.0, experts=3),
}


def updated(tiny, lora, *, deviation=0.1) -> tuple:
    """Return the tiny model with updates that are not at their initial zeros."""
    model, base = tiny
    model = dataclasses.replace(model, lora=lora)
    leaves = {name: leaf for name, leaf in flatten(model.init(jax.random.key(3))).items() if is_low_rank(name)}
    keys = jax.random.split(jax.random.key(4), len(leaves))
    noisy = {
        name: leaf + deviation * jax.random.normal(key, leaf.shape) for (name, leaf), key in zip(leaves.items(), keys)
    }
    return model, unflatten(flatten(base) | noisy)


def inputs(model, size=3):
    x = jax.random.normal(jax.random.key(5), (size, 8, 8, 1))
    return x, jnp.asarray([30, 500, 960])[:size], jnp.asarray([0, 4, 10])[:size]


def run(model, params, mode="gated"):
    return jax.jit(functools.partial(model.apply, mode=mode))(params, *inputs(model))[0]


def test_updates_change_nothing_at_the_start(tiny):
    model, base = tiny
    own = dataclasses.replace(model, lora=KINDS["of the timestep"])
    fresh = unflatten(flatten(own.init(jax.random.key(3))) | flatten(base))
    np.testing.assert_array_equal(run(own, fresh), run(model, base))


@pytest.mark.parametrize("kind, platform", [("some targets", "cpu"), SLOW("constant", "gpu"), SLOW("constant", "tpu")])
def test_folded_updates_equal_those_beside_the_kernels(tiny, kind, platform):
    model, params = updated(tiny, KINDS[kind])
    model = dataclasses.replace(model, matmul_precision="highest", platform=platform)
    plain = dataclasses.replace(model, lora=None)
    beside, folded = run(model, params), run(plain, fold_constant(params, model.lora))
    assert relative_error(folded, beside) < 1e-6
    assert relative_error(run(plain, tiny[1]), beside) > 0.01


@pytest.mark.parametrize("most", [0, 16], ids=["product", "sum"])
def test_folded_updates_are_the_formula(tiny, most, monkeypatch):
    """W + (alpha / rank) sum_i w_i B_i A, in float64, for every target."""
    monkeypatch.setattr("dydit_jax.models.lora.MOST_SUMMED", most)
    lora = KINDS["of the timestep"]
    _, params = updated(tiny, lora)
    block = jax.tree.map(lambda leaf: leaf[1], params["blocks"])
    weights = np.array([0.5, 0.3, 0.2])
    folded = fold_block(block, jnp.asarray(weights), lora)
    for target, part in TARGETS.items():
        a, b = (np.asarray(block[part][name], np.float64) for name in names_of(target))
        rank = a.shape[-1]
        mixed = sum(weight * expert.reshape(rank, -1) for weight, expert in zip(weights, b))
        kernel = np.asarray(block[part][target], np.float64)
        update = lora.alpha / rank * a.reshape(-1, rank) @ mixed
        if target == "qkv":  # [D,3,H,K] to [3,D,H,K]
            update = np.moveaxis(update.reshape(kernel.shape[1], 3, *kernel.shape[2:]), 1, 0)
        np.testing.assert_allclose(folded[part][target], kernel + update.reshape(kernel.shape), atol=1e-6)
    assert not any(is_low_rank(name) for name in flatten(folded))


@pytest.mark.parametrize("mode", ["fast", SLOW("gated"), SLOW("complete")])
def test_updates_of_the_timestep_are_folded_at_every_step(tiny, mode):
    """Sampling folds them into narrowed kernels, step by step; here the network runs them beside the kernels."""
    model, params = updated(tiny, KINDS["of the timestep"])
    sampling = SamplingConfig(sampler="ddim", steps="4", guidance=1.0)
    labels = np.array([1, 7])
    folded = draw(model, params, labels, mode=mode, sampling=sampling)
    expected = by_hand(model, params, labels, sampling, "complete" if mode == "complete" else "gated")
    assert relative_error(folded.images, expected) < 1e-5


def by_hand(model, params, labels, sampling, mode):
    """Return DDIM's images with the updates beside the kernels."""
    table = make_run(model, params, sampling=sampling).table
    alphas = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    x = np.asarray(first_noise(image_keys(0, np.arange(len(labels))), (8, 8, 1)), np.float64)
    times = list(table.timestep)
    apply = jax.jit(functools.partial(model.apply, mode=mode))
    for t, following in zip(times, [*times[1:], None]):
        output, _ = apply(params, jnp.asarray(x, jnp.float32), jnp.full(len(labels), t), jnp.asarray(labels))
        noise = np.asarray(output[..., :1], np.float64)
        x0 = (x - np.sqrt(1 - alphas[t]) * noise) / np.sqrt(alphas[t])
        after = 1.0 if following is None else alphas[following]
        x = np.sqrt(after) * x0 + np.sqrt(1 - after) * noise
    return x


def test_updates_of_experts_have_the_weights_of_their_timestep(tiny):
    """One expert alone is a constant update; with several, each timestep has its own."""
    lora = KINDS["of the timestep"]
    model, params = updated(tiny, lora)
    params["blocks"]["lora_mixture"]["bias"] = jnp.zeros((2, 3)).at[:, 1].set(1e3)  # expert 1 at every timestep
    blocks = {part: dict(leaves) for part, leaves in params["blocks"].items() if part != "lora_mixture"}
    for target, part in TARGETS.items():
        name = names_of(target)[1]
        blocks[part][name] = blocks[part][name][:, 1:2]
    constant = dataclasses.replace(model, lora=dataclasses.replace(lora, experts=1))
    assert relative_error(run(model, params), run(constant, params | dict(blocks=blocks))) < 1e-6


@pytest.mark.parametrize("kind", ["constant", "of the timestep"])
def test_a_pipeline_folds_updates_once(tiny, kind):
    lora = KINDS[kind]
    model, params = updated(tiny, lora)
    sampling = SamplingConfig(sampler="ddim", steps="2", clip=1.0)
    pipeline = Pipeline(Weights(model.config, Diffusion(), sampling, params, {}, lora))
    first = pipeline.prepare(pipeline.sampling()).draw(np.zeros(4, int), mode="gated").images
    pipeline.prepare(pipeline.sampling(steps="3"))
    again = dataclasses.replace(sampling, eta=0.5)
    assert np.isfinite(pipeline.prepare(again).draw(np.zeros(4, int), mode="gated").images).all()
    expected = make_run(model, params, sampling=sampling).draw(np.zeros(4, int), mode="gated").images
    assert relative_error(first, expected) < 1e-4  # on four devices sums are rounded otherwise: 1.1e-5


def test_split_parts_join_to_the_whole_and_hold_what_is_named(tiny):
    model, params = updated(tiny, KINDS["of the timestep"])
    for trainable in (("routers",), ("routers", "labels"), ("lora",), tuple(PARTS)):
        trained, frozen = split_params(params, trainable)
        jax.tree.map(np.testing.assert_array_equal, join_params(trained, frozen), params)
        assert not set(flatten(trained)) & set(flatten(frozen))
    assert set(flatten(split_params(params, ("routers", "labels"))[0])) == {
        name for name in flatten(params) if "_router/" in name or name == "label_embed/table"
    }
    assert split_params(params, ("everything",)) == (params, {})


@pytest.mark.parametrize(
    "lora, share", [(LoRAConfig(), 0.0150), (LoRAConfig(rank=4, alpha=4.0, experts=4), 0.0150)], ids=["one", "four"]
)
def test_updates_of_the_largest_model_are_few(lora, share):
    config = published_config("XL/2", side=32, routers="first_on")
    leaves = flatten(Model(config, lora=lora).abstract_params())
    size = lambda wanted: sum(leaf.size for name, leaf in leaves.items() if wanted(name))
    low_rank, whole = size(is_low_rank), size(lambda name: not is_low_rank(name))
    assert 0.005 < low_rank / whole <= share
    trained = size(lambda name: any(part(name) for part in PARTS.values()))
    assert trained / whole < 0.05  # so that AdamW's moments shrink by 95 %


@pytest.mark.parametrize("targets", [("qkv", "attention"), (), ("up", "up")])
def test_targets_that_do_not_exist_are_an_error_that_lists_them(targets):
    with pytest.raises(InputError, match="lora.targets must be some of qkv, out, up, down"):
        LoRAConfig(targets=targets)
