"""Class folders and tars become a dataset without TensorFlow: exactly, again after a kill, whoever made the archive."""

import gzip
import io
import os
import tarfile

import numpy as np
import pytest
from stand_ins import png, write_pictures

from dydit_jax.data import packing
from dydit_jax.data.archives import open_pictures
from dydit_jax.data.image_sets import open_images
from dydit_jax.data.images import MAX_BYTES
from dydit_jax.data.packing import prepare_pictures
from dydit_jax.data.prepared import open_prepared
from dydit_jax.data.sources import DataConfig, open_source
from dydit_jax.errors import InputError
from dydit_jax.models.config import DiTConfig

COUNT = 10
MODEL = DiTConfig(depth=1, width=32, heads=2, patch=2, side=16, channels=3, classes=2)


@pytest.fixture
def folder(tmp_path):
    return write_pictures(tmp_path / "pictures", COUNT)


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


def test_features_of_other_names_are_read_by_their_keys(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(packing, "_features", renamed_features)
    monkeypatch.setattr(packing.tfds.features.FeaturesDict, "encode_example", renamed_example)
    path = prepare_pictures(str(folder), str(tmp_path / "out"))
    opened = lambda **keys: open_source(DataConfig(name="tfds", path=path, batch_size=1, **keys), MODEL)
    source = opened(image_key="photo", label_key="kind")
    plain = open_source(DataConfig(name="images", path=str(folder), batch_size=1), MODEL)
    for index in range(COUNT):
        np.testing.assert_array_equal(source[index]["pixels"], plain[index]["pixels"])
        assert source[index]["label"] == plain[index]["label"]
    assert source.fingerprint.endswith(f"train {COUNT} photo kind")
    assert open_images(f"tfds:{path}", image_key="photo").count == COUNT
    with pytest.raises(InputError, match="has no picture named 'image' but .*photo"):
        opened()
    with pytest.raises(InputError, match="has no classes named 'label' but .*kind.*data.label_key"):
        opened(image_key="photo")


def renamed_features(classes):
    label, text = packing.tfds.features.ClassLabel(names=classes), packing.tfds.features.Text()
    return packing.tfds.features.FeaturesDict(dict(photo=packing.tfds.features.Image(), kind=label, file_name=text))


def renamed_example(features, example):
    example = {dict(image="photo", label="kind").get(name, name): value for name, value in example.items()}
    return {name: feature.encode_example(example[name]) for name, feature in features.items()}


def test_wrong_sources_are_refused(folder, tmp_path):
    out = str(tmp_path / "out")
    with pytest.raises(InputError, match="There is no file or folder"):
        prepare_pictures(str(tmp_path / "nowhere"), out)
    (tmp_path / "text.tar").write_text("no tar")
    with pytest.raises(InputError, match="is not a tar archive"):
        prepare_pictures(str(tmp_path / "text.tar"), out)
    with pytest.raises(InputError, match="holds no .tar per class"):
        prepare_pictures(str(tar_of(tmp_path / "flat.tar", {"a.png": png(0)})), out)
    with pytest.raises(InputError, match="is not empty"):
        prepare_pictures(str(folder), str(folder))
    (folder / "class0" / "0.png").write_bytes(b"")
    with pytest.raises(InputError, match="1 pictures can't be read"):
        prepare_pictures(str(folder), out, max_bad=0)
    with pytest.raises(InputError, match="can't be opened as <folder or name>/<split>"):
        open_source(DataConfig(name="tfds", path=f"{folder}/train", batch_size=1), MODEL)


def contents(path: str) -> list[tuple[str, bytes, int]]:
    """Return name, bytes and label of every picture of a prepared dataset, in its order."""
    _, source = open_prepared(path)
    rows = [source[index] for index in range(len(source))]
    return [(row["file_name"].decode(), row["image"], int(row["label"])) for row in rows]


# --- Going on ------------------------------------------------------------------------------------


@pytest.mark.parametrize("killed_at", range(12))
def test_a_killed_job_goes_on_where_it_was(folder, tmp_path, monkeypatch, killed_at):
    monkeypatch.setattr(packing, "SHARD_BYTES", 4000)  # three pictures
    (folder / "class0" / "4.png").write_bytes(b"broken")
    whole = contents(prepare_pictures(str(folder), str(tmp_path / "whole")))
    decode, finish, read = packing.decode_image, packing._finish, []

    def dying_decode(content, name):
        if len(read) == killed_at:
            raise KeyboardInterrupt
        read.append(name)
        return decode(content, name)

    def dying_finish(classes, shards, partial, folder):
        finish(classes, shards, partial, folder.with_name("renamed too early"))
        folder.with_name("renamed too early").rename(partial)  # as if the last step had not been
        raise KeyboardInterrupt

    out = tmp_path / "parts"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(packing, "decode_image", dying_decode)
        patch.setattr(packing, "_finish", dying_finish)
        prepare_pictures(str(folder), str(out))
    partial = out / "class_pictures" / "1.0.0.partial"
    assert not (out / "class_pictures" / "1.0.0").exists() and partial.is_dir()
    with (partial / "journal.jsonl").open("a") as journal:
        journal.write('{"seen": 4, "cou')  # a line that the kill has cut
    again = []
    monkeypatch.setattr(packing, "decode_image", lambda *given: (again.append(given[1]), decode(*given))[1])
    path = prepare_pictures(str(folder), str(out), max_bad=1)  # the unreadable one counts once
    assert contents(path) == whole and len(whole) == COUNT - 1
    assert len(read) + len(again) <= COUNT + 3  # at most one shard is read twice
    again.clear()
    assert prepare_pictures(str(folder), str(out)) == path and not again  # complete


def cut_shard(partial) -> None:
    shard = partial / "class_pictures-train.array_record-00001"
    shard.write_bytes(shard.read_bytes()[:-1])


def damage_journal(partial) -> None:
    lines = (partial / "journal.jsonl").read_bytes().splitlines(keepends=True)
    lines[1] = b"\xff" + lines[1]
    (partial / "journal.jsonl").write_bytes(b"".join(lines))


@pytest.mark.parametrize("damage", [cut_shard, damage_journal])
def test_shards_that_are_not_whole_are_made_again(folder, tmp_path, monkeypatch, caplog, damage):
    monkeypatch.setattr(packing, "SHARD_BYTES", 4000)
    whole = contents(prepare_pictures(str(folder), str(tmp_path / "out")))
    done = tmp_path / "out" / "class_pictures" / "1.0.0"
    damage(done.rename(done.with_name("1.0.0.partial")))
    assert contents(prepare_pictures(str(folder), str(tmp_path / "out"))) == whole
    assert "what follows file 1 is not whole and is made again" in caplog.text


def test_other_pictures_and_other_folders_are_refused(folder, tmp_path):
    path = prepare_pictures(str(folder), str(tmp_path / "out"))
    (folder / "class0" / "new.png").write_bytes(png(99))
    with pytest.raises(InputError, match="made of other pictures than --source has now"):
        prepare_pictures(str(folder), str(tmp_path / "out"))
    (tmp_path / "out" / "class_pictures" / "1.0.0" / "source.json").unlink()  # of another program
    with pytest.raises(InputError, match="is not empty and holds no dataset of this command"):
        prepare_pictures(str(folder), str(tmp_path / "out"))
    assert len(contents(path)) == COUNT
    with pytest.raises(InputError, match="a bucket mounted as one, not gs://"):
        prepare_pictures(str(folder), "gs://bucket/out")


def test_a_full_disk_is_one_line_and_the_command_goes_on(folder, tmp_path, monkeypatch):
    class FullDisk:
        def __init__(self, *_):
            pass

        def write(self, _):
            raise RuntimeError("write() failed: No space left on device; writing x")

    with monkeypatch.context() as patch, pytest.raises(InputError, match=r"Can't write to .*No space left .*goes on"):
        patch.setattr(packing.array_record_module, "ArrayRecordWriter", FullDisk)
        prepare_pictures(str(folder), str(tmp_path / "out"))
    assert len(contents(prepare_pictures(str(folder), str(tmp_path / "out")))) == COUNT


# --- Archives from strangers ---------------------------------------------------------------------


def test_the_same_name_twice_is_kept_twice(tmp_path, caplog):
    members = [member("a/1.png", png(1)), member("1.png", png(2)), member("./1.png", png(3))]
    tar_of(tmp_path / "tars" / "ants.tar", members)
    found = contents(prepare_pictures(str(tmp_path / "tars"), str(tmp_path / "out")))
    assert found == [(f"ants/1.png{mark}", png(n), 0) for n, mark in ((1, ""), (2, "#2"), (3, "#3"))]
    assert "1 names occur more than once (ants/1.png); all are kept" in caplog.text


@pytest.mark.parametrize(
    "fields, reason",
    [
        (dict(type=tarfile.SYMTYPE, linkname="/etc/passwd"), "a link"),
        (dict(type=tarfile.SYMTYPE, linkname="x.png"), "a link"),  # to itself
        (dict(type=tarfile.LNKTYPE, linkname="../../home/x.png"), "a link"),
        (dict(type=tarfile.FIFOTYPE), "a device, a FIFO"),
        (dict(type=tarfile.CHRTYPE, devmajor=1, devminor=5), "a device, a FIFO"),
        (dict(type=b"q"), "a device, a FIFO or of an unknown kind"),
        (dict(pax_headers={"GNU.sparse.size": "9000000000", "GNU.sparse.map": "0,0"}), "a sparse file"),
    ],
)
def test_members_that_are_no_ordinary_files_are_unreadable_pictures(tmp_path, caplog, fields, reason):
    members = [member("1.png", png(1)), member("x.png", **fields), member("2.png", png(2))]
    tar_of(tmp_path / "tars" / "ants.tar", members)
    found = contents(prepare_pictures(str(tmp_path / "tars"), str(tmp_path / "out"), max_bad=1))
    assert [name for name, _, _ in found] == ["ants/1.png", "ants/2.png"]
    assert f"ants/x.png is not a readable picture: {reason}" in caplog.text
    with pytest.raises(InputError, match="1 pictures can't be read, the last of them ants/x.png; --max_bad allows 0"):
        prepare_pictures(str(tmp_path / "tars"), str(tmp_path / "strict"), max_bad=0)


def test_members_larger_than_any_picture_are_not_read(tmp_path):
    path = tar_of(tmp_path / "tars" / "ants.tar", [member("1.png", png(1)), member("x.png", b"", size=0)])
    content = bytearray(path.read_bytes())
    info = tarfile.TarInfo("x.png")
    info.size = MAX_BYTES + 1
    place = content.index(b"x.png")
    content[place : place + 512] = info.tobuf()
    path.write_bytes(content)
    names = {}
    with pytest.raises(InputError, match="damaged after x.png"):  # the data are not there
        for found in open_pictures(str(tmp_path / "tars")).pictures():
            names[found.name] = found.read
            if found.name == "ants/x.png":
                with pytest.raises(InputError, match=f"{MAX_BYTES + 1} bytes, more than {MAX_BYTES}"):
                    found.read()
    assert list(names) == ["ants/1.png", "ants/x.png"]


def test_what_systems_leave_in_tars_is_passed_over_and_the_rest_named(tmp_path, caplog):
    caplog.set_level("INFO")
    names = ["__MACOSX/._1.png", ".ipynb_checkpoints/1.png", "Thumbs.db", "x.avif", "../1.png", "dir.png"]
    members = [member(name, png(1)) for name in names[:-1]] + [member("dir.png", type=tarfile.DIRTYPE)]
    tar_of(tmp_path / "tars" / "ants.tar", members)
    (tmp_path / "tars" / "._ants.tar").write_bytes(b"")
    (tmp_path / "tars" / "stray.png").write_bytes(b"")
    source = open_pictures(str(tmp_path / "tars"))
    assert source.classes == ["ants"] and [found.name for found in source.pictures()] == ["ants/1.png"]
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert [("stray.png" in text, "x.avif" in text) for text in warnings] == [(True, False), (False, True)]
    assert all("1 entries are ignored" in text for text in warnings)


def damaged(kind: str, content: bytes) -> bytes:
    second = content.index(b"2.png")
    negative = tarfile.TarInfo("2.png")
    negative.size = -512
    change = {
        "cut in a picture": lambda: content[: second + 600],
        "cut in a header": lambda: content[: second + 100],
        "flipped header": lambda: content[:second] + b"3" + content[second + 1 :],
        "end in the middle": lambda: content[:second] + bytes(1024) + content[second:],
        "length below zero": lambda: content[:second] + negative.tobuf(tarfile.GNU_FORMAT) + content[second + 512 :],
        "compressed": lambda: gzip.compress(content),
        "no tar": lambda: b"<html>Not found</html>" * 99,
        "empty": lambda: b"",
    }
    return change[kind]()


KINDS = ["cut in a picture", "cut in a header", "flipped header", "end in the middle", "length below zero"]


@pytest.mark.parametrize("kind", [*KINDS, "compressed", "no tar", "empty"])
def test_damaged_tars_are_an_error_and_not_the_end(tmp_path, kind):
    path = tar_of(tmp_path / "tars" / "ants.tar", {f"{n}.png": png(n) for n in (1, 2, 3)})
    path.write_bytes(damaged(kind, path.read_bytes()))
    with pytest.raises(InputError, match=r"ants.tar is not a tar archive without compression, or it is damaged after"):
        prepare_pictures(str(tmp_path / "tars"), str(tmp_path / "out"))
    assert not (tmp_path / "out" / "class_pictures" / "1.0.0").exists()


def test_tars_that_end_without_their_closing_blocks_are_read_with_a_warning(tmp_path, caplog):
    path = tar_of(tmp_path / "tars" / "ants.tar", {"1.png": png(1)})
    path.write_bytes(path.read_bytes().rstrip(b"\0").ljust(512 * (1 + -(-len(png(1)) // 512)), b"\0"))
    assert [found.read() for found in open_pictures(str(tmp_path / "tars")).pictures()] == [png(1)]
    assert "has no closing blocks; it may have been cut" in caplog.text


def test_mutated_tars_raise_nothing_but_our_error(tmp_path):
    generator = np.random.default_rng(0)
    path = tar_of(tmp_path / "tars" / "ants.tar", {f"{n}.png": b"%d" % n for n in range(3)})
    good = path.read_bytes()[:4096]
    for _ in range(150):
        content = bytearray(good)
        for place in generator.integers(0, 3072, generator.integers(1, 4)):
            content[place] = generator.integers(256)
        for start in range(0, 3072, 1024):  # so that what is changed is also believed
            total = sum(content[start : start + 512]) - sum(content[start + 148 : start + 156]) + 8 * 32
            content[start + 148 : start + 156] = b"%06o\0 " % total
        path.write_bytes(content)
        try:
            for found in open_pictures(str(tmp_path / "tars")).pictures():
                assert len(found.read()) <= len(good)
        except InputError:
            pass


@pytest.mark.parametrize(
    "members, message",
    [
        ([member("ants.tar"), member("x/ants.tar")], "holds ants.tar more than once"),
        ([member("ants.tar", type=tarfile.SYMTYPE, linkname="/etc/x.tar")], "ants.tar in .* is a link"),
        ([member("._ants.tar")], "holds no .tar per class"),
    ],
)
def test_wrong_tars_of_tars_are_refused(tmp_path, members, message):
    with pytest.raises(InputError, match=message):
        open_pictures(str(tar_of(tmp_path / "all.tar", members)))


def test_tars_without_pictures_and_tars_that_would_hang_are_refused(tmp_path):
    tar_of(tmp_path / "tars" / "ants.tar", {"1.txt": b""})
    with pytest.raises(InputError, match=r"ants.tar has no pictures"):
        prepare_pictures(str(tmp_path / "tars"), str(tmp_path / "out"))
    os.mkfifo(tmp_path / "tars" / "bees.tar")
    with pytest.raises(InputError, match=r"bees.tar is no ordinary file"):
        open_pictures(str(tmp_path / "tars"))


def test_names_are_printable(tmp_path):
    tar_of(tmp_path / "tars" / "ants.tar", [member("\x1b[2J\udcff\nü.png", png(1))])
    [(name, _, _)] = contents(prepare_pictures(str(tmp_path / "tars"), str(tmp_path / "out")))
    assert name == r"ants/\x1b[2J\udcff\nü.png"


# --- Damage to what was prepared -----------------------------------------------------------------


def test_damaged_examples_count_as_unreadable_pictures(folder, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(packing, "SHARD_BYTES", 8000)  # two files of five or six
    path = prepare_pictures(str(folder), str(tmp_path / "out"))
    opened = lambda max_bad: open_source(DataConfig(name="tfds", path=path, batch_size=1, max_bad=max_bad), MODEL)
    whole = [opened(0)[index] for index in range(COUNT)]
    shard = tmp_path / "out" / "class_pictures" / "1.0.0" / "class_pictures-train.array_record-00000"
    content = shard.read_bytes()
    place = content.index(png(2)[-40:])
    shard.write_bytes(content[:place] + b"\xff" + content[place + 1 :])
    source = opened(1)
    np.testing.assert_array_equal(source[1]["pixels"], whole[2]["pixels"])  # the next one in its place
    np.testing.assert_array_equal(source[0]["pixels"], whole[0]["pixels"])
    assert "Example 1 of tfds class_pictures/1.0.0 train 10 is not a readable picture: " in caplog.text
    with pytest.raises(InputError, match=r"1 pictures can't be read, .* data.max_bad allows 0"):
        opened(0)[1]
    with pytest.raises(InputError, match="Example 1 of tfds:.* is not a readable picture"):
        list(open_images(f"tfds:{path}", side=16).batches(COUNT))
    shard.unlink()
    with pytest.raises(InputError, match=r"2 pictures can't be read, .* data.max_bad allows 1"):
        opened(1)[0]


def test_labels_outside_the_classes_stop_the_run(folder, tmp_path):
    path = prepare_pictures(str(folder), str(tmp_path / "out"))
    source = open_source(DataConfig(name="tfds", path=path, batch_size=1), MODEL)
    source._source = [dict(image=png(0), label=-1)]  # as the test splits of public datasets have
    with pytest.raises(InputError, match=r"Example 0 .* has label -1; labels are whole numbers from 0 to 1"):
        source[0]
