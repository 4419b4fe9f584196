"""The page about a folder: what it holds, and how a phone and a desk show it by day and by night."""

import html.parser
import io
import json
import sys

import numpy as np
import pytest
from browser import find_browser, open_browser
from PIL import Image

from dydit_jax.drawing.report import write_report
from dydit_jax.runtime import last_words
from dydit_jax.runtime.origin import command_line


class Page(html.parser.HTMLParser):
    """Collects what a page points to and checks that its tags are closed."""

    def __init__(self):
        super().__init__()
        self.sources, self.open = [], []

    def handle_starttag(self, tag, attributes):
        self.sources += [value for name, value in attributes if name in ("src", "href")]
        if tag not in ("img", "meta", "wbr"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def assert_self_contained(text: str, pictures: int) -> None:
    page = Page()
    page.feed(text)
    assert not page.open and len(page.sources) == pictures
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)


def test_page_holds_what_lies_in_the_folder(tmp_path):
    sampling = dict(sampler="ddpm", steps="250", guidance=1.5, guided_channels="all")
    manifest = dict(
        dict.fromkeys(("checksum", "num_images", "seed", "mode", "precision", "matmul_precision", "device"), "x"),
        checkpoint="<b>runs</b>",
        sampling=sampling,
        model=dict(depth=2, width=32, heads=4, patch=2),
        versions=dict(jax="1"),
    )
    cost = dict(macs=5e9, macs_complete=1e10, heads=0.5, groups=0.5, tokens=0.5, images=4, seconds=2.0)
    found = dict(fid=2.5, inception_score=9.0, samples=dict(name="s", count=10), reference=None)
    for name, content in (("manifest", manifest), ("cost", cost), ("evaluation", [found])):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    (tmp_path / "images").mkdir()
    for number in range(30):
        Image.new("L", (8, 8)).save(tmp_path / "images" / f"{number:06d}.png")
    text = write_report(tmp_path).read_text()
    assert_self_contained(text, pictures=1)
    for words in ("&lt;b&gt;runs", "ddpm, 250 steps", "5.0 G (50.0 %)", "2.5000", "The first images of the set"):
        assert words in text


def test_sets_of_every_format_and_size_are_shown_by_their_first_images(tmp_path):
    for place in ("flat", "classes/ant", "classes/bee", "sampled/images"):
        (tmp_path / place).mkdir(parents=True)
        for number in range(30):
            image = Image.new("RGB", (8 + number % 3, 9), "#336699")
            image.save(tmp_path / place / f"{number:06d}.{('png', 'jpg', 'webp')[number % 3]}")
    for folder in ("flat", "classes", "sampled"):
        text = write_report(tmp_path / folder).read_text()
        assert_self_contained(text, pictures=1)
        assert "The first images of the set" in text and len(text) < 20_000


def test_pictures_that_can_not_be_read_leave_the_page_without_images(tmp_path, caplog):
    (tmp_path / "images").mkdir()
    assert_self_contained(write_report(tmp_path).read_text(), pictures=0)
    (tmp_path / "images" / "0.jpg").write_bytes(b"none")
    assert_self_contained(write_report(tmp_path).read_text(), pictures=0)
    assert "0.jpg is not a readable picture" in caplog.text and "The report goes without images." in caplog.text


def write_folder(folder):
    """Lay down all that a page can show, with long names that have no place to break."""
    sampling = dict(sampler="ddim", steps="50", guidance=4.0, guided_channels="first_three")
    long = "a_checkpoint_of_a_very_long_name/" * 4 + "x" * 60 + ".safetensors"
    manifest = dict(
        dict.fromkeys(("num_images", "seed"), 4),
        **dict(checksum="0123456789abcdef" * 4, mode="fast", precision="float32", matmul_precision="default"),
        **dict(checkpoint=long, sampling=sampling, model=dict(depth=4, width=96, heads=6, patch=2)),
        **dict(device="cpu", versions={"jax": "0.10.2", "orbax-checkpoint": "0.12.8"}),
    )
    made = dict(command=f"python sample.py --checkpoint {long} --labels 0,1", date="2026-11-30 12:00", device="1 x cpu")
    cost = dict(macs=4.0e6, macs_executed=4.1e6, macs_complete=7.57e6, heads=0.5, groups=0.5, tokens=0.5)
    cost |= dict(images=4, seconds=2.0, compile_seconds=1.5, made=made)
    metrics = dict(fid=2.5, sfid=3.5, inception_score=9.0, precision=0.5, recall=None)
    found = dict(metrics, samples=dict(name=long, count=10), reference=None)
    for name, content in (("manifest", manifest), ("cost", cost), ("evaluation", [found])):
        (folder / f"{name}.json").write_text(json.dumps(content))
    Image.new("RGB", (700, 300), "#336699").save(folder / "grid.png")
    Image.new("RGB", (1056, 600), "white").save(folder / "routing.png")
    return write_report(folder)


def test_pictures_stand_before_numbers_and_all_that_made_them_below(tmp_path):
    text = write_folder(tmp_path).read_text()
    assert text.index("<img") < text.rindex("<img") < text.index("What made it") < text.index("<dl>")
    facts = (
        "python sample.py \\\n  --checkpoint",
        "ddim, 50 steps",
        "4.0, channels: first_<wbr>three",
        "float32",
        "0.10.2",
    )
    for fact in facts:
        assert fact in text
    assert "2026-11-30 12:00" in text and "4.0 M (52.8 %)" in text and "2.0 s, 1.5 s of it compiling" in text
    assert "prefers-color-scheme: dark" in text and 'name="viewport"' in text
    assert text.count('class="photograph"') == 1  # the grid keeps its colours at night, the figure does not


def test_command_is_what_was_typed_and_nothing_in_a_notebook(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/bin/dydit-sample", "--labels", "0,1", "--out", "my folder"])
    monkeypatch.setattr(last_words, "PROGRAM_FLAGS", ["labels"])
    assert command_line() == "dydit-sample --labels 0,1 --out 'my folder'"
    monkeypatch.setattr(sys, "argv", ["tools/sample.py"])
    assert command_line() == "python tools/sample.py"
    monkeypatch.setattr(last_words, "PROGRAM_FLAGS", [])
    assert command_line() == ""


@pytest.mark.slow
@pytest.mark.skipif(find_browser() is None, reason="No Chromium on this machine (apt-get install chromium).")
def test_page_is_read_on_a_phone_and_a_desk_by_day_and_by_night(tmp_path):
    path, brightness = write_folder(tmp_path), {}
    with open_browser() as page:
        for width in (390, 1100):
            for scheme in ("light", "dark"):
                page.open(path, width=width, scheme=scheme)
                assert page.evaluate("document.documentElement.scrollWidth") <= width
                # What is wider than the screen scrolls in a box of its own.
                right = "Math.max(...[...document.querySelectorAll('body > *, figure, img, dl, dd')].map("
                assert page.evaluate(right + "e => e.getBoundingClientRect().right))") <= width
                assert page.evaluate("getComputedStyle(document.querySelector('dd')).overflowWrap") == "normal"
                pixels = np.asarray(Image.open(io.BytesIO(page.screenshot())).convert("L"))
                assert pixels.shape[1] == 2 * width and pixels.std() > 10  # text and pictures
                brightness[width, scheme] = float(np.median(pixels))
    assert min(brightness[width, "light"] for width in (390, 1100)) > 200
    assert max(brightness[width, "dark"] for width in (390, 1100)) < 60
