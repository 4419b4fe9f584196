"""The job behind sample.py: exact numbers of images, resumable, never overwriting another's."""

import dataclasses
import io
import json
import logging
import re
import types

import jax
import numpy as np
import pytest
from PIL import Image
from stand_ins import small_autoencoder

from dydit_jax.checkpoints import Weights, save_autoencoder, save_weights
from dydit_jax.diffusion.process import Diffusion
from dydit_jax.diffusion.samplers import SamplingConfig
from dydit_jax.errors import InputError, StopError
from dydit_jax.fast.execution.registry import EXECUTIONS
from dydit_jax.fast.segmentation import PLATFORMS
from dydit_jax.jobs.sample import Request, sample
from dydit_jax.jobs.sample_folder import prepare_folder
from dydit_jax.loading import load_checkpoint
from dydit_jax.models.config import DiTConfig
from dydit_jax.models.dit import Model


@pytest.fixture(scope="module")
def checkpoint(tiny, tmp_path_factory):
    model, params = tiny
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    sampling = SamplingConfig(sampler="ddim", steps="2", clip=1.0)
    save_weights(path, Weights(model.config, Diffusion(), sampling, params, {}))
    return str(path)


def test_grid_has_a_column_per_label(checkpoint, tmp_path):
    out = tmp_path / "grid"
    sample(Request(checkpoint, str(out), labels=["1", "2", "3"], rows=2, growth=2, report=True))
    assert Image.open(out / "grid.png").size == (3 * 70 + 6, 2 * 70 + 6 + 14)  # and a line of labels
    assert Image.open(out / "routing.png").size[0] > 500
    cost = json.loads((out / "cost.json").read_text())
    assert 0 < cost["macs"] < cost["macs_complete"] and cost["images"] == 6 and 0 < cost["tokens"] < 1
    assert (out / "report.html").read_text().count("<img") == 5  # grid, steps, routing, growth, plan
    with Image.open(out / "growth.gif") as picture:
        assert picture.n_frames == 2
    assert len((out / "routing.csv").read_text().splitlines()) == 1 + 2 * 2  # steps and layers
    header, *steps = (line.split(",") for line in (out / "steps.csv").read_text().splitlines())
    assert header[:4] == ["step", "timestep", "guidance", "passes"] and header[-1] == "segment"
    assert [step[:4] for step in steps] == [["0", "999", "1.0", "1"], ["1", "0", "1.0", "1"]]
    assert cost["passes_per_image"] == 2
    assert cost["steps"]["segment"] == ["none", "none"] and len(cost["steps"]["executed_macs_per_pass"]) == 2
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["steps"] == dict(timestep=[999, 0], guidance=[1.0, 1.0], passes=[1, 1])
    assert manifest["sampling"]["steps"] == "2" and manifest["labels"] == ["1", "2", "3"]
    assert len(manifest["checksum"]) == 64 and manifest["precision"] == "float32"


def test_set_is_exact_and_packed_for_evaluation(checkpoint, tmp_path, capsys, caplog):
    out = tmp_path / "set"
    with caplog.at_level(logging.INFO):
        sample(Request(checkpoint, str(out), num_images=7, batch_size=3))
    assert re.search(r"sampling: 100%.* 7/7 .*image", capsys.readouterr().err)  # a single batch counts steps
    cost = json.loads((out / "cost.json").read_text())
    assert 0 <= cost["compile_seconds"] <= cost["seconds"]
    assert cost["macs_of_all_images"] == pytest.approx(7 * 2 * cost["macs_executed"])  # images and steps
    assert f"Drew 7 images in {cost['seconds']:.1f} s" in caplog.text
    packed = np.load(out / "samples.npz")
    assert packed["arr_0"].shape == (7, 8, 8, 1) and packed["arr_0"].dtype == np.uint8
    assert packed["labels"].shape == (7,) and packed["labels"].max() < 10
    for index in range(7):
        np.testing.assert_array_equal(
            np.asarray(Image.open(out / f"images/{index:06d}.png")), packed["arr_0"][index, ..., 0]
        )
    assert len(list((out / "images").iterdir())) == 7


@pytest.mark.parametrize(("dies", "missing"), [("write_set", "samples.npz"), ("draw_growth", "growth.png")])
def test_job_that_is_killed_after_its_last_image_has_written_its_records(
    checkpoint, tmp_path, monkeypatch, dies, missing
):
    def die(*_, **__):
        raise KeyboardInterrupt

    request = Request(checkpoint, str(tmp_path), num_images=2, growth=1, report=True)
    monkeypatch.setattr(f"dydit_jax.jobs.sample.{dies}", die)
    with pytest.raises(KeyboardInterrupt):
        sample(request)
    records = {"cost.json", *(f"{name}.{kind}" for name in ("routing", "steps", "plan") for kind in ("png", "csv"))}
    assert records <= {path.name for path in tmp_path.iterdir()} and not (tmp_path / missing).exists()


def test_routing_of_images_that_are_all_there_is_missed_with_a_word(checkpoint, tmp_path, caplog):
    request = Request(checkpoint, str(tmp_path), labels=["1"])
    sample(request)
    assert "gets no" not in caplog.text
    sample(dataclasses.replace(request, routing=True))
    assert "gets no routing.png: it is recorded while images are drawn, and all are there. Name another" in caplog.text
    assert not (tmp_path / "routing.png").exists()


def test_set_grows_in_its_folder_and_does_not_shrink(checkpoint, tmp_path):
    out, whole = tmp_path / "set", tmp_path / "whole"
    request = dict(checkpoint=checkpoint, batch_size=4)
    sample(Request(out=str(out), num_images=4, **request))
    first, labels = (np.load(out / "samples.npz")[name] for name in ("arr_0", "labels"))
    kept = (out / "images/000003.png").stat().st_mtime_ns
    sample(Request(out=str(out), num_images=8, **request))
    sample(Request(out=str(whole), num_images=8, **request))
    grown, theirs = np.load(out / "samples.npz"), np.load(whole / "samples.npz")
    assert (out / "images/000003.png").stat().st_mtime_ns == kept
    np.testing.assert_array_equal(grown["arr_0"][:4], first)
    np.testing.assert_array_equal(grown["labels"][:4], labels)
    np.testing.assert_array_equal(grown["labels"], theirs["labels"])
    assert np.abs(grown["arr_0"].astype(int) - theirs["arr_0"]).max() <= 1
    assert (out / "manifest.json").read_text() == (whole / "manifest.json").read_text()
    with pytest.raises(InputError, match="holds a set of 8 images, more than 6; name another --out"):
        sample(Request(out=str(out), num_images=6, **request))
    with pytest.raises(InputError, match=r"made otherwise \(labels, num_images, seed differ\)"):
        sample(Request(out=str(out), num_images=9, seed=1, **request))
    (tmp_path / "labels.txt").write_text(" ".join(["3"] * 9))
    with pytest.raises(InputError, match=r"made otherwise \(labels, num_images differ\)"):
        sample(Request(out=str(out), labels_file=str(tmp_path / "labels.txt"), **request))


def test_killed_job_makes_only_what_is_missing(checkpoint, tmp_path):
    out, whole = tmp_path / "parts", tmp_path / "whole"
    request = dict(checkpoint=checkpoint, num_images=8, batch_size=4)
    sample(Request(out=str(whole), **request))
    sample(Request(out=str(out), **request))
    (out / "samples.npz").unlink()
    for index in (2, 5, 6):
        (out / f"images/{index:06d}.png").unlink()
    kept = (out / "images/000000.png").stat().st_mtime_ns
    sample(Request(out=str(out), **request))
    assert (out / "images/000000.png").stat().st_mtime_ns == kept
    ours, theirs = np.load(out / "samples.npz")["arr_0"], np.load(whole / "samples.npz")["arr_0"]
    # Another batch size may move a value across a rounding boundary.
    assert np.abs(ours.astype(int) - theirs).max() <= 1


@pytest.mark.parametrize("damage", ["empty", "cut", "flipped", "another"])
def test_damaged_image_of_a_finished_job_is_drawn_again(checkpoint, tmp_path, damage, caplog):
    out, request = tmp_path / "out", dict(checkpoint=checkpoint, labels=["1", "2"], rows=2)
    sample(Request(out=str(out), **request))
    path = out / "images/000002.png"
    whole, grid = path.read_bytes(), (out / "grid.png").read_bytes()
    if damage == "another":
        Image.new("L", (9, 8)).save(path)
    else:
        flipped = bytearray(whole)
        flipped[len(whole) // 2] ^= 1
        path.write_bytes(dict(empty=b"", cut=whole[: len(whole) // 2], flipped=bytes(flipped))[damage])
    (out / "grid.png").unlink()
    (out / "images/000001.png.0123.partial").write_bytes(b"what a kill left")
    sample(Request(out=str(out), **request))
    assert "1 images" in caplog.text and "000002.png" in caplog.text
    assert np.abs(np.asarray(Image.open(path)).astype(int) - np.asarray(Image.open(io.BytesIO(whole)))).max() <= 1
    assert np.asarray(Image.open(out / "grid.png")).shape == np.asarray(Image.open(io.BytesIO(grid))).shape
    assert len(list((out / "images").iterdir())) == 4


def test_image_that_can_not_be_written_ends_the_job_soon(checkpoint, tmp_path):
    out, request = tmp_path / "out", dict(checkpoint=checkpoint, num_images=12, batch_size=4)
    sample(Request(out=str(out), **request))
    for path in (out / "images").iterdir():
        path.unlink()
    (out / "images/000000.png").mkdir()
    with pytest.raises(InputError, match="Can't write .*000000.png"):
        sample(Request(out=str(out), **request))
    drawn = sorted(int(path.stem) for path in (out / "images").iterdir() if path.is_file())
    assert drawn == [1, 2, 3]  # the next batch was on its way, the third one was not begun


@pytest.mark.parametrize("content", ["", '{"seed": 0, "mo', "[]", "\0\0\0\0"])
def test_damaged_manifest_is_one_clear_line(checkpoint, tmp_path, content):
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(InputError, match="manifest.json .*; name another --out") as caught:
        sample(Request(checkpoint, str(tmp_path), labels=["1"]))
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.rglob("*.*")] == ["manifest.json"]


def test_images_that_are_not_finite_are_not_written(tiny, tmp_path):
    model, params = tiny
    params = jax.tree.map(lambda leaf: np.array(leaf), params)
    params["label_embed"]["table"][3] = np.nan  # so that one image of three is
    path, out = tmp_path / "nan.safetensors", tmp_path / "out"
    sampling = SamplingConfig(sampler="ddim", steps="2", clip=1.0)
    save_weights(path, Weights(model.config, Diffusion(), sampling, params, {}))
    with pytest.raises(StopError, match="The image 1 is not finite") as caught:
        sample(Request(str(path), str(out), labels=["1", "3", "2"]))
    assert caught.value.code != 0
    assert [path.name for path in out.rglob("*.*")] == ["manifest.json"]
    sample(Request(str(path), str(out), labels=["1", "2"]))  # no image is there, so the folder is no other job's
    assert len(list((out / "images").iterdir())) == 2


def test_set_that_the_disk_can_not_hold_is_refused(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: types.SimpleNamespace(free=6_000_000))
    with pytest.raises(InputError, match="0.0 GB left; the images take at least 6.4 GB"):
        prepare_folder(tmp_path / "out", {}, sample_bytes=6_400_000_000).__enter__()
    assert not (tmp_path / "out").exists()
    with prepare_folder(tmp_path / "out", {}, sample_bytes=5_000_000):
        assert (tmp_path / "out" / "manifest.json").is_file()


def test_cache_that_can_not_be_written_does_not_end_a_job(checkpoint, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("DYDIT_JAX_CACHE", str(tmp_path / "file"))
    sample(Request(checkpoint, str(tmp_path / "out"), num_images=3, segments=1))
    assert "The plan is not kept for the next job" in caplog.text
    assert np.load(tmp_path / "out" / "samples.npz")["arr_0"].shape == (3, 8, 8, 1)


def test_labels_come_from_a_file(checkpoint, tmp_path):
    (tmp_path / "labels.txt").write_text("3\n1\n4\n")
    sample(Request(checkpoint, str(tmp_path / "out"), labels_file=str(tmp_path / "labels.txt")))
    assert np.load(tmp_path / "out" / "samples.npz")["labels"].tolist() == [3, 1, 4]
    (tmp_path / "labels.txt").write_text("3\n1\n5\n")
    with pytest.raises(InputError, match="made otherwise .labels differ"):
        sample(Request(checkpoint, str(tmp_path / "out"), labels_file=str(tmp_path / "labels.txt")))


def test_latents_are_decoded_into_colour_images(tmp_path):
    autoencoder = small_autoencoder(channels=16, widths=(32,) * 5, scale=(0.36,), shift=(0.12,))
    save_autoencoder(tmp_path / "vae.safetensors", autoencoder, {})
    config = DiTConfig(depth=1, width=32, heads=2, patch=2, side=4, channels=16, classes=10, routers="first_on")
    sampling = SamplingConfig(sampler="ddim", steps="2", guidance=2.0, autoencoder=str(tmp_path / "vae.safetensors"))
    params = jax.jit(Model(config).init)(jax.random.key(0))
    save_weights(tmp_path / "dit.safetensors", Weights(config, Diffusion(), sampling, params, {}))
    sample(Request(str(tmp_path / "dit.safetensors"), str(tmp_path / "out"), num_images=3, batch_size=2))
    assert np.load(tmp_path / "out" / "samples.npz")["arr_0"].shape == (3, 64, 64, 3)


def test_settings_given_win_over_the_checkpoints(checkpoint, tmp_path):
    sample(Request(checkpoint, str(tmp_path / "a"), labels=["1"], overrides=dict(guidance=3.0)))
    manifest = json.loads((tmp_path / "a" / "manifest.json").read_text())
    assert manifest["sampling"]["guidance"] == 3.0 and manifest["sampling"]["sampler"] == "ddim"


@pytest.fixture
def narrowing_pays(monkeypatch):
    """Let compiling take so short that a job of four tiny images is worth a segment, one of two is not."""
    costs = dict(whole_seconds=0.0, narrowed_seconds=4e-5, macs_per_second=1e10, half_speed_width=0.0)
    monkeypatch.setitem(PLATFORMS, "cpu", dataclasses.replace(PLATFORMS["cpu"], **costs))


def segments_of(out) -> int:
    return json.loads((out / "manifest.json").read_text())["segments"]


@pytest.mark.usefixtures("narrowing_pays")
def test_the_segments_of_a_job_suit_all_its_images_and_stay_when_it_goes_on(checkpoint, tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    out, grown = tmp_path / "set", tmp_path / "grown"
    job = dict(checkpoint=checkpoint, batch_size=2)
    sample(Request(**job, out=str(grown), num_images=2))
    assert segments_of(grown) == 0 and "Plan: 0 segments, nothing is left out" in caplog.text
    sample(Request(**job, out=str(out), num_images=4))
    assert segments_of(out) == 1
    sample(Request(**job, out=str(grown), num_images=4))
    assert segments_of(grown) == 1
    for index in (1, 2):  # few images are missing, and another machine would choose otherwise
        (out / f"images/{index:06d}.png").unlink()
    monkeypatch.setitem(PLATFORMS, "cpu", dataclasses.replace(PLATFORMS["cpu"], narrowed_seconds=10.0))
    caplog.clear()
    sample(Request(**job, out=str(out), num_images=4))
    assert "Plan: 1 segments of 2 steps" in caplog.text and segments_of(out) == 1
    (out / "images/000001.png").unlink()
    sample(Request(**job, out=str(out), num_images=4, segments=2))
    assert segments_of(out) == 2
    sample(Request(**job, out=str(out), num_images=4, segments=0))  # nothing is missing
    assert segments_of(out) == 0
    pictures = [np.load(folder / "samples.npz")["arr_0"].astype(int) for folder in (out, grown)]
    assert np.abs(pictures[0] - pictures[1]).max() <= 1


@pytest.mark.parametrize("mode", ["gated", "complete"])
def test_only_fast_has_segments(checkpoint, tmp_path, mode):
    sample(Request(checkpoint, str(tmp_path), labels=["1"], mode=mode))
    assert segments_of(tmp_path) is None


def test_without_segments_all_is_computed_and_counted(checkpoint, tmp_path):
    samples = sample(Request(checkpoint, str(tmp_path), labels=["1", "2"], routing=True))
    macs = load_checkpoint(checkpoint).model.macs
    np.testing.assert_allclose(samples.executed_macs, macs.complete + macs.routers)
    assert samples.mean_macs < 0.9 * macs.complete
    rows = (tmp_path / "plan.csv").read_text().splitlines()
    assert len(rows) == 1 + 2 and rows[1].endswith("0 1 2 3,0 1 2 3")  # a segment with all units of two layers


def test_images_made_otherwise_are_left_alone(checkpoint, tmp_path):
    out = str(tmp_path / "a")
    sample(Request(checkpoint, out, labels=["1"]))
    with pytest.raises(InputError, match="made otherwise .*seed"):
        sample(Request(checkpoint, out, labels=["1"], seed=1))
    assert json.loads((tmp_path / "a" / "manifest.json").read_text())["seed"] == 0
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="not empty"):
        sample(Request(checkpoint, str(tmp_path / "b"), labels=["1"]))
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(), "Give one of --labels.*not none"),
        (dict(labels=["1"], num_images=3), "not labels and num_images"),
        (dict(labels=["one"]), "numbers from 0 to 9 .*, not one"),
        (dict(labels=[]), "not nothing"),
        (dict(labels_file="/nowhere"), "There is no file /nowhere"),
        (
            dict(labels=["1"], overrides=dict(autoencoder="sd-vae")),
            "no published autoencoder of that name; known: sd-vae-ft-ema, sd-vae-ft-mse",
        ),
        (dict(labels=["11"]), "from 0 to 9"),
        (dict(labels=["1"], rows=0), "--rows must be from 1 to 10000, not 0"),
        (dict(labels=["1"], rows=10**12), "--rows must be from 1 to 10000, not 10+"),
        (dict(labels=["1"] * 200, rows=51), "200 labels and 51 rows has more than 10000 images"),
        (dict(num_images=0), "--num_images must be from 1 to 1000000, not 0"),
        (dict(num_images=10**7), "--num_images must be from 1 to 1000000, not 10000000"),
        (dict(num_images=1, batch_size=0), "--batch_size must be from 1"),
        (dict(num_images=1, batch_size=10**9), "--batch_size must be from 1 to 65536, not 1000000000"),
        (dict(labels=["9" * 5000]), "numbers from 0 to 9 .*, not 9{40}[.]"),
        (dict(labels=["1"], overrides=dict(sampler="ddmi")), "Unknown sampler 'ddmi'"),
        (dict(labels=["1"], overrides=dict(steps="5000")), "section of 1000"),
        (dict(labels=["1"], precision="half"), "Unknown precision"),
        (dict(labels=["1"], mode="quick"), "Unknown mode"),
        (dict(labels=["1"], out=""), "--out is empty"),
        (dict(labels=["1"], segments=-1), "--segments must be at least 0"),
        (dict(labels=["1"], segments=3), "--segments must be from 1 to the 2 steps of the run, or 0, .*; not 3"),
        (dict(labels=["1"], token_capacity=["half"]), "--token_capacity must be a number"),
        (dict(labels=["1"], token_capacity=["1.5"]), "at most 1, not 1.5"),
        (dict(labels=["1"], out="/proc/x"), "Can't write"),
    ],
)
def test_impossible_requests_are_refused_before_anything_is_written(checkpoint, tmp_path, fields, message):
    with pytest.raises(InputError, match=message):
        sample(Request(**dict(dict(checkpoint=checkpoint, out=str(tmp_path / "out")), **fields)))
    assert not (tmp_path / "out").exists()


def test_long_job_calibrates_itself_and_leaves_a_plan(checkpoint, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("DYDIT_JAX_CACHE", str(tmp_path / "cache"))
    caplog.set_level("INFO")
    names = ("short", "long", "again", "damaged")
    short, long, again, damaged = (dict(out=str(tmp_path / name), segments=1) for name in names)
    sample(Request(checkpoint, num_images=4, batch_size=4, **short))
    assert "Calibrating" not in caplog.text and "Plan: 1 segments of 2 steps" in caplog.text
    [kept] = (tmp_path / "cache" / "plans").iterdir()
    with np.load(kept) as plan:
        assert plan["heads"].shape == (2, 2, 4) and "mean" not in plan and str(plan["execution"]) == "switch"
    sample(Request(checkpoint, num_images=16, batch_size=4, **long))
    assert "Tokens, milliseconds for 2 blocks" in caplog.text
    with np.load(kept) as plan:
        assert str(plan["execution"]) in EXECUTIONS and 0 < plan["mean"].max() <= 1
    caplog.clear()
    sample(Request(checkpoint, num_images=16, batch_size=4, **again))
    assert "Tokens, milliseconds" not in caplog.text and "Calibrating" not in caplog.text
    kept.write_bytes(kept.read_bytes()[:100])
    sample(Request(checkpoint, num_images=4, batch_size=4, **damaged))
    assert "Planned again" in caplog.text
    for index in range(4):  # whatever the plan, the images are the same
        paths = [f"{job['out']}/images/{index:06d}.png" for job in (long, again, damaged)]
        first, *others = (np.asarray(Image.open(path)) for path in paths)
        np.testing.assert_array_equal(np.stack(others), np.stack([first] * 2))


def test_a_job_learns_from_a_batch_that_overflows(checkpoint, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("DYDIT_JAX_CACHE", str(tmp_path / "cache"))
    caplog.set_level("INFO")
    request = dict(checkpoint=checkpoint, labels=["1"], batch_size=4, segments=1)
    sample(Request(**request, rows=4, out=str(tmp_path / "alone")))
    [path] = (tmp_path / "cache" / "plans").iterdir()
    plan = dict(np.load(path))
    steps, layers, _ = plan["heads"].shape
    none = np.zeros((steps, layers))
    usage = dict(mean=none, deviation=none, max_rows=none, images=8)
    np.savez(path, **(plan | usage | dict(execution="gather")))
    sample(Request(**request, rows=16, out=str(tmp_path / "job")))
    [passes] = re.findall(r"In (\d+) passes through an MLP more tokens were open", caplog.text)
    assert 0 < int(passes) <= steps * layers  # those of the first of four batches
    assert np.load(path)["mean"].max() > 0


def test_token_capacity_is_part_of_the_record(checkpoint, tmp_path):
    samples = sample(Request(checkpoint, str(tmp_path / "half"), labels=["1"], token_capacity=["0.5"]))
    assert samples.usage.mean.max() <= 0.5
    manifest = json.loads((tmp_path / "half" / "manifest.json").read_text())
    assert manifest["model"]["token_capacity"] == [0.5]
