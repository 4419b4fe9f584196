"""The growing images of a job: its first ones, drawn a second time step by step.

<out>/growth.gif    what the network saw and what it took the images for, with the tokens that were open
<out>/growth.png    a strip of a few of these steps
"""

import numpy as np

from dydit_jax.drawing.growth import draw_frames, draw_strip, save_animation
from dydit_jax.drawing.pictures import to_uint8
from dydit_jax.drawing.style import save_figure, spread_indices
from dydit_jax.pipeline import Pipeline
from dydit_jax.runtime.processes import is_main
from dydit_jax.runtime.progress import Progress
from dydit_jax.sampling.trajectory import trace

MOST_FRAMES, STRIP_FRAMES = 50, 6


def draw_growth(pipeline: Pipeline, labels: np.ndarray, out, *, seed: int, mode: str) -> None:
    """Draw the first images of a job once more and show how they grow; all processes call this together.

    Args:
      pipeline: the model, sampled by its own settings.
      labels: of the images [B], which have the indices 0 .. B - 1.
      out: folder for the files.
      seed: of the job.
      mode: of the job; "fast" takes the gates of "gated", which are the same.
    """
    sampling = pipeline.weights.sampling
    run = pipeline.prepare(sampling)
    with Progress(len(run.table), "step", "growing images", delay=0) as progress:
        mode = "complete" if mode == "complete" else "gated"
        way = trace(run, labels, seed=seed, mode=mode, report=progress.advance)
    shown, strip = frame_steps(len(way.timesteps))
    pixels = lambda images: to_uint8(pipeline.decode(images, sampling))
    seen, taken_for = (np.stack([pixels(images[step]) for step in shown]) for images in (way.xt, way.x0))
    if not is_main():
        return
    tokens, timesteps = way.tokens.mean(2)[shown], way.timesteps[shown]
    save_animation(out / "growth.gif", draw_frames(seen, taken_for, tokens, timesteps))
    save_figure(out / "growth.png", draw_strip(taken_for[strip], tokens[strip], timesteps[strip]))


def frame_steps(steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Return which of the steps are frames of the animation, and which of these frames are in the strip."""
    shown = spread_indices(steps, MOST_FRAMES)
    return shown, spread_indices(len(shown), STRIP_FRAMES)
