"""The scripts in launch/ parse, name flags that exist, and do what they promise, with stand-ins for clusters."""

import os
import re
import shutil
import subprocess

import pytest
from conftest import ROOT

from dydit_jax.cli.flags import read_meanings
from dydit_jax.cli.train import Training, config_keys

SCRIPTS = sorted((ROOT / "launch").glob("*.s*"))
PAGES = [*SCRIPTS, ROOT / "launch" / "Dockerfile", ROOT / "docs" / "pods.md"]
JOINING = {"config", "distributed", "coordinator", "num_processes", "process_id"}
names = pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)


@names
def test_script_parses_and_stops_at_the_first_error(path):
    assert subprocess.run(["bash", "-n", path]).returncode == 0
    assert re.search(r"^set -euo pipefail", path.read_text(), re.MULTILINE)
    assert os.access(path, os.X_OK) or path.suffix == ".sbatch"


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="shellcheck is not installed")
@names
def test_script_has_no_known_trap(path):
    found = subprocess.run(["shellcheck", path], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_flags_of_training_exist(path):
    text = path.read_text().replace("\\\n", " ")
    used = {flag for line in re.findall(r"train\.py(.*)", text) for flag in re.findall(r"--([a-z_][\w.]*)", line)}
    used |= set(re.findall(r"--(config\.\w+\.\w+)", text))
    assert used <= JOINING | set(read_meanings(Training)) | set(config_keys())


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_no_path_of_one_machine_is_named(path):
    assert not re.search(r"/home/|/root\b|/work/|/tmp/|\.\./", path.read_text().replace('"$0")/..', ""))


@pytest.fixture
def stand_ins(tmp_path, monkeypatch):
    """Return a function that puts a program of a given script first on the path; all calls are noted in a file."""
    folder, calls = tmp_path / "bin", tmp_path / "calls"
    folder.mkdir()
    calls.touch()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")

    def add(name: str, script: str = "true") -> None:
        program = folder / name
        program.write_text(f'#!/usr/bin/env bash\necho {name} "$@" >>{calls}\n{script}\n')
        program.chmod(0o755)

    add.calls = lambda: calls.read_text().splitlines()
    return add


def run(script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    known = dict(os.environ, **environment)
    return subprocess.run([f"launch/{script}", *arguments], cwd=ROOT, env=known, capture_output=True, text=True)


def run_slurm(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    known = dict(os.environ, SLURM_JOB_ID="17", SLURM_CPUS_PER_TASK="8", **environment)
    return subprocess.run(["bash", "launch/slurm.sbatch", *arguments], cwd=ROOT, env=known)


@pytest.mark.parametrize("code", [0, 1, 75])
def test_slurm_job_is_requeued_when_it_has_saved_and_only_then(stand_ins, code):
    stand_ins("srun", f"exit {code}")
    stand_ins("scontrol")
    done = run_slurm("--config", "digits_dit", "--workdir", "a folder")
    launched, *after = stand_ins.calls()
    assert (
        "--cpus-per-task=8 .venv/bin/python train.py --distributed --config digits_dit --workdir a folder" in launched
    )
    assert after == (["scontrol requeue 17"] if code == 75 else [])
    assert done.returncode == (0 if code == 75 else code)


def test_slurm_job_runs_in_a_container(stand_ins):
    stand_ins("srun")
    run_slurm(IMAGE="/scratch/image.sqsh", MOUNTS="/scratch:/scratch")
    [launched] = stand_ins.calls()
    assert "--container-image=/scratch/image.sqsh --container-mounts=/scratch:/scratch" in launched
    assert launched.endswith("--no-container-entrypoint python train.py --distributed")
    assert run_slurm(IMAGE="/scratch/image.sqsh").returncode != 0  # nothing could be read or kept


POD = dict(NAME="pod", ZONE="z", TYPE="v5litepod-16", VERSION="v2-alpha-tpuv5-lite", REPOSITORY="https://host/r")


@pytest.mark.parametrize("prepare", ["", "make data"])
@pytest.mark.parametrize(
    "states, verbs",
    [
        (["", "WAITING_FOR_RESOURCES", "ACTIVE"], ["describe", "create", "describe", "describe"]),
        (["ACTIVE"], ["describe"]),
        (["PROVISIONING", "ACTIVE"], ["describe", "describe"]),
        (["SUSPENDED", "ACTIVE"], ["describe", "delete", "create", "describe"]),
    ],
)
def test_pod_is_queued_for_and_started(stand_ins, tmp_path, states, verbs, prepare):
    (tmp_path / "states").write_text("".join(state + "\n" for state in states))
    pop = f'[ "$4" = describe ] && sed -n 1p {tmp_path}/states && sed -i 1d {tmp_path}/states; true'
    stand_ins("gcloud", pop)
    stand_ins("sleep")
    settings = dict(POD, FLAGS="--spot --reserved", PREPARE=prepare)
    done = run("tpu_pod.sh", "--config", "a.py", "--workdir", "gs://bucket/a run", **settings)
    assert done.returncode == 0, done.stderr
    calls = "\n".join(stand_ins.calls())
    assert re.findall(r"gcloud compute tpus queued-resources (\w+) pod --zone=z", calls) == verbs
    for created in re.findall(r"create pod.*", calls):
        assert "--accelerator-type=v5litepod-16 --runtime-version=v2-alpha-tpuv5-lite --spot --reserved" in created
    order = r"install\.sh tpu(.*--command=make data)?.*sudo systemd-run --unit=dydit"
    assert bool(re.search(order, calls, re.DOTALL)[1]) == bool(prepare)
    assert calls.count("tpu-vm ssh pod --zone=z --worker=all") == 2 + bool(prepare)
    assert r"train.py --distributed --config a.py --workdir gs://bucket/a\ run" in calls
    assert "journalctl" in done.stdout


def test_pod_that_is_not_to_be_had_ends_the_script(stand_ins, tmp_path):
    stand_ins(
        "gcloud", f'[ "$4" = describe ] && echo $([ -e {tmp_path}/asked ] && echo FAILED); touch {tmp_path}/asked'
    )
    stand_ins("sleep")
    done = run("tpu_pod.sh", FLAGS="", **POD)
    assert done.returncode == 1 and "FAILED" in done.stdout
    assert not any("ssh" in call for call in stand_ins.calls())


def test_python_is_brought_along(stand_ins):
    stand_ins("uv")
    assert run("install.sh", "tpu,wandb").returncode == 0
    made, installed = stand_ins.calls()
    assert made.startswith("uv venv") and "--managed-python --python 3.12 .venv" in made
    assert installed.endswith("--python .venv/bin/python --editable .[tpu,wandb]")
    assert run("install.sh").returncode != 0 and len(stand_ins.calls()) == 2
