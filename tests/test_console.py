"""How programs end: a mistake or a lack of memory is one line that says what to do, with a code that is not 0."""

import logging
import pathlib
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from buckets import HttpError
from conftest import ROOT
from etils import epath
from etils.epath.backend import fsspec_backend
from ml_collections import config_flags

from dydit_jax.errors import InputError, StopError
from dydit_jax.runtime import console


@pytest.fixture
def program(monkeypatch):
    """Return a function that runs a program with flags of its own, as typed."""
    monkeypatch.delitem(sys.modules, "config_config", raising=False)  # the last test's file
    known = flags.FlagValues()
    monkeypatch.setattr(console.logging, "basicConfig", lambda **_: None)
    monkeypatch.setattr(console, "_hush_storage", lambda: None)
    config = config_flags.DEFINE_config_file("config", None, "", flag_values=known)
    flags.DEFINE_integer("batch_size", 1, "", flag_values=known)

    def run(*arguments, main=lambda config: console.read_config(config)) -> int:
        monkeypatch.setattr(sys, "argv", ["program", *arguments])
        with pytest.raises(SystemExit) as end:
            console.run(lambda: main(config), known)
        return end.value.code

    run.known = known
    return run


def test_what_a_stranger_wrote_commands_no_terminal(program, capsys):
    said, escaped = "x\x1b]0;owned\x07\x1b[2J\u202e\r", r"x\x1b]0;owned\x07\x1b[2J\u202e\r"

    def main(config):
        raise InputError(f"It was trained on {said}\nFinished in 3s.")

    assert program(main=main) == 2
    assert capsys.readouterr().err == f"program: It was trained on {escaped}\\nFinished in 3s.\n"
    record = logging.LogRecord("it", logging.INFO, "", 0, "a table\nof %s", (said,), None)
    assert console._Printable("%(message)s").format(record) == f"a table\nof {escaped}"


@pytest.mark.parametrize(
    "text, message",
    [
        ("def get_config(:", r"config.py, line 1 is no Python: invalid syntax."),
        ("\n  import os\n", r"config.py, line 2 is no Python: unexpected indent."),
        ("\n\nimport nosuch", r"config.py, line 3: ModuleNotFoundError: No module named 'nosuch'"),
        ("def get_config():\n    return 1 / 0", r"config.py, line 2: ZeroDivisionError: division by zero"),
        ("x = 1", "has no function get_config"),
        ("def get_config():\n    return 3", "get_config must return an ml_collections.ConfigDict, not 3."),
        ("\0", "The file of --config is no Python"),
        (None, "config.py"),
    ],
)
def test_config_that_does_not_run_is_named_with_its_line(program, tmp_path, capsys, text, message):
    path = tmp_path / "config.py"
    if text is None:
        path.mkdir()
    else:
        path.write_text(text)
    assert program(f"--config={path}") == 2
    said = capsys.readouterr().err
    assert message in said and said.startswith("program: ") and len(said.splitlines()) == 1


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("2", "3"), "Unknown argument '2'"),
        (("--batch_size=many",), "many"),
        (("--batch_size=1e3",), "1e3"),
        (("--bath_size=1",), "Unknown flag --bath_size. Did you mean --batch_size?"),
        (
            ("--config=configs/digits_dit.py", "--config.train.stepz=1"),
            "Unknown config key 'stepz'. Did you mean 'steps'?",
        ),
        (("--config=configs/digits_dit.py", "--config.train.steps=many"), "many"),
    ],
)
def test_wrong_flags_are_one_line(program, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(ROOT)
    assert program(*arguments) == 2
    said = capsys.readouterr().err
    assert message in said and len(said.splitlines()) == 1


@pytest.mark.parametrize(
    "action, message",
    [
        (lambda: jnp.zeros(2**46), "Out of memory; lower --batch_size or --config.data.batch_size"),
        (lambda: np.zeros(2**50), "Out of memory; lower --batch_size or --config.data.batch_size"),
        (lambda: pathlib.Path("/" + "x" * 300).read_bytes(), "File name too long"),
        (lambda: _raise(HttpError("503\nService Unavailable")), "503 Service Unavailable."),
    ],
)
def test_what_the_machine_lacks_is_one_line(program, capsys, action, message):
    assert program(main=lambda config: action()) == 1
    said = capsys.readouterr().err
    assert message in said and len(said.splitlines()) == 1


def test_extra_that_paths_of_buckets_need_is_named(program, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    fsspec_backend._get_filesystem.cache_clear()
    assert program(main=lambda config: epath.Path("gs://bucket/run").exists()) == 2
    expected = "program: Paths at gs:// need the extra gcs: pip install 'dydit-jax[gcs]'.\n"
    assert capsys.readouterr().err == expected


def _raise(error: BaseException):
    raise error


@pytest.mark.parametrize(
    "error, code",
    [(InputError("no"), 2), (StopError("no"), 1), (StopError("no", 75), 75), (KeyboardInterrupt(), 130)],
)
def test_errors_of_ours_end_with_their_code(program, capsys, error, code):
    assert program(main=lambda config: _raise(error)) == code
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_bug_keeps_its_traceback(program):
    with pytest.raises(ZeroDivisionError):
        program(main=lambda config: 1 / 0)


def test_flag_that_a_benchmark_requires_is_named_with_its_meaning(program, capsys):
    flags.DEFINE_string("out", None, "File for the results.", flag_values=program.known, required=True)
    assert program("--batch_size=2") == 2
    assert capsys.readouterr().err == "program: --out is required. File for the results.\n"
