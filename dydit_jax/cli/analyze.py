"""Look into models: which timesteps and patches are hard, and what a dynamic model leaves out of them.

    dydit-analyze --checkpoints digits --out out/analysis --report
    dydit-analyze --checkpoints runs/small,runs/large,runs/dydit --out out/compared --data=latents --data_path=in256

The first model is what the others are compared with. Every picture is a .png and an .svg, with its numbers as .csv.
"""

from absl import flags

from dydit_jax.cli.flags import define_flags, read_flags
from dydit_jax.jobs.analyze import Analysis, analyze
from dydit_jax.runtime.console import run


def main():
    """Run the command."""
    values = flags.FlagValues()
    required = define_flags(Analysis, values)
    run(lambda: analyze(read_flags(Analysis, values)), values, about=__doc__, required=required)
