"""Send pictures through the autoencoder once, for training. The command `dydit-prepare-latents` in a clone."""

from dydit_jax.cli.prepare_latents import main

if __name__ == "__main__":
    main()
