"""An image depends on weights, settings, seed and its index, and on nothing else."""

import dataclasses
import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
from conftest import relative_error

from dydit_jax.diffusion.process import Diffusion
from dydit_jax.diffusion.samplers import SamplingConfig
from dydit_jax.errors import InputError
from dydit_jax.fast.narrow import narrow
from dydit_jax.models.dit import Layer
from dydit_jax.models.execution import Dense
from dydit_jax.runtime.aot import describe_call
from dydit_jax.runtime.sharding import MeshConfig, make_mesh, shardings
from dydit_jax.sampling import runner, segment
from dydit_jax.sampling.generate import SamplingRun
from dydit_jax.sampling.guidance import guide
from dydit_jax.sampling.noise import uniform_labels

SAMPLING = SamplingConfig(sampler="ddim", eta=1.0, steps="6", clip=1.0, guidance=2.0)


def draw(tiny, labels, **settings):
    return runs.draw(*tiny, labels, **dict(dict(sampling=SAMPLING), **settings))


def test_image_does_not_depend_on_its_batch(tiny):
    together = draw(tiny, [1, 2, 3, 4]).images
    alone = draw(tiny, [3], indices=[2]).images
    np.testing.assert_allclose(alone[0], together[2], atol=1e-5)
    assert np.abs(together[2] - together[3]).max() > 0.1


def test_image_depends_on_the_seed(tiny):
    assert np.abs(draw(tiny, [1]).images - draw(tiny, [1], seed=1).images).max() > 0.1
    np.testing.assert_array_equal(draw(tiny, [1]).images, draw(tiny, [1]).images)


@pytest.mark.parametrize("devices", [1, 4])
def test_weights_as_a_training_shards_them_draw_the_same_images(tiny, devices):
    model, params = tiny
    mesh = make_mesh(MeshConfig(data=1, fsdp=devices), jax.devices()[:devices])
    sharded = jax.device_put(params, shardings(mesh, params))
    settings = dict(mesh=mesh if devices > 1 else None, sampling=dataclasses.replace(SAMPLING, steps="2"))
    images = draw((model, sharded), [1, 2, 3, 4], **settings).images
    np.testing.assert_allclose(images, draw(tiny, [1, 2, 3, 4], sampling=settings["sampling"]).images, atol=1e-5)


def test_record_has_the_open_gates(tiny):
    model, params = tiny
    reports = []
    samples = draw(tiny, [1, 2], report=reports.append)
    assert samples.timesteps.tolist() == [999, 799, 599, 400, 200, 0]
    assert samples.routing.heads.shape == (6, 2, 4) and samples.routing.tokens.shape == (6, 2, 16)
    heads, groups = model.time_gates(params, jnp.asarray(samples.timesteps))
    np.testing.assert_array_equal(samples.routing.heads, heads)
    np.testing.assert_array_equal(samples.routing.groups, groups)
    assert sum(reports) == 6
    complete = draw(tiny, [1, 2], mode="complete")
    np.testing.assert_allclose(complete.macs, model.config.macs.complete, rtol=1e-6)
    assert samples.macs.mean() < model.config.macs.complete


def test_every_program_is_compiled_once(tiny, monkeypatch, program_folder):
    model, params = tiny
    sampling = dataclasses.replace(SAMPLING, steps="7")  # no other test compiles these
    settings = dict(sampling=sampling, process=Diffusion())
    lowered = []

    def counted(function, arguments, settings, **code):
        call = describe_call(function, arguments, settings, **code)
        return dataclasses.replace(call, lower=lambda: (lowered.append(call.name), call.lower())[1])

    monkeypatch.setattr(runner, "describe_call", counted)
    run = SamplingRun(model, params, **settings)
    plan = run.plan(3)
    first = run.draw([1, 2], plan=plan)
    assert len(lowered) == len(set(lowered)) == 3
    again = run.draw([1, 2], plan=plan)
    assert len(lowered) == 3
    np.testing.assert_array_equal(first.images, again.images)
    lowered.clear()
    longer = SamplingRun(model, params, **dict(settings, sampling=dataclasses.replace(sampling, steps="20")))
    longer.draw([1, 2], mode="gated")
    assert len(lowered) == 1  # for ten pieces


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_modulations_of_all_steps_are_those_of_each(tiny, monkeypatch, platform):
    model, params = tiny
    model = dataclasses.replace(model, platform=platform)
    every = (tuple(range(model.config.heads)),) * model.config.depth
    blocks = narrow(params["blocks"], heads=every, groups=every, dtype=model.dtype)
    layers = [Layer(block, None, None, Dense(platform)) for block in blocks]
    timesteps, labels = jnp.asarray([900, 500, 7]), jnp.asarray([1, 3])
    ahead = segment.modulations_ahead(model, params, layers, timesteps, labels)
    for step, t in enumerate(timesteps):
        each = model.modulations(params, layers, jnp.full(2, t), labels)
        of_step = jax.tree.map(operator.itemgetter(step), ahead)
        for one, expected in zip(of_step, each, strict=True):
            np.testing.assert_allclose(jnp.stack([*one]), expected, atol=1e-6)
    assert len(ahead) == model.config.depth + 1
    monkeypatch.setattr(segment, "MOST_MODULATION_BYTES", 100)
    assert segment.modulations_ahead(model, params, layers, timesteps, labels) is None


def test_guidance_of_one_runs_the_labels_alone(tiny):
    model, params = tiny
    x, labels = jax.random.normal(jax.random.key(0), (2, 8, 8, 1)), jnp.asarray([1, 2])
    network = functools.partial(model.apply, params, mode="gated")
    output, routing = guide(network, x, jnp.asarray(5), labels, scale=None, guided_channels="all", config=model.config)
    expected, _ = model.apply(params, x, jnp.full(2, 5), labels, mode="gated")
    np.testing.assert_array_equal(output, expected)
    assert len(routing.heads) == 2


def test_guidance_can_cover_all_channels(golden_v2):
    model, params = golden_v2.model, golden_v2.params
    x, t, labels = golden_v2.inputs
    network = functools.partial(model.apply, params, mode="gated")
    run = lambda channels: guide(
        network,
        jnp.asarray(x),
        jnp.asarray(t[0]),
        jnp.asarray(labels),
        scale=4.0,
        guided_channels=channels,
        config=model.config,
    )[0]
    three, all_four = run("first_three"), run("all")
    np.testing.assert_array_equal(three[..., :3], all_four[..., :3])
    np.testing.assert_array_equal(three[..., 4:], all_four[..., 4:])
    conditional, _ = model.apply(params, x, np.full(4, t[0]), labels, mode="gated")
    assert relative_error(three[..., 3], conditional[..., 3]) < 1e-5
    assert relative_error(all_four[..., 3], conditional[..., 3]) > 1e-2


def test_uniform_labels_depend_on_seed_and_index():
    labels = uniform_labels(0, np.arange(1000), 10)
    assert np.bincount(labels, minlength=10).min() > 60
    np.testing.assert_array_equal(uniform_labels(0, np.arange(500, 510), 10), labels[500:510])
    assert (uniform_labels(1, np.arange(1000), 10) != labels).any()


@pytest.mark.parametrize("labels", [[11], [-1], [3, 12]])
def test_labels_out_of_range_are_refused(tiny, labels):
    with pytest.raises(InputError, match="from 0 to 9, or 10 for no class"):
        draw(tiny, labels)
