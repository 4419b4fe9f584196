"""A run says how fast it is, what it waits for, and traces its steps when asked."""

import time

import jax
import pytest

from dydit_jax.errors import InputError
from dydit_jax.runtime import tracking
from dydit_jax.runtime.tracking import PROFILE_REQUEST, Clock, Profile, StallWatchdog, TrackingConfig, duration


def test_clock_estimates_what_is_left(monkeypatch):
    now = iter([100.0, 110.0, 120.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(now))
    clock = Clock(0, 100)
    assert clock.read(20) == (2.0, 40.0)
    assert clock.read(70) == (5.0, 6.0)


def test_watch_says_once_what_is_waited_for(caplog):
    with StallWatchdog(0.05) as watch:
        watch.now("the batch of step 3")
        deadline = time.monotonic() + 20
        while "Nothing has moved" not in caplog.text and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.2)
    assert caplog.text.count("process 0 waits for the batch of step 3") == 1


@pytest.fixture
def traced(monkeypatch):
    """Return what happens to traces, instead of traces."""
    happened = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: happened.append("start"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: happened.append("stop"))
    return happened


def run_steps(profile, traced, steps, reports=()) -> dict:
    """Return before which steps traces started and stopped."""
    seen = {}
    with profile:
        for step in steps:
            profile.at(step)
            if len(traced) > len(seen):
                seen[step] = traced[-1]
            if step + 1 in reports:
                profile.look(step + 1)
    return seen


def test_profile_is_of_the_steps_of_the_config(tmp_path, traced):
    assert run_steps(Profile((2, 3), tmp_path), traced, range(8)) == {2: "start", 4: "stop"}
    assert run_steps(Profile((), tmp_path), traced := [], range(8)) == {} and not traced


@pytest.mark.parametrize("count, folder", [(1, "profile"), (4, "profile/process_3")])
def test_processes_of_one_machine_trace_into_folders_of_their_own(tmp_path, monkeypatch, count, folder):
    monkeypatch.setattr(jax, "process_count", lambda: count)
    monkeypatch.setattr(jax, "process_index", lambda: count - 1)
    folders = []
    monkeypatch.setattr(jax.profiler, "start_trace", folders.append)
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: None)
    with Profile((0, 0), tmp_path) as profile:
        profile.at(0)
    assert folders == [str(tmp_path / folder)]


def test_file_in_the_work_directory_asks_for_one_profile(tmp_path, traced):
    (tmp_path / PROFILE_REQUEST).touch()
    seen = run_steps(Profile((30, 30), tmp_path), traced, range(40), reports=(10, 20))
    assert seen == {10: "start", 15: "stop", 30: "start", 31: "stop"}
    assert not (tmp_path / PROFILE_REQUEST).exists()


def test_processes_trace_the_steps_that_the_first_one_was_asked_for(tmp_path, traced, monkeypatch):
    """They may not see the file, or see it later: what process 0 saw counts."""
    monkeypatch.setattr(tracking, "is_main", lambda: False)
    monkeypatch.setattr(tracking, "from_main", lambda numbers, limit: [0])
    assert run_steps(Profile((), tmp_path), traced, range(9), reports=(2,)) == {2: "start", 7: "stop"}
    (tmp_path / PROFILE_REQUEST).touch()
    monkeypatch.setattr(tracking, "from_main", lambda numbers, limit: [])
    traced.clear()
    assert run_steps(Profile((), tmp_path), traced, range(9), reports=(2,)) == {}
    assert (tmp_path / PROFILE_REQUEST).exists()


@pytest.mark.parametrize(
    "settings", [dict(profile=(1,)), dict(profile=(5, 2)), dict(stall_seconds=0.0), dict(sample_labels=())]
)
def test_impossible_settings_are_refused(settings):
    with pytest.raises(InputError, match="tracking."):
        TrackingConfig(**settings)


@pytest.mark.parametrize("seconds, text", [(0.4, "0s"), (42, "42s"), (187, "3m 07s"), (18720, "5h 12m")])
def test_durations_read_like_speech(seconds, text):
    assert duration(seconds) == text
