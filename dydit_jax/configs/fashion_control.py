"""The control of fashion_dydit: the same static DiT, trained on for equally many steps, without routers.

    python train.py --config configs/fashion_control.py --workdir runs/fashion_control

Starts from runs/fashion_dit, like fashion_dydit. What dynamic models must be compared with: fine-tuning alone makes a
model better.
"""

from dydit_jax.configs import fashion_dydit


def get_config():
    config = fashion_dydit.get_config()
    config.model.routers = "none"
    return config
