"""Search a solver with few evaluations for one model. The command `dydit-search-solver` in a clone."""

from dydit_jax.cli.search_solver import main

if __name__ == "__main__":
    main()
