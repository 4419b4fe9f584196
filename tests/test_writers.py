"""Metrics and samples reach their files, in the order of the steps, also when a restart repeats steps."""

import json
import struct
import types

import pytest
from PIL import Image

from dydit_jax.errors import InputError
from dydit_jax.runtime import files
from dydit_jax.runtime.tracking import TrackingConfig
from dydit_jax.runtime.writers import JsonLines, open_writers

SETTINGS = dict(model=dict(depth=3, size=""), train=dict(steps=40), tracking=dict(sample_labels=(1, 2)))
GRID = Image.new("L", (6, 4), 77)


def write_steps(workdir, steps, start: int = 0) -> None:
    writer = JsonLines(workdir, start)
    for step in steps:
        writer.write(step, {"loss/total": step / 10 + start})


@pytest.fixture(params=["local", "bucket"])
def place(request, monkeypatch):
    """Write as on a disk of this machine, and as to a bucket."""
    if request.param == "bucket":
        monkeypatch.setattr(files, "is_local", lambda path: False)
    return request.param


def test_lines_are_appended_and_extended(tmp_path, place):
    path = tmp_path / "metrics.jsonl"
    write_steps(tmp_path, (10, 20))
    before, inode = path.read_bytes(), path.stat().st_ino
    writer = JsonLines(tmp_path, 20)
    writer.write(30, {"loss/total": 3.0})
    writer.write(30, {"ema/loss": 5.0})
    writer.write(40, {"loss/total": 4.0})
    added = path.read_text().removeprefix(before.decode())
    assert [json.loads(line) for line in added.splitlines()] == [
        {"step": 30, "loss/total": 3.0, "ema/loss": 5.0},
        {"step": 40, "loss/total": 4.0},
    ]
    assert place == "bucket" or path.stat().st_ino == inode  # the same file, not another one under its name
    assert not (tmp_path / "set_aside").exists()


@pytest.mark.parametrize("start, kept", [(0, []), (20, [10, 20]), (25, [10, 20])])
def test_restart_sets_later_lines_aside(tmp_path, place, start, kept):
    write_steps(tmp_path, (10, 20, 30))
    before = (tmp_path / "metrics.jsonl").read_text().splitlines()
    write_steps(tmp_path, (start + 10,), start=start)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert lines[:-1] == before[: len(kept)]
    assert json.loads(lines[-1]) == {"step": start + 10, "loss/total": (start + 10) / 10 + start}
    assert (tmp_path / "set_aside" / "metrics.jsonl").read_text().splitlines() == before[len(kept) :]
    # A second restart adds to what the first has set aside.
    JsonLines(tmp_path, start)
    assert (tmp_path / "set_aside" / "metrics.jsonl").read_text().splitlines() == [*before[len(kept) :], lines[-1]]


@pytest.mark.parametrize("cut", ['{"step": 30, "loss', "\0\0\0", '{"step": 30}'])
def test_line_that_a_kill_has_cut_is_set_aside(tmp_path, cut):
    write_steps(tmp_path, (10, 20))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(cut)
    write_steps(tmp_path, (30,), start=30)
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [10, 20, 30]
    assert (tmp_path / "set_aside" / "metrics.jsonl").read_text() == cut + "\n"


def test_line_that_a_disk_has_damaged_is_set_aside(tmp_path, place):
    path = tmp_path / "metrics.jsonl"
    write_steps(tmp_path, (10, 20, 30))
    path.write_bytes(path.read_bytes().replace(b'total": 2.0', b'tot\xffl": 2.0'))
    write_steps(tmp_path, (40,), start=30)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [10, 30, 40]
    assert (tmp_path / "set_aside" / "metrics.jsonl").read_text() == '{"step": 20, "loss/tot\ufffdl": 2.0}\n'


def events(folder) -> list:
    """Read the events of TensorBoard's files: length, checksum, event, checksum."""
    event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2")
    found = []
    for path in sorted(folder.iterdir()):
        content, at = path.read_bytes(), 0
        while at < len(content):
            (length,) = struct.unpack_from("<Q", content, at)
            found.append(event_pb2.Event.FromString(content[at + 12 : at + 12 + length]))
            at += length + 16
    return found


def test_tensorboard_gets_scalars_samples_and_the_config(tmp_path):
    pytest.importorskip("tensorboardX")
    with open_writers(TrackingConfig(tensorboard=True), tmp_path, 20, SETTINGS) as writers:
        writers.write(30, {"loss/total": 0.5})
        writers.draw(30, GRID)
    found = events(tmp_path / "tensorboard")
    values = {value.tag: (event.step, value) for event in found for value in event.summary.value}
    assert values["loss/total"][0] == 30 and values["loss/total"][1].simple_value == 0.5
    image = values["samples"][1].image
    assert (values["samples"][0], image.width, image.height) == (30, 6, 4)
    [(_, text)] = [found for tag, found in values.items() if tag.startswith("config")]
    assert '"depth": 3' in text.tensor.string_val[0].decode()
    # What an earlier start has left of later steps is hidden.
    assert 21 in [event.step for event in found if event.session_log.status == 1]


@pytest.fixture
def wandb(monkeypatch):
    """Stand in for Weights & Biases, and keep what it was given."""
    fake = types.SimpleNamespace(runs=[], Image=lambda picture: ("image", picture.size))

    def init(**settings):
        run = types.SimpleNamespace(settings=settings, logged=[], codes=[])
        run.log = lambda metrics, step: run.logged.append((step, metrics))
        run.finish = lambda exit_code: run.codes.append(exit_code)
        fake.runs.append(run)
        return run

    fake.init = init
    monkeypatch.setitem(__import__("sys").modules, "wandb", fake)
    return fake


def test_wandb_gets_metrics_samples_and_the_whole_config(tmp_path, wandb):
    with open_writers(TrackingConfig(wandb_project="p"), tmp_path, 0, SETTINGS) as writers:
        writers.write(10, {"loss/total": 0.5})
        writers.draw(10, GRID)
    [run] = wandb.runs
    assert run.settings["project"] == "p" and run.settings["resume"] == "allow"
    assert run.settings["config"] == dict(SETTINGS, tracking=dict(sample_labels=[1, 2]))
    assert run.logged == [(10, {"loss/total": 0.5}), (10, {"samples": ("image", (6, 4))})]
    assert run.codes == [0]


def test_wandb_run_is_continued_by_its_work_directory_alone(tmp_path, wandb):
    """Two runs of one name are two runs; one that is started again, or moved, is one."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    for workdir in (tmp_path / "a" / "run", tmp_path / "b" / "run", tmp_path / "a" / "run"):
        workdir.mkdir(exist_ok=True)
        open_writers(TrackingConfig(wandb_project="p"), workdir, 0, SETTINGS)
    (tmp_path / "a" / "run").rename(tmp_path / "moved")
    open_writers(TrackingConfig(wandb_project="p"), tmp_path / "moved", 0, SETTINGS)
    first, other, again, moved = (run.settings["id"] for run in wandb.runs)
    assert first == again == moved != other
    assert [run.settings["name"] for run in wandb.runs] == ["run", "run", "run", "moved"]


def test_wandb_run_that_fails_is_marked_so(tmp_path, wandb):
    writers = open_writers(TrackingConfig(wandb_project="p"), tmp_path, 0, SETTINGS)
    with pytest.raises(ZeroDivisionError), writers:
        _ = 1 / 0
    assert wandb.runs[0].codes == [1]


@pytest.mark.parametrize(
    "extra, setting", [("wandb", dict(wandb_project="p")), ("tensorboard", dict(tensorboard=True))]
)
def test_missing_extras_are_named(tmp_path, monkeypatch, extra, setting):
    for module in ("wandb", "tensorboardX"):
        monkeypatch.setitem(__import__("sys").modules, module, None)
    with pytest.raises(InputError, match=rf"pip install 'dydit-jax\[{extra}\]'"):
        open_writers(TrackingConfig(**setting), tmp_path, 0, SETTINGS)
