"""What is asked of the TPU's compiler; where it is installed, also its answers.

What a step for a slice gathers, and that products are counted right.
"""

import importlib.util
import json
import subprocess
import sys

import pytest
from conftest import ROOT

compiled = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")

# All programs of two benchmarks are traced, none is compiled.
TRACED = """
import sys
import jax
import tpu_compiler
from absl import flags

def trace(function, *arguments, chip):
    jax.eval_shape(function, *arguments)
    return tpu_compiler.Cost(1.0, 1.0, 0, (), "")

tpu_compiler.compile_and_cost = trace
sys.argv = f"benchmark --chips=v5e --chip=v5e --model=S/8 --depth=2 --remats=dots --out={sys.argv[1]}".split()
import tpu_cost
flags.FLAGS(sys.argv, known_only=True)
rows = tpu_cost._blocks("v5e", 16) + tpu_cost._models("v5e", 16)
for name in ("model", "depth", "out"):
    delattr(flags.FLAGS, name)
import train_step
flags.FLAGS(sys.argv, known_only=True)
train_step.main()
print(len(rows))
"""

# Cycles of three products, the first two of which leave their result in fast memory, over those of their multiply-adds.
PRODUCTS = """
import jax
from tpu_compiler import CHIPS, compile_and_cost

def products(x, kernels):
    for kernel in kernels:
        x = jax.lax.optimization_barrier(jax.nn.relu(x @ kernel))
    return x

x, kernels = (jax.ShapeDtypeStruct(shape, "bfloat16") for shape in ((8192, 1152), (3, 1152, 1152)))
cost = compile_and_cost(products, x, kernels, chip="v5e")
print(cost.scheduled / (3 * 2 * 8192 * 1152**2 / CHIPS["v5e"].flops_per_cycle))
"""

# A block with the kernels that pack tokens: what they read and write is in fast memory, S(1).
KERNELS = """
import re, sys
sys.argv = ["tpu_cost.py", "--model=S/2", "--executions=mosaic", "--out="]
import tpu_cost
from absl import flags

flags.FLAGS(sys.argv)
seen, cost = [], tpu_cost.compile_and_cost
tpu_cost.compile_and_cost = lambda *arguments, **settings: seen.append(cost(*arguments, **settings)) or seen[-1]
tpu_cost._blocks("v5e", 16)
made = re.findall(r"= (\\S+|\\(.*?\\)) custom-call\\(.*tpu_custom_call", seen[-1].text)
print(len(made), all("S(1)" in array for types in made for array in re.findall(r"\\w+\\[[^{]*{[^}]*}", types)))
"""


@pytest.mark.slow
def test_programs_of_the_benchmarks_can_be_traced(tmp_path):
    command = [sys.executable, "-c", TRACED, str(tmp_path / "steps.json")]
    done = subprocess.run(command, cwd=ROOT / "benchmarks", capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split()[-1] == "6"  # a block and the model, each whole and by two executions
    assert len(json.loads((tmp_path / "steps.json").read_text())["rows"]) == 5


@compiled
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


@compiled
def test_a_product_costs_its_macs():
    command = [sys.executable, "-c", PRODUCTS]
    done = subprocess.run(command, cwd=ROOT / "benchmarks", capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert float(done.stdout) == pytest.approx(1, rel=1e-3)


@compiled
def test_kernels_keep_tokens_in_fast_memory():
    command = [sys.executable, "-c", KERNELS]
    done = subprocess.run(command, cwd=ROOT / "benchmarks", capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["2", "True"]  # the packing and the spreading one
