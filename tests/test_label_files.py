"""Files of labels: how they may be written, and what none of them may be."""

import pytest

from dydit_jax.checkpoints import Weights
from dydit_jax.diffusion.process import Diffusion
from dydit_jax.diffusion.samplers import SamplingConfig
from dydit_jax.errors import InputError
from dydit_jax.jobs import label_files
from dydit_jax.jobs.label_files import read_words
from dydit_jax.jobs.sample import Request, sample


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le-with-mark"])
def test_files_of_labels_may_begin_with_a_mark(tmp_path, encoding):
    text = "3\r\n1\r\n4\r\n"
    content = b"\xff\xfe" + text.encode("utf-16-le") if encoding.endswith("mark") else text.encode(encoding)
    (tmp_path / "labels.txt").write_bytes(content)
    assert read_words(tmp_path / "labels.txt") == ["3", "1", "4"]


def test_long_names_fit(tmp_path):
    name = "black-footed ferret, ferret, Mustela nigripes"
    (tmp_path / "labels").write_text(400_000 * f"{name}\n")
    words = read_words(tmp_path / "labels")
    assert len(words) == 400_000 and set(words) == {name}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x89PNG\r\n\x1a\n\0\xff", "can't be read as text"),
        (b"1\n2\n" + 5000 * b"9", "must hold numbers"),
    ],
)
def test_file_without_labels_is_refused(tiny_config, tmp_path, monkeypatch, content, message):
    weights = Weights(tiny_config, Diffusion(), SamplingConfig(), {}, {})
    monkeypatch.setattr("dydit_jax.jobs.sample.load_checkpoint", lambda *_: weights)
    (tmp_path / "labels").write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        sample(Request("weights", str(tmp_path / "out"), labels_file=str(tmp_path / "labels")))
    assert len(str(caught.value)) < 400 and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("1 2 3\n4", "labels holds 4 labels; at most 3 images are drawn at once"),
        ("a" * 17, "labels is larger than 0 MB, too large for the labels of 3 images; numbers take less room"),
    ],
)
def test_file_of_too_many_labels_is_refused_with_the_reason(tmp_path, monkeypatch, content, message):
    monkeypatch.setattr(label_files, "MOST_IMAGES", 3)
    monkeypatch.setattr(label_files, "MOST_BYTES", 16)
    (tmp_path / "labels").write_text(content)
    with pytest.raises(InputError, match=message):
        read_words(tmp_path / "labels")
