"""Look into models: where their work goes. The command `dydit-analyze` in a clone."""

from dydit_jax.cli.analyze import main

if __name__ == "__main__":
    main()
