"""SiT-XL/2 on ImageNet 256 x 256 (https://arxiv.org/abs/2401.08740): DiT-XL/2 trained as a flow.

    python train.py --config configs/sit_xl2.py --workdir gs://bucket/sit_xl2

675 M parameters, 118.6 G MACs per image and pass. The published recipe: velocities on the straight path, times uniform
in [0, 1], AdamW 1e-4 without decay, batch 256, EMA 0.9999, 7 M steps. Published (50,000 images, ADM's reference batch):
FID 2.06 with guidance 1.5 and 250 steps of Euler-Maruyama, 2.15 with an adaptive solver.
Here times are drawn from four quarters in turn, which are uniform together. This project has not trained it.
"""

from dydit_jax.configs import dit_xl2


def get_config():
    config = dit_xl2.get_config()

    config.process.name = "flow"
    config.loss.terms = ("mse", "budget")
    config.sampling.update(sampler="euler_maruyama", steps="250")

    return config
