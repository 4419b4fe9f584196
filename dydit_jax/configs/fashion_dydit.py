"""Fine-tune the Fashion-MNIST DiT into a DyDiT at lambda 0.5: half the MACs (DyDiT, https://arxiv.org/abs/2410.03456).

    python train.py --config configs/fashion_dydit.py --workdir runs/fashion_dydit

Starts from runs/fashion_dit (--config.train.init_from=...). Other costs by --config.loss.budget=0.3. As on the digits
the dynamic pass alone is trained, which halves the time of a step, and the routers learn at a rate of 1e-2. At lambda
0.5: 32.0 M MACs per image and pass.
"""

from dydit_jax.configs import fashion_dit


def get_config():
    config = fashion_dit.get_config()

    config.model.routers = "first_on"
    config.loss.budget = 0.5
    config.loss.complete_steps = 0
    config.loss.budget_hold_steps = 50
    config.loss.budget_warmup_steps = 500

    config.optimizer.learning_rate = 5e-4
    config.optimizer.router_multiplier = 20.0
    config.optimizer.warmup_steps = 100
    config.optimizer.decay_steps = 8000

    config.train.steps = 8000
    config.train.init_from = "runs/fashion_dit"

    return config
