"""Pictures are packed once: exactly, again after a kill, and verifiably; tars become a dataset without TensorFlow."""

import io
import tarfile

import numpy as np
import pytest
from PIL import Image
from stand_ins import mean_for_autoencoder

from dydit_jax.data.archives import prepare_pictures
from dydit_jax.data.sources import DataConfig, examples, open_source
from dydit_jax.errors import InputError
from dydit_jax.jobs import prepare_latents as preparation
from dydit_jax.jobs.prepare_latents import LatentsRequest, prepare_latents, verify_latents
from dydit_jax.jobs.train import train_and_evaluate
from dydit_jax.models.dit import DiTConfig

COUNT = 10


def picture(number: int) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, format="PNG")
    return file.getvalue()


@pytest.fixture
def folder(tmp_path):
    for number in range(COUNT):
        place = tmp_path / "pictures" / f"class{number % 2}"
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{number}.png").write_bytes(picture(number))
    return tmp_path / "pictures"


@pytest.fixture
def encoded():
    """Put a plain mean in the autoencoder's place; returns how many images it was given."""
    with mean_for_autoencoder() as given:
        yield given


def request(folder, out, **settings):
    settings = dict(dict(side=16, chunk=4, autoencoder="vae"), **settings)
    return LatentsRequest("images", str(folder), out=str(out), **settings)


def test_latents_are_those_of_the_pictures_and_their_mirror_images(folder, encoded, tmp_path):
    out = prepare_latents(request(folder, tmp_path / "out"))
    moments, labels = np.load(out / "moments.npy"), np.load(out / "labels.npy")
    assert moments.shape == (COUNT, 2, 2, 2, 8) and moments.dtype == np.float16
    assert labels.tolist() == [0] * 5 + [1] * 5
    np.testing.assert_allclose(moments[:, 0, :, 0], moments[:, 1, :, 1], atol=1e-3)  # mirrored
    verify_latents(out)
    again = prepare_latents(request(folder, tmp_path / "out"))  # nothing left to do
    assert again == out and sum(encoded) == 2 * COUNT
    model = DiTConfig(depth=1, width=32, heads=2, patch=1, side=2, channels=4, classes=2)
    source = open_source(DataConfig(name="latents", path=str(out), batch_size=1), model)
    assert source.autoencoder == "vae" and len(source) == COUNT
    for image, mean in zip(examples(source, count=COUNT)["image"], moments[..., :4].astype(np.float32)):
        assert min(np.abs(image - 0.18215 * view).max() for view in mean) < 1e-4


def test_killed_job_goes_on_where_it_was(folder, encoded, tmp_path, monkeypatch):
    whole = prepare_latents(request(folder, tmp_path / "whole"))
    encode, calls = preparation.encode_moments, []

    def dies(*arguments):
        calls.append(1)
        if len(calls) > 3:  # in the middle of the second chunk
            raise KeyboardInterrupt
        return encode(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(preparation, "encode_moments", dies)
        prepare_latents(request(folder, tmp_path / "parts"))
    assert not (tmp_path / "parts" / "moments.npy").exists()
    with (tmp_path / "parts" / "progress-0.jsonl").open("a") as journal:
        journal.write('{"first": 4, "sha')  # a line that the kill has cut
    encoded.clear()
    prepare_latents(request(folder, tmp_path / "parts"))
    assert sum(encoded) == 2 * (COUNT - 4)
    for name in ("moments.npy", "labels.npy", "info.json"):
        assert (tmp_path / "parts" / name).read_bytes() == (whole / name).read_bytes()


def test_damage_and_other_jobs_are_noticed(folder, encoded, tmp_path):
    out = prepare_latents(request(folder, tmp_path / "out"))
    with pytest.raises(InputError, match=r"made otherwise \(autoencoder differ"):
        prepare_latents(request(folder, out, autoencoder="another"))
    moments = np.lib.format.open_memmap(out / "moments.npy", "r+")
    moments[5, 0, 0, 0, 0] += 1
    moments.flush()
    with pytest.raises(InputError, match="damaged: pictures 4 to 7"):
        verify_latents(out)
    with pytest.raises(InputError, match="is not finished"):
        verify_latents(folder)
    with pytest.raises(InputError, match="holds no latents"):
        prepare_latents(request(folder, folder))
    with pytest.raises(InputError, match="--side must be a multiple of 8"):
        request(folder, out, side=20)
    with pytest.raises(InputError, match="a bucket mounted as one"):
        request(folder, "gs://bucket/latents")
    config = dict(
        model=dict(depth=1, width=32, heads=2, patch=1, side=2, channels=4, classes=2),
        data=dict(name="latents", path=str(out), batch_size=8),
        optimizer=dict(learning_rate=1e-3),
        train=dict(steps=1),
        sampling=dict(autoencoder="another"),
    )
    with pytest.raises(InputError, match="are of vae, but sampling.autoencoder is another"):
        train_and_evaluate(config, tmp_path / "run")


# --- Tars ----------------------------------------------------------------------------------------


def tar_of(path, members: dict[str, bytes]):
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return path


@pytest.mark.parametrize("form", ["folders", "tars", "tar of tars"])
def test_pictures_become_a_dataset_that_trains(folder, tmp_path, form, caplog):
    source = folder
    (folder / "class1" / "9.png").write_bytes(b"broken")
    if form != "folders":
        source = tmp_path / "tars"
        source.mkdir()
        for place in folder.iterdir():
            tar_of(source / f"{place.name}.tar", {file.name: file.read_bytes() for file in place.iterdir()})
    if form == "tar of tars":
        source = tar_of(tmp_path / "all.tar", {file.name: file.read_bytes() for file in source.iterdir()})
    path = prepare_pictures(str(source), str(tmp_path / "out"))
    assert "class1/9.png is not a readable picture" in caplog.text
    model = DiTConfig(depth=1, width=32, heads=2, patch=2, side=16, channels=3, classes=2)
    found = open_source(DataConfig(name="tfds", path=path, batch_size=1), model)
    assert len(found) == COUNT - 1 and found.fingerprint == f"tfds class_pictures/1.0.0 train {COUNT - 1}"
    folder_source = open_source(DataConfig(name="images", path=str(folder), batch_size=1), model)
    key = lambda example: (int(example["label"]), example["pixels"].tobytes())
    # The last picture of the folder is broken and stands for the first one again.
    assert {key(found[i]) for i in range(COUNT - 1)} == {key(folder_source[i]) for i in range(COUNT)}


def test_wrong_sources_are_refused(folder, tmp_path):
    out = str(tmp_path / "out")
    with pytest.raises(InputError, match="There is no file or folder"):
        prepare_pictures(str(tmp_path / "nowhere"), out)
    (tmp_path / "text.tar").write_text("no tar")
    with pytest.raises(InputError, match="is not a tar archive"):
        prepare_pictures(str(tmp_path / "text.tar"), out)
    with pytest.raises(InputError, match="holds no .tar per class"):
        prepare_pictures(str(tar_of(tmp_path / "flat.tar", {"a.png": picture(0)})), out)
    with pytest.raises(InputError, match="is not empty"):
        prepare_pictures(str(folder), str(folder))
    (folder / "class0" / "0.png").write_bytes(b"")
    with pytest.raises(InputError, match="1 pictures can't be read"):
        prepare_pictures(str(folder), out, max_bad=0)
    model = DiTConfig(depth=1, width=32, heads=2, patch=2, side=16, channels=3, classes=2)
    with pytest.raises(InputError, match="can't be opened as <folder or name>/<split>"):
        open_source(DataConfig(name="tfds", path=f"{folder}/train", batch_size=1), model)
