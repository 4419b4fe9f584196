"""Fine-tune the digits DiT into a DyDiT at lambda 0.5."""

from configs import digits_dit


def get_config():
    config = digits_dit.get_config()

    config.model.routers = "first_on"
    config.loss.budget = 0.5
    config.loss.budget_hold_steps = 50
    config.loss.budget_warmup_steps = 300
    config.loss.complete_steps = 0

    config.optimizer.learning_rate = 1e-3
    config.optimizer.router_multiplier = 10.0
    config.optimizer.warmup_steps = 0
    config.optimizer.decay_steps = 1500

    config.train.steps = 1500
    config.train.init_from = "runs/digits_dit"

    return config
