"""A small static SiT on Fashion-MNIST: fashion_dit as a flow, and the start of fashion_dysit.

    python train.py --config configs/fashion_sit.py --workdir runs/fashion_sit

The network, the data and the optimiser are those of fashion_dit; the loss is the squared error of the velocity (SiT,
https://arxiv.org/abs/2401.08740).
"""

from dydit_jax.configs import fashion_dit


def get_config():
    config = fashion_dit.get_config()

    config.process.name = "flow"
    config.loss.terms = ("mse", "budget")
    config.loss.weighting = "none"

    # 30 evaluations of the network, like fashion_dit. The last is at the image itself: nothing to clip.
    config.sampling.update(sampler="unipc", steps="30", clip=None, guidance=1.0)

    return config
