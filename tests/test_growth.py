"""Growing images are those that a job draws, and their pictures show which tokens were open."""

import types

import numpy as np
import pytest
from conftest import relative_error
from PIL import Image

from dydit_jax.diffusion.process import Diffusion
from dydit_jax.diffusion.samplers import SamplingConfig
from dydit_jax.drawing.growth import draw_frames, draw_strip, save_animation
from dydit_jax.jobs import growth
from dydit_jax.sampling.generate import SamplingRun
from dydit_jax.sampling.noise import first_noise, image_keys
from dydit_jax.sampling.trajectory import Trajectory, trace

GUIDED = dict(guidance=2.0, guidance_interval=(400, 600), guided_channels="all")  # at one step of three


@pytest.mark.parametrize(
    "settings, evaluations",
    [
        (dict(sampler="ddim", steps="2"), [1, 1]),
        pytest.param(dict(sampler="ddpm", steps="3", **GUIDED), [1, 2, 1], marks=pytest.mark.slow),
    ],
)
def test_trajectory_is_the_way_of_the_images_that_are_drawn(tiny, settings, evaluations):
    run = SamplingRun(*tiny, sampling=SamplingConfig(**settings), process=Diffusion())
    drawn, counted = run.draw([3, 7], seed=5, mode="gated"), []
    way = trace(run, [3, 7], seed=5, report=counted.append)
    assert counted == [1] * len(evaluations) and run.evaluations.tolist() == evaluations
    assert relative_error(way.images, drawn.images) < 1e-5
    np.testing.assert_array_equal(way.timesteps, drawn.timesteps)
    np.testing.assert_array_equal(way.xt[0], first_noise(image_keys(5, np.arange(2)), way.images.shape[1:]))
    assert relative_error(way.x0[-1], drawn.images) < 1e-5  # both end with the estimate of the last step
    assert set(np.unique(way.tokens)) == {0, 1} and way.tokens.shape == (len(evaluations), 2, 2, 16)
    unguided = np.equal(evaluations, 1)  # the record of a guided step is of both passes
    np.testing.assert_allclose(way.tokens.mean(1)[unguided], drawn.routing.tokens[unguided], atol=1e-6)


@pytest.fixture
def grown() -> tuple:
    """Return seen and taken-for pictures [3,6,8,8,1] that get brighter, tokens [3,6,4] and timesteps."""
    seen = np.broadcast_to(np.array([0, 100, 200], np.uint8)[:, None, None, None, None], (3, 6, 8, 8, 1))
    tokens = np.ones((3, 6, 4))
    tokens[0, :, 0], tokens[1, :, 0] = 0, 0.75
    return seen, seen, tokens, np.array([999, 500, 0])


def test_frames_show_pictures_and_tint_what_skips(grown):
    frames = draw_frames(*grown)
    assert len(frames) == 3 and len({frame.size for frame in frames}) == 1
    width, height = frames[0].size
    assert 390 <= width <= 800
    pixels = np.asarray(frames[1])
    colours = {tuple(colour) for colour in pixels.reshape(-1, 3)}
    # Half of the tint of the first token: 0.5 * 100 + 0.5 * (0.3 * 100 + 0.7 * (213, 94, 0)).
    assert (100, 100, 100) in colours and (140, 98, 65) in colours
    assert (149, 66, 0) in {tuple(colour) for colour in np.asarray(frames[0]).reshape(-1, 3)}
    last = np.asarray(frames[2])
    assert not (np.ptp(last[60:].astype(int), axis=-1) > 40).any()  # no token skips: no colour but the paper's


def test_animation_rests_on_its_last_frame(grown, tmp_path):
    save_animation(tmp_path / "growth.gif", draw_frames(*grown))
    with Image.open(tmp_path / "growth.gif") as picture:
        assert picture.n_frames == 3 and picture.info["loop"] == 0
        durations = []
        for frame in range(3):
            picture.seek(frame)
            durations.append(picture.info["duration"])
    assert durations == [250, 250, 2500] and [path.name for path in tmp_path.iterdir()] == ["growth.gif"]


def test_strip_says_how_many_tokens_pass(grown):
    _, taken_for, tokens, timesteps = grown
    figure = draw_strip(taken_for, tokens, timesteps)
    assert figure.get_suptitle() == "75 % of the tokens pass an MLP in noise, 100 % at the image"
    assert len(figure.axes) == 4 * 3 and figure.axes[1].get_xlabel() == "94 %"
    assert [axis.get_title() for axis in figure.axes[:3]] == ["t = 999", "t = 500", "t = 0"]
    static = draw_strip(taken_for, np.ones_like(tokens), timesteps)
    assert static.get_suptitle() == "Every token passes every MLP, from noise to image"


def test_strip_is_spread_over_the_frames_of_any_number_of_steps():
    for steps in range(1, 1001):
        shown, strip = growth.frame_steps(steps)
        chosen = shown[strip].tolist()
        assert len(shown) == min(50, steps) and len(chosen) == min(6, steps)
        assert chosen == sorted(set(chosen)) and (chosen[0], chosen[-1]) == (0, steps - 1)


def test_growth_of_many_steps_is_drawn_from_the_steps_that_it_names(tmp_path, monkeypatch):
    steps = 250
    images = np.broadcast_to(np.linspace(-1, 1, steps)[:, None, None, None, None], (steps, 1, 4, 4, 1))
    tokens = np.broadcast_to((np.arange(steps) >= 100)[:, None, None, None], (steps, 1, 2, 4))
    way = Trajectory(np.arange(steps)[::-1], images, images, tokens, images[-1])
    monkeypatch.setattr(growth, "trace", lambda *_, **__: way)
    drawn = []
    monkeypatch.setattr(growth, "draw_strip", lambda *given: (drawn.append(given), draw_strip(*given))[1])
    run, weights = types.SimpleNamespace(table=range(steps)), types.SimpleNamespace(sampling=None)
    pipeline = types.SimpleNamespace(weights=weights, prepare=lambda _: run, decode=lambda images, _: images)
    growth.draw_growth(pipeline, np.array([3]), tmp_path, seed=0, mode="fast")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["growth.gif", "growth.png"]
    [(taken_for, tokens, timesteps)] = drawn
    assert timesteps[0] == 249 and timesteps[-1] == 0 and len(timesteps) == 6
    np.testing.assert_allclose(taken_for[:, 0, 0, 0, 0], 255 * (1 - timesteps / 249), atol=1)
    np.testing.assert_array_equal(tokens[:, 0, 0], timesteps < 150)
