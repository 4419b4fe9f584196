"""Fine-tune the digits DiT into a DyDiT at lambda 0.5 by routers and low-rank updates alone (docs/adapters.md).

    python train.py --config configs/digits_lora.py --workdir runs/digits_lora

Starts from runs/digits_dit (--config.train.init_from=...), whose weights stay as they are: a checkpoint holds the
routers and the updates. For updates that depend on the timestep: --config.lora.experts=4 --config.lora.rank=4
--config.lora.alpha=8.
"""

from dydit_jax.configs import digits_dydit


def get_config():
    config = digits_dydit.get_config()

    config.train.trainable = ("routers", "lora")
    config.lora.rank = 16
    config.lora.alpha = 32.0

    return config
