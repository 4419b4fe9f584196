"""The objective of one training step: what is drawn at random, the passes of the network, the sum of their loss terms.

Random draws belong to the whole batch, however it is split afterwards.

Source: DyDiT, https://arxiv.org/abs/2410.03456, section 3.4, and its training code.
"""

import functools

import jax
import jax.numpy as jnp

from dydit_jax.diffusion.losses import drop_labels
from dydit_jax.diffusion.process import Process, perturb
from dydit_jax.diffusion.terms import LossConfig, LossInputs, budget_target, weigh_terms
from dydit_jax.models.config import DiTConfig
from dydit_jax.models.cost import routed_ratio
from dydit_jax.models.dit import Model

BETA_KEY = 1  # folded into the key of a step: what else is drawn stays as it is without guidance in one pass


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
      Arrays with the leading axis B, or None: "x0", "noise", "t", "labels", "router_noise" and "beta".
    """
    size = len(batch["label"])
    time_key, noise_key, label_key, router_key = jax.random.split(key, 4)
    # A model without classes has "no class" alone.
    probability = loss.label_dropout if model.config.classes else 1.0
    dropout = dict(null_label=model.config.null_label, probability=probability)
    labels = drop_labels(label_key, batch["label"], **dropout)
    return dict(
        x0=batch["image"],
        noise=jax.random.normal(noise_key, batch["image"].shape, jnp.float32),
        t=process.draw_times(time_key, size, loss),
        labels=labels,
        router_noise=model.router_noise(router_key, size) if "gated" in passes else None,
        beta=_draw_beta(key, labels, model.config) if loss.guidance_free else None,
    )


def _draw_beta(key, labels, config: DiTConfig):
    """Draw beta of each image, uniform from 0 to 1; 1 where the label was dropped."""
    beta = jax.random.uniform(jax.random.fold_in(key, BETA_KEY), labels.shape)
    return jnp.where(labels == config.null_label, 1.0, beta)


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

    With guidance in one pass, the prediction that the terms see is beta times the network's, plus 1 - beta times its
    prediction without a class, which has no gradient (https://arxiv.org/abs/2501.15420). Where that mixture is right,
    the network's own prediction is the guided one, of the scale 1 / beta.

    Returns:
      What the terms of the loss look at, for each pass.
    """
    x0, noise, t, labels = (examples[name] for name in ("x0", "noise", "t", "labels"))
    xt, (alpha, sigma) = perturb(process, x0, noise, t), process.levels(t)
    run = functools.partial(_run_network, model=model, passes=passes, noise=examples["router_noise"])
    results = run(params, xt, t, labels, beta=examples["beta"])
    if loss.guidance_free:
        # The same noise in the routers: the gates of heads and groups are the same.
        no_class = jnp.full_like(labels, model.config.null_label)
        unconditional = run(jax.lax.stop_gradient(params), xt, t, no_class)
        results = [
            (mix_guided(output, other, examples["beta"], channels=x0.shape[-1]), routing)
            for (output, routing), (other, _) in zip(results, unconditional)
        ]
    common = dict(x0=x0, noise=noise, xt=xt, target=process.target(x0, noise), alpha=alpha, sigma=sigma)
    common |= dict(labels=labels, coefficients=process.posterior(t), step=step, config=loss)
    macs = dict(attention=model.config.macs.attention, mlp=model.config.macs.mlp)
    return [
        LossInputs(mode=mode, output=output, routing=routing, ratio=routed_ratio(routing, **macs), **common)
        for mode, (output, routing) in zip(passes, results, strict=True)
    ]


def _run_network(params, xt, t, labels, *, model: Model, passes: tuple[str, ...], noise, beta=None) -> list[tuple]:
    """Return (prediction, `Routing`) of each pass."""
    if passes == ("gated", "complete") and not model.config.token_capacity:
        *outputs, routing = model.apply_both(params, xt, t, labels, noise=noise, beta=beta)
        return list(zip(outputs, (routing, model.open_routing(len(labels)))))
    noises = [noise if mode == "gated" else None for mode in passes]
    return [model.apply(params, xt, t, labels, mode=mode, noise=own, beta=beta) for mode, own in zip(passes, noises)]


def mix_guided(output, unconditional, beta, *, channels: int):
    """Return beta * output + (1 - beta) * unconditional in the channels that are predicted, the output in the others.

    Args:
      output, unconditional: [B,side,side,2C]; the second has no gradient.
      beta: [B].
      channels: C.
    """
    beta, fixed = beta[:, None, None, None], jax.lax.stop_gradient(unconditional[..., :channels])
    mixed = beta * output[..., :channels] + (1 - beta) * fixed
    return jnp.concatenate([mixed, output[..., channels:]], axis=-1)
