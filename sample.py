"""Draw images from a checkpoint. The command `dydit-sample` in a clone."""

from dydit_jax.cli.sample import main

if __name__ == "__main__":
    main()
