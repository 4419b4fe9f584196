"""Sampling against a loop that is written here: its own schedule in float64, its own formulas, the same keys.

The network is the package's (held to the original elsewhere); what it is given, what is drawn, what is made of its
output and which gates it ran with are not.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import make_run

from dydit_jax.diffusion.samplers import SamplingConfig

TRAIN_STEPS, SEED, LABELS = 1000, 3, [1, 2]


def kept_timesteps(steps: str) -> list[int]:
    """Space steps over the training schedule, as guided diffusion does."""
    if steps.startswith("ddim"):
        return list(range(0, TRAIN_STEPS, TRAIN_STEPS // int(steps[4:])))
    stride, position, kept = (TRAIN_STEPS - 1) / (int(steps) - 1), 0.0, []
    for _ in range(int(steps)):
        kept.append(round(position))
        position += stride
    return kept


def normal(index: int, *words: int, shape) -> np.ndarray:
    """Draw the noise of an image: its own key, then a word for each purpose."""
    key = jax.random.fold_in(jax.random.key(SEED), index)
    for word in words:
        key = jax.random.fold_in(key, word)
    return np.asarray(jax.random.normal(key, (math.prod(shape),))).reshape(shape)


def guide(network, x, t: int, labels, scale: float, null: int):
    """Return noise and variance channels of the guided output, and the token gates of the labelled half."""
    run = lambda labels: network(jnp.asarray(x, jnp.float32), jnp.full(len(x), t), jnp.asarray(labels))
    conditional, routing = run(labels)
    output = np.asarray(conditional, np.float64)
    if scale != 1:
        unconditional = np.asarray(run([null] * len(x))[0], np.float64)
        output[..., :3] = unconditional[..., :3] + scale * (output[..., :3] - unconditional[..., :3])
    return *np.split(output, 2, axis=-1), routing


def plain_loop(network, config, sampling: SamplingConfig):
    """Return the images, the timesteps that the network was given, and the gates that it ran with at each."""
    kept = kept_timesteps(sampling.steps)
    cumulative = np.cumprod(1 - np.linspace(1e-4, 0.02, TRAIN_STEPS))[kept]
    shape = (config.side, config.side, config.channels)
    x = np.stack([normal(i, 0, shape=shape) for i in range(len(LABELS))]).astype(np.float64)
    timesteps, gates = [], []
    for step in reversed(range(len(kept))):
        now, before = cumulative[step], cumulative[step - 1] if step else 1.0
        noise, v, routing = guide(network, x, kept[step], LABELS, sampling.guidance, config.classes)
        timesteps.append(kept[step])
        gates.append(jax.tree.map(np.asarray, routing))
        x0 = (x - np.sqrt(1 - now) * noise) / np.sqrt(now)
        if sampling.clip is not None:
            x0 = x0.clip(-sampling.clip, sampling.clip)
            noise = (x - np.sqrt(now) * x0) / np.sqrt(1 - now)
        drawn = np.stack([normal(i, 1, step, shape=shape) for i in range(len(LABELS))])
        beta = 1 - now / before
        if sampling.sampler == "ddpm":
            variance = beta * (1 - before) / (1 - now)
            if step == 0:  # there is no posterior at the first step; the next one's stands in for it
                variance = (1 - cumulative[1] / now) * (1 - now) / (1 - cumulative[1])
            log_variance = (v + 1) / 2 * np.log(beta) + (1 - v) / 2 * np.log(variance)
            mean = (np.sqrt(before) * beta * x0 + np.sqrt(1 - beta) * (1 - before) * x) / (1 - now)
            x = mean + (step > 0) * np.exp(log_variance / 2) * drawn
        else:
            sigma = sampling.eta * np.sqrt((1 - before) / (1 - now) * beta)
            x = np.sqrt(before) * x0 + np.sqrt(1 - before - sigma**2) * noise + (step > 0) * sigma * drawn
    return x, timesteps, gates


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize(
    "sampler, steps, eta",
    [("ddpm", "5", 0.0), ("ddim", "ddim5", 0.0), pytest.param("ddim", "7", 1.0, marks=pytest.mark.slow)],
)
def test_sampling_is_the_plain_loop(golden_v2, sampler, steps, eta, guidance):
    sampling = SamplingConfig(sampler=sampler, steps=steps, eta=eta, guidance=guidance, clip=1.0)
    params = jax.tree.map(jnp.asarray, golden_v2.params)
    network = jax.jit(functools.partial(golden_v2.model.apply, params, mode="gated"))
    images, timesteps, gates = plain_loop(network, golden_v2.config, sampling)
    run = make_run(golden_v2.model, params, sampling=sampling)
    for mode in ("fast", "gated"):
        samples = run.draw(LABELS, seed=SEED, mode=mode)
        assert samples.timesteps.tolist() == timesteps
        # What each step executed, against passes that know nothing of a plan.
        for name in ("heads", "groups"):
            wanted = np.stack([getattr(routing, name)[0] for routing in gates])
            np.testing.assert_array_equal(getattr(samples.routing, name), wanted)
        if guidance == 1:
            tokens = np.stack([routing.tokens.mean(0) for routing in gates])
            np.testing.assert_array_equal(samples.routing.tokens, tokens)
        assert np.abs(samples.images - images).max() < 1e-4 * np.abs(images).max()


@pytest.mark.slow
def test_a_gate_that_a_segment_leaves_out_is_noticed(golden_v2):
    sampling = SamplingConfig(sampler="ddim", steps="5", clip=1.0)
    run = make_run(golden_v2.model, jax.tree.map(jnp.asarray, golden_v2.params), sampling=sampling)
    plan = run.plan(1)
    [segment] = plan.segments
    heads, gates = list(segment.heads), list(segment.head_gates)
    heads[0], gates[0] = heads[0][1:], None if gates[0] is None else gates[0][:, 1:]
    broken = dataclasses.replace(segment, heads=tuple(heads), head_gates=tuple(gates))
    whole, wrong = (run.draw(LABELS, plan=dataclasses.replace(plan, segments=(own,))) for own in (segment, broken))
    assert (whole.routing.heads != wrong.routing.heads).any()
    assert np.abs(whole.images - wrong.images).max() > 1e-3 * np.abs(whole.images).max()
