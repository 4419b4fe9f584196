"""Fine-tune the digits DiT so that one pass of the network gives the guided prediction (docs/guidance.md).

    python train.py --config configs/digits_gft.py --workdir runs/digits_gft
    python sample.py --checkpoint runs/digits_gft --labels 0,1,2 --out out/gft --sampling.guidance=2

Starts from runs/digits_dit. From a DyDiT: --config.train.init_from=runs/digits_dydit --config.model.routers=first_on.
"""

from dydit_jax.configs import digits_dit


def get_config():
    config = digits_dit.get_config()

    config.model.guidance_free = True
    config.loss.guidance_free = True
    config.loss.budget = 0.5  # of a DyDiT, which has learnt it already
    config.loss.complete_steps = 0
    config.loss.budget_hold_steps = 0
    config.loss.budget_warmup_steps = 1

    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_steps = 0
    config.optimizer.decay_steps = 2500

    config.train.steps = 2500
    config.train.init_from = "runs/digits_dit"

    config.sampling.guidance = 2.0

    return config
