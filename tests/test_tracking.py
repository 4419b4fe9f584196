"""Metrics reach their files, once per step, also when a restart repeats steps."""

import json
import time

import pytest

from dydit_jax.errors import InputError
from dydit_jax.tracking import Clock, JsonLines, TrackingConfig, duration, make_writers


def test_json_lines_of_repeated_steps_are_replaced(tmp_path):
    writer = JsonLines(tmp_path)
    for step in (10, 20, 30):
        writer.write(step, {"loss/total": step / 10})
    JsonLines(tmp_path).write(20, {"loss/total": 9.0})
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [{"step": 10, "loss/total": 1.0}, {"step": 20, "loss/total": 9.0}]


def test_tensorboard_gets_an_event_file(tmp_path):
    pytest.importorskip("tensorboardX")
    writers = make_writers(TrackingConfig(tensorboard=True), tmp_path)
    for writer in writers:
        writer.write(1, {"loss/total": 0.5})
    assert list((tmp_path / "tensorboard").iterdir()) and (tmp_path / "metrics.jsonl").exists()


def test_missing_extras_are_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    with pytest.raises(InputError, match=r"pip install 'dydit-jax\[wandb\]'"):
        make_writers(TrackingConfig(wandb_project="p"), tmp_path)


def test_clock_estimates_what_is_left(monkeypatch):
    now = iter([100.0, 110.0, 120.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(now))
    clock = Clock(0, 100)
    assert clock.read(20) == (2.0, 40.0)
    assert clock.read(70) == (5.0, 6.0)


@pytest.mark.parametrize("seconds, text", [(0.4, "0s"), (42, "42s"), (187, "3m 07s"), (18720, "5h 12m")])
def test_durations_read_like_speech(seconds, text):
    assert duration(seconds) == text
