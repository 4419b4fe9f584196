"""Seeds: the whole range, no two alike, and the keys that JAX makes of small ones."""

import itertools

import jax
import numpy as np
import pytest

from dydit_jax.convert.conversion import Conversion
from dydit_jax.data.sources import DataConfig
from dydit_jax.diffusion.process import Diffusion
from dydit_jax.diffusion.samplers import SamplingConfig
from dydit_jax.errors import InputError
from dydit_jax.jobs.analyze import Analysis
from dydit_jax.jobs.sample import Request
from dydit_jax.runtime.seeds import make_key, seed_words
from dydit_jax.sampling.generate import generate
from dydit_jax.sampling.noise import image_keys
from dydit_jax.training.update import TrainConfig

SEEDS = (0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**32 + 1, 2**33, 2**63 - 1, 2**63, 2**64 - 1)


def test_no_two_seeds_have_the_same_key_or_noise():
    draws = [jax.random.bits(make_key(seed), (4,)).tolist() for seed in SEEDS]
    assert all(one != other for one, other in itertools.combinations(draws, 2))


@pytest.mark.parametrize("seed", [0, 1, 12345, 2**31 - 1])
def test_keys_of_small_seeds_are_those_of_jax(seed):
    np.testing.assert_array_equal(jax.random.key_data(make_key(seed)), jax.random.key_data(jax.random.key(seed)))


@pytest.mark.parametrize("seed", SEEDS)
def test_a_compiled_function_makes_the_same_keys_from_the_words(seed):
    compiled = jax.jit(lambda words: jax.random.key_data(image_keys(words, np.arange(3))))(seed_words(seed))
    np.testing.assert_array_equal(compiled, jax.random.key_data(image_keys(seed, np.arange(3))))


@pytest.mark.parametrize("seed", [-1, 2**64, 10**20, 1.5, "7", None])
def test_other_seeds_are_refused_in_one_line(seed):
    with pytest.raises(InputError, match=r"from 0 to 2\^64 - 1, not ") as error:
        make_key(seed)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "make, name",
    [
        (lambda seed: Request("weights", "out", labels=["1"], seed=seed), "--seed"),
        (lambda seed: Analysis(("weights",), "out", seed=seed), "--seed"),
        (lambda seed: Conversion("source", "out", seed=seed), "--seed"),
        (lambda seed: TrainConfig(steps=1, seed=seed), "train.seed"),
        (lambda seed: DataConfig("digits", 8, seed=seed), "data.seed"),
    ],
)
def test_requests_and_configs_take_the_whole_range_and_refuse_the_rest(make, name):
    assert make(2**64 - 1).seed == 2**64 - 1
    for seed in (-1, 2**64, 10**20):
        with pytest.raises(InputError, match=rf"^{name} must be a whole number from 0 to 2\^64 - 1, not {seed}\."):
            make(seed)


def test_images_of_seeds_whose_lower_halves_agree_differ(tiny):
    model, params = tiny
    settings = dict(sampling=SamplingConfig(sampler="ddim", steps="2"), process=Diffusion(), mode="gated")
    draws = [generate(model, params, [1], seed=seed, **settings).images for seed in (7, 2**32 + 7, 2**63 + 7)]
    assert all((one != other).any() for one, other in itertools.combinations(draws, 2))
