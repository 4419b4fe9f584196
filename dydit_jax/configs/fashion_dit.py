"""A small static DiT on Fashion-MNIST, 28x28 in pixels: the start of fashion_dydit.

    python train.py --config configs/fashion_dit.py --workdir runs/fashion_dit

The pictures come from the folder data.path (`apt-get install dataset-fashion-mnist` puts them there). 49 tokens of 4x4
pixels, 1.9 M parameters, 62.5 M MACs per image and pass.
"""

from dydit_jax.configs import default


def get_config():
    config = default.get_config()

    config.model.update(depth=6, width=128, heads=8, patch=4, side=28, channels=1, classes=10)
    # With DiT's own 0.02 the labels are barely learnt in a run this short.
    config.model.label_init_std = 1.0
    config.model.time_init_std = 0.1

    # The linear schedule leaves nothing of pictures this small in most of its timesteps.
    config.diffusion.schedule = "squared_cosine"

    config.data.name = "idx"
    config.data.path = "/usr/share/datasets/fashion-mnist"
    # At equal seconds smaller batches learn more here: tried with 32 and 64.
    config.data.batch_size = 32
    config.data.flip = False

    config.loss.weighting = "min_snr"

    config.optimizer.learning_rate = 1e-3
    config.optimizer.decay = "cosine"
    config.optimizer.warmup_steps = 500
    config.optimizer.decay_steps = 20_000
    config.optimizer.clip_norm = 1.0

    config.train.steps = 20_000
    config.train.ema_decay = 0.999

    # Steps that end before t = 0: min-SNR hardly weighs the noise there, and what is not learnt would end as grain.
    config.sampling.update(sampler="ddpm", steps="trailing:30", clip=1.0, guidance=1.0)
    config.checkpoint.every_steps = 500

    return config
