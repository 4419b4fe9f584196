"""Draw images from a checkpoint.

    dydit-sample --checkpoint digits --labels 0,1,2 --out out/grid
    dydit-sample --checkpoint runs/digits_dydit --num_images 1000 --out out/thousand --sampling.guidance=2.0

A grid needs --labels, a set of images --num_images (labels drawn uniformly) or --labels_file. The checkpoint brings its
own sampling settings; --sampling.* override them. Images depend on the seed and their index alone.
"""

from absl import flags

from dydit_jax.cli.flags import define_flags, define_overrides, read_flags, read_overrides
from dydit_jax.diffusion.samplers import SamplingConfig
from dydit_jax.jobs.sample import Request, sample
from dydit_jax.runtime.console import run
from dydit_jax.sampling.settings import Preset


def main():
    """Run the command."""
    values = flags.FlagValues()
    required = define_flags(Request, values)
    for cls in (Preset, SamplingConfig):
        define_overrides(cls, "sampling", values)

    def draw():
        overrides = [read_overrides(cls, "sampling", values) for cls in (Preset, SamplingConfig)]
        sample(read_flags(Request, values, overrides=overrides[0] | overrides[1]))

    run(draw, values, about=__doc__, required=required)
