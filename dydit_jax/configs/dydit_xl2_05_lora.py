"""Fine-tune DiT-XL/2 into a DyDiT at lambda 0.5 by routers and low-rank updates alone (docs/adapters.md).

    python train.py --config configs/dydit_xl2_05_lora.py --workdir runs/dydit_xl2_05_lora

The published DiT-XL/2 stays as it is. Trained are updates of rank 16 of attention and MLP, the routers and the table of
labels: 2 % of the numbers, see docs/adapters.md for memory. This project has not trained it.
"""

from dydit_jax.configs import dydit_xl2_05


def get_config():
    config = dydit_xl2_05.get_config()

    config.train.trainable = ("routers", "labels", "lora")

    return config
