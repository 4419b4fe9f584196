"""A static DiT of half the digits model's size and MACs, trained for as many steps as it and its DyDiT together.

    python train.py --config configs/digits_half.py --workdir runs/digits_half

The other way to half the cost: what a dynamic model has to beat.
"""

from dydit_jax.configs import digits_dit


def get_config():
    config = digits_dit.get_config()
    config.model.update(width=68, heads=4)
    config.train.steps = 5500
    config.optimizer.decay_steps = 5500
    return config
