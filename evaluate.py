"""Judge sets of images: FID, sFID, Inception score, precision and recall. The command `dydit-evaluate` in a clone."""

from dydit_jax.cli.evaluate import main

if __name__ == "__main__":
    main()
