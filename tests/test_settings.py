"""Settings of JAX from outside decide neither images nor labels nor what a training step makes."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import STATIC

from dydit_jax.diffusion.process import Diffusion
from dydit_jax.diffusion.samplers import SamplingConfig
from dydit_jax.errors import InputError
from dydit_jax.jobs import analyze, evaluate, prepare_latents, sample, search_solver, train
from dydit_jax.models.dit import Model
from dydit_jax.runtime.settings import own_settings
from dydit_jax.sampling.generate import generate
from dydit_jax.sampling.noise import uniform_labels
from dydit_jax.training.experiment import build_update, read_experiment
from dydit_jax.training.optimizer import build_optimizer
from dydit_jax.training.update import init_state

FOREIGN = {
    "jax_default_prng_impl": "rbg",
    "jax_threefry_partitionable": False,
    "jax_enable_x64": True,
    "jax_numpy_dtype_promotion": "strict",
    "jax_numpy_rank_promotion": "raise",
    "jax_default_matmul_precision": "bfloat16",
}
SAMPLING = SamplingConfig(sampler="ddpm", steps="3", clip=1.0)


@contextlib.contextmanager
def set_from_outside(settings: dict):
    """Set what an environment or a calling program would; the caller finds it as it was set."""
    before = {name: jax.config.values[name] for name in settings}
    try:
        for name, value in settings.items():
            jax.config.update(name, value)
        yield
        assert {name: jax.config.values[name] for name in settings} == settings
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


def images(tiny, mode: str) -> np.ndarray:
    model, params = tiny
    found = generate(model, params, [1, 2], sampling=SAMPLING, process=Diffusion(), seed=2**40, mode=mode)
    assert found.images.dtype == np.float32
    return found.images


@pytest.mark.parametrize("mode", ["fast", "gated"])
@pytest.mark.parametrize("name", FOREIGN)
def test_images_are_the_same_under_any_setting(tiny, name, mode):
    expected = images(tiny, mode)
    with set_from_outside({name: FOREIGN[name]}):
        np.testing.assert_array_equal(images(tiny, mode), expected)


@pytest.mark.parametrize("name", FOREIGN)
def test_labels_are_the_same_under_any_setting(name):
    labels = own_settings()(uniform_labels)
    expected = labels(3, np.arange(100), 10)
    with set_from_outside({name: FOREIGN[name]}):
        found = labels(3, np.arange(100), 10)
    assert found.dtype == jnp.int32
    np.testing.assert_array_equal(found, expected)


@pytest.fixture(scope="module")
def training_step():
    """A training step as a job runs it, compiled under whatever is set when it is called: () -> its results."""
    experiment = read_experiment(STATIC)
    model = Model(experiment.model)
    optimizer = build_optimizer(experiment.optimizer)
    update = jax.jit(build_update(experiment, model, ("complete",)))

    @own_settings()
    def step():
        state = init_state(jax.jit(model.init)(jax.random.key(0)), optimizer)
        image = np.linspace(-1, 1, 8 * 64, dtype=np.float32).reshape(8, 8, 8, 1)
        return jax.device_get(update(state, dict(image=image, label=np.arange(8, dtype=np.int32))))

    return step


@pytest.mark.parametrize(
    "name", [next(iter(FOREIGN)), *(pytest.param(name, marks=pytest.mark.slow) for name in list(FOREIGN)[1:])]
)
def test_a_training_step_is_the_same_under_any_setting(training_step, name):
    expected = training_step()
    with set_from_outside({name: FOREIGN[name]}):
        jax.tree.map(np.testing.assert_array_equal, training_step(), expected)


@pytest.mark.parametrize(
    "job, first",
    [
        (train.train_and_evaluate, "dydit_jax.jobs.train.read_experiment"),
        (sample.sample, "dydit_jax.jobs.sample.load_checkpoint"),
        (analyze.analyze, "dydit_jax.jobs.analyze.load_checkpoint"),
        (evaluate.evaluate, "dydit_jax.jobs.evaluate.open_images"),
        (prepare_latents.prepare_latents, "dydit_jax.jobs.prepare_latents.DataConfig"),
        (search_solver.search_solver, "dydit_jax.jobs.search_solver.load_checkpoint"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_jobs_run_under_their_own_settings(job, first, monkeypatch):
    class Seen(Exception):
        """The first thing that the job does was reached."""

    with own_settings():
        own = [getattr(jax.config, name) for name in FOREIGN]
    assert not set(own) & set(FOREIGN.values()) - {True, False}

    def look(*_, **__):
        assert [getattr(jax.config, name) for name in FOREIGN] == own
        raise Seen

    class Anything:
        def __getattr__(self, name):
            return ["x"] if name in ("checkpoints", "samples") else "x"

    monkeypatch.setattr(first, look)
    arguments = ({}, "run") if job is train.train_and_evaluate else (Anything(),)
    with set_from_outside(FOREIGN), pytest.raises(Seen):
        job(*arguments)


def test_an_error_puts_the_settings_back(tiny):
    with set_from_outside(dict(jax_enable_x64=True)), pytest.raises(InputError, match="Unknown mode"):
        generate(*tiny, [1], sampling=SAMPLING, process=Diffusion(), mode="slow")


@pytest.mark.parametrize("inside, outside", [(True, False), (False, True), (True, True)])
def test_a_context_of_the_caller_changes_nothing(tiny, inside, outside):
    expected = images(tiny, "fast")
    with set_from_outside(dict(jax_enable_x64=outside)), jax.enable_x64(inside):
        np.testing.assert_array_equal(images(tiny, "fast"), expected)
