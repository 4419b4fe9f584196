"""Files appear whole or not at all, with the mode of any new file; damaged ones are named in one line."""

import errno
import fcntl
import json
import os
import pathlib
import signal
import threading
from unittest import mock

import numpy as np
import pytest
import safetensors.numpy
from buckets import HttpError, memory_for_buckets

from dydit_jax.checkpoints import has_checkpoint
from dydit_jax.convert.conversion import output_file
from dydit_jax.data.archives import open_pictures
from dydit_jax.data.image_sets import open_images
from dydit_jax.data.sources import DataConfig, open_source
from dydit_jax.errors import InputError
from dydit_jax.jobs.evaluate import Evaluation, load_reference
from dydit_jax.loading import load_checkpoint
from dydit_jax.models.config import DiTConfig
from dydit_jax.runtime.files import hold_lock, read_json, write_atomically, write_json


@pytest.fixture
def umask():
    before = os.umask(0o022)
    yield
    os.umask(before)


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_file_appears_when_it_is_whole(tmp_path):
    path = tmp_path / "new" / "file.txt"
    with write_atomically(path) as partial:
        partial.write_text("half")
        assert partial.parent == path.parent and not path.exists()
        partial.write_text("all of it")
    assert path.read_text() == "all of it" and names(path.parent) == ["file.txt"]


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        (OSError(28, "No space left on device"), InputError),
        (KeyboardInterrupt("stop"), KeyboardInterrupt),
        (ValueError("wrong"), ValueError),
    ],
)
def test_failure_leaves_the_old_file_and_nothing_else(error, shown, tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(shown, match="No space left|stop|wrong"), write_atomically(path) as partial:
        partial.write_text("new")
        raise error
    assert path.read_text() == "old" and names(tmp_path) == ["file.txt"]


def test_two_writers_do_not_meet(tmp_path):
    path = tmp_path / "file.txt"
    with write_atomically(path) as first, write_atomically(path) as second:
        first.write_text("first")
        second.write_text("second")
    assert path.read_text() == "first" and names(tmp_path) == ["file.txt"]


def test_mode_follows_the_umask_whatever_the_writer_does(tmp_path, umask):
    path = tmp_path / "arrays.safetensors"
    with write_atomically(path) as partial:
        safetensors.numpy.save_file({"x": np.zeros(3)}, partial)
        pathlib.Path(partial).chmod(0o600)  # as some of its versions do
    assert path.stat().st_mode & 0o777 == 0o644
    os.umask(0o077)
    write_json(tmp_path / "private.json", {})
    assert (tmp_path / "private.json").stat().st_mode & 0o777 == 0o600


def test_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"Can't write .*file/inside.json \(.*\). Make room"):
        write_json(tmp_path / "file" / "inside.json", {})


@pytest.mark.parametrize("address", ["ftp://host/a.npz", "https://host/a.npz", "s3://bucket/a.npz", "hf://owner/a"])
def test_addresses_that_are_no_places_of_files_are_refused(address):
    config = DataConfig(name="images", path=address, batch_size=1)
    for use in (
        lambda: open_images(address),
        lambda: open_images(f"tfds:{address}/train"),
        lambda: open_pictures(address),
        lambda: load_reference(address, "", None, open_images),
        lambda: Evaluation(("set",), out=address),
        lambda: open_source(config, DiTConfig(depth=1, width=32, heads=2, patch=2, side=8, channels=3, classes=2)),
        lambda: has_checkpoint(address),
        lambda: output_file(address),
        lambda: write_json(address, {}),
    ):
        with pytest.raises(InputError, match=r"://.* is an address, and files are read and written on this machine"):
            use()
    with pytest.raises(InputError, match="ftp://host/a is an address"):
        load_checkpoint("ftp://host/a")


def test_errors_of_a_bucket_are_those_of_a_disk(monkeypatch):
    path = "gs://bucket/run/file.json"
    with memory_for_buckets() as bucket:
        write_json(path, dict(step=1))
        monkeypatch.setattr(bucket, "open", mock.Mock(side_effect=HttpError("503\nService Unavailable")))
        with pytest.raises(InputError, match=rf"Can't write {path} \(503 Service Unavailable\). Make room"):
            write_json(path, dict(step=2))
        with pytest.raises(InputError, match=rf"{path} can't be read \(503 Service Unavailable\); restore it"):
            read_json(path)
        monkeypatch.undo()
        assert read_json(path) == dict(step=1)


def test_json_comes_back(tmp_path):
    path = tmp_path / "file.json"
    for content in ({"a": [1, 2.5, None, "ä"]}, [1, 2]):
        write_json(path, content)
        assert read_json(path, kind=type(content)) == content
        assert path.read_text() == json.dumps(content, indent=2) + "\n"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "can't be read .No such file"),
        (b"", "is empty"),
        (b" \n", "is empty"),
        (b'{"steps": 1', "is damaged or cut short"),
        (b"\xff\xfe\x00", "is no text"),
        (b"\x00" * 100, "is damaged or cut short"),
        (b"[" * 100_000, "is damaged or cut short"),
        (b"[1, 2]", "holds list, not a mapping"),
        (b"null", "holds NoneType, not a mapping"),
    ],
)
def test_damaged_json_is_one_line_that_names_the_file(content, reason, tmp_path):
    path = tmp_path / "job.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=f"{path} {reason}.*; draw them again") as raised:
        read_json(path, remedy="draw them again")
    assert "\n" not in str(raised.value)


def test_one_process_at_a_time_holds_a_lock(tmp_path, caplog):
    caplog.set_level("INFO")
    path, order = tmp_path / "new" / "file.lock", []

    def second():
        with hold_lock(path, to="to count"):
            order.append("second")

    with hold_lock(path, to="to count"):
        thread = threading.Thread(target=second)
        thread.start()
        while "Another process holds" not in caplog.text:
            thread.join(timeout=0.01)
        order.append("first")
    thread.join(timeout=10)
    assert order == ["first", "second"]


def test_a_lock_ends_with_its_process(tmp_path):
    path = tmp_path / "file.lock"
    child = os.fork()
    if not child:
        hold = hold_lock(path, to="to die")
        hold.__enter__()
        os.kill(os.getpid(), signal.SIGKILL)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    with path.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises if it is held


def test_without_locks_all_go_through_with_a_warning(tmp_path, caplog, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with hold_lock(tmp_path / "file.lock", to="to count"):
        pass
    assert "There are no locks where" in caplog.text
