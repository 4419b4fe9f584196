"""A static DiT of half the MACs of the Fashion-MNIST model: shallower.

    python train.py --config configs/fashion_shallow.py --workdir runs/fashion_shallow

One of two other ways to half the cost (fashion_narrow is the other): what a dynamic model has to beat. Trained from
nothing for as many steps as the model and its DyDiT together. 31.4 M MACs per image and pass.
"""

from dydit_jax.configs import fashion_dit, fashion_dydit


def get_config():
    config = fashion_dit.get_config()
    config.model.depth = 3
    config.train.steps += fashion_dydit.get_config().train.steps
    config.optimizer.decay_steps = config.train.steps
    return config
