"""The command lines, as a new user types them, with wrong input too."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import GOLDEN, ROOT, channels_last, relative_error

from dydit_jax.loading import load_checkpoint
from dydit_jax.models.dit import Model


def call(*arguments, expect: int = 0) -> str:
    """Run a script in its own process and return what it said."""
    environment = dict(os.environ, JAX_PLATFORMS="cpu")
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == expect, done.stderr
    return done.stdout + done.stderr


@pytest.mark.slow
def test_train_then_sample(tmp_path):
    workdir, out = tmp_path / "run", tmp_path / "out"
    small = ("--config.model.depth=1", "--config.data.batch_size=8", "--config.tracking.every_steps=1")
    said = call("train.py", "--config=configs/digits_dit.py", f"--workdir={workdir}", "--config.train.steps=2", *small)
    assert "step 2/2" in said and "steps/s" in said and "left" in said and "Compiled" in said
    said = call("train.py", "--config=configs/digits_dit.py", f"--workdir={workdir}", "--config.train.steps=3", *small)
    assert "Continuing from step 2" in said and "step 3/3" in said
    said = call(
        "sample.py", f"--checkpoint={workdir}", f"--out={out}", "--num_images=3", "--sampling.steps=2", "--batch_size=2"
    )
    assert "MACs" in said and str(out / "samples.npz") in said
    assert np.load(out / "samples.npz")["arr_0"].shape == (3, 8, 8, 1)


@pytest.mark.slow
def test_convert_check_and_export(tmp_path):
    pytest.importorskip("torch")
    source, ours, back = GOLDEN / "dydit_v2_train.pt", tmp_path / "ours", tmp_path / "back.safetensors"
    said = call("convert_torch_weights.py", f"--source={source}", f"--out={ours}", "--verify")
    assert "each used once" in said and "Largest difference to PyTorch" in said and "SHA-256" in said
    golden = np.load(GOLDEN / "v2_forward.npz")
    weights = load_checkpoint(ours)
    inputs = (channels_last(golden["x"]), golden["t"], golden["y"])
    prediction, _ = Model(weights.model).apply(weights.params, *inputs, mode="gated")
    assert relative_error(prediction, channels_last(golden["out"])) < 1e-5
    call("convert_torch_weights.py", f"--source={ours}", f"--out={back}", "--export=original")
    assert back.exists()


@pytest.mark.parametrize("code", [75, 134])
def test_command_is_started_again_until_it_is_done(tmp_path, code):
    counting = f"echo >> {tmp_path}/runs; [ $(wc -l < {tmp_path}/runs) -ge 3 ] && exit 4; exit {code}"
    done = subprocess.run(["launch/until_done.sh", "bash", "-c", counting], cwd=ROOT, timeout=60)
    assert done.returncode == 4 and len((tmp_path / "runs").read_text().splitlines()) == 3


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_command_asked_to_stop_is_not_started_again(tmp_path, number):
    waiting = f"trap 'exit 75' TERM; echo >> {tmp_path}/begun; while true; do sleep 0.1; done"
    process = subprocess.Popen(["launch/until_done.sh", "bash", "-c", waiting], cwd=ROOT)
    while not (tmp_path / "begun").exists():
        time.sleep(0.05)
    process.send_signal(number)
    assert process.wait(timeout=60) == 75 and len((tmp_path / "begun").read_text().splitlines()) == 1


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            ("train.py", "--config=configs/digits_dit.py", "--workdir={tmp}", "--config.train.stepz=1"),
            "Did you mean 'steps'",
        ),
        (("train.py", "--config=configs/digits_dit.py", "--workdir={tmp}", "--config.train.steps=many"), "many"),
        (("train.py", "--config=configs/digits_dit.py", "--workdir={tmp}", "--config.model.heads=5"), "must divide"),
        (
            ("train.py", "--config=configs/nowhere.py", "--workdir={tmp}"),
            "There is no file 'configs/nowhere.py' and no config of that name; known: default, digits_control,",
        ),
        (("train.py", "--workdir={tmp}"), "--config is required"),
        (("sample.py", "--checkpoint={tmp}/no.safetensors", "--out={tmp}", "--labels=1"), "There is no file"),
        (("sample.py", "--out={tmp}", "--labels=1"), "--checkpoint is required"),
        (("convert_torch_weights.py", "--source=README.md", "--out={tmp}"), "neither a .safetensors file"),
        (("convert_torch_weights.py", "--source=tests", "--out={tmp}"), "is a folder"),
        (
            ("sample.py", "--checkpoint=x", "--out={tmp}", "--sampling.gidance=2"),
            "Unknown flag --sampling.gidance. Did you mean --sampling.guidance",
        ),
    ],
)
def test_mistakes_end_in_one_line(tmp_path, arguments, message):
    script, *rest = (argument.format(tmp=tmp_path / "new") for argument in arguments)
    said = call(script, *rest, expect=2)
    assert message in said and "Traceback" not in said and len(said.strip().splitlines()) == 1
    assert not (tmp_path / "new").exists()
