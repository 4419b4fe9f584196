"""The study runs the most important first, goes on where it was stopped, and says what its numbers say.

So does the Pareto page, whose points can be drawn again.
"""

import importlib
import json
import re
import shlex
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from conftest import ROOT
from flax import nnx

from dydit_jax.checkpoints import WEIGHTS_FILE, Weights, save_weights
from dydit_jax.cli import sample as sample_command
from dydit_jax.diffusion.process import Diffusion
from dydit_jax.diffusion.samplers import SamplingConfig
from dydit_jax.errors import InputError
from dydit_jax.models.execution import token_ranks
from dydit_jax.models.routing import TIME_ROUTERS, TOKEN_ROUTERS
from dydit_jax.runtime import locks

REAL = dict(accuracy=0.95, distance=0.5)


@pytest.fixture(scope="module")
def modules():
    """Import the study's modules; what they register and define is taken back."""
    registries, known = (TIME_ROUTERS, TOKEN_ROUTERS), set(flags.FLAGS)
    before, loaded = [dict(registry) for registry in registries], set(sys.modules)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        names = ("study", "study_models", "study_pages", "study_routers", "studies", "pareto", "pareto_page", "ship")
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})
    for registry, entries in zip(registries, before):
        registry.clear()
        registry.update(entries)
    for name in set(flags.FLAGS) - known:
        delattr(flags.FLAGS, name)
    for name in set(sys.modules) - loaded:
        if name.partition("_")[0] in ("study", "studies", "judge", "pareto", "ship"):
            del sys.modules[name]
    flags.FLAGS.unparse_flags()


@pytest.fixture
def given(modules, tmp_path):
    """Return a function that sets flags of the study, of the digits in a folder of their own."""
    fixed = ["study.py", "--data=digits", f"--runs={tmp_path}", "--num_images=20", "--sampling_seeds=2"]
    return lambda *more: flags.FLAGS([*fixed, *more])


# --- Order and time ------------------------------------------------------------------------------


def test_a_model_starts_from_one_that_was_trained_before(modules):
    order = modules.study_models.ordered_runs()
    assert order[0] == ("static", 0) and len(set(order)) == len(order)
    for study in modules.study_models.STUDIES.values():
        assert set(study.contestants) == {name for name, _ in order}
        for place, (name, _) in enumerate(order):
            start = study.contestants[name].start
            assert not start or (start, 0) in order[:place]
    compared = {name for question in modules.study_models.QUESTIONS for pair in question.pairs for name in pair}
    assert compared <= {name for name, _ in order}


def test_every_training_of_the_digits_is_a_config_that_is_allowed(modules, given):
    given()
    study = modules.study_models.STUDIES["digits"]
    models = {name: modules.study.Training(study, name, 0).experiment.model for name in study.contestants}
    macs = {name: model.macs.complete for name, model in models.items()}
    assert macs["static, narrower"] / macs["static"] == pytest.approx(0.5, abs=0.02)
    assert macs["static, shallower"] / macs["static"] == pytest.approx(0.5, abs=0.02)
    assert models["DyDiT, heads off"].time_router == "open,linear"
    assert models["DyDiT, top-k tokens"].capacities == (8, 8, 8, 8) and models["DyDiT, one pass"].guidance_free


def test_hours_are_those_of_the_speed_so_far(modules, given, tmp_path):
    given("--sampling_seeds=1")
    study = modules.study_models.STUDIES["digits"]
    static = modules.study.Training(study, "static", 0)
    macs = 3000 * 3 * 64 * static.experiment.model.macs.complete
    assert modules.study.training_macs(static.experiment) == macs
    assert modules.study.sampling_macs(static.experiment) == 20 * 50 * static.experiment.model.macs.complete
    one_pass = modules.study.Training(study, "DyDiT, one pass", 0).experiment
    assert modules.study.training_macs(one_pass) == 2500 * 4 * 64 * one_pass.model.macs.complete
    assert modules.study.measured_rate([static], 7.0) == 7.0
    static.folder.mkdir(parents=True)
    reports = [{"step": step, "time/steps_per_second": speed} for step, speed in ((100, 1.0), (200, 5.0), (1500, 6.0))]
    (static.folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in reports) + '{"step": 16')
    assert modules.study.measured_rate([static], 7.0) == pytest.approx(5.0 * macs / 3000)
    lines = modules.study.plan(study, []).splitlines()
    [row] = [line for line in lines if line.startswith("| 1 | static | 0 | 3000 |")]
    assert row.endswith("| 0.2 | step 1500 |") and lines[-1].endswith("at 7.3 GMACs per second in training.")


# --- Routers that learn less ---------------------------------------------------------------------


@pytest.mark.parametrize("name, counts", [("open", (6, 6, 6)), ("constant", (3, 3, 3)), ("rising", (4, 3, 2))])
def test_schedules_open_as_many_units_as_they_say(modules, name, counts):
    router = TIME_ROUTERS[name](layers=2, width=16, units=6, layout="first_on", rngs=nnx.Rngs(0))
    gates = np.asarray(router(jnp.asarray([0, 499, 999]), None, None))
    assert gates.shape == (3, 2, 6) and gates.dtype == np.float32 and (gates[:, :, 0] == 1).all()
    assert tuple(gates[:, 1].sum(-1)) == counts
    whole = router(jnp.arange(1000), None, None).mean()
    assert whole == pytest.approx(1 if name == "open" else 0.5, abs=0.01)


def test_random_tokens_have_a_random_order_and_nothing_that_is_learnt(modules):
    router = TOKEN_ROUTERS["random"](width=32, dtype=jnp.float32, platform="cpu", rngs=nnx.Rngs(0))
    assert not jax.tree.leaves(nnx.state(router, nnx.Param))
    x = jax.random.normal(jax.random.key(1), (16, 64, 32))
    logits = np.asarray(router(x))
    assert (logits > 0).all()  # how many pass is a matter of the capacity alone
    passing = lambda logits: token_ranks(logits) < 19  # 0.3 of 64
    gates, nearly_same = np.asarray(passing(logits)), np.asarray(passing(router(x + 0.1)))
    assert (gates[0] != gates[1]).any()
    assert (gates != nearly_same).mean() == pytest.approx(2 * 0.3 * 0.7, abs=0.06)  # as two that are independent
    assert not np.asarray(jax.grad(lambda x: router(x).sum())(x)).any()


# --- Measurements, kept and written --------------------------------------------------------------


def distance_of(model: str, seed: int, sampling_seed: int) -> float:
    """Return what the stand-in for a measurement finds."""
    base = {"static, narrower": 3.0, "DyDiT, heads off": 1.5}.get(model, 1.0)
    return base + 0.2 * seed + 0.02 * sampling_seed


@pytest.fixture
def stand_ins(modules, monkeypatch):
    """Let models train and be measured in no time; returns the list of what was done."""
    done = []

    def train(config, workdir, settings, script):
        workdir.mkdir(parents=True, exist_ok=True)
        if not (workdir / WEIGHTS_FILE).exists():
            done.append(workdir.parent.name)
            (workdir / WEIGHTS_FILE).write_text("")

    def measure(pipeline, judge, sampling, *, images, seed):
        if len(done) > 4 and "stop" in done:
            raise KeyboardInterrupt
        model, training_seed = pipeline.name
        distance = distance_of(model, training_seed, seed)
        return dict(accuracy=0.9, distance=distance, macs=4e6, mac_ratio=0.5, passes=1.0, tokens=0.804)

    names = {modules.study.Training(None, name, seed): (name, seed) for name, seed in modules.study.ordered_runs()}
    load = lambda folder, precision: SimpleNamespace(
        name=next(key for training, key in names.items() if training.folder == folder), sampling=lambda guidance: None
    )
    monkeypatch.setattr(modules.study, "train_to_end", train)
    monkeypatch.setattr(modules.study, "measure", measure)
    monkeypatch.setattr(modules.study, "Pipeline", SimpleNamespace(load=load))
    monkeypatch.setattr(modules.study, "analyze_models", lambda study: None)
    judge = SimpleNamespace(measure=lambda images, labels: dict(REAL))
    digits = modules.study_models.Study(
        modules.study_models.STUDIES["digits"].contestants, lambda: judge, lambda n: (0, 0)
    )
    monkeypatch.setitem(modules.study.STUDIES, "digits", digits)
    return done


def test_study_goes_on_where_it_was_stopped(modules, given, stand_ins, tmp_path, monkeypatch):
    given()
    monkeypatch.setattr(modules.study.Results, "write_pages", lambda self: None)
    stand_ins += ["stop"]
    with pytest.raises(KeyboardInterrupt):
        modules.study.main()
    before = json.loads((tmp_path / "study.json").read_text())
    assert [row["sampling_seed"] for row in before["results"]] == [0, 1] * 3  # three of four had been measured
    assert before["real"] == REAL and before["images"] == 20 and before["command"].startswith("python ")
    stand_ins.remove("stop")
    modules.study.main()
    rows = json.loads((tmp_path / "study.json").read_text())["results"]
    assert [(row["model"], row["seed"]) for row in rows[::2]] == modules.study.ordered_runs()
    assert rows[:6] == before["results"] and len(stand_ins) == len(rows) / 2
    # There are rows for as many tokens as pass above a threshold: 0.8 of 16.
    for name in ("DyDiT, top-k tokens", "DyDiT, random tokens"):
        training = modules.study.Training(modules.study.STUDIES["digits"], name, 0)
        assert training.experiment.model.capacities == (13,) * 4
    modules.study.main()
    assert len(stand_ins) == len(rows) / 2
    given("--num_images=30")
    with pytest.raises(InputError, match=r"study\.json was measured otherwise \(images differ\); name another --runs"):
        modules.study.Results(modules.study.STUDIES["digits"])


def test_a_model_that_another_process_works_on_is_left_to_it(modules, given, stand_ins, tmp_path, monkeypatch):
    given("--sampling_seeds=1")
    monkeypatch.setattr(modules.study.Results, "write_pages", lambda self: None)
    monkeypatch.setattr(locks, "ENDING_SECONDS", 0.1)
    taken = modules.study.Training(modules.study.STUDIES["digits"], "static, narrower", 0).folder.with_suffix(".study")
    taken.mkdir(parents=True)
    other = locks.FolderLock(taken)
    other.__enter__()
    waits = []

    def sleep(seconds):
        waits.append(len(stand_ins))
        other.__exit__(None, None, None)

    monkeypatch.setattr(modules.study, "time", SimpleNamespace(sleep=sleep))
    modules.study.main()
    everything = modules.study.ordered_runs()
    assert waits == [len(everything) - 1] and stand_ins[-1] == "static_narrower"
    rows = json.loads((tmp_path / "study.json").read_text())["results"]
    assert sorted((row["model"], row["seed"]) for row in rows) == sorted(everything)


@pytest.fixture
def found(modules) -> dict:
    """Return the results of a study that has ended."""
    rows = [
        dict(model=model, seed=seed, sampling_seed=s, distance=distance_of(model, seed, s), accuracy=0.9)
        | dict(macs=4e6, mac_ratio=0.5)
        for model, seed in modules.study_models.ordered_runs()
        for s in (0, 1)
    ]
    return dict(results=rows, real=REAL)


def test_tables_hold_means_and_both_deviations(modules, found):
    text = modules.study_pages.tables(found)
    # 1, 1.2 and 1.4, each with two sampling seeds that are 0.02 apart.
    assert "| DyDiT, lambda 0.5 | 3 | 4.00 | 0.500 | 0.900 ± 0.000 (0.000) | 1.21 ± 0.20 (0.01) |" in text
    assert "| static | 1 | 4.00 | 0.500 | 0.900 (0.000) | 1.01 (0.01) |" in text
    assert "| real test pictures |  |  |  | 0.950 | 0.50 |" in text
    # sqrt(0.2^2 + 0.2^2) = 0.283.
    assert "| DyDiT, lambda 0.5, minus static, narrower | +0.000 | -2.00 (-7.1) |" in text
    assert "**At equal MACs, does a DyDiT beat static models?**" in text


def test_titles_say_what_the_numbers_say(modules, found):
    pages = modules.study_pages
    expected = (
        "nearer to real ones than those of a narrower static model and as near to real ones as those of a shallower one"
    )
    assert pages.cost_finding(found) == f"At its cost, a DyDiT's pictures are {expected}"
    # sqrt(0.141^2 + 0.2^2) = 0.245 for two seeds beside three.
    differences = pages.part_differences(found)
    assert differences["DyDiT, heads off"]["by"] == pytest.approx(0.4)
    assert pages.parts_finding(differences) == "None of these makes the pictures measurably worse"
    differences["DyDiT, heads off"]["deviations"] = 2.5
    assert pages.parts_finding(differences) == "Measurably worse at equal cost: heads off"
    first = dict(found, results=[row for row in found["results"] if row["seed"] == 0])
    assert pages.cost_finding(first) == "Fréchet distance to real pictures, over cost"
    assert pages.draw_cost(dict(found, results=[])) is None and pages.draw_parts(dict(found, results=[])) is None


def test_figures_are_drawn_from_what_there_is(modules, found):
    first = dict(found, results=[row for row in found["results"] if row["seed"] == 0])
    for results in (found, first):
        [axis] = modules.study_pages.draw_cost(results).axes
        assert len(axis.lines) == 4 + 3 + 2 + 2  # static, DyDiTs, flows; lines of DyDiTs and real pictures
        [axis] = modules.study_pages.draw_parts(results).axes
        assert [text.get_text().partition("\n")[0] for text in axis.get_yticklabels()][:2] == [
            "DyDiT, heads off",
            "DyDiT, groups off",
        ]


# --- The Pareto page -----------------------------------------------------------------------------


def test_points_are_at_most_sixty_and_each_is_drawn_again_by_its_command(modules, monkeypatch):
    points = modules.pareto.all_points()
    assert len(points) == len({point.name for point in points}) <= 60
    assert {point.mode for point in points} == {"fast", "gated", "complete"}
    requests = []
    monkeypatch.setattr(sample_command, "sample", requests.append)
    for point in (points[0], points[-1], next(point for point in points if point.guidance == "interval")):
        settings = dict(num_images=2000, mode=point.mode, batch_size=64)
        words = shlex.split(modules.pareto.command(point, "runs/x", "out/y", settings))
        monkeypatch.setattr(sys, "argv", words[1:])
        sample_command.main()
        asked = SamplingConfig(**requests[-1].overrides)
        assert asked == SamplingConfig(**point.overrides)
        assert (requests[-1].num_images, requests[-1].mode, requests[-1].out) == (2000, point.mode, "out/y")


def made_points() -> list[dict]:
    """Return points of the Pareto page: cost, seconds and distance of a static and of two dynamic models."""
    common = dict(solver="ddim, 50", guidance="none", passes=50, accuracy=0.9)
    rows = [
        ("static", "complete", 4e9, 0.04, 0.5),
        ("DyDiT, lambda 0.5", "fast", 2e9, 0.05, 0.6),
        ("DyDiT, lambda 0.3", "fast", 1e9, 0.01, 0.8),
        ("DyDiT, lambda 0.3", "complete", 4e9, 0.04, 0.9),
    ]
    names = ("model", "mode", "macs", "seconds", "distance")
    return [common | dict(zip(names, row)) for row in rows]


def test_front_holds_what_nothing_beats(modules):
    page, points = modules.pareto_page, made_points()
    assert [point["distance"] for point in page.front(points, "macs")] == [0.8, 0.6, 0.5]
    assert [point["distance"] for point in page.front(points, "seconds")] == [0.8, 0.5]
    assert page.finding(points, "macs") == "By MACs, 2 of 3 points that nothing beats are dynamic"
    assert page.finding(points[1:3], "seconds") == "By seconds, all 2 points that nothing beats are dynamic"
    lines = page.table(points).splitlines()
    assert len(lines) == 2 + 3 and lines[2].startswith(
        "| DyDiT, lambda 0.3 | ddim, 50 | none | fast | 50 | 1000 | 10.0 |"
    )
    assert lines[2].endswith("| 0.900 | 0.80 | MACs, seconds |") and lines[3].endswith("| 0.60 | MACs |")
    of_macs, of_seconds = page.draw(points).axes
    assert len(of_macs.lines) == len(of_seconds.lines) == 1 + 4


def test_page_measures_the_models_that_are_there(modules, given, tmp_path, monkeypatch):
    given("--num_images=2000")
    monkeypatch.setattr(modules.pareto, "save_figure", lambda path, figure: None)
    with pytest.raises(InputError, match="No model in .* has been trained; start with benchmarks/study.py"):
        modules.pareto.main()
    study = modules.study_models.STUDIES["digits"]
    folder = modules.study.Training(study, "static", 0).folder
    folder.mkdir(parents=True)
    (folder / WEIGHTS_FILE).write_text("")
    measured = []

    def measure(point, checkpoint, judge):
        if len(measured) == 5:
            raise KeyboardInterrupt
        measured.append(point)
        row = made_points()[0] | dict(solver=point.solver, guidance=point.guidance, mode=point.mode)
        del row["seconds"]
        return row

    timed = lambda points, checkpoints: [[64.0 * index, 640.0, 0.0] for index, _ in enumerate(points)]
    monkeypatch.setattr(modules.pareto, "measure", measure)
    monkeypatch.setattr(modules.pareto, "time_points", timed)
    monkeypatch.setitem(modules.pareto.STUDIES, "digits", modules.study_models.Study(study.contestants, dict, None))
    with pytest.raises(KeyboardInterrupt):
        modules.pareto.main()
    assert not (tmp_path / "pareto.md").exists()
    measured[:0] = [None]  # lets it go on
    modules.pareto.main()
    assert len(measured) == 1 + 12 and len(set(measured)) == 1 + 12  # of the static model, each once
    rows = json.loads((tmp_path / "pareto.json").read_text())["points"]
    assert [row["seconds"] for row in rows] == list(range(11)) + [10]  # the median round, for one image
    (tmp_path / "pareto.md").unlink()  # killed before it was written
    modules.pareto.main()
    assert (tmp_path / "pareto.md").read_text().startswith("| model |")


@pytest.mark.slow
def test_a_point_is_drawn_judged_and_timed(modules, given, tiny, tmp_path):
    given("--num_images=12", "--timed_images=4", "--rounds=2")
    model, params = tiny
    weights = Weights(model.config, Diffusion(), SamplingConfig(clip=1.0), params, {})
    save_weights(tmp_path / WEIGHTS_FILE, weights)
    point = modules.pareto.Point("DyDiT, lambda 0.5", "unipc, trailing:6", "interval", "fast")
    judge = SimpleNamespace(measure=lambda images, labels: dict(distance=float(np.abs(images).max())))
    row = modules.pareto.measure(point, tmp_path / WEIGHTS_FILE, judge)
    assert row["distance"] <= 1 and 6 < row["passes"] < 12 and row["macs"] < row["passes"] * model.config.macs.complete
    [seconds] = modules.pareto.time_points([point], {point.model: tmp_path / WEIGHTS_FILE})
    assert len(seconds) == 2 and min(seconds) > 0
    folder = tmp_path / "pareto" / point.name
    assert {path.name for path in folder.iterdir()} == {"manifest.json", "cost.json", "samples.npz"}
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["num_images"] == 12 and manifest["sampling"]["guidance_interval"] == [100, 700]


def test_trials_of_a_few_steps_are_not_taken_for_the_study(modules, given, tmp_path):
    (tmp_path / "study.json").write_text(json.dumps(dict(data="digits", images=12, results=[])))
    given("--num_images=12")
    modules.study.Results(None)  # of a version that did not say the steps
    given("--num_images=12", "--steps=20")
    with pytest.raises(InputError, match="was measured otherwise .steps differ"):
        modules.study.Results(None)


# --- What comes with the package -----------------------------------------------------------------


def test_a_model_ships_only_as_good_as_its_parent(modules):
    rows = lambda *distances, **others: [
        dict(accuracy=0.94, recall=0.6, macs=5e6, distance=d) | others for d in distances
    ]
    real, parent = dict(accuracy=0.95, distance=0.1, recall=0.7), rows(1.0, 1.2, macs=10e6)
    met = lambda model, size=8_000_000: {
        row["about"].partition(",")[0]: row["met"] for row in modules.ship.conditions(model, parent, real, size)
    }
    good = rows(1.3, 1.4)  # 0.25 worse; the bound is 2 sqrt(0.071^2 + 0.141^2) = 0.316
    assert list(met(good)) == ["accuracy", "distance", "recall", "MACs beside the parent's", "bytes"]
    assert all(met(good).values())
    assert not met(rows(1.4, 1.5))["distance"]
    assert not met(rows(1.3, 1.4, accuracy=0.92))["accuracy"]
    assert not met(rows(1.3, 1.4, recall=0.59))["recall"]  # neither differs from seed to seed
    assert not met(rows(1.3, 1.4, macs=5.6e6))["MACs beside the parent's"]
    assert not met(good, size=8_000_001)["bytes"]
    text = modules.ship.conditions_table(modules.ship.conditions(rows(1.4, 1.5), parent, real, 4_000_000))
    assert "| distance, loss beside the parent | 0.35 | at most 0.3162 | **no** |" in text


# --- The page ------------------------------------------------------------------------------------


def test_the_page_holds_the_tables_of_its_results(modules):
    page = (ROOT / "docs" / "study.md").read_text().splitlines()
    found, shipped = (json.loads((ROOT / "docs" / name).read_text()) for name in ("study.json", "fashion.json"))
    written = modules.study_pages.tables(found) + modules.ship.conditions_table(shipped["conditions"])
    written += modules.ship.models_table(shipped).split("\n", 1)[1]  # the page's first line says more
    written += modules.pareto_page.table(json.loads((ROOT / "docs" / "pareto.json").read_text())["points"])
    assert [line for line in written.splitlines() if line.startswith("|") and line not in page] == []


def test_the_readme_holds_what_was_measured_of_the_model_that_ships(modules):
    readme = (ROOT / "README.md").read_text()
    shipped = json.loads((ROOT / "docs" / "fashion.json").read_text())
    for line in modules.ship.models_table(shipped).splitlines()[2:]:
        _, macs, accuracy, distance, _, recall = (cell.strip() for cell in line.strip("|").split("|"))
        macs = f"{float(macs):.1f}" if macs else ""
        numbers = re.escape(f" {macs} | {accuracy} | {distance} | {recall} |".replace("  ", " "))
        assert re.search(rf"^\| [^|]+ \|{numbers}$", readme, re.MULTILINE)
