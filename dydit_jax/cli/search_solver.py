"""Search a solver for one model: timesteps and weights for a few evaluations of the network, fitted to many.

    dydit-search-solver --checkpoint digits --out out/solver --evaluations 10
    dydit-sample --checkpoint digits --labels 0,1,2 --out out/few --sampling.sampler=out/solver/solver.json

It compares with images that the same model draws in a thousand steps from the same noise. The command goes on where it
was stopped.
"""

from absl import flags

from dydit_jax.cli.flags import define_flags, define_overrides, read_flags, read_overrides
from dydit_jax.diffusion.samplers import SamplingConfig
from dydit_jax.jobs.search_solver import SearchRequest, search_solver
from dydit_jax.runtime.console import run


def main():
    """Run the command."""
    values = flags.FlagValues()
    required = define_flags(SearchRequest, values)
    define_overrides(SamplingConfig, "sampling", values)

    def find():
        search_solver(read_flags(SearchRequest, values, overrides=read_overrides(SamplingConfig, "sampling", values)))

    run(find, values, about=__doc__, required=required)
