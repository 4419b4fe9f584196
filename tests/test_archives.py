"""Class folders and tars become a dataset without TensorFlow: exactly, again after a kill, whoever made the archive."""

import io
import tarfile

import numpy as np
import pytest
from PIL import Image

from dydit_jax.data.packing import prepare_pictures
from dydit_jax.data.sources import DataConfig, open_source
from dydit_jax.errors import InputError
from dydit_jax.models.dit import DiTConfig

COUNT = 10
MODEL = DiTConfig(depth=1, width=32, heads=2, patch=2, side=16, channels=3, classes=2)


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


def member(name: str, content: bytes = b"", **fields) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, content


def tar_of(path, members):
    """Write a tar of {name: content}, or of pairs from `member`, which may repeat a name."""
    path.parent.mkdir(exist_ok=True)
    members = [member(*item) for item in members.items()] if isinstance(members, dict) else members
    with tarfile.open(path, "w") as archive:
        for info, content in members:
            archive.addfile(info, io.BytesIO(content))
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
    found = open_source(DataConfig(name="tfds", path=path, batch_size=1), MODEL)
    assert len(found) == COUNT - 1 and found.fingerprint == f"tfds class_pictures/1.0.0 train {COUNT - 1}"
    folder_source = open_source(DataConfig(name="images", path=str(folder), batch_size=1), MODEL)
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
    with pytest.raises(InputError, match="can't be opened as <folder or name>/<split>"):
        open_source(DataConfig(name="tfds", path=f"{folder}/train", batch_size=1), MODEL)
