"""The scheduler of diffusers' pipeline says which diffusion a model was trained on, and comes back."""

import json

import numpy as np
import pytest

from dydit_jax.checkpoints import Weights, load_weights, save_weights
from dydit_jax.convert.conversion import Conversion, convert
from dydit_jax.convert.diffusers_scheduler import read_scheduler, scheduler_config
from dydit_jax.convert.exporting import Export, export
from dydit_jax.diffusion.process import Diffusion
from dydit_jax.diffusion.samplers import SamplingConfig
from dydit_jax.diffusion.schedules import make_schedule
from dydit_jax.errors import InputError


@pytest.mark.parametrize("schedule, steps", [("linear", 1000), ("linear", 500), ("squared_cosine", 1000)])
def test_scheduler_has_the_process_of_the_model(schedule, steps):
    process = Diffusion(schedule=schedule, train_steps=steps)
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDIMScheduler.from_config(scheduler_config(process))
    np.testing.assert_allclose(scheduler.alphas_cumprod, make_schedule(process).alphas_cumprod, rtol=2e-4)
    assert len(scheduler.betas) == steps


COSINE = Diffusion("squared_cosine", 500)


@pytest.mark.parametrize(
    "described, process",
    [
        (scheduler_config(Diffusion()), Diffusion()),
        (scheduler_config(Diffusion("linear", 500)), Diffusion("linear", 500)),
        (scheduler_config(COSINE), COSINE),
        (dict(beta_schedule="squaredcos_cap_v2", num_train_timesteps=1000), Diffusion("squared_cosine")),
        (dict(trained_betas=np.linspace(1e-4, 0.02, 1000, dtype=np.float32).tolist()), Diffusion()),
    ],
)
def test_scheduler_says_the_process_of_the_model(described, process, tmp_path):
    path = tmp_path / "scheduler_config.json"
    path.write_text(json.dumps(dict(num_train_timesteps=1000) | described))
    assert read_scheduler(path) == process


@pytest.mark.parametrize(
    "change, message",
    [
        (
            dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012),
            "'scaled_linear'.*known",
        ),
        (dict(beta_start=0.00085), "'beta_start': 0.00085, 'beta_end': 0.02, no trained_betas, 1000 steps.*known"),
        (dict(num_train_timesteps=500), "500 steps.*known"),
        (dict(trained_betas=[0.1, 0.2]), "all betas, 1000 steps"),
        (dict(rescale_betas_zero_snr=True), "can't be sampled on here"),
        (dict(prediction_type="v_prediction"), "prediction_type 'v_prediction'; here networks predict noise"),
        (dict(num_train_timesteps=10**12), "scheduler_config.json: diffusion.train_steps must be"),
        (dict(num_train_timesteps="many"), "'many' num_train_timesteps"),
        (dict(beta_start=10**400), "can't be sampled on here"),
    ],
)
def test_schedules_that_are_not_here_are_refused(change, message, tmp_path):
    path = tmp_path / "scheduler_config.json"
    path.write_text(json.dumps(scheduler_config(Diffusion()) | change))
    with pytest.raises(InputError, match=message):
        read_scheduler(path)


def test_schedule_of_the_pipeline_comes_back_and_is_no_guess(tiny, tmp_path):
    model, params = tiny
    weights = Weights(model.config, COSINE, SamplingConfig(), params, {})
    save_weights(tmp_path / "ours.safetensors", weights)
    export(Export(str(tmp_path / "ours.safetensors"), str(tmp_path / "pipe"), "diffusers"))
    for source in ("pipe", "pipe/transformer"):
        report = convert(Conversion(str(tmp_path / source), str(tmp_path / "back.safetensors"), overwrite=True))
        assert load_weights(tmp_path / "back.safetensors").process == COSINE
        assert not [doubt for doubt in report.doubts if doubt.startswith(("schedule", "train_steps"))]
    with pytest.raises(InputError, match="config.json says schedule squared_cosine, but --schedule says linear"):
        convert(Conversion(str(tmp_path / "pipe"), str(tmp_path / "out"), schedule="linear"))
