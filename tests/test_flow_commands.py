"""The README's commands on flow matching, one of each kind, and the DySiT that comes with the package."""

import csv
import importlib
import json
import re
import shlex
import shutil
import sys

import numpy as np
import pytest
from conftest import GOLDEN, ROOT
from sklearn.neighbors import KNeighborsClassifier

from dydit_jax import Pipeline
from dydit_jax.checkpoints import load_weights
from dydit_jax.data.sources import digits
from dydit_jax.diffusion.process import Flow
from dydit_jax.runtime import console

TINY = [f"--config.model.{key}" for key in ("depth=1", "width=32", "heads=2", "patch=4")]
# What makes a command short; sampled and analysed is what was trained before.
SHORT = {
    "train": [*TINY, "--config.train.steps=2", "--config.data.batch_size=8"],
    "sample": ["--checkpoint=runs/digits_sit", "--weights=params"],
    "analyze": ["--checkpoints=runs/digits_sit", "--labels=1", "--num_examples=8", "--num_timesteps=3"],
    "convert_torch_weights": ["--heads=4"],
}


def commands() -> list[list[str]]:
    """Return the words of the commands in the README's block on flows, of two trainings the first."""
    blocks = re.findall(r"^```\n(.*?)^```$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    [block] = [block for block in blocks if "digits_sit" in block]
    return [shlex.split(line)[1:] for line in block.splitlines() if "digits_dysit" not in line]


@pytest.fixture
def typed(tmp_path, monkeypatch):
    """Return a function that runs a command here, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.setattr(console.logging, "basicConfig", lambda **_: None)
    monkeypatch.setattr(console, "_hush_storage", lambda: None)

    def run(words: list[str]) -> None:
        monkeypatch.setattr(sys, "argv", words)
        monkeypatch.delitem(sys.modules, "config_config", raising=False)  # the config that was read before
        script = (ROOT / words[0]).read_text()
        importlib.import_module(re.search(r"from (dydit_jax\.cli\.\w+) import", script)[1]).main()

    return run


def test_commands_of_the_readme_run_on_a_flow(typed, tmp_path):
    kinds = []
    for words in commands():
        kinds.append(words[0].removesuffix(".py"))
        if kinds[-1] == "convert_torch_weights":
            shutil.copy(GOLDEN / "sit_plain.pt", words[words.index("--source") + 1])
        typed(words + SHORT[kinds[-1]])
    assert set(kinds) == set(SHORT)
    for made in ("runs/digits_sit", "checkpoints/sit-xl2"):
        assert load_weights(tmp_path / made / "weights.safetensors").process == Flow()
    assert json.loads((tmp_path / "out/flow/manifest.json").read_text())["process"] == dict(name="flow")
    assert (tmp_path / "out/flow/grid.png").is_file()
    with (tmp_path / "out/flow_analysis/losses.csv").open() as file:
        assert {row["timestep"] for row in csv.DictReader(file)} == {"0", "0.5", "1"}


def test_shipped_flow_draws_digits_and_fast_equals_gated():
    pipe, labels = Pipeline.load("digits-flow", precision="highest"), np.arange(40) % 10
    assert pipe.weights.process == Flow() and pipe.weights.model.routers == "first_on"
    fast, gated = (pipe(labels, sampler="heun", steps=5, seed=1, mode=mode) for mode in ("fast", "gated"))
    np.testing.assert_allclose(fast.samples.images, gated.samples.images, atol=1e-5)
    assert fast.macs == gated.macs < 0.6 * pipe.macs.complete
    images, real_labels = digits("train")
    judge = KNeighborsClassifier(3).fit(images.reshape(len(images), -1), real_labels)
    assert (judge.predict(fast.pixels.reshape(40, -1) / 127.5 - 1) == labels).mean() > 0.8
