"""The control of digits_dydit: the same static DiT, trained on for equally many steps, without routers.

    python train.py --config configs/digits_control.py --workdir runs/digits_control

What the dynamic model must be compared with: fine-tuning alone makes a model better.
"""

from dydit_jax.configs import digits_dydit


def get_config():
    config = digits_dydit.get_config()
    config.model.routers = "none"
    return config
