"""Make one dataset from class folders or tars. The command `dydit-prepare-images` in a clone."""

from dydit_jax.cli.prepare_images import main

if __name__ == "__main__":
    main()
