"""Fine-tune the digits DiT into a DyDiT at lambda 0.5: half the MACs (DyDiT, https://arxiv.org/abs/2410.03456).

    python train.py --config configs/digits_dydit.py --workdir runs/digits_dydit

Starts from runs/digits_dit (--config.train.init_from=...). Two CPU cores: about 4 minutes. The routers learn ten times
faster than the rest: their biases start far from the threshold, and at one rate the token router never moves in a run
this short.
"""

from dydit_jax.configs import digits_dit


def get_config():
    config = digits_dit.get_config()

    config.model.routers = "first_on"
    config.loss.budget = 0.5
    config.loss.complete_steps = 0  # the dynamic pass alone: half the time of a step
    config.loss.budget_hold_steps = 50
    config.loss.budget_warmup_steps = 300

    config.optimizer.learning_rate = 1e-3
    config.optimizer.router_multiplier = 10.0
    config.optimizer.warmup_steps = 0
    config.optimizer.decay_steps = 2500

    config.train.steps = 2500
    config.train.init_from = "runs/digits_dit"

    return config
