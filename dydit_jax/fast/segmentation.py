"""How many segments a job is worth: compiling takes long for one image, running for many.

Each narrowed segment is a program of its own. It takes seconds to compile, whatever is drawn, and what it saves grows
with the images. Without segments one program serves all steps: it computes everything and multiplies by the gates.

    seconds(n) = n programs, layer by layer, compiled + images * MACs of one image with n segments / MACs per second

The number with the least sum is chosen. It depends on the model, its gates over the schedule, the images of the whole
job and a platform's constants alone: not on the batch size, the devices, the cache, or what is drawn already.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from dydit_jax.models.cost import ModelMacs

OPEN_TOKENS = 0.85  # expected, before any were seen; of the digits model 0.84


@dataclasses.dataclass(frozen=True)
class Platform:
    """What compiling and running take, as `benchmarks/compile.py` measures them.

    Programs are compiled a core each, and a CPU runs them on all its cores: there, all seconds are those of one core.

    Attributes:
      whole_seconds: to compile a block of the program that leaves nothing out.
      narrowed_seconds: to compile a block of a narrowed program.
      macs_per_second: of the program that leaves nothing out.
      half_speed_width: width of a model whose narrowed programs run at half that speed. Packing moves D numbers of each
        token where products compute D^2, so that the wider a model is, the less of its speed it loses.
    """

    whole_seconds: float
    narrowed_seconds: float
    macs_per_second: float
    half_speed_width: float


PLATFORMS = {
    # Rounded from S/2 and the digits on a busy Intel Xeon of two cores, float32: `benchmarks/compile.py --constants`.
    "cpu": Platform(whole_seconds=0.3, narrowed_seconds=0.5, macs_per_second=4e10, half_speed_width=32),
    # Speeds estimated from docs/speed/xl2_h200.json, bfloat16. Seconds rounded from docs/speed/gpu_counts.json: of one
    # core of a busy Xeon, without choosing algorithms, for which a GPU is needed. They fit the H200's first calls.
    "gpu": Platform(whole_seconds=0.3, narrowed_seconds=0.4, macs_per_second=2.4e14, half_speed_width=450),
    # A guess, half of a v5e's peak; nothing was run on a TPU.
    "tpu": Platform(whole_seconds=0.3, narrowed_seconds=0.4, macs_per_second=5e13, half_speed_width=300),
}


@dataclasses.dataclass(frozen=True)
class Job:
    """What is to be drawn, as far as a plan depends on it.

    Attributes:
      images: of the whole job.
      platform: a key of `PLATFORMS`.
      width: of the model.
      token_share: of the tokens that have a row in an MLP, mean over the layers; less than 1 for top-k models.
    """

    images: int
    platform: str
    width: int
    token_share: float = 1.0


def expected_macs(macs: ModelMacs, job: Job) -> ModelMacs:
    """Return the counts of narrowed programs, whose MLPs pack their open tokens.

    How many are open depends on images that are not there yet: `OPEN_TOKENS`, or as few as have a row.

    Args:
      macs: the model's counts.
      job: whose images are drawn.
    """
    share = min(job.token_share, OPEN_TOKENS) if macs.token_router else job.token_share
    return dataclasses.replace(macs, mlp=share * macs.mlp)


def choose_segments(macs: Sequence[float], programs: Sequence[int], *, layers: int, job: Job) -> int:
    """Return the number of segments that is there soonest; of equals the smallest.

    More images never get fewer segments.

    Args:
      macs: of one image's run, with 0 segments, 1, 2 and so on; infinite where the schedule can't be cut so.
      programs: how many there are to compile, likewise.
      layers: of the model.
      job: whose images are drawn.
    """
    platform = PLATFORMS[job.platform]
    narrowed = np.arange(len(macs)) > 0
    of_block = np.where(narrowed, platform.narrowed_seconds, platform.whole_seconds)
    slower = 1 + platform.half_speed_width / job.width
    speed = platform.macs_per_second / np.where(narrowed, slower, 1.0)
    return int(np.argmin(layers * of_block * np.asarray(programs) + job.images * np.asarray(macs) / speed))
