"""Guidance in one pass: nothing changes at the start, the target is the mixture, every scale takes one evaluation."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import DYNAMIC, STATIC, changed, relative_error
from runs import SAMPLING, make_run

from dydit_jax.checkpoints import Weights, save_weights
from dydit_jax.convert.exporting import Export, export
from dydit_jax.diffusion.process import PROCESSES, Diffusion, perturb
from dydit_jax.errors import InputError
from dydit_jax.jobs.train import train_and_evaluate
from dydit_jax.loading import load_checkpoint
from dydit_jax.models.dit import Model
from dydit_jax.sampling.noise import first_noise, image_keys
from dydit_jax.training.experiment import read_experiment
from dydit_jax.training.initialize import starting_weights
from dydit_jax.training.objective import draw_examples, run_passes

NULL = 10


@pytest.fixture(scope="module")
def conditioned(tiny):
    """The tiny model that is conditioned on beta, with an embedding of it that is not zero."""
    model, base = tiny
    model = dataclasses.replace(model, config=dataclasses.replace(model.config, guidance_free=True))
    kernel = 0.1 * jax.random.normal(jax.random.key(7), (256, 256))
    return model, base | dict(guidance_embed=dict(kernel=kernel))


def inputs(size=4):
    x = jax.random.normal(jax.random.key(5), (size, 8, 8, 1))
    return x, jnp.asarray([30, 500, 960, 200])[:size], jnp.asarray([0, 4, NULL, 9])[:size]


def run(model, params, beta=None, mode="gated"):
    return jax.jit(functools.partial(model.apply, mode=mode))(params, *inputs(), beta=beta)


def test_fresh_embedding_changes_nothing_and_routers_never_see_it(tiny, conditioned):
    model, params = conditioned
    before, routing = run(*tiny)
    fresh = params | dict(guidance_embed=dict(kernel=jnp.zeros((256, 256))))
    np.testing.assert_array_equal(run(model, fresh, jnp.full(4, 0.3))[0], before)
    guided, of_guided = run(model, params, jnp.full(4, 0.3))
    np.testing.assert_array_equal(of_guided.heads, routing.heads)
    np.testing.assert_array_equal(of_guided.groups, routing.groups)
    # What has no class has nothing to be guided to: as without guidance, beta = 1.
    alone, _ = run(model, params, jnp.ones(4))
    np.testing.assert_array_equal(guided[2], alone[2])
    assert all(relative_error(guided[i], alone[i]) > 1e-3 for i in (0, 1, 3))
    np.testing.assert_array_equal(run(model, params)[0], alone)


@pytest.mark.parametrize("process", ["diffusion", "flow"])
def test_terms_see_the_mixture_with_the_prediction_without_a_class(conditioned, process):
    """Beta eps(x, t, y, beta) + (1 - beta) eps(x, t, none, 1), the variance left alone; for velocities too."""
    model, params = conditioned
    loss = dict(guidance_free=True, label_dropout=0.3, terms=("mse", "budget"))
    config = changed(DYNAMIC, loss=loss, model=dict(guidance_free=True), process=dict(name=process))
    config["sampling"] = dict(sampler="ddim", steps="10")
    settings = dict(model=model, loss=read_experiment(config).loss, process=PROCESSES[process](), passes=("gated",))
    batch = dict(image=jnp.ones((16, 8, 8, 1)), label=jnp.arange(16) % 10)
    examples = draw_examples(batch, jax.random.key(3), **settings)
    dropped = np.asarray(examples["labels"]) == NULL
    beta = np.asarray(examples["beta"])
    assert 0 < dropped.sum() < 16 and (beta[dropped] == 1).all() and beta[~dropped].std() > 0.15
    [seen] = jax.jit(lambda params: [i.output for i in run_passes(params, examples, 0, **settings)])(params)
    xt = perturb(settings["process"], examples["x0"], examples["noise"], examples["t"])
    apply = jax.jit(functools.partial(model.apply, mode="gated"))
    noise = dict(noise=examples["router_noise"])
    own, _ = apply(params, xt, examples["t"], examples["labels"], beta=examples["beta"], **noise)
    none, _ = apply(params, xt, examples["t"], jnp.full(16, NULL), beta=jnp.ones(16), **noise)
    expected = beta[:, None, None, None] * own[..., :1] + (1 - beta)[:, None, None, None] * none[..., :1]
    assert relative_error(seen[..., :1], expected) < 1e-5
    assert relative_error(seen[..., 1:], own[..., 1:]) < 1e-6


def test_prediction_without_a_class_has_no_gradient(conditioned):
    """Of a batch with labels, the row of "no class" is read by that prediction alone."""
    model, params = conditioned
    config = changed(DYNAMIC, loss=dict(guidance_free=True, complete_steps=0), model=dict(guidance_free=True))
    experiment = read_experiment(config)
    settings = dict(model=model, loss=experiment.loss, process=experiment.process, passes=("gated", "complete"))
    batch = dict(image=jnp.ones((4, 8, 8, 1)), label=jnp.arange(4))
    examples = draw_examples(batch, jax.random.key(3), **settings) | dict(labels=jnp.arange(4), beta=jnp.full(4, 0.4))
    total = lambda params: sum(i.output.sum() for i in run_passes(params, examples, 0, **settings))
    gradient = jax.jit(jax.grad(total))(params)["label_embed"]["table"]
    assert not gradient[NULL].any() and gradient[:4].any(axis=1).all()


@pytest.mark.parametrize("mode", ["fast", "complete"])
def test_sampling_runs_once_per_step_with_beta_of_the_scale(conditioned, mode):
    model, params = conditioned
    sampling = dataclasses.replace(SAMPLING, sampler="ddim", steps="4", guidance=2.5, guidance_interval=(0, 600))
    run = make_run(model, params, sampling=sampling)
    assert run.evaluations.tolist() == [1, 1, 1, 1]
    labels = np.array([3, NULL])
    images = run.draw(labels, mode=mode).images
    alphas, times = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000)), list(run.table.timestep)
    x = np.asarray(first_noise(image_keys(0, np.arange(2)), (8, 8, 1)), np.float64)
    apply = jax.jit(functools.partial(model.apply, mode="complete" if mode == "complete" else "gated"))
    for t, following in zip(times, [*times[1:], None]):
        beta = jnp.full(2, 1 / 2.5 if t <= 600 else 1.0)
        output, _ = apply(params, jnp.asarray(x, jnp.float32), jnp.full(2, t), jnp.asarray(labels), beta=beta)
        noise = np.asarray(output[..., :1], np.float64)
        x0 = (x - np.sqrt(1 - alphas[t]) * noise) / np.sqrt(alphas[t])
        after = 1.0 if following is None else alphas[following]
        x = np.sqrt(after) * x0 + np.sqrt(1 - after) * noise
    assert relative_error(images, x) < 1e-5


def test_scales_below_one_are_refused(conditioned):
    with pytest.raises(InputError, match="in one pass, for scales from 1 on; sampling.guidance is 0.5. Two passes"):
        make_run(*conditioned, sampling=dataclasses.replace(SAMPLING, guidance=0.5))


@pytest.mark.parametrize(
    "sections, message",
    [
        (dict(loss=dict(guidance_free=True)), "loss.guidance_free needs model.guidance_free=True"),
        (
            dict(loss=dict(guidance_free=True, label_dropout=0.0), model=dict(guidance_free=True)),
            "needs a loss.label_dropout between 0 and 1",
        ),
    ],
)
def test_what_the_loss_needs_is_said(sections, message):
    with pytest.raises(InputError, match=message):
        read_experiment(changed(STATIC, **sections))


@pytest.fixture(scope="module")
def base(tiny, tmp_path_factory):
    """A file of the tiny model, and the config of a training of guidance in one pass that starts from it."""
    model, params = tiny
    path = tmp_path_factory.mktemp("base") / "base.safetensors"
    save_weights(path, Weights(model.config, Diffusion(), SAMPLING, params, {}))
    return changed(
        DYNAMIC,
        model=dict(dataclasses.asdict(model.config), guidance_free=True),
        loss=dict(guidance_free=True, complete_steps=0),
        train=dict(init_from=str(path), steps=2),
    )


def test_training_starts_from_a_model_without_the_embedding(tiny, base):
    experiment = read_experiment(base)
    weights = starting_weights(Model(experiment.model), experiment)
    jax.tree.map(np.testing.assert_array_equal, weights.params, tiny[1])


@pytest.mark.slow
def test_run_learns_the_embedding_and_says_that_its_model_is_told(base, tmp_path):
    state = train_and_evaluate(base, tmp_path / "run")
    assert float(jnp.abs(state.params["guidance_embed"]["kernel"]).max()) > 0
    weights = load_checkpoint(tmp_path / "run")
    assert weights.model.guidance_free
    with pytest.raises(InputError, match="is conditioned on the guidance scale"):
        export(Export(tmp_path / "run" / "weights.safetensors", tmp_path / "out.pt"))
