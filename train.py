"""Train a DiT or fine-tune it into a DyDiT. The command `dydit-train` in a clone."""

from dydit_jax.cli.train import main

if __name__ == "__main__":
    main()
