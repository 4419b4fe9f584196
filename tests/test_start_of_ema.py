"""An EMA near its start is warned of, and a run's raw parameters can be taken in its place."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import STATIC, changed

from dydit_jax.checkpoints import CheckpointConfig, Run, Weights, save_weights
from dydit_jax.diffusion.process import Diffusion
from dydit_jax.diffusion.samplers import SamplingConfig
from dydit_jax.errors import InputError
from dydit_jax.jobs.sample import Request, sample
from dydit_jax.loading import load_checkpoint, warn_of_start
from dydit_jax.models.config import read_model
from dydit_jax.models.dit import Model

STEP = 400
SAMPLING = dict(sampler="ddim", steps="2", clip=1.0, guidance=1.0)


@pytest.fixture(scope="module", params=[0.9999, 0.9])
def run(request, tmp_path_factory):
    """A work directory whose EMA is zero and whose parameters are one, and whether that EMA is near its start."""
    workdir = tmp_path_factory.mktemp("run")
    config = changed(STATIC, train=dict(ema_decay=request.param), sampling=SAMPLING)
    (workdir / "config.json").write_text(json.dumps(config))
    shapes = Model(read_model(config["model"])).abstract_params()
    trees = {
        kind: jax.tree.map(lambda leaf, n=n: jnp.full(leaf.shape, n), shapes)
        for n, kind in ((0.0, "ema"), (1.0, "params"))
    }
    with Run(workdir, CheckpointConfig()) as saved:
        saved.save(STEP, trees, dict(data=""))
    return workdir, request.param > 0.99


def test_the_ema_of_a_young_run_is_warned_of(run, caplog):
    workdir, young = run
    found = load_checkpoint(workdir)
    assert not any(leaf.any() for leaf in jax.tree.leaves(found.params))
    message = "After 400 steps at a decay of 0.9999 the EMA still is 96.1 % of what training started from"
    assert (message in caplog.text) == young == ("--weights=params" in caplog.text)


def test_raw_parameters_are_read_without_a_word(run, caplog):
    found = load_checkpoint(run[0], weights="params")
    assert all(np.all(leaf == 1) for leaf in jax.tree.leaves(found.params)) and found.about["step"] == STEP
    assert not caplog.text


def test_samples_are_of_the_weights_asked_for(run, tmp_path):
    manifests = []
    for weights in ("ema", "params"):
        sample(Request(str(run[0]), str(tmp_path / weights), labels=["1"], weights=weights, mode="complete"))
        manifests.append(json.loads((tmp_path / weights / "manifest.json").read_text()))
    assert manifests[0]["checksum"] != manifests[1]["checksum"]


def test_weights_of_a_file_are_warned_of_and_have_no_raw_parameters(tiny, tmp_path, caplog):
    model, params = tiny
    about = dict(config=dict(train=dict(ema_decay=0.999)), step=2000)
    weights = Weights(model.config, Diffusion(), SamplingConfig(), params, about)
    save_weights(tmp_path / "weights.safetensors", weights)
    load_checkpoint(tmp_path)
    assert "the EMA still is 13.5 % of what training started from: its images will be noise" in caplog.text
    caplog.clear()
    about["config"]["train"]["init_from"] = "runs/dit"
    save_weights(tmp_path / "weights.safetensors", weights)
    load_checkpoint(tmp_path)
    assert "13.5 % of what training started from: its images are partly those of the weights before" in caplog.text
    with pytest.raises(InputError, match="--weights=params needs a training's work directory"):
        load_checkpoint(tmp_path, weights="params")
    with pytest.raises(InputError, match="Unknown weights 'raw'; known: ema, params"):
        load_checkpoint(tmp_path, weights="raw")
    caplog.clear()
    save_weights(tmp_path / "weights.safetensors", dataclasses.replace(weights, about=dict(source="dydit_0.7.pth")))
    load_checkpoint(tmp_path)
    assert not caplog.text


@pytest.mark.parametrize("decay, step, share", [(0.9999, 0, "100.0"), (0.9999, 46_000, "1.0"), (1.0, 10**6, "100.0")])
def test_the_share_is_that_of_the_start(caplog, decay, step, share):
    warn_of_start(dict(config=dict(train=dict(ema_decay=decay)), step=step))
    assert f"still is {share} %" in caplog.text


@pytest.mark.parametrize("decay, step", [(0.9999, 47_000), (0.995, 3000), (0.0, 1)])
def test_a_share_below_a_hundredth_is_no_matter(caplog, decay, step):
    warn_of_start(dict(config=dict(train=dict(ema_decay=decay)), step=step))
    assert not caplog.text
