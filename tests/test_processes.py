"""Two processes of four devices each do what one process does, and leave together."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from conftest import DYNAMIC, ROOT, changed
from PIL import Image
from stand_ins import few_numbers_for_inception, mean_for_autoencoder, write_tiny_reference

from dydit_jax.checkpoints.reading import saved_steps
from dydit_jax.errors import InputError
from dydit_jax.jobs.prepare_latents import LatentsRequest, prepare_latents, verify_latents
from dydit_jax.jobs.sample import Request, sample
from dydit_jax.jobs.train import train_and_evaluate
from dydit_jax.loading import load_checkpoint
from dydit_jax.runtime.processes import joined_processes

CONFIG = changed(DYNAMIC, data=dict(batch_size=16), mesh=dict(data=2, fsdp=2, tensor=2), train=dict(steps=6))
SAMPLING = dict(sampler="ddim", steps="2", clip=1.0)


def start(action: str, task: dict, count: int = 2, devices: int = 4) -> list[subprocess.Popen]:
    """Start the processes of a job, each with so many devices."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    return [
        subprocess.Popen(
            [
                sys.executable,
                ROOT / "tests" / "worker.py",
                str(port),
                str(count),
                str(number),
                action,
                json.dumps(task),
            ],
            cwd=ROOT,
            env=dict(os.environ, WORKER_DEVICES=str(devices), PYTHONPATH=str(ROOT)),  # this checkout
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(count)
    ]


def finish(processes: list[subprocess.Popen], code: int = 0) -> list[str]:
    """Wait for all and return what they said."""
    try:
        said = [process.communicate(timeout=240)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [code] * len(processes), said
    return said


def train(workdir, *, steps: int) -> None:
    """Train, or go on, with two processes."""
    config = changed(CONFIG, train=dict(steps=steps), sampling=SAMPLING)
    finish(start("train", dict(config=[config] * 2, workdir=[str(workdir)] * 2)))


def require_same_run(ours, theirs) -> None:
    last = lambda run: json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert last(ours)["step"] == last(theirs)["step"] == 6
    assert last(ours)["loss/total"] == pytest.approx(last(theirs)["loss/total"], rel=1e-5)
    near = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    jax.tree.map(near, load_checkpoint(ours).params, load_checkpoint(theirs).params)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of two processes."""
    workdir = tmp_path_factory.mktemp("pod") / "run"
    train(workdir, steps=6)
    return workdir


def test_two_processes_train_as_one_does(trained, tmp_path):
    train_and_evaluate(changed(CONFIG, mesh=dict(data=4, fsdp=1, tensor=1)), tmp_path / "one")
    require_same_run(trained, tmp_path / "one")


@pytest.mark.slow
def test_two_processes_go_on_as_if_they_had_not_stopped(trained, tmp_path):
    for steps in (3, 6):
        train(tmp_path / "run", steps=steps)
    require_same_run(tmp_path / "run", trained)


@pytest.mark.parametrize("batches", [1, pytest.param(4, marks=pytest.mark.slow)])  # four calibrate, and race forms
def test_two_processes_sample_as_one_does(trained, tmp_path, monkeypatch, batches):
    monkeypatch.setenv("DYDIT_JAX_CACHE", str(tmp_path / "cache"))
    task = dict(checkpoint=str(trained), labels=list(range(8)), rows=batches, batch_size=8)
    finish(start("sample", dict(task, out=str(tmp_path / "two"))))
    whole = sample(Request(**task, out=str(tmp_path / "one"))).images
    for number in range(2):
        np.testing.assert_allclose(np.load(tmp_path / "two" / f"process_{number}.npy"), whole, atol=1e-5)
    assert len(list((tmp_path / "two" / "images").iterdir())) == 8 * batches


@pytest.mark.slow
def test_two_processes_measure_what_one_does(tmp_path):
    with few_numbers_for_inception():
        reference = str(write_tiny_reference(tmp_path / "statistics.npz"))
        tracking = dict(metrics_every_steps=2, metrics_reference=reference, metrics_images=12)
        config = changed(CONFIG, train=dict(steps=4), sampling=SAMPLING, tracking=tracking, checkpoint=dict(keep=1))
        train_and_evaluate(changed(config, mesh=dict(data=4, fsdp=1, tensor=1)), tmp_path / "one")
    for _ in range(2):  # the second time nothing is left to do
        finish(start("judge", dict(config=config, workdir=str(tmp_path / "two"))))
    two, one = (json.loads((tmp_path / name / "best.json").read_text()) for name in ("two", "one"))
    assert two["step"] == one["step"] and two["by_step"].keys() == {"2", "4"}
    # A pixel between two values may be rounded either way.
    assert two["by_step"] == pytest.approx(one["by_step"], rel=1e-3)
    assert saved_steps(tmp_path / "two") == [2, 4]  # one is kept, and 2 was the best when 4 was saved


def request_for_latents(pictures) -> dict:
    """Draw ten pictures of two classes; return the request for their latents."""
    for number in range(10):
        place = pictures / f"class{number % 2}"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((16, 16, 3), 20 * number, np.uint8)).save(place / f"{number}.png")
    return dict(data="images", path=str(pictures), autoencoder="vae", side=16, chunk=3)


def test_two_processes_pack_the_latents_of_one(tmp_path):
    task = request_for_latents(tmp_path / "pictures")
    with mean_for_autoencoder():
        whole = prepare_latents(LatentsRequest(**task, out=str(tmp_path / "one")))
    finish(start("latents", dict(task, out=str(tmp_path / "two"))))
    for path in whole.iterdir():
        assert (tmp_path / "two" / path.name).read_bytes() == path.read_bytes(), path.name
    verify_latents(tmp_path / "two")


@pytest.mark.slow
def test_every_mesh_and_number_of_processes_gives_the_same_losses_and_images(tmp_path):
    losses, images = {}, {}
    for mesh, count, devices in (
        ((1, 1, 1), 1, 1),
        ((8, 1, 1), 1, 8),
        ((1, 8, 1), 1, 8),
        ((2, 2, 2), 1, 8),
        ((2, 2, 2), 2, 4),
    ):
        name = f"{mesh}_{count}"
        run, out = str(tmp_path / name), str(tmp_path / f"{name}_images")
        sections = dict(
            mesh=dict(zip(("data", "fsdp", "tensor"), mesh)), train=dict(steps=20), tracking=dict(every_steps=1)
        )
        config = changed(CONFIG, sampling=SAMPLING, **sections)
        finish(start("train", dict(config=[config] * count, workdir=[run] * count), count, devices))
        # The same weights for all: those of the first run.
        finish(
            start(
                "sample", dict(checkpoint=str(tmp_path / "(1, 1, 1)_1"), labels=list(range(8)), out=out), count, devices
            )
        )
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        losses[name] = [json.loads(line)["loss/total"] for line in lines]
        images[name] = np.load(f"{out}/process_0.npy")
    first = next(iter(losses))
    assert len(losses[first]) == 20
    for name in losses:
        np.testing.assert_allclose(losses[name], losses[first], rtol=1e-5, err_msg=name)
        np.testing.assert_allclose(images[name], images[first], atol=1e-5, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_notice_to_one_process_stops_both_at_the_same_step(tmp_path, number):
    config = changed(
        CONFIG,
        mesh=dict(data=2, fsdp=1, tensor=1),
        train=dict(steps=100_000),
        checkpoint=dict(every_steps=100_000),
        tracking=dict(every_steps=1),
    )
    processes = start("train", dict(config=[config] * 2, workdir=[str(tmp_path / "run")] * 2), devices=1)
    while not (tmp_path / "run" / "metrics.jsonl").exists() and processes[0].poll() is None:
        time.sleep(0.2)
    processes[1].send_signal(number)
    said = finish(processes, code=75)
    [step] = {text.split("Stopped: step ")[1].split()[0] for text in said}
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == [step]


# --- One for all -----------------------------------------------------------------------------------


def meet(monkeypatch, count: int, **task) -> list[subprocess.Popen]:
    """Start processes that do nothing but meet, and wait until they have."""
    monkeypatch.setenv("WORKER_PEERS", json.dumps(dict(BEAT_SECONDS=0.5, SILENT_SECONDS=10.0, GRACE_SECONDS=1.0)))
    processes = start("meet", task, count, devices=1)
    for process in processes:
        while process.stderr.readline() not in ("met\n", ""):
            pass
    return processes


def ends(processes: list[subprocess.Popen], left: list[int]) -> list[str]:
    """Wait for those that are left, end the others, and return what those left said."""
    try:
        said = {number: processes[number].communicate(timeout=60)[1] for number in left}
    finally:
        for process in processes:
            process.kill()
    assert [processes[number].returncode for number in left] == [75] * len(left), said
    return list(said.values())


def test_death_of_one_of_three_processes_ends_the_others(monkeypatch):
    """Processes 1 and 2 know of each other by process 0 alone."""
    processes = meet(monkeypatch, 3)
    processes[1].kill()
    for said in ends(processes, [0, 2]):
        assert "Process 1 has ended without a word" in said and "checkpoint is of step 5" in said


@pytest.mark.slow
@pytest.mark.parametrize("number, how", [(signal.SIGKILL, "ended without a word"), (signal.SIGSTOP, "not been heard")])
def test_loss_of_the_first_process_ends_the_other(monkeypatch, number, how):
    processes = meet(monkeypatch, 2)
    processes[0].send_signal(number)
    [said] = ends(processes, [1])
    assert f"Process 0 has {how}" in said and "checkpoint is of step 5" in said


@pytest.mark.slow
@pytest.mark.parametrize("failing", ["0", "1"])
def test_exception_in_one_process_ends_both_with_its_message(monkeypatch, failing):
    for said in finish(meet(monkeypatch, 2, **{failing: "no luck"}), code=1):
        assert f"Process {failing}: RuntimeError: no luck. The newest whole checkpoint is of step 5." in said


@pytest.mark.slow
@pytest.mark.parametrize("full", [0, 1])
def test_full_disk_under_one_process_ends_both(tmp_path, full):
    """Also where it is the writing behind the training that fails, while the other waits for it."""
    said = finish(start("save", dict(workdir=str(tmp_path / "run"), full=full), devices=1), code=1)
    newest = max(int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir() if path.name.isdecimal())
    for text in said:
        [line] = [line for line in text.splitlines() if f"Process {full}: " in line]
        assert "could not be written" in line and f"newest whole one is of step {newest};" in line


def test_another_configuration_of_one_process_ends_both():
    task = dict(config=[CONFIG, changed(CONFIG, train=dict(seed=1))], workdir=["a", "a"])
    said = finish(start("train", task), code=2)
    assert all("Process 1 has another configuration" in text for text in said)


@pytest.mark.slow
def test_mistake_of_one_process_ends_both(tmp_path):
    taken = tmp_path / "taken"
    taken.write_text("mine")
    for workdir, expected in (
        ([taken, tmp_path / "b"], "neither empty nor a run's"),
        ([tmp_path / "c", tmp_path / "d"], "a folder that all machines share"),
    ):
        said = finish(start("train", dict(config=[CONFIG] * 2, workdir=[str(path) for path in workdir])), code=2)
        assert all(expected in text for text in said)
    # The process that makes the chunk of a broken picture stops; so does the other one.
    task = request_for_latents(tmp_path / "pictures")
    (tmp_path / "pictures" / "class1" / "9.png").write_bytes(b"broken")
    said = finish(start("latents", dict(task, out=str(tmp_path / "three"), max_bad=0)), code=2)
    assert all("class1/9.png" in text for text in said)


def test_missing_coordinator_is_said():
    with pytest.raises(InputError, match="--coordinator"), joined_processes():
        pass


@pytest.mark.slow
def test_two_processes_pass_over_a_damaged_checkpoint_together(trained, tmp_path):
    run = shutil.copytree(trained, tmp_path / "run")
    for path in (run / "checkpoints" / "6" / "params").rglob("d/*"):
        path.write_bytes(path.read_bytes()[:-9])
    train(run, steps=6)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["4", "6"]
    assert [path.name for path in (run / "set_aside").iterdir() if path.is_dir()] == ["6"]
    require_same_run(run, trained)
