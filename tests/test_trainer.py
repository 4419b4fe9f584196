"""Runs train, stop, go on exactly, skip bad batches, and refuse foreign work directories."""

import dataclasses
import errno
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import types
import weakref
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import DYNAMIC, DYNAMIC_FLOW, ROOT, STATIC, changed
from PIL import Image

from dydit_jax.checkpoints import save_weights
from dydit_jax.data import sources
from dydit_jax.drawing.pictures import draw_grid
from dydit_jax.errors import InputError, StopError
from dydit_jax.jobs import ema, steps
from dydit_jax.jobs import train as trainer
from dydit_jax.jobs.train import train_and_evaluate
from dydit_jax.loading import load_checkpoint
from dydit_jax.models.dit import Model
from dydit_jax.runtime import files
from dydit_jax.runtime.sharding import make_mesh
from dydit_jax.training.experiment import read_experiment
from dydit_jax.training.initialize import first_params, starting_leaves, starting_weights


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


@pytest.mark.parametrize(
    "config", [DYNAMIC, pytest.param(DYNAMIC_FLOW, marks=pytest.mark.slow)], ids=["diffusion", "flow"]
)
def test_resumed_run_equals_the_uninterrupted_one(tmp_path, config):
    whole = train_and_evaluate(config, tmp_path / "whole")
    train_and_evaluate(changed(config, train=dict(steps=2)), tmp_path / "parts")
    parts = train_and_evaluate(config, tmp_path / "parts")
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
    leaves = starting_leaves(starting_weights(model, experiment), model, experiment)
    params = first_params(model, experiment, make_mesh(experiment.mesh), leaves)
    source = load_checkpoint(trained).params
    np.testing.assert_array_equal(params["blocks"]["mlp"]["up"], source["blocks"]["mlp"]["up"])
    assert bool((params["head_router"]["bias"] == 15).all())
    # With every gate open, the DyDiT is the DiT that it starts from.
    x, t, labels = jnp.ones((2, 8, 8, 1)), jnp.asarray([10, 900]), jnp.asarray([1, 2])
    dynamic, _ = model.apply(params, x, t, labels, mode="gated")
    static, _ = Model(load_checkpoint(trained).model).apply(source, x, t, labels, mode="complete")
    np.testing.assert_array_equal(dynamic, static)


def test_weights_that_a_run_started_from_do_not_stay_in_memory(trained, tmp_path, monkeypatch):
    kept, load = [], trainer.starting_weights

    def load_and_watch(*given):
        found = load(*given)
        kept.append(weakref.ref(found))  # of an array the CPU may use the memory as it lies
        return found

    def look(state, parts):
        raise StopError("gone" if kept[0]() is None else "still there")

    monkeypatch.setattr(trainer, "starting_weights", load_and_watch)
    monkeypatch.setattr(trainer, "run_steps", look)
    with pytest.raises(StopError, match="gone"):
        train_and_evaluate(changed(STATIC, train=dict(init_from=str(trained))), tmp_path / "run")


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


# --- Being stopped -------------------------------------------------------------------------------


def test_run_asked_to_stop_saves_its_step_and_goes_on_from_it(tmp_path, monkeypatch):
    whole = train_and_evaluate(changed(STATIC, train=dict(steps=5)), tmp_path / "whole")

    class Stopping(steps.PreemptionNotice):
        def came(self):
            if self._points == 2:  # after step 3
                os.kill(os.getpid(), signal.SIGTERM)
            return super().came()

    config = changed(STATIC, train=dict(steps=5), checkpoint=dict(every_steps=100))
    with monkeypatch.context() as patch, pytest.raises(StopError, match="step 3 is saved") as stopped:
        patch.setattr(steps, "PreemptionNotice", Stopping)
        train_and_evaluate(config, tmp_path / "run")
    assert stopped.value.code == 75
    jax.tree.map(np.testing.assert_array_equal, whole, train_and_evaluate(config, tmp_path / "run"))


def test_run_whose_batches_are_all_refused_stops(tmp_path):
    config = changed(STATIC, optimizer=dict(skip_norm=1e-9), train=dict(steps=50, max_skips=4))
    with pytest.raises(StopError, match="Step 4: the last 4 batches were all skipped .*newest checkpoint is of step 2"):
        train_and_evaluate(config, tmp_path / "run")


def test_weights_that_are_not_finite_are_not_trained(trained, tmp_path):
    weights = load_checkpoint(trained)
    params = jax.tree.map(lambda leaf: np.where(leaf == leaf.max(), np.nan, leaf), weights.params)
    save_weights(tmp_path / "bad.safetensors", dataclasses.replace(weights, params=params))
    config = changed(STATIC, train=dict(init_from=str(tmp_path / "bad.safetensors")))
    with pytest.raises(StopError, match="state of step 0 holds values that are not finite .*no whole checkpoint yet"):
        train_and_evaluate(config, tmp_path / "run")


def test_state_that_is_not_finite_is_not_saved(trained, tmp_path, monkeypatch):
    """It comes from memory that fails: an update can't make such a state."""
    shutil.copytree(trained, tmp_path / "run")
    monkeypatch.setattr(steps, "all_finite", lambda state: state[2][1][0].count < 6)
    with pytest.raises(StopError, match="state of step 6 holds .* newest whole checkpoint is of step 4"):
        train_and_evaluate(changed(STATIC, train=dict(steps=6)), tmp_path / "run")
    assert load_checkpoint(tmp_path / "run").about["step"] == 4


@pytest.mark.parametrize("failing", ["metrics.jsonl", "00000006.png", "weights.safetensors"])
def test_full_disk_ends_the_run_with_its_newest_checkpoint_named(trained, tmp_path, monkeypatch, failing):
    shutil.copytree(trained, tmp_path / "run")
    settle = files._settle

    def settle_or_fail(partial, mode):
        if partial.name.startswith(failing):
            raise OSError(errno.ENOSPC, "No space left on device")
        settle(partial, mode)

    def fail(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "_settle", settle_or_fail)
    if failing == "metrics.jsonl":
        monkeypatch.setattr(files, "_flush", fail)
    drawn = types.SimpleNamespace(images=np.zeros((12, 8, 8, 1)), mean_macs=1.0)
    monkeypatch.setattr(ema.SamplingRun, "draw", lambda *_, **__: drawn)
    monkeypatch.setattr(steps, "load_decoder", lambda *_: lambda images: images)
    monkeypatch.setattr(steps, "measure_ema", lambda *_: {})
    config = changed(STATIC, train=dict(steps=6), tracking=dict(samples_every_steps=6))
    step = 4 if failing == "metrics.jsonl" else 6
    with pytest.raises(StopError) as stopped:
        train_and_evaluate(config, tmp_path / "run")
    assert stopped.value.code == 1
    said = str(stopped.value)
    assert failing in said and "No space left" in said and f"checkpoint is of step {step}; the same command" in said
    assert "\n" not in said and not list((tmp_path / "run").rglob("*.partial"))


def test_data_that_can_not_be_read_on_the_way_end_the_run_with_its_newest_checkpoint_named(
    trained, tmp_path, monkeypatch
):
    def fail(self, index):
        raise InputError(f"Digit {index} can't be read.")

    monkeypatch.setattr(sources.Digits, "__getitem__", fail)
    with pytest.raises(StopError, match="can't be read. The newest whole checkpoint is of step 4; the same command"):
        train_and_evaluate(changed(STATIC, train=dict(steps=5)), shutil.copytree(trained, tmp_path / "run"))


def test_changed_dataset_is_refused(tmp_path, monkeypatch):
    train_and_evaluate(changed(STATIC, train=dict(steps=2)), tmp_path / "run")
    monkeypatch.setattr(
        sources.Digits, "fingerprint", property(lambda self: "other digits", lambda *_: None), raising=False
    )
    with pytest.raises(InputError, match="is not the one that the run of step 2 was trained on"):
        train_and_evaluate(STATIC, tmp_path / "run")


@pytest.mark.slow
def test_checkpoint_moves_to_other_meshes_and_back(trained, tmp_path):
    for last, size in ((2, 4), (3, 1), (4, 4)):
        devices = jax.devices()[:size]
        with mock.patch.object(trainer, "make_mesh", lambda config, devices=devices: make_mesh(config, devices)):
            config = changed(STATIC, train=dict(steps=last), mesh=dict(data=1, fsdp=-1))
            state = train_and_evaluate(config, tmp_path / "run")
    near = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    jax.tree.map(near, state.ema, load_checkpoint(trained).params)


@pytest.mark.slow
def test_samples_and_profile_are_left_on_the_way(tmp_path):
    tracking = dict(samples_every_steps=2, sample_labels=(1, 2, 3), profile=(1, 2))
    sampling = dict(sampler="ddim", steps="2", clip=1.0)
    config = changed(STATIC, train=dict(steps=4), tracking=tracking, sampling=sampling, mesh=dict(data=2, fsdp=2))
    train_and_evaluate(config, tmp_path / "run")
    grids = sorted((tmp_path / "run" / "samples").iterdir())
    assert [grid.name for grid in grids] == ["00000002.png", "00000004.png"]
    assert Image.open(grids[0]).size == draw_grid(np.zeros((3, 8, 8, 1), np.uint8), 3, ["1", "2", "3"]).size
    assert len(list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))) == 1
    measured = lines(tmp_path / "run")[0]
    assert measured["step"] == 2 and measured["loss/total"] > 0 and measured["ema/macs_share"] == 1
    # A model that has hardly learnt predicts next to nothing: the loss is about the noise's variance.
    assert all(0.5 < measured[f"ema/loss_t{t}"] < 1.5 for t in (100, 300, 500, 700, 900))
    (tmp_path / "run" / "profile.now").touch()
    train_and_evaluate(changed(config, train=dict(steps=12)), tmp_path / "run")
    assert len(list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))) == 2
    assert not (tmp_path / "run" / "profile.now").exists()
    assert [line["step"] for line in lines(tmp_path / "run")] == [2, 4, 6, 8, 10, 12]


PROGRAM = """
import json, sys
import jax
jax.config.update("jax_platforms", "cpu")
from dydit_jax.jobs.train import train_and_evaluate
from dydit_jax.runtime.console import run
config, workdir = sys.argv[1:]
sys.argv[1:] = []
run(lambda: train_and_evaluate(json.loads(config), workdir))
"""


@pytest.mark.slow
def test_full_disk_is_one_line_on_the_terminal(tmp_path):
    """Without the pages that Orbax's threads drop, which a full disk under a checkpoint makes."""
    config = changed(STATIC, train=dict(steps=10**6), mesh=dict(data=1, fsdp=1), checkpoint=dict(every_steps=50))
    config = changed(config, tracking=dict(every_steps=10**6))
    command = [sys.executable, "-c", PROGRAM, json.dumps(config), str(tmp_path / "run")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    while not (tmp_path / "run" / "checkpoints" / "100").exists():
        time.sleep(0.05)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
    said = process.communicate(timeout=120)[1].splitlines()
    assert process.returncode == 1
    [line] = [line for line in said if not re.match(r"\d\d:\d\d:\d\d  ", line)]
    steps = [int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir() if path.name.isdecimal()]
    assert "could not be written" in line and f"newest whole one is of step {max(steps)}" in line


KILLED = """
import json, sys
import jax
jax.config.update("jax_platforms", "cpu")
from dydit_jax.jobs.train import train_and_evaluate
train_and_evaluate(json.loads(sys.argv[1]), sys.argv[2])
"""


def killed_now_and_then(config: dict, workdir, kills: int) -> int:
    """Run a training in processes that are killed at random moments, then to its end; returns how many were killed."""
    generator, done = np.random.default_rng(0), 0
    for attempt in range(kills + 1):
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED, json.dumps(config), str(workdir)], stderr=subprocess.PIPE
        )
        try:
            process.wait(timeout=None if attempt == kills else generator.uniform(3, 12))
        except subprocess.TimeoutExpired:
            process.kill()
            done += 1
            process.wait()
        else:
            assert process.returncode == 0, process.stderr.read().decode()[-2000:]
        process.stderr.close()
    return done


@pytest.mark.slow
def test_killed_runs_end_as_if_nothing_had_happened(tmp_path):
    """20 times kill -9, a checkpoint after every step, so that many fall into the middle of a save."""
    config = changed(STATIC, train=dict(steps=1000), mesh=dict(data=1, fsdp=1), checkpoint=dict(every_steps=1))
    assert killed_now_and_then(config, tmp_path / "killed", 20) >= 15
    killed_now_and_then(config, tmp_path / "whole", 0)
    killed, whole = (load_checkpoint(tmp_path / name / "weights.safetensors").params for name in ("killed", "whole"))
    jax.tree.map(np.testing.assert_array_equal, killed, whole)
    assert [line["loss/total"] for line in lines(tmp_path / "killed")] == [
        line["loss/total"] for line in lines(tmp_path / "whole")
    ]
