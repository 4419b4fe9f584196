"""Fine-tune DiT-XL/2 into a DyDiT at lambda 0.7 (https://arxiv.org/abs/2410.03456), ImageNet 256 x 256.

    python train.py --config configs/dydit_xl2_07.py --workdir gs://bucket/dydit_xl2_07

678 M parameters; 118.6 G MACs per image and pass complete, 84.3 G published for the result. The published recipe: AdamW
2.5e-5, batch 256, budget warm-up 5000 steps, batches of gradient norm 50 and more skipped, 150,000 steps with the
complete pass throughout. Published: FID 2.12 with guidance 1.5 and 250 DDPM steps (50,000 images, ADM's reference
batch). This project has not trained it. Here a batch is one optimiser step; the official first stage takes two.
"""

from dydit_jax.configs import dit_xl2


def get_config():
    config = dit_xl2.get_config()

    config.model.routers = "first_on"
    config.loss.budget = 0.7
    config.loss.budget_warmup_steps = 5000
    config.optimizer.learning_rate = 2.5e-5
    config.optimizer.clip_norm = 50.0
    config.optimizer.skip_norm = 50.0
    config.train.steps = 150_000
    config.train.init_from = "dit-xl2-256"  # fetched and converted once

    return config
