"""Fine-tune the digits SiT into a DySiT at lambda 0.5: half the MACs (DyDiT++, https://arxiv.org/abs/2504.06803).

    python train.py --config configs/digits_dysit.py --workdir runs/digits_dysit

Starts from runs/digits_sit (--config.train.init_from=...). Two CPU cores: about 4 minutes. Routers, budget and rates
are those of digits_dydit.
"""

from dydit_jax.configs import digits_dydit, digits_sit


def get_config():
    config = digits_dydit.get_config()
    flow = digits_sit.get_config()

    config.process = flow.process
    config.loss.terms = flow.loss.terms
    config.sampling = flow.sampling

    config.train.init_from = "runs/digits_sit"

    return config
