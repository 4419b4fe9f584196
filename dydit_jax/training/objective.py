"""The objective of one training step: what is drawn at random, the passes of the network, the sum of their loss terms.

Random draws belong to the whole batch, however it is split afterwards.

Source: DyDiT, https://arxiv.org/abs/2410.03456, section 3.4, and its training code.
"""

import jax
import jax.numpy as jnp

from dydit_jax.diffusion.losses import drop_labels
from dydit_jax.diffusion.process import Process, perturb
from dydit_jax.diffusion.terms import LossConfig, LossInputs, budget_target, weigh_terms
from dydit_jax.models.config import DiTConfig
from dydit_jax.models.cost import routed_ratio
from dydit_jax.models.dit import Model


def passes_at(step: int, *, model: DiTConfig, loss: LossConfig) -> tuple[str, ...]:
    """Return the passes that are trained at a step: the static model has one, a DyDiT one or two."""
    if model.routers == "none":
        return ("complete",)
    both = loss.complete_steps < 0 or step < loss.complete_steps
    return ("gated", "complete") if both else ("gated",)


def draw_examples(batch, key, *, model: Model, loss: LossConfig, process: Process, passes: tuple[str, ...]) -> dict:
    """Draw all that is random in a step.

    Args:
      batch: {"image": [B,side,side,C], "label": [B]}.
      key: PRNG key of this step.
      model, loss, process, passes: as for `objective`.

    Returns:
      Arrays with the leading axis B, or None: "x0", "noise", "t", "labels" and "router_noise".
    """
    size = len(batch["label"])
    time_key, noise_key, label_key, router_key = jax.random.split(key, 4)
    dropout = dict(null_label=model.config.null_label, probability=loss.label_dropout)
    return dict(
        x0=batch["image"],
        noise=jax.random.normal(noise_key, batch["image"].shape, jnp.float32),
        t=process.draw_times(time_key, size, loss),
        labels=drop_labels(label_key, batch["label"], **dropout),
        router_noise=model.router_noise(router_key, size) if "gated" in passes else None,
    )


def objective(params, examples, step, *, model: Model, loss: LossConfig, process: Process, passes: tuple[str, ...]):
    """Return the loss of some examples, with its terms and the routing as metrics.

    Args:
      params: the parameter tree.
      examples: from `draw_examples`.
      step: number of this step, for the budget's ramp.
      model: the network.
      loss: terms and budget.
      process: that adds the noise.
      passes: "gated", "complete" or both; they share x_t, timesteps and labels.

    Returns:
      The scalar loss and a dict of scalar metrics: "loss/<pass>_<term>" for a term of each image, "loss/<term>" for one
      of the batch as a whole.
    """
    metrics, total = {}, 0.0
    for inputs in run_passes(params, examples, step, model=model, loss=loss, process=process, passes=passes):
        for name, value in weigh_terms(inputs).items():
            name = f"loss/{inputs.mode}_{name}" if value.ndim else f"loss/{name}"
            metrics[name] = metrics.get(name, 0.0) + value.mean()
            total += value.mean()
        if inputs.mode == "gated":
            metrics |= {f"routing/{name}": gates.mean() for name, gates in vars(inputs.routing).items()}
            metrics |= {"cost/ratio": inputs.ratio.mean(), "cost/target": budget_target(step, loss)}
    return total, metrics | {"loss/total": total}


def run_passes(
    params, examples, step, *, model: Model, loss: LossConfig, process: Process, passes: tuple[str, ...]
) -> list[LossInputs]:
    """Add noise to the images and run the network on them; arguments as for `objective`.

    Returns:
      What the terms of the loss look at, for each pass.
    """
    x0, noise, t, labels = (examples[name] for name in ("x0", "noise", "t", "labels"))
    xt, (alpha, sigma) = perturb(process, x0, noise, t), process.levels(t)
    if passes == ("gated", "complete") and not model.config.token_capacity:
        *outputs, routing = model.apply_both(params, xt, t, labels, noise=examples["router_noise"])
        results = zip(outputs, (routing, model.open_routing(len(labels))))
    else:
        noises = [examples["router_noise"] if mode == "gated" else None for mode in passes]
        results = [model.apply(params, xt, t, labels, mode=mode, noise=own) for mode, own in zip(passes, noises)]
    common = dict(x0=x0, noise=noise, xt=xt, target=process.target(x0, noise), alpha=alpha, sigma=sigma)
    common |= dict(labels=labels, coefficients=process.posterior(t), step=step, config=loss)
    macs = dict(attention=model.config.macs.attention, mlp=model.config.macs.mlp)
    return [
        LossInputs(mode=mode, output=output, routing=routing, ratio=routed_ratio(routing, **macs), **common)
        for mode, (output, routing) in zip(passes, results, strict=True)
    ]
