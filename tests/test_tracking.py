"""Metrics reach their files, once per step, also when a restart repeats steps."""

import json
import time
from unittest import mock

import jax
import jax.numpy as jnp
import pytest

from dydit_jax.errors import InputError
from dydit_jax.runtime.tracking import (
    Clock,
    JsonLines,
    TrackingConfig,
    Watch,
    best_case,
    duration,
    flops_utilisation,
    make_writers,
)


def test_json_lines_of_repeated_steps_are_replaced(tmp_path):
    writer = JsonLines(tmp_path)
    for step in (10, 20, 30):
        writer.write(step, {"loss/total": step / 10})
    JsonLines(tmp_path).write(20, {"loss/total": 9.0})
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [{"step": 10, "loss/total": 1.0}, {"step": 20, "loss/total": 9.0}]
    JsonLines(tmp_path).write(20, {"ema/loss": 3.0})
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert last == {"step": 20, "loss/total": 9.0, "ema/loss": 3.0}


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


def test_watch_says_once_what_is_waited_for(caplog):
    with Watch(0.05) as watch:
        watch.now("the batch of step 3")
        deadline = time.monotonic() + 20
        while "Nothing has moved" not in caplog.text and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.2)
    assert caplog.text.count("process 0 waits for the batch of step 3") == 1


def test_utilisation_is_told_where_the_peak_is_known(monkeypatch):
    chip = lambda kind: [mock.Mock(device_kind=kind)]
    monkeypatch.setattr(jax, "device_count", lambda: 4)
    for kind, peak in (("TPU v5 lite", 197e12), ("TPU v5p", 459e12), ("NVIDIA H200", 989e12)):
        monkeypatch.setattr(jax, "devices", lambda kind=kind: chip(kind))
        assert flops_utilisation(1e13, jnp.bfloat16) == pytest.approx(6e13 / (4 * peak))
        assert flops_utilisation(1e13, jnp.float32) is None
        # Recomputing a forward pass executes four FLOPs where three count.
        for remat, executed in (("none", 6), ("block", 8)):
            seconds, most = best_case(1e13, jnp.bfloat16, remat)
            assert seconds == pytest.approx(1e13 * executed / (4 * peak))
            assert most == pytest.approx(flops_utilisation(1e13 / seconds, jnp.bfloat16)) == pytest.approx(6 / executed)
    monkeypatch.setattr(jax, "devices", lambda: chip("abacus"))
    assert flops_utilisation(1e13, jnp.bfloat16) is None and best_case(1e13, jnp.bfloat16, "none") is None


@pytest.mark.parametrize(
    "settings", [dict(profile=(1,)), dict(profile=(5, 2)), dict(stall_seconds=0.0), dict(sample_labels=())]
)
def test_impossible_settings_are_refused(settings):
    with pytest.raises(InputError, match="tracking."):
        TrackingConfig(**settings)


@pytest.mark.parametrize("seconds, text", [(0.4, "0s"), (42, "42s"), (187, "3m 07s"), (18720, "5h 12m")])
def test_durations_read_like_speech(seconds, text):
    assert duration(seconds) == text
