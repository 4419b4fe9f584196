"""Two programs do not work in one folder; one that was killed does not keep the next from it."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, STATIC
from stand_ins import mean_for_autoencoder, write_pictures

from dydit_jax.checkpoints import CheckpointConfig, Run
from dydit_jax.errors import InputError, StopError
from dydit_jax.jobs.prepare_latents import LatentsRequest, prepare_latents
from dydit_jax.jobs.sample import Request, sample
from dydit_jax.jobs.sample_folder import prepare_folder
from dydit_jax.jobs.search_solver import SearchRequest, search_solver
from dydit_jax.jobs.train import train_and_evaluate
from dydit_jax.runtime import locks
from dydit_jax.runtime.locks import LOCK_FILE, FolderLock, claim_folder, is_free

HOLDS = """
import sys, time
from dydit_jax.runtime.locks import FolderLock
with FolderLock(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Seconds of waiting as tenths of seconds."""
    for name, seconds in (("RENEW", 0.1), ("WATCH", 0.6), ("POLL", 0.02), ("ENDING", 0.1)):
        monkeypatch.setattr(locks, f"{name}_SECONDS", seconds)


@pytest.fixture
def without_kernel_lock(monkeypatch):
    """As in a bucket, or on a disk without flock."""
    monkeypatch.setattr(locks, "_kernel_lock", lambda path: None)


def write_lock(folder, **changes) -> None:
    """Leave the file of another owner."""
    owner = dict(host="elsewhere", pid=1, machine="elsewhere/2", began=3, renewed=4.0) | changes
    (folder / LOCK_FILE).write_text(json.dumps(owner))


def test_lock_is_there_while_it_is_held_and_says_whose(tmp_path):
    with FolderLock(tmp_path) as lock:
        first = json.loads((tmp_path / LOCK_FILE).read_text())
        assert first["pid"] == os.getpid()
        lock.require_held()
        time.sleep(0.3)
        assert json.loads((tmp_path / LOCK_FILE).read_text())["renewed"] > first["renewed"]
    assert list(tmp_path.iterdir()) == []


def test_lock_is_renewed_again_after_errors_of_any_kind(tmp_path, monkeypatch, caplog):
    errors = iter([InputError("disk full"), RuntimeError("503 Service Unavailable")])
    with FolderLock(tmp_path), monkeypatch.context() as patch:
        first = json.loads((tmp_path / LOCK_FILE).read_text())

        def write(path, content, before=locks.write_json):
            for error in errors:
                raise error
            before(path, content)

        patch.setattr(locks, "write_json", write)
        time.sleep(0.5)
        assert json.loads((tmp_path / LOCK_FILE).read_text())["renewed"] > first["renewed"]
    assert "disk full" in caplog.text and "503" in caplog.text


def test_second_lock_of_a_folder_is_refused(tmp_path):
    with FolderLock(tmp_path):
        with pytest.raises(InputError, match=rf"is in use by process {os.getpid()} on "), FolderLock(tmp_path):
            pass
        assert (tmp_path / LOCK_FILE).exists()
    with FolderLock(tmp_path):
        pass


def test_lock_of_a_killed_process_is_taken_over_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "WATCH_SECONDS", 1e9)  # nothing is watched
    command = [sys.executable, "-c", HOLDS, tmp_path]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(InputError, match=f"in use by process {other.pid} "), FolderLock(tmp_path):
            pass
        other.send_signal(signal.SIGKILL)
        other.wait()
    left = (tmp_path / LOCK_FILE).read_text()
    for kernel_lock in (locks._kernel_lock, lambda path: None):
        monkeypatch.setattr(locks, "_kernel_lock", kernel_lock)
        (tmp_path / LOCK_FILE).write_text(left)
        with FolderLock(tmp_path):
            assert json.loads((tmp_path / LOCK_FILE).read_text())["pid"] == os.getpid()


def test_lock_of_another_machine_is_watched_and_respected_while_it_lives(tmp_path, without_kernel_lock, monkeypatch):
    with FolderLock(tmp_path):
        with monkeypatch.context() as patch:
            patch.setattr(locks, "_machine", lambda: "another/machine")
            with pytest.raises(InputError, match="is in use by"), FolderLock(tmp_path):
                pass
        assert json.loads((tmp_path / LOCK_FILE).read_text())["machine"] == locks._machine()


@pytest.mark.parametrize("content", [None, "", "[]", "{}"])
def test_lock_of_another_machine_that_gives_no_sign_of_life_is_taken_over(tmp_path, caplog, content):
    write_lock(tmp_path)
    if content is not None:
        (tmp_path / LOCK_FILE).write_text(content)
    began = time.monotonic()
    with FolderLock(tmp_path):
        assert time.monotonic() - began >= 0.6
        assert json.loads((tmp_path / LOCK_FILE).read_text())["pid"] == os.getpid()
    assert "taken over" in caplog.text


def test_owner_that_was_taken_over_does_not_save(tmp_path):
    with FolderLock(tmp_path) as lock, Run(tmp_path, CheckpointConfig(), lock=lock) as run:
        write_lock(tmp_path)
        with pytest.raises(StopError, match="taken over by process 1 on elsewhere"):
            run.save(1, dict(params=dict(a=1.0)), {})
        assert run.latest_step is None
    assert json.loads((tmp_path / LOCK_FILE).read_text())["host"] == "elsewhere"  # left to its owner


def test_second_training_in_a_work_directory_is_refused(tmp_path):
    with FolderLock(tmp_path), pytest.raises(InputError, match="is in use by process"):
        train_and_evaluate(STATIC, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_work_directory_of_a_run_killed_at_its_first_moment_is_its_own(tmp_path):
    write_lock(tmp_path, machine=locks._machine(), pid=2**30)
    (tmp_path / "config.json.0123.partial").write_text("{")
    with pytest.raises(InputError, match="classes"):  # comes as far as the data
        train_and_evaluate(dict(STATIC, model=dict(STATIC["model"], channels=3)), tmp_path)


# --- Folders of jobs -----------------------------------------------------------------------------


def test_folder_is_free_if_it_holds_at_most_what_a_kill_left(tmp_path):
    folder = tmp_path / "out"
    assert is_free(folder)
    folder.mkdir()
    (folder / "job.json.0123.partial").write_text("{")
    write_lock(folder)
    assert is_free(folder)
    (folder / "job.json").write_text("{}")
    assert not is_free(folder) and not is_free(folder / "job.json")


def test_folder_of_something_else_is_not_claimed_and_nothing_in_it_changes(tmp_path):
    (tmp_path / LOCK_FILE).write_text("a lock of its own")
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="is not empty and has no job.json; name another folder"):
        claim_folder(tmp_path, "job.json").__enter__()
    assert (tmp_path / LOCK_FILE).read_text() == "a lock of its own"
    (tmp_path / LOCK_FILE).unlink()
    (tmp_path / "job.json").write_text("{}")
    with claim_folder(tmp_path, "info.json", "job.json") as lock:
        lock.require_held()


def test_folder_that_another_job_began_to_fill_meanwhile_is_not_claimed(tmp_path, monkeypatch):
    write_lock(tmp_path, machine=locks._machine(), pid=2**30)
    wait = FolderLock._await_the_last_owner
    fill = lambda self: (wait(self), (tmp_path / "manifest.json").write_text("{}"))
    monkeypatch.setattr(FolderLock, "_await_the_last_owner", fill)
    with pytest.raises(InputError, match="is not empty and has no job.json"):
        claim_folder(tmp_path, "job.json").__enter__()


def draw(folder, out):
    sample(Request("digits", str(out), labels=["1"]))


def encode(folder, out):
    with mean_for_autoencoder():
        prepare_latents(LatentsRequest(str(out), str(write_pictures(folder / "pictures", 2)), side=16))


def find(folder, out):
    search_solver(SearchRequest("digits", str(out), evaluations=3, reference="trailing:10"))


@pytest.mark.parametrize("start", [draw, encode, find])
def test_second_command_in_a_folder_is_refused_and_changes_nothing(tmp_path, start):
    out = tmp_path / "out"
    with FolderLock(out), pytest.raises(InputError, match=rf"out is in use by process {os.getpid()} on "):
        start(tmp_path, out)
    assert list(out.iterdir()) == []


def test_picture_that_another_command_writes_is_left_to_it(tmp_path):
    job = dict(manifest=dict(num_images=1), sample_bytes=0)
    with prepare_folder(tmp_path, **job):
        begun = tmp_path / "images" / "000000.png.0123.partial"
        begun.write_bytes(b"half of it")
        with pytest.raises(InputError, match="is in use by"):
            prepare_folder(tmp_path, **job).__enter__()
        assert begun.exists()
    with prepare_folder(tmp_path, **job):
        assert not begun.exists()


def test_finished_latents_are_used_without_a_lock(tmp_path):
    encode(tmp_path, tmp_path / "out")
    with FolderLock(tmp_path / "out"):
        encode(tmp_path, tmp_path / "out")
