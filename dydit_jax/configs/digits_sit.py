"""A small static SiT on scikit-learn's 8x8 digits, in pixels: digits_dit as a flow, and the start of digits_dysit.

    python train.py --config configs/digits_sit.py --workdir runs/digits_sit

The network, the data and the optimiser are those of digits_dit; the loss is the squared error of the velocity (SiT,
https://arxiv.org/abs/2401.08740). 0.72 M parameters, 7.6 M MACs per image and pass. Two CPU cores: about 4 minutes.
"""

from dydit_jax.configs import digits_dit


def get_config():
    config = digits_dit.get_config()

    config.process.name = "flow"
    config.loss.terms = ("mse", "budget")

    # 50 evaluations of the network, like digits_dit. Heun's last one is at the image itself, where there is
    # nothing to clip.
    config.sampling.update(sampler="heun", steps="25", clip=None, guidance=1.0)

    return config
