"""Turn PyTorch weights into ours, and back. The command `dydit-convert` in a clone."""

from dydit_jax.cli.convert import main

if __name__ == "__main__":
    main()
