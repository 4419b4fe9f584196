"""FID while training: evaluate.py's numbers for the images that sample.py draws, and the best checkpoint stays."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import STATIC, changed
from stand_ins import few_numbers_for_inception, write_tiny_reference

from dydit_jax.checkpoints import CheckpointConfig, Run, load_weights
from dydit_jax.checkpoints.reading import saved_steps
from dydit_jax.errors import InputError, StopError
from dydit_jax.jobs import judging, steps
from dydit_jax.jobs.evaluate import Evaluation, evaluate
from dydit_jax.jobs.sample import Request, sample
from dydit_jax.jobs.train import train_and_evaluate
from dydit_jax.runtime.sharding import MeshConfig, make_mesh
from dydit_jax.training.experiment import read_experiment

IMAGES = 12
SCORES = ("fid", "sfid", "inception_score", "precision", "recall")


@pytest.fixture
def tiny_judge(tmp_path):
    """Put a tiny network in Inception's place; return the file of a reference's statistics."""
    with few_numbers_for_inception():
        yield write_tiny_reference(tmp_path / "statistics.npz")


def measured(reference, **tracking) -> dict:
    """Return the config of a run that measures after every second step, with few-step images."""
    settings = dict(metrics_every_steps=2, metrics_reference=str(reference), metrics_images=IMAGES)
    sampling = dict(sampler="ddim", steps="10", clip=1.0)
    return changed(STATIC, tracking=settings | dict(metrics_steps="2") | tracking, sampling=sampling)


def scores_of(workdir, step: int) -> dict:
    """Return what the run has written of a step's scores."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    [line] = [line for line in lines if line["step"] == step and "ema/fid" in line]
    return {name: line[f"ema/{name}"] for name in SCORES}


def require_same_as_evaluate(run, step: int, reference, out) -> None:
    """Compare the scores of a step with those of `evaluate.py` for the images that `sample.py` draws."""
    overrides = dict(steps="2")
    sample(Request(str(run), str(out), num_images=IMAGES, from_step=step, mode="gated", overrides=overrides))
    [record] = evaluate(Evaluation((str(out),), reference=str(reference)))
    assert scores_of(run, step) == {name: record[name] for name in SCORES}


def test_metrics_are_those_of_the_images_that_are_sampled_from_the_checkpoint(tiny_judge, tmp_path, monkeypatch):
    config, run = changed(measured(tiny_judge), train=dict(steps=2)), tmp_path / "run"
    train_and_evaluate(config, run)
    require_same_as_evaluate(run, 2, tiny_judge, tmp_path / "set")
    scores, best = scores_of(run, 2), json.loads((run / "best.json").read_text())
    value = scores["fid"]
    assert best == dict(step=2, metric="fid", value=value, by_step={"2": value}, measured=best["measured"])
    assert best["measured"]["images"] == IMAGES and best["measured"]["sampling"]["steps"] == "2"
    # A run that was stopped before it had measured its checkpoint does so when it goes on.
    (run / "best.json").unlink()
    (run / "metrics.jsonl").unlink()
    # A notice to leave is heard meanwhile.
    with monkeypatch.context() as patch, pytest.raises(StopError, match="step 2 is saved") as stopped:
        patch.setattr(steps.PreemptionNotice, "came", lambda self: True)
        train_and_evaluate(config, run)
    assert stopped.value.code == 75 and not (run / "best.json").exists()
    train_and_evaluate(config, run)
    assert json.loads((run / "best.json").read_text()) == best and scores_of(run, 2) == scores


@pytest.mark.slow
def test_a_measured_run_is_the_run_that_is_not_measured(tiny_judge, tmp_path):
    run, plain = tmp_path / "run", tmp_path / "plain"
    train_and_evaluate(measured(tiny_judge), run)
    train_and_evaluate(measured(tiny_judge, metrics_every_steps=0), plain)
    weights = [load_weights(workdir / "weights.safetensors").params for workdir in (run, plain)]
    jax.tree.map(np.testing.assert_array_equal, *weights)
    for step in (2, 4):
        require_same_as_evaluate(run, step, tiny_judge, tmp_path / f"set{step}")
    best = json.loads((run / "best.json").read_text())
    values = {step: scores_of(run, step)["fid"] for step in (2, 4)}
    assert best["by_step"] == {str(step): value for step, value in values.items()}
    assert (best["step"], best["value"]) == min(values.items(), key=lambda item: item[1])


def test_the_best_checkpoint_is_kept_until_another_is_the_best(tmp_path):
    items, kept = dict(params=dict(x=jnp.zeros(3))), []
    with Run(tmp_path, CheckpointConfig(keep=1)) as run:
        for step, best in ((1, 1), (2, 2), (3, 2), (4, 2), (5, 5), (6, 5)):
            run.save(step, items, {})
            run.wait()
            run.keep_best(best)
            kept.append(saved_steps(tmp_path))
    assert kept == [[1], [1, 2], [2, 3], [2, 4], [2, 5], [5, 6]]


def test_the_best_checkpoint_stays_where_a_run_goes_on_with_other_settings(tmp_path):
    items, kept = dict(params=dict(x=jnp.zeros(3))), []
    for start in (1, 3):  # the second start measures nothing
        with Run(tmp_path, CheckpointConfig(keep=1)) as run:
            for step in (start, start + 1):
                run.save(step, items, {})
                run.wait()
                kept.append(saved_steps(tmp_path))
        (tmp_path / "best.json").write_text(json.dumps(dict(step=2, by_step={"2": 1.0})))
    # A run that goes back to an older step has set it aside.
    with Run(tmp_path, CheckpointConfig(keep=1), from_step=1) as run:
        run.set_aside(after=1)
        for step in (2, 3):
            run.save(step, items, {})
            run.wait()
            kept.append(saved_steps(tmp_path))
    assert kept == [[1], [2], [2, 3], [2, 4], [2], [3]]


class FakeRun:
    """What a judge tells a run."""

    best = None

    def keep_best(self, step):
        self.best = step


@pytest.mark.parametrize(
    ("step", "there", "best", "due"),
    [(6, (2, 4, 6), 4, False), (2, (2,), 2, False), (8, (6, 8), 6, True), (0, (), None, False)],
)
def test_a_run_that_goes_on_knows_its_best_checkpoint_among_those_that_are_there(
    tiny_judge, tmp_path, step, there, best, due
):
    for number in there:
        (tmp_path / "checkpoints" / str(number)).mkdir(parents=True)
    judge, run = judging.Judge(read_experiment(measured(tiny_judge)), make_mesh(MeshConfig())), FakeRun()
    values = {"2": 3.0, "4": 1.0, "6": 2.0}
    record = dict(step=4, metric="fid", value=1.0, by_step=values, measured=judge._measured)
    (tmp_path / "best.json").write_text(json.dumps(record))
    judge.open(tmp_path, run, step)
    assert run.best == best and judge.is_due(step) == due and not judge.is_due(step + 1) and judge.is_due(10)
    # With other settings the values can't be compared; the best checkpoint stays.
    other = judging.Judge(read_experiment(measured(tiny_judge, metrics_images=20)), make_mesh(MeshConfig()))
    other.open(tmp_path, run, step)
    assert run.best == best and other.is_due(step) == (step > 0)


@pytest.mark.parametrize(
    "content", ["{}", "[", '{"by_step": {"x": 1.0}}', '{"by_step": {"2": null}}', '{"by_step": {}}']
)
def test_damaged_values_are_one_line(tiny_judge, tmp_path, content):
    (tmp_path / "best.json").write_text(content)
    judge = judging.Judge(read_experiment(measured(tiny_judge)), make_mesh(MeshConfig()))
    with pytest.raises(InputError, match=r"best\.json .*remove it, which forgets what was measured"):
        judge.open(tmp_path, FakeRun(), 2)


@pytest.mark.parametrize(
    ("tracking", "sections", "message"),
    [
        (dict(metrics_reference=""), {}, "metrics_every_steps needs tracking.metrics_reference"),
        (dict(metrics_images=1), {}, "tracking.metrics_images must be from 2"),
        (dict(metrics_every_steps=-1), {}, "tracking.metrics_every_steps must be at least 0"),
        (dict(metrics_sampler="ddmi"), {}, "Unknown sampler 'ddmi'"),
        (dict(metrics_steps="2000"), {}, "2000"),
        (dict(metrics_reference="nowhere.npz"), {}, "There is no file or folder nowhere.npz"),
        (
            {},
            dict(model=dict(channels=4), data=dict(name="synthetic")),
            "model draws 4, which are latents; name their decoder",
        ),
        (
            dict(metrics_every_steps=0, samples_every_steps=2),
            dict(model=dict(channels=4), data=dict(name="synthetic")),
            "model draws 4, which are latents; name their decoder",
        ),
        ({}, dict(sampling=dict(autoencoder="nowhere")), "no published autoencoder of that name"),
    ],
)
def test_what_can_not_be_measured_is_refused_before_the_training_starts(
    tiny_judge, tmp_path, tracking, sections, message
):
    config = changed(measured(tiny_judge, **tracking), **sections)
    with pytest.raises(InputError, match=message):
        train_and_evaluate(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_statistics_of_another_network_are_refused_before_the_training_starts(tiny_judge, tmp_path, monkeypatch):
    monkeypatch.setattr(judging, "load_inception", lambda name: ({}, "another"))
    with pytest.raises(InputError, match="statistics.npz holds statistics of another network"):
        train_and_evaluate(measured(tiny_judge), tmp_path / "run")
    assert not (tmp_path / "run").exists()
