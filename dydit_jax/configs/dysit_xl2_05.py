"""Fine-tune SiT-XL/2 into a DySiT at lambda 0.5 (DyDiT++, https://arxiv.org/abs/2504.06803), both stages.

    python train.py --config configs/dysit_xl2_05.py --workdir gs://bucket/dysit_xl2_05

678 M parameters, 118.6 G MACs per image and pass complete; half of the blocks' for the result. The paper's loss: the
squared error of the velocity in the dynamic and, for the first 30,000 steps, the complete pass, and the budget. It has
released neither code nor weights for flows; rates, steps and clipping are those of DyDiT at lambda 0.5 (dydit_xl2_05).
The start is the published SiT-XL/2, FID 2.06 with guidance 1.5 and 250 steps of Euler-Maruyama. This project has not
trained it, so no figure of its own can be stated.
"""

from dydit_jax.configs import dydit_xl2_05, dysit_xl2_07


def get_config():
    return dysit_xl2_07.as_flow(dydit_xl2_05.get_config())
