"""A flow through every job: train, sample, go on, analyze; and by steps of its own choice."""

import csv
import json

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import DYNAMIC_FLOW, GOLDEN, changed, channels_last, relative_error
from runs import make_run
from test_flow import sit  # noqa: F401

from dydit_jax import Pipeline
from dydit_jax.diffusion.process import Diffusion, Flow, noise_first, spread_times
from dydit_jax.diffusion.samplers import SamplingConfig
from dydit_jax.drawing.loss_figures import draw_losses
from dydit_jax.errors import InputError
from dydit_jax.jobs.analyze import Analysis, analyze
from dydit_jax.jobs.sample import Request, sample
from dydit_jax.jobs.train import train_and_evaluate
from dydit_jax.sampling import adaptive


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A work directory with two steps of a DySiT that measured its EMA."""
    workdir = tmp_path_factory.mktemp("runs") / "flow"
    tracking = dict(every_steps=1, samples_every_steps=2, sample_labels=(1, 2))
    train_and_evaluate(changed(DYNAMIC_FLOW, train=dict(steps=2, ema_decay=0.5), tracking=tracking), workdir)
    return workdir


def rows_of(path) -> list[dict]:
    return list(csv.DictReader(path.open()))


@pytest.mark.slow
def test_training_measures_a_flow(trained):
    metrics = json.loads((trained / "metrics.jsonl").read_text().splitlines()[-1])
    losses = [metrics[f"ema/loss_t{tenth / 10:g}"] for tenth in (1, 3, 5, 7, 9)]
    assert np.isfinite(losses).all() and metrics["loss/gated_mse"] > 0 and "loss/gated_vb" not in metrics
    assert (trained / "samples/00000002.png").is_file()


@pytest.mark.slow
def test_set_of_a_flow_says_what_it_is(trained, tmp_path):
    out = tmp_path / "set"
    sample(Request(str(trained), str(out), num_images=3, batch_size=3, routing=True, process="flow"))
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["process"] == {"name": "flow"} and "diffusion" not in manifest
    steps = rows_of(out / "steps.csv")
    assert [float(row["timestep"]) for row in steps] == [0, 0.5, 0.5, 1]
    assert [row["passes"] for row in steps] == ["2", "2", "2", "1"]  # guided up to 0.6
    with pytest.raises(InputError, match="was trained as a flow and predicts nothing that could be sampled as diff"):
        sample(Request(str(trained), str(tmp_path / "other"), num_images=1, process="diffusion"))
    with pytest.raises(InputError, match="timestep must be from 0.0 to 1.0, not 1.5; the process is flow"):
        Pipeline.load(trained).routing(np.zeros((1, 8, 8, 1), np.float32), [1], 1.5)


@pytest.mark.slow
def test_set_of_a_flow_grows_and_is_the_gated_one(trained, tmp_path):
    request = dict(checkpoint=str(trained), batch_size=3)
    sample(Request(out=str(tmp_path / "set"), num_images=2, **request))
    sample(Request(out=str(tmp_path / "set"), num_images=5, **request))
    sample(Request(out=str(tmp_path / "whole"), num_images=5, mode="gated", **request))
    grown, whole = (np.load(tmp_path / name / "samples.npz")["arr_0"] for name in ("set", "whole"))
    assert np.abs(grown.astype(int) - whole).max() <= 1


@pytest.mark.slow
def test_losses_of_a_flow_are_shown_over_its_time(trained, tmp_path):
    request = Analysis((str(trained),), str(tmp_path / "out"), num_examples=4, num_timesteps=3, labels=("1",))
    losses = analyze(request)["flow"]
    assert losses.shape == (4, 3) and np.isfinite(losses).all()
    assert [row["timestep"] for row in rows_of(tmp_path / "out/losses.csv")] == ["0", "0.5", "1"]
    routing = Pipeline.load(trained).routing(np.zeros((1, 8, 8, 1), np.float32), [1], 0.25)
    assert routing.heads.shape == (1, 1, 2)


@pytest.mark.parametrize("process", [Diffusion(), Flow()])
def test_loss_figures_run_from_noise_to_image(process):
    """Where the noise is: on the left, whichever way the process counts its time."""
    times = spread_times(process, 3)
    assert times.tolist() == ([0, 500, 999] if process.name == "diffusion" else [0, 0.5, 1])
    order = noise_first(process, times)
    figure = draw_losses(times[order], dict(model=np.ones((2, 3))))
    left, right = figure.axes[0].get_xlim()
    assert (left > right) == (process.name == "diffusion")


# --- Steps of its own choice -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["guided", pytest.param("plain", marks=pytest.mark.slow)])
def test_adaptive_solver_finds_what_many_small_steps_find(sit, kind, monkeypatch):  # noqa: F811
    pytest.importorskip("diffrax")
    reference = np.load(GOLDEN / "sit_transport.npz")
    z = jnp.asarray(channels_last(reference["z"]))
    monkeypatch.setattr(adaptive, "first_noise", lambda keys, shape: z)
    sampling = SamplingConfig(sampler="heun", steps="4", guidance=4.0 if kind == "guided" else 1.0)
    run = make_run(*sit, sampling=sampling, process=Flow())
    found = adaptive.draw_adaptively(run, reference["y"], rtol=1e-6)
    final = lambda name: channels_last(reference[f"{name}/{kind}/final"])[: len(z)]
    assert relative_error(found.images, final("ode_fine")) < 1e-4
    assert relative_error(found.images, final("ode_dopri5")) < 3e-3  # it is itself that far from the truth
    assert (found.steps < 50).all()


def test_adaptive_solver_needs_a_flow_and_a_constant_scale(tiny):
    refused = [
        (Diffusion(), {}, "gated", "needs the process flow"),
        (Flow(), dict(guidance=2.0, guidance_interval=(0.0, 0.5)), "gated", "a constant scale of guidance alone"),
        (Flow(), dict(clip=1.0), "gated", "leave out sampling.clip"),
        (Flow(), {}, "fast", "mode"),
    ]
    for process, settings, mode, message in refused:
        run = make_run(*tiny, sampling=SamplingConfig(sampler="euler", steps="4", **settings), process=process)
        with pytest.raises(InputError, match=message):
            adaptive.draw_adaptively(run, [1], mode=mode)
    run = make_run(*tiny, sampling=SamplingConfig(sampler="euler", steps="4"), process=Flow())
    with pytest.raises(InputError, match="Labels must be from 0 to 9"):
        adaptive.draw_adaptively(run, [11])
