"""DiT-XL/2 on ImageNet 256 x 256 (https://arxiv.org/abs/2212.09748): the static model.

    python train.py --config configs/dit_xl2.py --workdir gs://bucket/dit_xl2

675 M parameters, 118.6 G MACs per image and pass. The published recipe: AdamW 1e-4, batch 256, EMA 0.9999, 7 M steps.
Published: FID 2.27 with guidance 1.5 and 250 DDPM steps (50,000 images, ADM's reference batch). This project has not
trained it.
"""

from dydit_jax.configs import default


def get_config():
    config = default.get_config()

    config.model.size = "XL/2"
    config.model.side = 32
    config.data.name = "latents"  # --config.data.path=...: moments of sd-vae-ft-ema, packed; see data/sources.py
    config.data.batch_size = 256
    config.optimizer.learning_rate = 1e-4
    config.train.steps = 7_000_000
    config.train.remat = "dots"
    config.mesh.update(data=1, fsdp=-1)  # state and moments split over all devices: 16 GiB of a small chip suffice
    config.sampling.autoencoder = "sd-vae-ft-ema"

    return config
