"""What a training never showed a model is not sampled unnoticed: "no class", and t = 0 under min_snr."""

import dataclasses

import numpy as np
import pytest
from conftest import DYNAMIC, changed

from dydit_jax.checkpoints import Weights, save_weights
from dydit_jax.diffusion.process import Diffusion
from dydit_jax.diffusion.samplers import SamplingConfig
from dydit_jax.errors import InputError
from dydit_jax.jobs.analyze import Analysis, analyze
from dydit_jax.jobs.sample import Request, sample
from dydit_jax.pipeline import Batch, DrawResult, Pipeline
from dydit_jax.sampling.generate import Samples, generate
from dydit_jax.sampling.guidance import require_trained
from dydit_jax.training.experiment import read_experiment

PLAIN, GUIDED = SamplingConfig(), SamplingConfig(guidance=1.5)


def trained(dropout: float, **train) -> dict:
    return dict(loss=dict(label_dropout=dropout), train=train)


@pytest.mark.parametrize(
    "config, sampling, labels",
    [
        ({}, GUIDED, [10]),
        (dict(loss=None), GUIDED, [3]),
        (trained(0.1), GUIDED, [10]),
        (trained(0.0), PLAIN, [3]),
        (trained(1.0), PLAIN, [10]),
        (dict(trained(0.1), model=dict(guidance_free=True)), PLAIN, [3]),
        (dict(loss=dict(guidance_free=True), model=dict(guidance_free=True)), GUIDED, [3]),
    ],
)
def test_what_was_trained_may_be_asked(config, sampling, labels):
    require_trained(config, sampling, labels=labels, classes=10)


def test_the_one_label_of_a_model_without_classes_was_trained():
    require_trained(trained(0.0), PLAIN, labels=[0, 0], classes=0)


def test_scales_that_were_never_trained_are_refused():
    config = dict(trained(0.1), model=dict(guidance_free=True))
    message = "has seen scales of guidance; this one was trained with model.guidance_free, but not loss.guidance_free"
    with pytest.raises(InputError, match=message):
        require_trained(config, GUIDED, labels=[3], classes=10)
    with pytest.raises(InputError, match=message):
        read_experiment(changed(DYNAMIC, model=dict(guidance_free=True), sampling=dict(guidance=1.5)))


def test_guidance_of_a_model_without_classes_is_refused_before_training():
    with pytest.raises(InputError, match="Guidance needs classes"):
        read_experiment(changed(DYNAMIC, model=dict(classes=0), sampling=dict(guidance=1.5)))


@pytest.mark.parametrize(
    "dropout, sampling, labels, message",
    [
        (0.0, GUIDED, [3], "Guidance of 1.5 needs a model that has seen no class; .* loss.label_dropout 0.0"),
        (0, GUIDED, [], "Guidance of 1.5 needs a model that has seen no class"),
        (0.0, SamplingConfig(guidance=0.0), [3], "Guidance of 0.0"),
        (1.0, GUIDED, [3], "a model that has seen any class; .* loss.label_dropout 1.0"),
        (0.0, PLAIN, [3, 10], "The label 10 needs a model that has seen no class"),
    ],
)
def test_what_was_never_trained_is_refused(dropout, sampling, labels, message):
    with pytest.raises(InputError, match=message) as error:
        require_trained(trained(dropout, init_from=""), sampling, labels=np.asarray(labels, np.int32), classes=10)
    assert "\n" not in str(error.value)


def test_weights_that_a_training_started_from_may_have_it(caplog):
    require_trained(trained(0.0, init_from="dit-xl2-256"), GUIDED, labels=[3], classes=10)
    assert "Whether dit-xl2-256 had, from which it started, is not known." in caplog.text


@pytest.mark.parametrize("steps, warned", [("20", True), ("logsnr:5", True), ("ddim5", True), ("trailing:5", False)])
@pytest.mark.parametrize("weighting", ["min_snr", "none"])
def test_sampling_down_to_a_timestep_that_was_hardly_learnt_is_warned_of(tiny, caplog, steps, warned, weighting):
    model, params = tiny
    about = dict(config=dict(loss=dict(weighting=weighting)))
    pipeline = Pipeline(Weights(model.config, Diffusion(), SamplingConfig(), params, about))
    for _ in range(2):
        pipeline.prepare(pipeline.sampling(sampler="ddim", steps=steps))
    said = [record for record in caplog.records if "end at t = 0" in record.message]
    assert len(said) == (warned and weighting == "min_snr")
    assert not said or "sampling.steps=trailing:5" in said[0].message or steps == "20"


def test_a_training_without_label_dropout_is_refused_guided_samples():
    config = changed(DYNAMIC, loss=dict(label_dropout=0.0))
    read_experiment(changed(config, sampling=dict(guidance=1.0)))
    with pytest.raises(InputError, match="Guidance of 2.0 needs"):
        read_experiment(changed(config, sampling=dict(guidance=2.0)))


@pytest.fixture
def checkpoint(tiny, tmp_path) -> str:
    """A model trained without label dropout whose own sampling is guided."""
    model, params = tiny
    sampling = SamplingConfig(sampler="ddim", steps="2", guidance=2.0)
    path = tmp_path / "weights.safetensors"
    save_weights(path, Weights(model.config, Diffusion(), sampling, params, dict(config=trained(0.0))))
    return str(path)


def test_the_jobs_refuse_before_they_write(checkpoint, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(InputError, match="Guidance of 2.0"):
        sample(Request(checkpoint, str(out), labels=["1"]))
    with pytest.raises(InputError, match="The label 10"):
        sample(Request(checkpoint, str(out), labels=["10"], overrides=dict(guidance=1.0)))
    with pytest.raises(InputError, match="Guidance of 2.0"):
        analyze(Analysis((checkpoint,), str(out), data="digits", num_examples=2, num_timesteps=2))
    assert not out.exists()


def test_a_table_without_a_row_for_no_class_is_refused(tiny):
    model, params = tiny
    short = dict(params, label_embed=dict(table=params["label_embed"]["table"][:-1]))
    sampling = dataclasses.replace(GUIDED, steps="2")
    with pytest.raises(InputError, match="has 10 rows; 10 classes and no class need 11"):
        generate(model, short, [1], sampling=sampling, process=Diffusion())


def test_pipeline_takes_a_scale_an_interval_or_a_scale_per_evaluation(tiny, monkeypatch):
    jobs = []

    def draw(self, job):
        jobs.append(job.sampling)
        samples = Samples(np.zeros((1, 8, 8, 1)), *[None] * 7)
        return iter([Batch(job.indices, np.zeros((1, 8, 8, 1), np.uint8), DrawResult(samples))])

    monkeypatch.setattr(Pipeline, "draw", draw)
    model, params = tiny
    own = SamplingConfig(steps="10", guidance=1.5)
    pipe = Pipeline(Weights(model.config, Diffusion(), own, params, {}))
    pipe([1], guidance=3.0, guidance_interval=(100, 700), sampler="unipc", steps="logsnr:8")
    pipe([1], guidance=[1.0] + 9 * [2], guidance_interval=None)
    assert jobs == [
        SamplingConfig(sampler="unipc", steps="logsnr:8", guidance=3.0, guidance_interval=(100, 700)),
        SamplingConfig(steps="10", guidance_scales=(1.0, *9 * [2.0])),
    ]
    with pytest.raises(InputError, match="Guidance of 2.0 needs a model that has seen no class"):
        unseen = dict(config=trained(0.0))
        Pipeline(Weights(model.config, Diffusion(), PLAIN, params, unseen))([1], guidance=[1.0, 2.0])
