"""A solver is searched for one model, goes on after a kill, and is refused where it does not belong."""

import dataclasses
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import relative_error
from runs import make_run

from dydit_jax.checkpoints import Weights, checksum, load_weights, save_weights
from dydit_jax.diffusion.process import Diffusion, Flow
from dydit_jax.diffusion.samplers import SamplingConfig
from dydit_jax.errors import InputError, StopError
from dydit_jax.jobs import search_solver as job
from dydit_jax.jobs.sample import Request, sample
from dydit_jax.jobs.search_solver import SearchRequest, search_solver
from dydit_jax.models.dit import Model
from dydit_jax.models.lora import LoRAConfig
from dydit_jax.sampling.search import Fit, Teacher, first_positions, moves, search
from dydit_jax.sampling.searched import listed
from dydit_jax.sampling.settings import PRESETS, choose_sampling

IMAGES, EVALUATIONS = 40, 4
OWN = SamplingConfig(sampler="ddim", steps="2", clip=1.0)
PROCESS = Diffusion()


@pytest.fixture(scope="module")
def checkpoint(tiny, tmp_path_factory) -> str:
    model, params = tiny
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    save_weights(path, Weights(model.config, PROCESS, OWN, params, {}))
    return str(path)


def request(checkpoint, out) -> SearchRequest:
    noises = dict(train_noises=IMAGES, held_out_noises=IMAGES, batch_size=IMAGES)
    return SearchRequest(checkpoint, str(out), EVALUATIONS, reference="trailing:40", **noises)


@pytest.fixture(scope="module")
def found(checkpoint, tmp_path_factory):
    """A search that went through: its folder, and how often it measured something."""
    out, patch = tmp_path_factory.mktemp("search") / "out", pytest.MonkeyPatch()
    patch.setattr(job, "SOLVERS", ["ddim", "dpmpp_2m"])  # each form of table is compiled
    measured = []
    recall = job.Journal.recall
    patch.setattr(job.Journal, "recall", lambda *all: (measured.append(all[1]), recall(*all))[1])
    search_solver(request(checkpoint, out))
    patch.undo()
    return out, len(set(measured))


# --- The search ----------------------------------------------------------------------------------


def test_search_finds_a_better_solver_than_every_built_in(found):
    out, _ = found
    solver = json.loads((out / "solver.json").read_text())
    assert solver["error"] < 0.8 * min(solver["errors_of_built_in"].values())
    assert solver["error"] <= solver["start"]["error"] and solver["kept"].startswith("fit ")
    assert {name.split()[0] for name in solver["errors_of_built_in"]} == {"ddim", "dpmpp_2m"}
    assert len(solver["errors_of_built_in"]) == 10 and len(solver["timesteps"]) == EVALUATIONS
    assert sorted(path.name for path in out.iterdir()) == ["job.json", "measured.json", "solver.json"]


def test_killed_search_ends_with_the_same_solver(checkpoint, found, tmp_path, monkeypatch):
    monkeypatch.setattr(job, "SOLVERS", ["ddim", "dpmpp_2m"])
    whole, total = found
    write, kills = job.write_json, 0

    def write_and_die(path, content):
        write(path, content)
        if len(content) in (3, 14, 15, total) and path.name == "measured.json":
            raise KeyboardInterrupt

    out = tmp_path / "out"
    monkeypatch.setattr(job, "write_json", write_and_die)
    while kills < 10:
        try:
            search_solver(request(checkpoint, out))
            break
        except KeyboardInterrupt:
            kills += 1
    assert kills == 4
    solver, expected = (json.loads((folder / "solver.json").read_text()) for folder in (out, whole))
    assert {**solver, "made": None} == {**expected, "made": None}
    monkeypatch.setattr(job, "_search", None)
    assert search_solver(request(checkpoint, out)) == solver  # nothing left to do


def test_folder_of_another_search_is_left_alone(checkpoint, found, tmp_path):
    with pytest.raises(InputError, match="another search .*evaluations.* differ"):
        search_solver(dataclasses.replace(request(checkpoint, found[0]), evaluations=5))
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="not empty"):
        search_solver(request(checkpoint, tmp_path))


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(evaluations=2), "--evaluations must be from 3 to 50, not 2"),
        (dict(train_noises=0), "--train_noises must be from 1"),
        (dict(reference="trailing:7"), "too few timesteps for 4 evaluations"),
        (dict(reference="1001"), "wants 1001 steps"),
        (dict(overrides=dict(steps="10")), "sampling.steps is what this command finds"),
        (dict(overrides=dict(guidance=-1.0)), "sampling.guidance must be from 0.0 to"),
        (dict(out=""), "--out is empty"),
    ],
)
def test_impossible_searches_are_refused(checkpoint, tmp_path, fields, message):
    with pytest.raises(InputError, match=message):
        search_solver(dataclasses.replace(request(checkpoint, tmp_path / "out"), **fields))
    assert not (tmp_path / "out").exists()


def test_scales_of_another_solver_are_no_guidance_of_a_search(checkpoint, tmp_path, monkeypatch):
    own = dataclasses.replace(load_weights(checkpoint), sampling=SamplingConfig(guidance_scales=(1.0, 2.0)))
    monkeypatch.setattr(job, "load_checkpoint", lambda _: own)
    with pytest.raises(InputError, match="has sampling.guidance_scales, .*: give sampling.guidance"):
        search_solver(request(checkpoint, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_held_out_noises_choose():
    row = dict(timesteps=[9, 0], weights=[[1.0, 0.0], [0.0, 1.0]])
    built_in = {
        "a": dict(sampler="a", steps="x:2", train=0.3, held_out=0.2),
        "b": dict(sampler="b", steps="x:2", train=0.2, held_out=0.4),
    }
    fits = [row | dict(train=0.2, held_out=0.35), row | dict(train=0.1, held_out=0.39)]
    result = job._result(built_in, fits)
    assert (result["kept"], result["error"], result["start"]["name"]) == ("fit 1 of 2", 0.35, "b")
    with pytest.raises(StopError, match="No fit is better than b with x:2 .* .0.5, 0.4.; take that, .* another --out"):
        job._result(built_in, [row | dict(train=0.1, held_out=0.5)])


def test_search_without_a_solver_leaves_no_trajectories_and_is_not_repeated(tmp_path, monkeypatch):
    journal = lambda: job.Journal(tmp_path / "measured.json", types.SimpleNamespace(require_held=lambda: None))
    path, drawn = tmp_path / "reference-000.npy", []

    def fail(*_):
        raise StopError("No fit is better")

    monkeypatch.setattr(job, "_reference", lambda *_: drawn.append(path.write_bytes(b"large")))
    monkeypatch.setattr(job, "_search", fail)
    for _ in range(2):
        with pytest.raises(StopError, match="No fit is better"):
            job._find_solver(None, None, tmp_path, journal())
        assert not path.exists() and len(drawn) == 1


def test_teacher_computes_a_batch_at_once(monkeypatch):
    teacher, sizes = Teacher(None, {}, OWN, PROCESS, "trailing:5", seed=0, batch_size=3), []
    keep = lambda _, x, labels, __: (sizes.append(len(x)), x + labels)[1]
    monkeypatch.setattr(Teacher, "_estimate_batch", keep)
    monkeypatch.setattr(Teacher, "_draw_batch", lambda _, __, images: (sizes.append(len(images)), images)[1])
    np.testing.assert_array_equal(teacher.estimate(np.arange(7), np.arange(7), 2), 2 * np.arange(7))
    np.testing.assert_array_equal(teacher.draw(None, np.arange(7)), np.arange(7))
    assert sizes == [3, 3, 1] * 2


@pytest.mark.parametrize(
    "process, steps", [(PROCESS, "trailing:5"), pytest.param(Flow(), "5", marks=pytest.mark.slow)], ids=str
)
def test_fitted_rows_reach_what_a_run_of_them_draws(tiny, process, steps):
    """What a fit says of its error is what the sampler's step gives; with all timesteps it is DDIM itself."""
    teacher = Teacher(*tiny, OWN, process, steps, seed=3)
    for positions in first_positions(teacher, 3):
        assert positions[0] == 0 and list(positions) == sorted(set(positions)) and positions[-1] < 5
    reference = teacher.reference(np.arange(4), lambda _: None)
    np.testing.assert_allclose(reference[-1], teacher.draw(teacher.table, np.arange(4)), atol=1e-6)
    fit = Fit(teacher, reference)
    for positions in ((0, 1, 3), (0, 1, 2, 3, 4)):
        times = [teacher.table.timestep[i].item() for i in positions]
        table = teacher.tabulate(sampler="searched", steps=listed(times), searched_weights=fit.weights(positions))
        apart = teacher.draw(table, np.arange(4)) - reference[-1]
        assert fit.error(positions) == pytest.approx(np.sqrt(np.square(apart).mean((1, 2, 3))).mean(), abs=1e-5)
    assert fit.error((0, 1, 2, 3, 4)) < 1e-4 < 1e-3 < fit.error((0, 1, 3))


def test_guidance_is_that_of_the_run(tiny):
    sampling = dataclasses.replace(OWN, guidance=3.0, guidance_interval=(300, 700), steps="trailing:5")
    teacher = Teacher(*tiny, sampling, Diffusion(), "trailing:5", seed=0)
    _, labels = teacher.noise(np.arange(3))
    expected = make_run(*tiny, sampling=sampling).draw(np.asarray(labels), mode="gated").images
    assert relative_error(teacher.reference(np.arange(3), lambda _: None)[-1], expected) < 1e-5


@pytest.mark.parametrize("kind", ["guidance in one pass", "updates by the timestep"])
def test_teacher_draws_what_sampling_draws(tiny, kind):
    one_pass = kind == "guidance in one pass"
    config = dataclasses.replace(tiny[0].config, depth=1, guidance_free=one_pass)
    model = Model(config, lora=None if one_pass else LoRAConfig(rank=2, experts=2))
    params = jax.tree.map(lambda leaf: leaf + 0.1, model.init(jax.random.key(0)))  # what starts at zero counts, too
    teacher = Teacher(model, params, dataclasses.replace(OWN, guidance=2.0), Diffusion(), "trailing:3", seed=0)
    _, labels = teacher.noise(np.arange(2))
    sampling = dataclasses.replace(teacher.sampling, steps="trailing:3")
    expected = make_run(model, params, sampling=sampling).draw(np.asarray(labels), mode="gated").images
    assert relative_error(teacher.draw(teacher.table, np.arange(2)), expected) < 1e-5
    if one_pass:
        below = dataclasses.replace(teacher, sampling=dataclasses.replace(teacher.sampling, guidance=0.5))
        with pytest.raises(InputError, match="for scales from 1 on"):
            below.draw(below.table, np.arange(2))


def test_moves_keep_the_order_and_the_first():
    assert moves((0, 4, 8), 10, 1 / 2, 1) == [(0, 6, 8), (0, 2, 8)]
    assert moves((0, 4, 8), 10, 1 / 2, 2) == [(0, 4, 9), (0, 4, 6)]
    assert moves((0, 1, 2), 3, 1 / 2, 1) == []
    target, accepted = np.array([0, 13, 37]), []
    far = lambda positions: float(np.abs(np.array(positions) - target).sum())
    search([(0, 30, 60), (0, 50, 90)], 100, error=far, accept=accepted.append, report=lambda _: None)
    errors = list(map(far, accepted))
    assert accepted[0] == (0, 30, 60) and errors == sorted(set(errors), reverse=True) and errors[-1] < 6


# --- Its file ------------------------------------------------------------------------------------


def test_file_is_a_sampler(checkpoint, found, tiny, tmp_path):
    """In a job, whose manifest then says everything, and in the mode `fast` as in `gated`."""
    path = str(found[0] / "solver.json")
    solver = json.loads((found[0] / "solver.json").read_text())
    sample(Request(checkpoint, str(tmp_path / "a"), labels=["1"], overrides=dict(sampler=path)))
    settings = json.loads((tmp_path / "a" / "manifest.json").read_text())["sampling"]
    assert settings["sampler"] == "searched" and settings["searched_weights"] == solver["weights"]
    assert settings["steps"] == "list:" + ",".join(map(str, solver["timesteps"])) and settings["clip"] == 1.0
    run = make_run(*tiny, sampling=choose(tiny, dict(sampler=path)))
    fast, gated = (run.draw([1, 2, 3], mode=mode) for mode in ("fast", "gated"))
    assert relative_error(fast.images, gated.images) < 1e-5
    for name in ("heads", "groups", "tokens"):
        np.testing.assert_array_equal(getattr(fast.routing, name), getattr(gated.routing, name))


def choose(tiny, given: dict, own: SamplingConfig = OWN, process=PROCESS) -> SamplingConfig:
    return choose_sampling(own, given, process=process, checksum=lambda: checksum(tiny[1]))


def with_nan(solver: dict) -> list:
    return [[float("nan"), *row[1:]] for row in solver["weights"]]


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: "{", "damaged or cut short .*make it again with dydit-search-solver"),
        (lambda s: "[]", "holds list, not a mapping"),
        (lambda s: s | dict(format="other"), "its format is 'other', not 'dydit-jax searched solver 1'"),
        (lambda s: {"format": s["format"]}, "solver.json: solver lacks checksum, evaluations, process"),
        (
            lambda s: s | dict(checksum="0" * 64),
            "fitted to other weights: their SHA-256 is 000000000000...,",
        ),
        (
            lambda s: s | dict(process=dict(process=dict(name="flow"))),
            "for another process or schedule, .*flow",
        ),
        (lambda s: s | dict(evaluations=5), "4 rows of weights and 4 timesteps for 5 evaluations"),
        (lambda s: s | dict(weights=s["weights"][1:]), "3 rows of weights and 4 timesteps for 4 evaluations"),
        (lambda s: s | dict(weights=with_nan(s)), r"weights\[0\] in .* must be finite numbers, not nan"),
        (lambda s: s | dict(weights=[[1, 2, 3], *s["weights"][1:]]), "Row 0 .* must have from 2 to 2 numbers"),
        (lambda s: s | dict(weights="none"), "solver.json: solver.weights must be of type list, not 'none'"),
        (lambda s: s | dict(sampling="x"), "solver.json: solver.sampling must be of type dict, not 'x'"),
        (lambda s: s | dict(timesteps=[10**400, 5, 3, 0]), "timesteps in .* must be finite numbers, not 1000"),
        (lambda s: s | dict(weights=[[10**400, 0], *s["weights"][1:]]), r"weights\[0\] in .* must be finite numbers"),
        (lambda s: s | dict(timesteps=[999, 5, 7, 0]), "must descend from the noisiest: 7 follows 5"),
        (lambda s: s | dict(timesteps=[999, 5.5, 3, 0]), "Unknown spacing .*5.5"),
        (lambda s: s | dict(timesteps=[1000, 5, 3, 0]), "must be from 0 to 999, not 1000"),
    ],
)
def test_files_that_do_not_fit_are_refused(found, tiny, tmp_path, change, message):
    changed = change(json.loads((found[0] / "solver.json").read_text()))
    path = tmp_path / "solver.json"
    path.write_text(changed if isinstance(changed, str) else json.dumps(changed))
    with pytest.raises(InputError, match=message) as error:
        make_run(*tiny, sampling=choose(tiny, dict(sampler=str(path))))
    assert "\n" not in str(error.value)


def test_a_file_brings_its_steps_and_wants_the_guidance_it_was_fitted_with(found, tiny, tmp_path, caplog):
    path = str(found[0] / "solver.json")
    with pytest.raises(InputError, match="brings its own timesteps; leave out sampling.steps, not '20'"):
        choose(tiny, dict(sampler=path, steps="20"))
    with pytest.raises(InputError, match="eta belongs to ddim; .*solver.json has none, so 0.5 can't be honoured"):
        choose(tiny, dict(sampler=path, eta=0.5))
    with pytest.raises(InputError, match="can't be read"):
        choose(tiny, dict(sampler=str(tmp_path / "none.json")))
    with pytest.raises(InputError, match="The sampler searched needs weights"):
        SamplingConfig(sampler="searched")
    choose(tiny, dict(sampler=path))
    assert not caplog.records
    choose(tiny, dict(sampler=path, guidance=2.0))
    assert "was fitted with guidance 1.0; this run has guidance 2.0, and may do worse" in caplog.text
    caplog.clear()
    choose(tiny, dict(sampler=path, guidance_scales=(1.0, 3.0, 3.0, 1.0)))
    assert "was fitted with guidance_scales None; this run has guidance_scales [1.0, 3.0, 3.0, 1.0]" in caplog.text
    searched = choose(tiny, dict(sampler=path))
    assert choose(tiny, dict(sampler="ddim", steps="5"), searched) == dataclasses.replace(OWN, steps="5")


# --- Presets -------------------------------------------------------------------------------------


def test_settings_given_win_over_a_preset_and_it_over_the_checkpoints(tiny):
    own = SamplingConfig(guidance=1.5, autoencoder="sd-vae-ft-ema")
    preset = dataclasses.replace(own, **PRESETS["fast20"])
    assert choose(tiny, dict(preset="fast20"), own) == preset and preset.steps == "logsnr:20"
    explicit = dict(preset="fast20", sampler="unipc", guidance=4.0)
    assert choose(tiny, explicit, own) == dataclasses.replace(preset, sampler="unipc", guidance=4.0)
    scales = choose(tiny, dict(preset="fast20", guidance_scales=(1.0, 2.0)), own)
    assert (scales.guidance, scales.guidance_interval, scales.guidance_scales) == (1.0, None, (1.0, 2.0))
    constant = choose(tiny, dict(guidance=3.0, steps="4"), scales)
    assert constant == dataclasses.replace(scales, guidance=3.0, steps="4", guidance_scales=None)
    assert choose(tiny, dict(preset="fast20"), scales) == dataclasses.replace(preset, guidance=1.0)
    with pytest.raises(InputError, match="Unknown sampling.preset 'fast10'; known: fast20"):
        choose(tiny, dict(preset="fast10"))
    for process in (Flow(), Diffusion("squared_cosine"), Diffusion(train_steps=500)):
        with pytest.raises(InputError, match="fast20 is for Diffusion.*'linear', .*1000.*; give sampling.sampler,"):
            choose(tiny, dict(preset="fast20"), process=process)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_fit_the_published_schedule(tiny, name):
    run = make_run(*tiny, sampling=choose(tiny, dict(preset=name, guidance=1.5), SamplingConfig()))
    scales = jnp.asarray(run.table.guidance)
    assert len(run.table) == 20 and 1 < int((scales == 1.5).sum()) < 20
