"""From Python: one object that draws, decodes and shows what a model opens."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import SAMPLING, make_run

from dydit_jax.checkpoints import Weights
from dydit_jax.diffusion.process import Diffusion
from dydit_jax.drawing.pictures import to_uint8
from dydit_jax.errors import InputError
from dydit_jax.jobs.sample import Request, sample
from dydit_jax.models.dit import Model
from dydit_jax.pipeline import DrawJob, Pipeline
from dydit_jax.runtime.aot import compile_for
from dydit_jax.runtime.sharding import MeshConfig, make_mesh


@pytest.fixture(scope="module")
def pipeline(tiny):
    model, params = tiny
    sampling = dataclasses.replace(SAMPLING, steps="4", guidance=1.0, clip=1.0)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    return Pipeline(Weights(model.config, Diffusion(), sampling, params, {}), mesh=mesh)


def test_pictures_are_those_of_a_run(pipeline, tiny):
    drawn = pipeline([1, 2], seed=3, mode="gated")
    samples = make_run(*tiny, sampling=pipeline.weights.sampling).draw([1, 2], seed=3, mode="gated")
    np.testing.assert_array_equal(drawn.pixels, to_uint8(samples.images))
    assert [picture.size for picture in drawn.pictures] == [(8, 8)] * 2
    np.testing.assert_array_equal(drawn.routing.tokens, samples.routing.tokens)
    assert drawn.macs == pytest.approx(samples.macs.mean()) and drawn.macs < pipeline.macs.complete


@pytest.mark.parametrize("mode", ["fast", "gated"])
def test_what_a_job_says_of_itself_does_not_depend_on_its_batches(pipeline, mode):
    """The last batch is filled up; those images count nowhere."""
    labels, sampling = np.array([0, 1, 2, 0, 1]), pipeline.sampling(guidance=2.0)
    records = []
    for size in (5, 4, 2, 8):
        job = DrawJob(labels, np.arange(5), sampling, mode=mode, batch_size=size)
        *_, last = pipeline.draw(job)
        records.append(last.result.samples)
        assert records[-1].usage.images == 5
    for record in records[1:]:
        np.testing.assert_allclose(record.routing.tokens, records[0].routing.tokens, rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(record.macs, records[0].macs, rtol=1e-6)


def test_a_second_call_compiles_nothing(pipeline, monkeypatch):
    first = pipeline([1, 2])
    described = []
    monkeypatch.setattr(
        "dydit_jax.runtime.aot.compile_for", lambda *given: described.append(given) or compile_for(*given)
    )
    np.testing.assert_array_equal(pipeline([1, 2]).pixels, first.pixels)
    assert not described


def test_routing_is_that_of_a_pass_over_the_noisy_images(pipeline, tiny):
    model, params = tiny
    images = np.random.default_rng(0).uniform(-1, 1, (3, 8, 8, 1)).astype(np.float32)
    routing = pipeline.routing(images, [0, 1, 2], 600)
    heads, groups = model.time_gates(params, jnp.full(3, 600))
    np.testing.assert_array_equal(routing.heads, heads)
    np.testing.assert_array_equal(routing.groups, groups)
    assert routing.tokens.shape == (3, 2, 16) and set(np.unique(routing.tokens)) <= {0, 1}
    assert (pipeline.routing(images, [0, 1, 2], 0).tokens != routing.tokens).any()
    with pytest.raises(InputError, match="whole number from 0 to 999, not 1000"):
        pipeline.routing(images, [0, 1, 2], 1000)


@pytest.mark.parametrize(
    "labels, message",
    [
        ([999, -1], "labels must hold numbers from 0 to 9 .10 for no class., not 999, -1[.]"),
        ([1], "2 images came with 1 labels; give one label for each image[.]"),
    ],
)
def test_routing_wants_a_label_that_the_model_has_for_each_image(pipeline, labels, message):
    with pytest.raises(InputError, match=message):
        pipeline.routing(np.zeros((2, 8, 8, 1)), labels, 600)


def test_a_call_returns_the_images_of_all_its_batches(pipeline, monkeypatch):
    monkeypatch.setattr("dydit_jax.pipeline.DrawJob", functools.partial(DrawJob, batch_size=2))
    drawn = pipeline([0, 1, 2], mode="gated")
    np.testing.assert_array_equal(to_uint8(drawn.samples.images), drawn.pixels)


def test_settings_may_be_numbers_of_numpy(pipeline):
    found = pipeline.sampling(guidance=np.float64(2), guidance_interval=np.array([100, 700]), clip=jnp.float32(1))
    assert found == pipeline.sampling(guidance=2.0, guidance_interval=(100.0, 700.0), clip=1.0)
    scales = pipeline.sampling(guidance_scales=[np.float32(1), np.int64(2)]).guidance_scales
    assert scales == (1.0, 2.0) and set(map(type, scales)) == {float}
    with pytest.raises(InputError, match="sampling.guidance must be of type float, not 'two'"):
        pipeline([1], guidance="two")


def test_latents_without_a_decoder_are_refused_before_anything_is_written(tiny_config, tmp_path, monkeypatch):
    config = dataclasses.replace(tiny_config, channels=4)
    params = jax.jit(Model(config).init)(jax.random.key(0))
    latents = Pipeline(Weights(config, Diffusion(), SAMPLING, params, {}))
    message = "the model draws 4, which are latents; name their decoder as sampling.autoencoder"
    with pytest.raises(InputError, match=message):
        latents([1])
    monkeypatch.setattr("dydit_jax.jobs.sample.load_checkpoint", lambda *_: latents.weights)
    with pytest.raises(InputError, match=message):
        sample(Request("latents", str(tmp_path / "out"), labels=["1"]))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "settings, message", [(dict(steps="0"), "steps"), (dict(sampler="ddmi"), "ddim"), (dict(guidance=-1.0), "guidance")]
)
def test_settings_that_are_not_allowed_are_refused(pipeline, settings, message):
    with pytest.raises(InputError, match=message):
        pipeline([1], **settings)
