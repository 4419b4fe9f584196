"""The package as people install and import it: public names, data files, and, nightly, the wheel away from a clone."""

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile

import numpy as np
import pytest
from conftest import ROOT

import dydit_jax
from dydit_jax.loading import load_checkpoint


@pytest.mark.parametrize("name", dydit_jax.__all__)
def test_public_names_are_there(name):
    assert getattr(dydit_jax, name).__name__ in (name, "train_and_evaluate")
    assert name in dir(dydit_jax)


def test_other_names_are_not():
    with pytest.raises(AttributeError, match="no attribute 'Pipelin'"):
        dydit_jax.Pipelin  # noqa: B018 (asked for to see it fail)


def test_version_is_that_of_the_project():
    assert dydit_jax.__version__ == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


def test_digits_go_by_their_name(monkeypatch, tmp_path):
    by_file = load_checkpoint(ROOT / "assets" / "digits_dydit.safetensors")
    monkeypatch.chdir(tmp_path)
    by_name = load_checkpoint("digits")
    assert by_name.model == by_file.model and by_name.sampling == by_file.sampling
    np.testing.assert_array_equal(
        by_name.params["label_embed"]["table"], by_file.params["label_embed"]["table"], strict=True
    )


@pytest.mark.slow
def test_wheel_runs_away_from_the_clone(tmp_path):
    source, installed, elsewhere = tmp_path / "source", tmp_path / "installed", tmp_path / "elsewhere"
    # A copy: building leaves files behind.
    kept_out = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "out", "runs")
    shutil.copytree(ROOT, source, symlinks=True, ignore=kept_out)
    elsewhere.mkdir()
    environment = dict(os.environ, JAX_PLATFORMS="cpu", PYTHONPATH=str(installed))

    def run(*command, cwd=elsewhere) -> str:
        done = subprocess.run(
            [sys.executable, *map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    # Without a network: what it depends on is here.
    quiet = ("--quiet", "--no-deps", "--no-build-isolation", "--no-index")
    run("-m", "pip", "wheel", *quiet, "--wheel-dir", tmp_path, source)
    (wheel,) = tmp_path.glob("dydit_jax-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"dydit_jax"}
    assets = {f"dydit_jax/assets/digits_{kind}.safetensors" for kind in ("dydit", "dysit")}
    assert {"dydit_jax/py.typed", *assets} <= set(names)
    run("-m", "pip", "install", *quiet, "--target", installed, wheel)

    said = run("-c", "import dydit_jax; print(dydit_jax.__file__, dydit_jax.__version__, dydit_jax.Pipeline)")
    assert said.startswith(str(installed)) and dydit_jax.__version__ in said
    run(installed / "bin" / "dydit-sample", "--checkpoint", "digits", "--labels", "0,1,2", "--out", "out")
    assert (elsewhere / "out" / "grid.png").is_file()
    small = ("--config.train.steps=2", "--config.train.init_from=digits", "--config.data.batch_size=8")
    run(installed / "bin" / "dydit-train", "--config", "digits_dydit", "--workdir", "run", *small)
    assert (elsewhere / "run" / "weights.safetensors").is_file()
