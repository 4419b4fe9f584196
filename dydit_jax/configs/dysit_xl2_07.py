"""Fine-tune SiT-XL/2 into a DySiT at lambda 0.7 (DyDiT++, https://arxiv.org/abs/2504.06803), ImageNet 256 x 256.

    python train.py --config configs/dysit_xl2_07.py --workdir gs://bucket/dysit_xl2_07

678 M parameters, 118.6 G MACs per image and pass complete. The paper's loss: the squared error of the velocity in the
dynamic and the complete pass, and the budget. It has released neither code nor weights for flows; rates, steps and
clipping are those of DyDiT at lambda 0.7 (dydit_xl2_07). The start is the published SiT-XL/2, FID 2.06 with guidance
1.5 and 250 steps of Euler-Maruyama. This project has not trained it, so no figure of its own can be stated.
"""

from dydit_jax.configs import dydit_xl2_07, sit_xl2


def get_config():
    return as_flow(dydit_xl2_07.get_config())


def as_flow(config):
    """Return the config of a DyDiT-XL/2 for a flow that starts from the published SiT-XL/2."""
    flow = sit_xl2.get_config()

    config.process = flow.process
    config.loss.terms = flow.loss.terms
    config.sampling = flow.sampling
    config.train.init_from = "sit-xl2-256"  # fetched and converted once

    return config
