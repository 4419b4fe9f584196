"""Fine-tune DiT-XL/2 into a DyDiT on your pictures: a folder with one sub-folder per class, its name the class's.

    python train.py --config configs/finetune.py --workdir runs/flowers --config.data.path=flowers
    python sample.py --checkpoint runs/flowers --labels "tulip,water lily" --out out/flowers

The pictures go through the autoencoder once, into runs/flowers.latents; what is trained starts from dit-xl2-256, which
is fetched and converted once. The label table's rows are new, or those of ImageNet classes that are alike
(--config.train.class_map="tulip:985"). Half the MACs of the DiT, 57.9 G per image and pass. What to set for which
machine: docs/finetune.md. This project has not run it.
"""

from dydit_jax.configs import dydit_xl2_05


def get_config():
    config = dydit_xl2_05.get_config()

    config.model.classes = -1  # the number of folders
    config.data.name = "images"
    config.data.batch_size = 32
    config.data.max_bad = 10

    config.loss.complete_steps = 2000
    config.optimizer.router_multiplier = 10.0  # as on the digits: in a run this short the routers move too little else
    config.optimizer.warmup_steps = 500

    config.train.steps = 20_000
    config.train.ema_decay = 0.9995
    config.train.remat = "block"

    config.checkpoint.every_steps = 1000

    return config
