"""A small static DiT on scikit-learn's 8x8 digits, in pixels: the start of digits_dydit.

    python train.py --config configs/digits_dit.py --workdir runs/digits_dit

0.72 M parameters, 7.6 M MACs per image and pass. Two CPU cores: about 4 minutes. What to expect of its samples stands
in docs/digits.md.
"""

from dydit_jax.configs import default


def get_config():
    config = default.get_config()

    config.model.update(depth=4, width=96, heads=6, patch=2, side=8, channels=1, classes=10)
    # With DiT's own 0.02 the labels are barely learnt in a run this short.
    config.model.label_init_std = 1.0
    config.model.time_init_std = 0.1

    config.data.name = "digits"
    config.data.batch_size = 64

    config.optimizer.learning_rate = 2e-3
    config.optimizer.decay = "cosine"
    config.optimizer.warmup_steps = 100
    config.optimizer.decay_steps = 3000
    config.optimizer.clip_norm = 1.0

    config.train.steps = 3000
    config.train.ema_decay = 0.995

    config.sampling.update(sampler="ddim", steps="50", clip=1.0, guidance=1.0)
    config.checkpoint.every_steps = 1000

    return config
