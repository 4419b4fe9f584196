"""Grids hold the images where they belong; figures have their axes and units."""

import numpy as np
import pytest
from PIL import Image

from dydit_jax.drawing.figures import draw_plan, draw_routing, save_figure
from dydit_jax.drawing.pictures import draw_grid, save_image, to_uint8
from dydit_jax.errors import InputError, StopError
from dydit_jax.fast.plan import make_plan
from dydit_jax.fast.usage import TokenUsage
from dydit_jax.models.config import DiTConfig
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


def test_grid_places_images_row_by_row(tmp_path):
    images = np.arange(6, dtype=np.uint8).reshape(6, 1, 1, 1).repeat(16, 1).repeat(16, 2) * 40
    grid = draw_grid(images, columns=3)
    assert grid.size == (3 * 33 + 1, 2 * 33 + 1)
    pixels = np.asarray(grid)
    assert [[pixels[16 + 33 * row, 16 + 33 * column] for column in range(3)] for row in range(2)] == [
        [0, 40, 80],
        [120, 160, 200],
    ]
    save_image(tmp_path / "grid.png", grid)
    assert Image.open(tmp_path / "grid.png").size == grid.size


def test_grid_keeps_colours_and_leaves_large_images_alone():
    images = np.zeros((2, 64, 64, 3), np.uint8)
    images[1, ..., 0] = 255
    pixels = np.asarray(draw_grid(images, columns=2))
    assert pixels.shape == (66, 131, 3) and pixels[32, 100].tolist() == [255, 0, 0]


def test_routing_figure_is_labelled(tmp_path):
    config = DiTConfig(depth=2, width=32, heads=4, patch=2, side=8, channels=1, routers="first_on")
    steps = np.random.default_rng(0)
    routing = Routing(steps.random((5, 2, 4)), steps.random((5, 2, 4)), steps.random((5, 2, 16)))
    timesteps, seen = np.array([999, 749, 499, 250, 0]), np.zeros((5, 2))
    usage = TokenUsage(seen, seen, seen, 1)
    samples = Samples(
        np.zeros((1, 8, 8, 1)), timesteps, routing, np.linspace(1e5, 2e5, 5), np.linspace(2e5, 3e5, 5), usage, seen
    )
    figure = draw_routing(samples, config.macs)
    labels = " ".join(axis.get_ylabel() + axis.get_xlabel() + axis.get_title(loc="left") for axis in figure.axes)
    for word in ("heads", "groups", "tokens", "GMACs per pass", "timestep"):
        assert word in labels
    save_figure(tmp_path / "routing.png", figure)
    assert Image.open(tmp_path / "routing.png").size[0] > 800


def test_plan_figure_says_what_is_kept(tmp_path):
    config = DiTConfig(depth=2, width=32, heads=4, patch=2, side=8, channels=1, routers="first_on")
    gates = np.random.default_rng(0).random((6, 2, 4)) < 0.5
    plan = make_plan(gates, gates, config.macs, execution="switch", segments=3)
    figure = draw_plan(plan, np.arange(6)[::-1])
    assert "heads: " in figure.axes[0].get_title(loc="left") and "% kept" in figure.axes[1].get_title(loc="left")
    save_figure(tmp_path / "plan.png", figure)
    assert Image.open(tmp_path / "plan.png").size[0] > 800
