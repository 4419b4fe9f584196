"""Bars count work and not compiling, say which of both goes on, and stay whole beside log lines."""

import concurrent.futures
import contextlib
import io
import logging
import os
import pty
import re
import sys
import threading
import time
import types
import unittest.mock

import jax
import numpy as np
import pytest
from conftest import ROOT
from tqdm.contrib.logging import logging_redirect_tqdm

from dydit_jax.runtime import cache, progress
from dydit_jax.runtime.progress import Progress, compile_seconds, counted, counted_bytes, result_of


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def terminal(monkeypatch):
    stream = Terminal()
    monkeypatch.setattr(progress, "sys", types.SimpleNamespace(stderr=stream))
    return stream


@pytest.fixture
def clock(monkeypatch):
    """Let the time that a bar sees be set: it moves as far as a test says."""
    now = [1000.0]
    monkeypatch.setattr(time, "time", lambda: now[0])
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    return lambda seconds: now.__setitem__(0, now[0] + seconds)


def last_line(stream) -> str:
    return stream.getvalue().replace("\n", "\r").rstrip("\r").split("\r")[-1]


def test_estimate_is_of_work_without_the_compiling_before_and_between(terminal, clock):
    with Progress(10, "step", "sampling", delay=0) as bar:
        clock(100)  # the first program
        progress._note_end(progress.END_EVENT, 100.0)
        for _ in range(4):
            clock(2)
            bar.advance(1)
        assert "4/10 [00:08<00:12" in last_line(terminal)  # 2 s a step, 6 to go
        clock(50)  # the second program
        progress._note_end(progress.END_EVENT, 50.0)
        clock(2)
        bar.advance(1)
        assert "5/10 [00:10<00:10" in last_line(terminal)
    assert last_line(terminal).startswith("sampling: ")


def test_waiting_for_a_program_is_said_and_not_counted(terminal, monkeypatch):
    monkeypatch.setattr(progress, "TICK_SECONDS", 0.02)
    program, before = concurrent.futures.Future(), compile_seconds()
    threading.Timer(0.3, program.set_result, ["made"]).start()
    with Progress(2, "step", "sampling", delay=0) as bar:
        assert result_of(program) == "made"
        assert last_line(terminal).startswith("sampling, compiling: ")
        waited = compile_seconds() - before
        assert waited > 0.2
        bar.advance(1)
        assert bar._bar.format_dict["elapsed"] < waited  # tqdm's own count of seconds
        bar.advance(1)
    assert last_line(terminal).startswith("sampling: 100%")
    assert result_of(program) == "made" and compile_seconds() - before == waited  # it was there


def test_compiling_in_the_same_thread_is_noticed(terminal):
    before = compile_seconds()
    with Progress(1, "pass", "losses", delay=0) as bar:
        jax.jit(lambda x: x * 3.25 + before)(np.ones(3))  # a program of this test alone
        assert compile_seconds() > before
        bar.advance(1)
    assert "losses, compiling" in terminal.getvalue() and last_line(terminal).startswith("losses: 100%")


def test_other_threads_compile_without_stopping_the_clock():
    before, seen = compile_seconds(), []
    thread = threading.Thread(
        target=lambda: (progress._note_end(progress.END_EVENT, 9.0), seen.append(compile_seconds()))
    )
    thread.start()
    thread.join()
    assert seen == [9.0] and compile_seconds() == before


def test_parts_of_a_unit_add_up_to_whole_ones(terminal):
    with Progress(7, "image", "sampling", delay=0) as bar:
        for wanted in (3, 3, 1):  # batches of a set, in 10 steps each
            for _ in range(10):
                bar.advance(wanted / 10)
        assert bar._bar.n == 7
    assert "7/7" in last_line(terminal) and "image/s" in last_line(terminal)


def test_what_is_over_at_once_shows_no_bar(terminal):
    arrays = {"a": np.zeros(3), "b": np.zeros(5, np.int8)}
    assert list(counted("abc", 3, "letter", "reading")) == list("abc")
    assert [(name, array.nbytes) for name, array in counted_bytes(arrays, "writing")] == [("a", 24), ("b", 5)]
    assert terminal.getvalue() == ""


def test_without_a_terminal_a_bar_is_few_lines(monkeypatch, clock):
    stream = io.StringIO()
    monkeypatch.setattr(progress, "sys", types.SimpleNamespace(stderr=stream))
    for _ in counted(range(200), 200, "image", "packing"):
        clock(1)
    lines = [line for line in stream.getvalue().split("\r") if line.strip()]
    assert 5 <= len(lines) <= 9 and "200/200" in lines[-1]


def test_a_terminal_without_a_size_shows_the_bar():
    ours, theirs = pty.openpty()
    with os.fdopen(theirs, "w") as stream:
        assert os.get_terminal_size(theirs).columns == 0
        with unittest.mock.patch.object(progress, "sys", types.SimpleNamespace(stderr=stream)):
            assert list(counted(range(2), 2, "image", "packing")) == [0, 1]
            with Progress(2, "image", "sampling", delay=0) as bar:
                bar.advance(2)
    shown = b""
    with contextlib.suppress(OSError):  # the end of a terminal that nobody writes to any more
        while chunk := os.read(ours, 10_000):
            shown += chunk
    os.close(ours)
    assert b"2/2" in shown


def test_log_lines_stand_beside_the_bar(monkeypatch, terminal):
    monkeypatch.setattr(sys, "stderr", terminal)  # of which tqdm looks for handlers
    monkeypatch.setattr(logging.root, "handlers", [logging.StreamHandler(terminal)])
    with logging_redirect_tqdm(), Progress(2, "step", "sampling", delay=0) as bar:
        bar.advance(1)
        logging.getLogger("dydit_jax.test").warning("a line of the log")
        bar.advance(1)
    text = terminal.getvalue()
    assert re.search(r"\r *\ra line of the log\n", text)  # the bar is wiped, and drawn again below
    assert "sampling" in text[text.index("a line of the log") :]


def test_an_abandoned_generator_leaves_no_bar_behind(terminal):
    items = counted(range(3), 3, "image", "reading")
    next(items)
    thread = threading.Thread(target=items.close)
    thread.start()
    thread.join()
    assert progress._thread.bars == []


@pytest.mark.parametrize(("chosen", "kept_from"), [(None, 0.1), ("0.7", 0.7)])
def test_small_programs_are_kept_too_unless_the_user_says_otherwise(monkeypatch, program_folder, chosen, kept_from):
    name = cache.SECONDS_OF_USER
    monkeypatch.delenv(name) if chosen is None else monkeypatch.setenv(name, chosen)
    jax.config.update(name.lower(), float(chosen or 1.0))
    cache.keep_programs()
    assert jax.config.jax_persistent_cache_min_compile_time_secs == kept_from


@pytest.mark.parametrize("chosen", [None, "elsewhere"])
def test_programs_are_kept_unless_the_user_has_chosen_a_place(monkeypatch, tmp_path, chosen):
    monkeypatch.setenv("DYDIT_JAX_CACHE", str(tmp_path))
    before = jax.config.jax_compilation_cache_dir
    try:
        jax.config.update("jax_compilation_cache_dir", chosen)
        cache.keep_programs()
        assert jax.config.jax_compilation_cache_dir == (chosen or str(tmp_path / "programs"))
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


def test_only_one_module_draws_bars():
    """Those of others would count compiling, and be drawn by every process."""
    found = [path.name for path in (ROOT / "dydit_jax").rglob("*.py") if "import tqdm" in path.read_text()]
    assert found == ["progress.py"]
