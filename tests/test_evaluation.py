"""`evaluate.py`: sets in every form, saved statistics, ADM's reference batches, and an error for each mistake."""

import dataclasses
import json
import os
import shutil
import zipfile
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import fidelity_network
from PIL import Image

from dydit_jax.convert.torch_files import write_tensors
from dydit_jax.data.image_sets import npz_shapes, open_images
from dydit_jax.data.packing import prepare_pictures
from dydit_jax.drawing.report import write_report
from dydit_jax.errors import InputError
from dydit_jax.jobs import evaluate as evaluation
from dydit_jax.jobs.evaluate import (
    MOMENTS,
    Evaluation,
    Statistics,
    compare,
    evaluate,
    image_statistics,
    load_inception,
    load_reference,
    save_statistics,
)
from dydit_jax.runtime.sharding import MeshConfig, make_mesh


def pictures(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 16, 16, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The network with random weights, two sets as .npz, and one of them as a folder."""
    folder = tmp_path_factory.mktemp("sets")
    tensors = {name: tensor.numpy() for name, tensor in fidelity_network()[0].state_dict().items()}
    write_tensors(folder / "inception.safetensors", tensors)
    for name, seed in (("a", 0), ("b", 1)):
        np.savez(folder / f"{name}.npz", arr_0=pictures(6, seed))
    (folder / "a" / "images").mkdir(parents=True)
    for number, picture in enumerate(pictures(6, 0)):
        Image.fromarray(picture).save(folder / "a" / "images" / f"{number:06d}.png")
    return folder


def run(files, *samples: str, **settings) -> list[dict]:
    inception = str(files / "inception.safetensors")
    settings = dict(dict(batch_size=4), **settings)  # one program for all
    return evaluate(Evaluation(tuple(str(files / name) for name in samples), inception=inception, **settings))


@pytest.mark.slow
def test_sets_are_judged_in_every_form(files, tmp_path):
    settings = dict(reference=str(files / "b.npz"), save_statistics=str(tmp_path / "b_stats.npz"))
    packed, folder = run(files, "a.npz", "a", out=str(tmp_path / "out.json"), **settings)
    names = ("fid", "sfid", "inception_score", "precision", "recall")
    assert all(packed[name] == pytest.approx(folder[name], rel=1e-5) for name in names)
    assert packed["fid"] > 0 and packed["sfid"] > 0 and packed["inception_score"] >= 1
    assert json.loads((tmp_path / "out.json").read_text())[0]["fid"] == packed["fid"]


def statistics_of(count: int) -> Statistics:
    generator = np.random.default_rng(count)
    few = dict(mu=np.zeros(2), sigma=np.eye(2), mu_s=np.zeros(2), sigma_s=np.eye(2))
    pool = generator.standard_normal((count, 8)).astype(np.float32)
    return Statistics(dict(name=f"{count} images", count=count), few, pool, np.zeros((count, 4)))


def test_too_few_images_have_no_precision_or_recall_and_the_reason_is_written(tmp_path, caplog):
    scores = compare(statistics_of(3), statistics_of(40))
    assert scores["recall"] is None and 0 <= scores["precision"] <= 1
    reason = "the set has 3 images; 3 nearest neighbours of each need 4"
    assert scores["missing"] == dict(recall=reason)
    swapped = compare(statistics_of(40), statistics_of(3))
    assert swapped["precision"] is None and swapped["missing"]["precision"].startswith("the reference has 3 images")
    assert compare(statistics_of(4), statistics_of(4))["missing"] == {}
    evaluation._warn_of_few(scores, statistics_of(3), statistics_of(40))
    assert f"3 images has no recall: {reason}" in caplog.text
    record = json.loads(json.dumps(dict(scores, samples=dict(name="few", count=3), reference=None)))
    assert record["recall"] is None and evaluation._table([record]).splitlines()[1].endswith("none")
    (tmp_path / "evaluation.json").write_text(json.dumps([record]))
    assert "<td>none</td>" in write_report(tmp_path).read_text()


@pytest.mark.parametrize("size", [0.3, 0.6, 0.99])
def test_damaged_batches_and_statistics_are_named(tmp_path, size):
    np.savez(tmp_path / "set.npz", arr_0=pictures(6, 0))
    save_statistics(tmp_path / "kept.npz", statistics_of(40), "network")
    for name, array in (("set.npz", pictures(6, 0)), ("kept.npz", statistics_of(40).pool)):
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(whole[: int(size * len(whole))])
        with pytest.raises(InputError, match=rf"{name} is not an \.npz file of arrays, or damaged"):
            npz_shapes(tmp_path / name)
        flipped = bytearray(whole)
        flipped[whole.index(array.tobytes()) + 99] ^= 1
        (tmp_path / name).write_bytes(flipped)
    with pytest.raises(InputError, match=r"set\.npz is damaged, at image \d or before"):
        list(open_images(tmp_path / "set.npz").batches(2))
    with pytest.raises(InputError, match=r"kept\.npz .*damaged.*Bad CRC-32 for file .pool"):
        load_reference(str(tmp_path / "kept.npz"), "network", None, None)


def test_images_of_another_length_than_the_header_says_are_refused(tmp_path):
    np.savez(tmp_path / "set.npz", arr_0=pictures(6, 0))
    content = (tmp_path / "set.npz").read_bytes()
    (tmp_path / "set.npz").write_bytes(content.replace(b"(6, 16, 16, 3)", b"(7, 16, 16, 3)"))
    with pytest.raises(InputError, match=r"arr_0.npy is not as long as its shape \[7, 16, 16, 3\] says"):
        open_images(tmp_path / "set.npz")


@pytest.mark.slow
def test_kept_statistics_and_reference_batches_give_the_same(files, tmp_path):
    settings = dict(reference=str(files / "b.npz"), save_statistics=str(tmp_path / "b_stats.npz"))
    [packed] = run(files, "a.npz", **settings)
    names = ("fid", "sfid", "inception_score", "precision", "recall")
    # A set is at no distance from itself.
    again, same = run(files, "a.npz", "b.npz", reference=str(tmp_path / "b_stats.npz"))
    assert all(again[name] == pytest.approx(packed[name], rel=1e-4) for name in names)
    assert same["fid"] == pytest.approx(0, abs=1e-6 * packed["fid"]) and same["precision"] == same["recall"] == 1
    # ADM's reference batches hold the moments of another set beside their images.
    with np.load(tmp_path / "b_stats.npz") as kept:
        moments = {name: kept[name] for name in MOMENTS}
    np.savez(tmp_path / "adm.npz", arr_0=pictures(6, 1), **moments)
    [adm] = run(files, "a.npz", reference=str(tmp_path / "adm.npz"))
    assert all(adm[name] == pytest.approx(packed[name], rel=1e-4) for name in names)
    with np.load(tmp_path / "b_stats.npz") as kept:
        np.savez(tmp_path / "other.npz", **dict(kept, network="other"))
    with pytest.raises(InputError, match="another network"):
        run(files, "a.npz", reference=str(tmp_path / "other.npz"))


def test_without_a_reference_the_inception_score_remains(files):
    [found] = run(files, "a", report=True)
    assert "inception_score" in found and "fid" not in found
    assert json.loads((files / "a" / "evaluation.json").read_text())[0]["samples"] == found["samples"]
    assert f"{found['inception_score']:.4f}" in (files / "a" / "report.html").read_text()


def test_image_without_finite_features_is_named(files):
    params, _ = load_inception(str(files / "inception.safetensors"))
    broken = jax.tree.map(lambda leaf: leaf * np.nan, params)
    with pytest.raises(InputError, match="Image 0 of .*a.npz has features that are not finite"):
        image_statistics(open_images(files / "a.npz"), params=broken, mesh=make_mesh(MeshConfig()), batch_size=4)


@pytest.mark.parametrize(
    "arrays, message",
    [
        (dict(images=pictures(2, 0)), "has no arr_0; it has images"),
        (dict(arr_0=pictures(2, 0).astype(np.float32)), "must be uint8"),
        (dict(arr_0=pictures(1, 0)[0]), "must be uint8"),
        (dict(arr_0=pictures(2, 0)[..., :2]), "must be uint8"),
        (dict(arr_0=pictures(0, 0)), "must be uint8"),
    ],
)
def test_wrong_batches_are_refused(tmp_path, arrays, message):
    np.savez(tmp_path / "wrong.npz", **arrays)
    with pytest.raises(InputError, match=message):
        open_images(tmp_path / "wrong.npz")


@pytest.mark.parametrize("axes", [(), (1,)])
def test_grey_batches_are_colour_pictures_of_equal_channels(tmp_path, axes):
    grey = pictures(5, 0)[..., 0]
    np.savez(tmp_path / "grey.npz", arr_0=grey.reshape(*grey.shape, *axes))
    images = open_images(tmp_path / "grey.npz")
    found = np.concatenate(list(images.batches(2)))
    assert images.count == 5
    np.testing.assert_array_equal(found, np.stack([grey] * 3, axis=-1))


def test_class_folders_are_a_set(tmp_path):
    for number, picture in enumerate(pictures(4, 0)):
        place = tmp_path / "set" / f"class{number % 2}"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(place / f"{number // 2}.png")  # the same names in both
    images = open_images(tmp_path / "set")
    found = np.concatenate(list(images.batches(3)))
    np.testing.assert_array_equal(found, pictures(4, 0)[[0, 2, 1, 3]])
    (tmp_path / "set" / "class0").rename(tmp_path / "set" / "class2")
    assert images.count == 4 and open_images(tmp_path / "set").checksum != images.checksum


def test_class_named_images_hides_no_other_class(tmp_path, caplog):
    for number, place in enumerate(("images", "images", "drawings", "drawings", "drawings")):
        (tmp_path / place).mkdir(exist_ok=True)
        Image.fromarray(pictures(1, number)[0]).save(tmp_path / place / f"{number}.png")
    assert open_images(tmp_path).count == 5
    (tmp_path / "manifest.json").write_text("{}")  # now it is what sample.py wrote, with something beside it
    assert open_images(tmp_path).count == 2 and "1 entries are ignored" in caplog.text and "drawings" in caplog.text
    shutil.rmtree(tmp_path / "drawings")
    (tmp_path / "manifest.json").unlink()
    assert open_images(tmp_path).count == 2


def test_statistics_of_mu_and_sigma_alone_give_the_fid_and_reasons_for_the_rest(tmp_path):
    """The distance of two Gaussians with unit covariances is that of their means, squared."""
    np.savez(tmp_path / "known.npz", mu=np.full(2048, 0.5), sigma=np.eye(2048))
    reference = load_reference(str(tmp_path / "known.npz"), "network", None, None)
    moments = dict(mu=np.zeros(2048), sigma=np.eye(2048), mu_s=np.zeros(2023), sigma_s=np.eye(2023))
    scores = compare(dataclasses.replace(statistics_of(5), moments=moments), reference)
    assert scores["fid"] == pytest.approx(2048 / 4)
    assert scores["sfid"] is scores["precision"] is scores["recall"] is None
    assert scores["missing"]["sfid"] == "the reference has no mu_s and sigma_s"
    assert scores["missing"]["precision"] == "the reference has moments alone, no features of images"
    record = dict(scores, samples=dict(name="five", count=5))
    assert evaluation._table([record]).splitlines()[1].count("none") == 3


def test_wrong_files_are_refused(tmp_path):
    (tmp_path / "text.npz").write_text("no archive")
    with pytest.raises(InputError, match=r"not an \.npz"):
        open_images(tmp_path / "text.npz")
    with pytest.raises(InputError, match="no file or folder"):
        open_images(tmp_path / "missing.npz")
    with pytest.raises(InputError, match="has no pictures"):
        open_images(tmp_path)
    (tmp_path / "broken.png").write_bytes(b"")
    with pytest.raises(InputError, match=r"broken\.png is not a readable picture"):
        list(open_images(tmp_path).batches(2))
    (tmp_path / "broken.png").unlink()
    for side in (8, 16):
        Image.fromarray(pictures(1, 0)[0, :side, :side]).save(tmp_path / f"{side:02d}.png")
    with pytest.raises(InputError, match="Image 1 of"):
        list(open_images(tmp_path).batches(2))
    with pytest.raises(InputError, match="can't be opened as <folder or name>"):
        open_images("tfds:no_such_dataset/train")


def test_wrong_requests_are_refused(files):
    with pytest.raises(InputError, match="--samples is empty"):
        Evaluation(())
    for size in (0, 10**9):
        with pytest.raises(InputError, match=f"--batch_size must be from 1 to 65536, not {size}"):
            Evaluation(("a",), batch_size=size)
    with pytest.raises(InputError, match="--side must be from 0 to 4096, not 1000000000"):
        Evaluation(("a",), side=10**9)
    with pytest.raises(InputError, match="name one"):
        Evaluation(("a",), save_statistics="b")
    with pytest.raises(InputError, match="--report needs folders"):
        Evaluation((str(files / "a.npz"),), report=True)
    with pytest.raises(InputError, match="There is no file nowhere"):
        evaluate(Evaluation((str(files / "a.npz"),), inception="nowhere"))


@pytest.mark.parametrize(
    "damage",
    ["cut", "flipped", "not finite", "features not finite", "other moments", "no JSON", "deep JSON", "a list"],
)
def test_damaged_statistics_are_refused(tmp_path, monkeypatch, damage):
    monkeypatch.setattr(evaluation, "MOMENT_SHAPES", dict(mu=(64,), sigma=(64, 64), mu_s=(63,), sigma_s=(63, 63)))
    arrays = {name: np.zeros(shape) for name, shape in evaluation.MOMENT_SHAPES.items()}
    if damage == "not finite":
        arrays["mu"][5] = np.nan
    elif damage == "features not finite":
        arrays["pool"] = np.full((5, 64), np.inf, np.float32)
    elif damage == "other moments":
        arrays["mu_s"] = np.zeros(7)
    elif damage == "no JSON":
        arrays["told"] = '{"name": '
    elif damage in ("deep JSON", "a list"):
        arrays["about"] = "[" * 100_000 if damage == "deep JSON" else "[]"
    path = tmp_path / "statistics.npz"
    np.savez(path, **arrays)
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= damage == "flipped"
    path.write_bytes(content[: len(content) // 2] if damage == "cut" else content)
    with pytest.raises(InputError, match="statistics.npz (is not an .npz|holds|is damaged)") as caught:
        load_reference(str(path), "network", None, None)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    "arrays, message",
    [
        (dict(mu=np.zeros(4_000_000)), r"mu is float64 \[4000000\]"),
        (dict(mu=np.full(2048, "much")), r"mu is <U4 \[2048\]"),
        (dict(sigma=np.eye(3)), r"sigma is float64 \[3, 3\]"),
        (dict(mu_s=np.zeros(7), sigma_s=np.eye(2023)), r"mu_s is float64 \[7\]"),
        (dict(pool=np.zeros((9, 3), np.float32)), r"pool is float32 \[9, 3\]"),
        (dict(pool=np.zeros(2048, np.float32)), r"pool is float32 \[2048\]"),
        (dict(network="0" * 2**19), r"network is <U524288 \[\]"),
    ],
)
def test_statistics_of_other_features_are_refused_before_they_are_read(tmp_path, monkeypatch, arrays, message):
    path = tmp_path / "statistics.npz"
    np.savez_compressed(path, **dict(mu=np.zeros(2048), sigma=np.eye(2048)) | arrays)
    monkeypatch.setattr(np, "load", None)
    with pytest.raises(InputError, match=f"statistics.npz holds moments of other features: {message}; make it again"):
        load_reference(str(path), "network", None, None)


def test_arrays_of_the_size_of_what_is_measured_are_read_and_no_others(tmp_path, monkeypatch):
    """Floats shrink by a third or two, whoever packs them; a row of zeros would fill the memory."""
    monkeypatch.setattr(evaluation, "MOMENT_SHAPES", dict(mu=(64,), sigma=(64, 64), mu_s=(63,), sigma_s=(63, 63)))
    pool = np.maximum(np.random.default_rng(0).standard_normal((500, 64)), 0).astype(np.float32)  # half of it is zero
    arrays = dict(mu=pool.mean(0), sigma=np.cov(pool.T), arr_0=np.zeros((9, 16, 16, 3), np.uint8))
    np.savez_compressed(tmp_path / "kept.npz", pool=pool, network="net", about='{"name": "photos"}', **arrays)
    found = load_reference(str(tmp_path / "kept.npz"), "net", None, None)
    np.testing.assert_array_equal(found.pool, pool)
    np.savez_compressed(tmp_path / "bomb.npz", pool=np.zeros((5000, 64), np.float32), **arrays)
    monkeypatch.setattr(np, "load", None)
    with pytest.raises(InputError, match=r"arrays that are more than 16 times .*: pool \(1280128 bytes from \d+\)"):
        load_reference(str(tmp_path / "bomb.npz"), "net", None, None)


@pytest.mark.parametrize("packing", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_members_that_unpack_whole_are_refused_before_they_do(tmp_path, packing, monkeypatch):
    with zipfile.ZipFile(tmp_path / "set.npz", "w", packing) as archive:
        archive.writestr("arr_0.npy", b"0" * 10**6)
    monkeypatch.setattr(zipfile, "_get_decompressor", None)
    with pytest.raises(InputError, match="'arr_0.npy' is neither stored nor deflated"):
        open_images(tmp_path / "set.npz")


def test_long_headers_and_two_arrays_of_one_name_are_refused(tmp_path):
    header = b"\x93NUMPY\x02\x00" + (2**31).to_bytes(4, "little")
    with zipfile.ZipFile(tmp_path / "long.npz", "w") as archive:
        archive.writestr("arr_0.npy", header + b" " * 100)
    with zipfile.ZipFile(tmp_path / "two.npz", "w") as archive:
        for name in ("pool", "pool.npy"):
            archive.writestr(name, b"")
    for name, message in (("long", "a header of more than 65536 bytes"), ("two", "two of its arrays have one name")):
        with pytest.raises(InputError, match=message):
            npz_shapes(tmp_path / f"{name}.npz")


@pytest.mark.slow
def test_published_figures_of_adm_are_found():
    """Runs where $ADM_BATCHES names a folder with ADM's own samples, its reference batch, and the network's file."""
    folder = Path(os.environ.get("ADM_BATCHES", "/nowhere"))
    names = ("admnet_guided_upsampled_imagenet256.npz", "VIRTUAL_imagenet256_labeled.npz")
    inception = folder / "pt_inception-2015-12-05-6726825d.pth"
    if not all((folder / name).is_file() for name in names) or not inception.is_file():
        pytest.skip("The published files are not here.")
    samples, reference = (str(folder / name) for name in names)
    [found] = evaluate(Evaluation((samples,), reference=reference, inception=str(inception)))
    assert found["inception_score"] == pytest.approx(215.84, rel=1e-3)
    assert found["fid"] == pytest.approx(3.943, rel=2e-3) and found["sfid"] == pytest.approx(6.140, rel=2e-3)
    # The official distances are float16, which moves these by up to 0.007.
    assert found["precision"] == pytest.approx(0.8265, abs=0.01) and found["recall"] == pytest.approx(0.5309, abs=0.01)


def test_prepared_datasets_and_folders_are_cropped_alike(tmp_path):
    for number in range(4):
        place = tmp_path / "pictures" / f"class{number % 2}"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pictures(1, number)[0]).resize((20 + number, 24)).save(place / f"{number}.png")
    dataset = open_images("tfds:" + prepare_pictures(str(tmp_path / "pictures"), str(tmp_path / "prepared")), side=8)
    flat = tmp_path / "flat"
    flat.mkdir()
    for file in (tmp_path / "pictures").rglob("*.png"):
        (flat / file.name).write_bytes(file.read_bytes())
    read = lambda images: sorted(image.tobytes() for batch in images.batches(3) for image in batch)
    assert dataset.count == 4 and read(dataset) == read(open_images(flat, side=8))
    with pytest.raises(InputError, match="Image 1 of"):
        list(open_images(flat).batches(2))
