"""Fine-tune the Fashion-MNIST SiT into a DySiT at lambda 0.5: half the MACs (DyDiT++, https://arxiv.org/abs/2504.06803).

    python train.py --config configs/fashion_dysit.py --workdir runs/fashion_dysit

Starts from runs/fashion_sit (--config.train.init_from=...). Routers, budget and rates are those of fashion_dydit.
"""

from dydit_jax.configs import fashion_dydit, fashion_sit


def get_config():
    config = fashion_dydit.get_config()
    flow = fashion_sit.get_config()

    config.process = flow.process
    config.loss.terms = flow.loss.terms
    config.loss.weighting = flow.loss.weighting
    config.sampling = flow.sampling

    config.train.init_from = "runs/fashion_sit"

    return config
