"""Fine-tune DiT-XL/2 into a DyDiT at lambda 0.5 (https://arxiv.org/abs/2410.03456), ImageNet 256 x 256, both stages.

    python train.py --config configs/dydit_xl2_05.py --workdir gs://bucket/dydit_xl2_05

678 M parameters; 118.6 G MACs per image and pass complete, 57.9 G published for the result. The published recipe:
AdamW 1e-4, batch 256, budget warm-up 1000 steps, batches of gradient norm 200 and more skipped; 30,000 steps with the
complete pass beside the dynamic one, then without it up to 200,000. Published: FID 2.07 with guidance 1.5 and 250 DDPM
steps (50,000 images, ADM's reference batch). This project has not trained it. Here a batch is one optimiser step; the
official first stage takes two.
"""

from dydit_jax.configs import dydit_xl2_07


def get_config():
    config = dydit_xl2_07.get_config()

    config.loss.budget = 0.5
    config.loss.budget_warmup_steps = 1000
    config.loss.complete_steps = 30_000
    config.optimizer.learning_rate = 1e-4
    config.optimizer.clip_norm = 200.0
    config.optimizer.skip_norm = 200.0
    config.train.steps = 200_000

    return config
