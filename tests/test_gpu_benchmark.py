"""The benchmark for GPUs: its parts at tiny sizes, its clock and its file."""

import dataclasses
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT

from dydit_jax.errors import InputError
from dydit_jax.loading import load_checkpoint


def cpu() -> dict:
    """Return an environment in which JAX sees no GPU, whatever this machine has."""
    return os.environ | dict(JAX_PLATFORMS="cpu")


class Clock:
    """Seconds that pass when told to."""

    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def begin(benchmark, tmp_path, clock):
    """Return a function that begins a part, for a number of seconds, and the file that it goes on with."""
    results = benchmark("gpu_results").Results(tmp_path / "gpu.json")
    return lambda letter, seconds=1000.0: benchmark("gpu_results").Session(results, letter, clock() + seconds, clock)


# --- The clock and the file ----------------------------------------------------------------------


def run_parts(benchmark, results, clock, taken: dict, budget: float = 100.0):
    """Run parts a, b and c that take so many seconds, each weighing the same; return what each was given."""
    module, given = benchmark("gpu_results"), {}

    def start(letter, seconds):
        given[letter] = seconds
        clock.now += min(taken[letter], seconds)
        if taken[letter] > seconds:
            return None
        results.update_part(letter, state=module.FINISHED)
        return 0

    weights = dict.fromkeys("abc", 1)
    failed = module.run_parts(dict.fromkeys("abc", "title"), results, module.Budget(budget, weights, clock), start)
    return given, failed


def test_what_a_part_leaves_over_goes_to_those_after_it(benchmark, tmp_path, clock):
    results = benchmark("gpu_results").Results(tmp_path / "gpu.json")
    given, failed = run_parts(benchmark, results, clock, dict(a=25, b=20, c=20), budget=90)
    assert given == dict(a=30, b=32.5, c=45)
    assert failed == []


def test_a_part_over_its_share_is_ended_and_run_again_alone(benchmark, tmp_path, clock):
    results = benchmark("gpu_results").Results(tmp_path / "gpu.json")
    given, _ = run_parts(benchmark, results, clock, dict(a=10, b=1000, c=10), budget=90)
    assert given["b"] == 40 and given["c"] == 40  # b takes nothing from c
    states = {letter: results.part(letter)["state"] for letter in "abc"}
    assert states["a"] == states["c"] == "finished" and states["b"].startswith("ended after")
    given, _ = run_parts(benchmark, results, clock, dict(b=50), budget=90)
    assert given == dict(b=90)


def test_no_part_is_started_without_time(benchmark, tmp_path, clock):
    results = benchmark("gpu_results").Results(tmp_path / "gpu.json")
    given, failed = run_parts(benchmark, results, clock, dict(a=1), budget=5)
    assert given == {} and failed == []
    assert results.part("c")["state"] == "no time was left"


def test_a_part_that_breaks_does_not_stop_the_others(benchmark, tmp_path, clock):
    module = benchmark("gpu_results")
    results = module.Results(tmp_path / "gpu.json")
    codes = dict(a=1, b=0)
    budget = module.Budget(100, dict(a=1, b=1), clock)
    failed = module.run_parts(dict(a="", b=""), results, budget, lambda letter, _: codes[letter])
    assert failed == ["a"]
    assert results.part("a")["state"] == "failed, exit code 1"


def test_rows_are_kept_and_only_what_is_missing_is_measured(begin, clock):
    calls = []

    def measure(session, name, row, rounds):
        done = row.get("done", 0)
        for number in range(done, rounds):
            if session.left <= 0:
                return False
            calls.append((name, number))
            clock.now += 40
            session.write(name, dict(done=number + 1))
        return True

    first = begin("b", seconds=100)
    for name in ("one", "two"):
        first.measure(name, measure, 2)
    assert first.rows["one"] == dict(done=2, finished=True)
    assert first.rows["two"] == dict(done=1, finished=False)
    assert first.state == "incomplete"
    second = begin("b")
    for name in ("one", "two", "three"):
        second.measure(name, measure, 2)
    assert calls == [("one", 0), ("one", 1), ("two", 0), ("two", 1), ("three", 0), ("three", 1)]
    assert second.state == "finished"


@pytest.mark.parametrize(
    "error, key, line",
    [
        (MemoryError("4 GiB"), "not_measured", "too little memory: 4 GiB"),
        (
            RuntimeError("RESOURCE_EXHAUSTED: Out of\nmemory"),
            "not_measured",
            "too little memory: RESOURCE_EXHAUSTED: Ou",
        ),
        (RuntimeError("CUDA out of memory. Tried"), "not_measured", "too little memory: CUDA out of memory."),
        (
            ModuleNotFoundError("No module named 'torch'"),
            "not_measured",
            "a package is missing: No module named 'torch'",
        ),
        (InputError("no GPU"), "not_measured", "no GPU"),
        (ZeroDivisionError("by zero"), "failed", "ZeroDivisionError: by zero"),
    ],
)
def test_what_goes_wrong_is_one_line_of_its_row(begin, capsys, error, key, line):
    def breaks(session, name, row):
        session.write(name, dict(kept=1))
        raise error

    def goes_on(session, name, row):
        session.write(name, {})
        return True

    session = begin("e")
    session.measure("breaks", breaks)
    session.measure("goes on", goes_on)
    row = begin("e").rows["breaks"]  # tried again
    assert row == dict(kept=1)
    assert session.rows["breaks"][key].startswith(line) and "\n" not in session.rows["breaks"][key]
    assert session.rows["goes on"] == dict(finished=True)
    assert session.state == ("failed" if key == "failed" else "incomplete")
    assert ("Traceback" in capsys.readouterr().err) == (key == "failed")


def test_a_row_without_time_says_so(begin):
    session = begin("f", seconds=0)
    session.measure("row", None)
    assert session.rows["row"] == dict(not_measured="no time was left")


def test_results_of_another_device_are_not_mixed(benchmark, tmp_path):
    results = benchmark("gpu_results").Results(tmp_path / "gpu.json")
    here = dict(device="NVIDIA H200", commit="abc", versions={}, dry=False, date="today")
    results.begin(here)
    results.update_part("a", rows=dict(row={}))
    results.begin(here | dict(date="tomorrow"))
    assert results.part("a") == dict(rows=dict(row={}))
    with pytest.raises(InputError, match=r"made otherwise \(device, commit differ\); name another --out"):
        results.begin(here | dict(device="NVIDIA H100", commit="def"))


def test_a_damaged_file_is_not_overwritten(benchmark, tmp_path):
    path = tmp_path / "gpu.json"
    path.write_text('{"parts": ')
    with pytest.raises(InputError, match="damaged or cut short"):
        benchmark("gpu_results").Results(path).begin({})


# --- The parts -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sizes(benchmark):
    return benchmark("gpu_parts").dry_sizes()


def test_every_way_is_compared_with_gated(benchmark, begin, sizes):
    session = begin("a")
    benchmark("gpu_parts").run_part("a", session, sizes, "")
    assert session.state == "finished"
    assert set(session.rows) == {f"{way}, highest" for way in ("switch", "gather", "one_hot", "masked")}
    for row in session.rows.values():
        assert row["agrees"] and row["token_gates_unlike_per_million"] == 0
        assert row["largest_difference"] < 1e-5


@pytest.mark.slow
def test_complete_and_fast_are_timed_and_traced(benchmark, begin, sizes, tmp_path):
    session = begin("b")
    benchmark("gpu_parts").run_part("b", session, sizes, "")
    [row] = session.rows.values()
    assert session.state == "finished" and row["segments"] == 1
    assert {mode: len(taken) for mode, taken in row["all_seconds_per_step"].items()} == dict.fromkeys(
        ("complete", "gated", "fast"), sizes.rounds
    )
    assert row["efficiency"] == pytest.approx(row["speedup"] / row["ideal_speedup"])
    assert row["ideal_speedup"] > 1 and row["token_gates_unlike_gated_per_million"] == 0
    out = tmp_path / "gpu.json"
    session = begin("c")
    benchmark("gpu_parts").run_part("c", session, sizes, str(out))
    [row] = session.rows.values()
    assert session.state == "finished" and set(row["lost_ms_per_step"]) >= {"products", "gaps"}
    for mode in ("complete", "fast"):
        classes = row[mode]["classes"].values()
        assert sum(one["ms"] for one in classes) >= row[mode]["ms_per_step"] * (1 - 1e-6)
        assert (tmp_path / f"gpu_{mode}.trace.json.gz").exists()


@pytest.mark.parametrize("stage", [pytest.param(stage, marks=pytest.mark.slow) for stage in ("static", "second_stage")])
def test_training_steps_are_timed(benchmark, begin, sizes, stage):
    session, parts = begin("d"), benchmark("gpu_parts")
    session.measure(stage, parts.time_training, sizes, sizes.training_batch)
    [row] = session.rows.values()
    assert session.state == "finished" and len(row["all_seconds"]) == sizes.rounds
    assert row["images_per_second"] == pytest.approx(row["batch"] / np.median(row["all_seconds"]))
    macs = sizes.training.macs
    routers = 0 if stage == "static" else macs.routers
    assert row["giga_macs_per_image"] == pytest.approx((macs.complete + routers) / 1e9)


def test_utilisation_counts_no_pass_that_is_computed_again(benchmark, monkeypatch):
    training = benchmark("gpu_adapter").Training.__new__(benchmark("gpu_adapter").Training)
    training.macs, training._dtype = 32 * 118.6e9, jnp.dtype("bfloat16")
    assert training.utilisation(0.1) == {}  # no peak of a CPU is known
    device = dataclasses.make_dataclass("Device", ["device_kind"])("NVIDIA H200")
    monkeypatch.setattr(jax, "devices", lambda *_: [device])
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    found = training.utilisation(0.1)
    assert found["peak_tflops"] == pytest.approx(989)
    assert found["utilisation"] == pytest.approx(6 * 32 * 118.6e9 / 0.1 / 989e12)


def test_without_pytorch_every_row_says_so(benchmark, begin, sizes, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    session = begin("e")
    benchmark("gpu_parts").run_part("e", session, sizes, "")
    assert list(session.rows) == list(benchmark("gpu_torch").ROWS) and session.state == "incomplete"
    for row in session.rows.values():
        assert row["not_measured"].startswith("a package is missing: ")


def test_the_checkpoint_of_the_command_can_be_sampled(benchmark, sizes, tmp_path):
    benchmark("gpu_adapter").write_checkpoint(tmp_path, sizes.command, decoder=None)
    weights = load_checkpoint(tmp_path)
    assert weights.model == sizes.command.config and weights.sampling.steps == "2"


def test_full_sizes_are_those_of_the_docs(benchmark):
    sizes = benchmark("gpu_parts").full_sizes()
    assert (sizes.sampling.batch, sizes.sampling.rows, sizes.sampling.config.tokens) == (32, 64, 256)
    # The pace of 250 steps: a segment has as many steps, and units change as often in it.
    assert sizes.sampling.swings / sizes.sampling.steps == pytest.approx(0.5 / 250)
    assert sizes.sampling.steps / sizes.sampling.segments == pytest.approx(250 / 16, abs=1)


def test_without_a_gpu_there_is_one_line(tmp_path):
    command = [sys.executable, "benchmarks/gpu.py", f"--out={tmp_path / 'gpu.json'}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, env=cpu())
    assert done.returncode == 2
    assert done.stderr.strip().splitlines() == [
        "benchmarks/gpu.py: JAX finds no GPU here, only 'cpu'; install jax[cuda12] or jax[cuda13], or give --dry to "
        "try the parts at tiny sizes."
    ]
    assert not (tmp_path / "gpu.json").exists()


@pytest.mark.slow
def test_all_parts_run_as_one_command(tmp_path):
    pytest.importorskip("diffusers")
    out = tmp_path / "gpu.json"
    command = [sys.executable, "benchmarks/gpu.py", "--parts=a,b,c,d,e,f,g", "--dry", "--budget=5400", f"--out={out}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=3600, env=cpu())
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(out.read_text())
    assert {letter: part["state"] for letter, part in found["parts"].items()} == dict.fromkeys("abcdefg", "finished")
    assert list(found["parts"]["d"]["rows"]) == ["static", "second_stage"]
    assert found["parts"]["f"]["rows"]["top-k"]["ideal_speedup"] > 1
    assert found["environment"]["versions"]["jax"] == jax.__version__
