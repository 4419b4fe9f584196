"""Grids hold the images where they belong; figures have their axes and units."""

import numpy as np
import pytest
from PIL import Image

from dydit_jax.drawing.figures import draw_macs, draw_plan, draw_routing, tint_closed
from dydit_jax.drawing.pictures import draw_grid, label_texts, save_image, to_uint8
from dydit_jax.drawing.style import CLOSED, DPI, KEPT, LEFT_OUT, LINES, OPEN, WIDTH, save_figure
from dydit_jax.errors import InputError, StopError
from dydit_jax.fast.plan import make_plan
from dydit_jax.fast.usage import TokenUsage
from dydit_jax.models.config import DiTConfig
from dydit_jax.models.cost import format_count
from dydit_jax.models.routing import Routing
from dydit_jax.sampling.generate import Samples


def test_pixels_are_scaled_as_published():
    images = np.float32([-2.0, -1.0, 0.0, 0.5, 0.9999, 3.0]).reshape(1, 2, 3, 1)
    assert to_uint8(images).ravel().tolist() == [0, 0, 128, 191, 255, 255]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_images_that_are_not_finite_are_named_and_not_shown(value):
    images = np.zeros((4, 2, 2, 3), np.float32)
    images[1, 0, 1, 2] = images[3] = value
    with pytest.raises(StopError, match="The image 8 .and 1 others of its batch. is not finite"):
        to_uint8(images, indices=[7, 8, 9, 10])
    assert to_uint8(images[::2]).shape == (2, 2, 2, 3)


@pytest.mark.parametrize("shape", [(1, 8, 8, 4), (8, 8, 3), (1, 8, 8, 2)])
def test_latents_are_no_pictures(shape):
    with pytest.raises(InputError, match="latents are decoded first"):
        to_uint8(np.zeros(shape))


def cell_centres(grid: Image.Image, columns: int, rows: int, *, cell: int, gap: int, top: int) -> list:
    pixels = np.asarray(grid)
    at = lambda index: gap + index * (cell + gap) + cell // 2
    return [[pixels[top + at(row), at(column)].tolist() for column in range(columns)] for row in range(rows)]


def test_grid_enlarges_small_images_to_64_pixels_row_by_row(tmp_path):
    images = np.arange(6, dtype=np.uint8).reshape(6, 1, 1, 1).repeat(8, 1).repeat(8, 2) * 40
    grid = draw_grid(images, columns=3)
    assert grid.size == (3 * 70 + 6, 2 * 70 + 6)
    assert cell_centres(grid, 3, 2, cell=64, gap=6, top=0) == [[0, 40, 80], [120, 160, 200]]
    edge = np.asarray(grid)[:6]
    assert edge.min() == edge.max() and edge.min() not in (0, 255)  # white and black pictures end visibly
    save_image(tmp_path / "grid.png", grid)
    assert Image.open(tmp_path / "grid.png").size == grid.size


def test_grid_keeps_colours_and_leaves_large_images_alone():
    images = np.zeros((2, 64, 64, 3), np.uint8)
    images[1, ..., 0] = 255
    grid = draw_grid(images, columns=2)
    assert grid.size == (2 * 70 + 6, 70 + 6)
    assert cell_centres(grid, 2, 1, cell=64, gap=6, top=0) == [[[0, 0, 0], [255, 0, 0]]]


@pytest.mark.parametrize(
    "labels, written",
    [
        ("1 2 1 2 1", [True, False, False]),  # once above a column of the same label
        ("1 2 3 4 5", [True, True, True]),
        ("1 2 1 2 3", [True, False, True]),
        ("", [False, False, False]),
    ],
)
def test_grid_has_its_labels_above_the_images(labels, written):
    images = np.full((5, 64, 64, 1), 255, np.uint8)
    bare, grid = draw_grid(images, columns=2), draw_grid(images, columns=2, labels=labels.split())
    line = (grid.height - bare.height) // max(1, sum(written))
    assert grid.height - bare.height == line * sum(written) and (line >= 12) == any(written)
    pixels, top = np.asarray(grid), 6
    for labelled in written:
        strip = pixels[top : top + labelled * line]
        assert (strip < 100).any() == labelled  # ink
        top += labelled * line
        assert (pixels[top : top + 64, 6:70] == 255).all()
        top += 70


def test_labels_of_no_class_and_of_many_digits_stay_in_their_cell():
    images = np.full((4, 64, 64, 1), 255, np.uint8)
    pixels = np.asarray(draw_grid(images, columns=4, labels=label_texts([10] * 4, 10)))
    ink = (pixels[:30] < 100).any(0)
    assert not any(ink[70 * column : 70 * column + 6].any() for column in range(5))


def test_routing_figure_is_labelled(tmp_path):
    config = DiTConfig(depth=2, width=32, heads=4, patch=2, side=8, channels=1, routers="first_on")
    steps = np.random.default_rng(0)
    routing = Routing(steps.random((5, 2, 4)), steps.random((5, 2, 4)), steps.random((5, 2, 16)))
    timesteps, seen = np.array([999, 749, 499, 250, 0]), np.zeros((5, 2))
    usage = TokenUsage(seen, seen, seen, 1)
    samples = Samples(
        np.zeros((1, 8, 8, 1)),
        timesteps,
        np.ones(5, int),
        routing,
        np.linspace(1e5, 2e5, 5),
        np.linspace(2e5, 3e5, 5),
        usage,
        seen,
    )
    figure = draw_routing(samples, config.macs)
    labels = " ".join(axis.get_ylabel() + axis.get_xlabel() + axis.get_title(loc="left") for axis in figure.axes)
    for word in ("Heads: ", "MLP groups: ", "Tokens: ", "MACs per image and pass", "timestep"):
        assert word in labels
    save_figure(tmp_path / "routing.png", figure)
    assert Image.open(tmp_path / "routing.png").size[0] > 800


def test_plan_figure_says_what_is_kept(tmp_path):
    config = DiTConfig(depth=2, width=32, heads=4, patch=2, side=8, channels=1, routers="first_on")
    gates = np.random.default_rng(0).random((6, 2, 4)) < 0.5
    plan = make_plan(gates, gates, config.macs, execution="switch", segments=3)
    figure = draw_plan(plan, np.arange(6)[::-1])
    assert "Heads: " in figure.axes[0].get_title(loc="left") and "% kept" in figure.axes[1].get_title(loc="left")
    save_figure(tmp_path / "plan.png", figure)
    assert Image.open(tmp_path / "plan.png").size[0] > 800


PHONE = 358  # points: a screen of 390 without its margins


def test_figures_are_as_wide_as_a_phone_and_their_text_is_read_there(tmp_path):
    figure = draw_macs({"a": [999, 0]}, {"a": [4.0e6, 2.0e6]}, {"a": 7.57e6})
    save_figure(tmp_path / "macs.png", figure)
    picture = Image.open(tmp_path / "macs.png")
    assert picture.width == round(WIDTH * DPI) >= 2 * PHONE
    axis = figure.axes[0]
    texts = [axis.xaxis.label, *axis.get_xticklabels(), *axis.get_yticklabels(), *figure.legends[0].get_texts()]
    assert min(text.get_fontsize() for text in texts) * PHONE / (72 * WIDTH) >= 8.5
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a: 3.0 M, 40 % of complete"]
    assert "2 M" in [label.get_text() for label in axis.get_yticklabels()]


def test_tokens_that_are_left_out_have_a_hue_on_white_black_and_grey():
    for shade in (0, 128, 255):
        image = np.full((4, 4, 1), shade, np.uint8)
        tinted = tint_closed(image, np.float32([1, 0, 0.5, 1])).astype(int)
        assert (tinted[:2, :2] == shade).all() and (tinted[2:, 2:] == shade).all()  # open: as it is
        red, _, blue = tinted[0, 3]
        assert red - blue > 100
        assert 0 < np.ptp(tinted[3, 0]) < np.ptp(tinted[0, 3])  # open in half of the passes: half the tint


def _seen_by(colour: str, matrix) -> np.ndarray:
    value = np.array([int(colour[place : place + 2], 16) for place in (1, 3, 5)]) / 255
    linear = np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)
    return np.asarray(matrix) @ linear


@pytest.mark.parametrize(
    "matrix",
    [  # Machado, Oliveira and Fernandes (2009), severity 1: protanopia, deuteranopia; and brightness alone
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
        [[0.2126, 0.7152, 0.0722]],
    ],
    ids=["protanopia", "deuteranopia", "grey"],
)
def test_meanings_are_told_apart_by_every_eye(matrix):
    seen = [_seen_by(colour, matrix) for colour in (CLOSED, KEPT, OPEN)]
    assert min(np.abs(a - b).max() for n, a in enumerate(seen) for b in seen[:n]) > 0.15
    assert np.abs(_seen_by(OPEN, matrix) - _seen_by(LEFT_OUT, matrix)).max() > 0.05
    assert len({dashes for _, dashes in LINES}) == len(LINES) == len({colour for colour, _ in LINES})


@pytest.mark.parametrize(
    "count, text",
    [
        (0, "0.0"),
        (999, "999.0"),
        (1000, "1.0 k"),
        (7_573_312, "7.6 M"),
        (999_960, "1.0 M"),
        (118_640_000_000, "118.6 G"),
        (2.5e12, "2.5 T"),
    ],
)
def test_counts_have_the_prefix_that_fits(count, text):
    assert format_count(count) == text
