"""Where the TPU's compiler is installed, a step for a slice of eight chips gathers weights and nothing else."""

import importlib.util
import json
import subprocess
import sys

import pytest
from conftest import ROOT


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
@pytest.mark.parametrize("layout", ["data", "fsdp"])
def test_training_step_compiles_for_a_slice(tmp_path, layout):
    out = tmp_path / "cost.json"
    settings = ("--model=S/8", "--topologies=v5e:2x4", "--stages=first", "--batch_size=32", f"--layouts={layout}")
    command = [sys.executable, "benchmarks/tpu_train_cost.py", *settings, f"--out={out}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=550)
    assert done.returncode == 0, done.stderr[-2000:]
    [row] = json.loads(out.read_text())["rows"]
    assert row["other_gathers"] == [] and row["together_gib"] < 2
    assert ("all-gather" in row["collectives"]) == (layout == "fsdp")
