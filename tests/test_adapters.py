"""Training of a part: the rest stays, runs go on exactly, adapters are small, belong to one base, and merge."""

import dataclasses
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import DYNAMIC, changed

from dydit_jax import Pipeline, loading
from dydit_jax.checkpoints import (
    ADAPTER_FORMAT,
    CheckpointConfig,
    Run,
    Weights,
    checksum,
    describe_base,
    format_of,
    save_adapter,
    save_weights,
)
from dydit_jax.convert.exporting import Export, export
from dydit_jax.diffusion.process import Diffusion
from dydit_jax.diffusion.samplers import SamplingConfig
from dydit_jax.errors import InputError
from dydit_jax.jobs.train import train_and_evaluate
from dydit_jax.loading import load_checkpoint, merge
from dydit_jax.models.dit import Model
from dydit_jax.models.lora import LoRAConfig
from dydit_jax.models.trainable import split_params
from dydit_jax.runtime.sharding import MeshConfig, make_mesh, shardings
from dydit_jax.training.experiment import read_experiment
from dydit_jax.training.optimizer import build_optimizer
from dydit_jax.training.update import init_state
from dydit_jax.trees import flatten

SAMPLING = SamplingConfig(sampler="ddim", steps="3", guidance=1.0)
EXPERTS = dict(experts=2, rank=2, alpha=4.0)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A file of complete weights of the static model, none of them zero."""
    config = read_experiment(changed(DYNAMIC, model=dict(routers="none"))).model
    params = jax.jit(Model(config).init)(jax.random.key(2))
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noisy = [np.asarray(leaf + 0.1 * jax.random.normal(key, leaf.shape)) for leaf, key in zip(leaves, keys)]
    path = tmp_path_factory.mktemp("base") / "static.safetensors"
    save_weights(path, Weights(config, Diffusion(), SAMPLING, jax.tree.unflatten(structure, noisy), {}))
    return path


def config_on(base, trainable=("routers", "lora"), **sections) -> dict:
    train = dict(init_from=str(base), trainable=trainable) | sections.pop("train", {})
    sampling = dataclasses.asdict(SAMPLING)
    return changed(DYNAMIC, **sections, train=train, sampling=sampling, mesh=dict(data=1, fsdp=2, tensor=2))


@pytest.fixture(scope="module")
def trained(base, tmp_path_factory):
    """A work directory in which routers and low-rank updates were trained for two steps, then for two more."""
    workdir = tmp_path_factory.mktemp("runs") / "lora"
    train_and_evaluate(config_on(base, train=dict(steps=2)), workdir)
    return workdir, train_and_evaluate(config_on(base), workdir)


def test_what_is_not_trained_stays_and_has_no_state(base, trained):
    workdir, state = trained
    source = flatten(load_checkpoint(base).params)
    names = set(flatten(state.params))
    assert names == set(flatten(state.ema)) and not names & set(source)
    assert {name for name in names if "_router/" not in name and "_lora_" not in name} == set()
    for name, leaf in flatten(state.frozen).items():
        np.testing.assert_array_equal(leaf, source[name])
    moments = sum(leaf.size for leaf in jax.tree.leaves(state.opt_state))
    assert moments < 2.1 * sum(leaf.size for leaf in jax.tree.leaves(state.params))
    assert all(float(jnp.abs(leaf).max()) > 0 for name, leaf in flatten(state.params).items() if "_lora_b" in name)
    # No array of the base in any checkpoint.
    stored = sum(path.stat().st_size for path in (workdir / "checkpoints" / "4" / "params").rglob("*"))
    assert stored < sum(leaf.nbytes for leaf in source.values())


@pytest.mark.slow
def test_run_of_an_adapter_goes_on_exactly(base, trained, tmp_path):
    """The run in two parts read its base again, and ended where the one without a stop does, bit for bit."""
    _, parts = trained
    whole = train_and_evaluate(config_on(base), tmp_path / "whole")
    jax.tree.map(np.testing.assert_array_equal, whole, parts)


def test_adapter_is_merged_on_load_and_on_request(base, trained, tmp_path):
    workdir, state = trained
    file = workdir / "weights.safetensors"
    assert format_of(file) == ADAPTER_FORMAT
    from_run, from_file = load_checkpoint(workdir), load_checkpoint(file)
    jax.tree.map(np.testing.assert_array_equal, from_run.params, from_file.params)
    # By hand, in float64.
    lora, ema = LoRAConfig(), flatten(state.ema)
    a, b = (np.asarray(ema[f"blocks/mlp/up_lora_{part}"][0], np.float64) for part in "ab")
    before = flatten(load_checkpoint(base).params)["blocks/mlp/up"][0]
    expected = before + lora.alpha / lora.rank * np.tensordot(a, b[0], 1)
    np.testing.assert_allclose(from_run.params["blocks"]["mlp"]["up"][0], expected, atol=1e-6)
    merged = load_checkpoint(merge(workdir, tmp_path / "merged.safetensors"))
    assert checksum(merged.params) == checksum(from_run.params) and merged.lora is None
    with pytest.raises(InputError, match="exists; give --overwrite"):
        merge(workdir, tmp_path / "merged.safetensors")
    export(Export(file, tmp_path / "there.safetensors"), load_checkpoint)
    assert (tmp_path / "there.safetensors").stat().st_size > file.stat().st_size


def test_adapter_for_another_base_is_refused(base, trained, tmp_path):
    workdir, _ = trained
    weights = load_checkpoint(base)
    weights.params["output"]["bias"] = weights.params["output"]["bias"] + 1
    save_weights(tmp_path / "other.safetensors", weights)
    with pytest.raises(InputError, match="an adapter for another base: .*static.safetensors.*--base"):
        load_checkpoint(workdir, base=str(tmp_path / "other.safetensors"))
    moved = tmp_path / "moved.safetensors"
    moved.write_bytes(base.read_bytes())
    assert checksum(load_checkpoint(workdir, base=str(moved)).params) == checksum(load_checkpoint(workdir).params)
    # A run does not go on from another base either.
    with pytest.raises(InputError, match="train.init_from .* has changed since the run of step 4"):
        train_and_evaluate(config_on(tmp_path / "other.safetensors"), shutil.copytree(workdir, tmp_path / "run"))
    train_and_evaluate(config_on(moved), shutil.copytree(workdir, tmp_path / "went_on"))


def test_updates_of_the_timestep_are_kept_apart_and_sampled(base, tmp_path):
    lora, complete = LoRAConfig(**EXPERTS), load_checkpoint(base)
    params = jax.jit(Model(complete.model, lora=lora).init)(jax.random.key(5))
    part = dataclasses.replace(complete, params=split_params(params, ("lora",))[0], lora=lora)
    save_adapter(tmp_path / "adapter.safetensors", part, describe_base(str(base), complete))
    weights = load_checkpoint(tmp_path / "adapter.safetensors")
    assert weights.lora == lora and weights.params["blocks"]["lora_mixture"]["bias"].shape == (1, 2)
    np.testing.assert_array_equal(Pipeline(weights)([1, 2]).pixels, Pipeline(complete)([1, 2]).pixels)  # B is zero
    merged = load_checkpoint(merge(tmp_path / "adapter.safetensors", tmp_path / "merged.safetensors"))
    assert merged.lora == lora and checksum(merged.params) == checksum(weights.params)
    with pytest.raises(InputError, match="updates that depend on the timestep; no other layout has them"):
        export(Export(tmp_path / "merged.safetensors", tmp_path / "out.pt"))
    with pytest.raises(InputError, match="updates that depend on the timestep; take its base"):
        train_and_evaluate(changed(DYNAMIC, train=dict(init_from=str(tmp_path / "merged.safetensors"))), tmp_path / "x")


def test_adapter_is_no_base(base, trained, tmp_path):
    workdir, _ = trained
    with pytest.raises(InputError, match="is an adapter; .*--merge"):
        train_and_evaluate(config_on(workdir), tmp_path / "next")


def test_run_of_a_part_whose_checkpoint_names_no_base_is_refused(tmp_path):
    experiment = read_experiment(DYNAMIC)
    part, _ = split_params(jax.jit(Model(experiment.model).init)(jax.random.key(0)), ("labels",))
    with Run(tmp_path, CheckpointConfig()) as run:
        run.save(1, dict(ema=part), {})
    (tmp_path / "config.json").write_text(json.dumps(DYNAMIC | dict(train=dict(trainable=["labels"]))))
    with pytest.raises(InputError, match="trains labels alone, but its checkpoint names no base"):
        load_checkpoint(tmp_path)


def test_base_in_the_bucket_of_its_adapter_is_read(monkeypatch):
    monkeypatch.setattr(loading, "_load", lambda base: (base, None))
    assert loading._load_named("gs://own/runs/dit", "gs://own/runs/lora") == "gs://own/runs/dit"
    for adapter in ("gs://another/runs/lora", "runs/lora", "gs://own2"):
        with pytest.raises(InputError, match="is not fetched unasked; give --base=gs://own/runs/dit"):
            loading._load_named("gs://own/runs/dit", adapter)


ANOTHER = "The base that .*/a.safetensors names, .*/{}.safetensors, is an adapter too; give complete weights as --base"
UNASKED = "The base of .*/a.safetensors is at an address, and is not fetched unasked; give --base={}"


@pytest.mark.parametrize(
    "base, message",
    [
        (dict(checkpoint="HERE/a.safetensors", checksum="0"), ANOTHER.format("a")),
        (dict(checkpoint="HERE/b.safetensors", checksum="0"), ANOTHER.format("b")),
        (dict(checkpoint="http://127.0.0.1:9/w.safetensors", checksum="0"), UNASKED.format("http://127.0.0.1:9/w")),
        (dict(checkpoint="hf://nobody/nothing", checksum="0"), UNASKED.format("hf://nobody/nothing")),
        (dict(checkpoint="gs://stranger/w.safetensors", checksum="0"), UNASKED.format("gs://stranger/w")),
        (dict(checkpoint=7, checksum="0"), "a.safetensors: description.base.checkpoint must be of type str, not 7"),
        (dict(), "a.safetensors: description.base lacks checkpoint, checksum"),
        ("text", "a.safetensors: description.base must be a section with keys, not 'text'"),
        (None, "a.safetensors: description lacks base"),
    ],
)
def test_base_that_an_adapter_should_not_name_is_refused(tmp_path, base, message):
    weights = Weights(read_experiment(DYNAMIC).model, Diffusion(), SAMPLING, dict(a=np.zeros(1)), {})
    save_adapter(tmp_path / "a.safetensors", weights, json.loads(json.dumps(base).replace("HERE", str(tmp_path))))
    save_adapter(tmp_path / "b.safetensors", weights, dict(checkpoint=str(tmp_path / "a.safetensors"), checksum="0"))
    with pytest.raises(InputError, match=message):
        load_checkpoint(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    "sections, message",
    [
        (dict(train=dict(trainable=("router",))), "train.trainable must be .* some of routers, labels, lora"),
        (dict(train=dict(trainable=("everything", "lora"))), "train.trainable must be"),
        (dict(train=dict(trainable=("routers",), init_from="")), "needs train.init_from"),
        (dict(train=dict(trainable=("routers", "lora")), lora=dict(targets=("attn",))), "some of qkv, out, up, down"),
        (dict(train=dict(trainable=("routers",)), model=dict(routers="none")), "model.routers is 'none'"),
    ],
)
def test_parts_that_cannot_be_trained_are_refused(sections, message):
    train = dict(init_from="digits") | sections.pop("train")
    with pytest.raises(InputError, match=message):
        read_experiment(changed(DYNAMIC, train=train, **sections))


def test_parts_that_would_stay_random_are_refused(base, tmp_path):
    with pytest.raises(InputError, match="would leave .*token_router.* train these too"):
        train_and_evaluate(config_on(base, ("labels",)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_every_leaf_of_an_adapters_state_is_split_like_its_kernel():
    experiment = read_experiment(changed(DYNAMIC, lora=dict(experts=3)))
    config = dataclasses.replace(experiment.model, heads=4)
    shapes = Model(config, lora=experiment.lora).abstract_params()
    make = functools.partial(init_state, optimizer=build_optimizer(experiment.optimizer))
    state = jax.eval_shape(make, split_params(shapes, ("routers", "lora"))[0])
    layout = shardings(make_mesh(MeshConfig(data=1, fsdp=2, tensor=2)), state)
    blocks = layout.params["blocks"]
    spec = lambda part, name: tuple(blocks[part][name].spec)
    assert spec("attention", "qkv_lora_a") == (None, "fsdp", None)
    assert spec("attention", "qkv_lora_b") == (None, None, None, None, "tensor", None)
    assert spec("attention", "out_lora_a") == (None, "tensor", None, None)
    assert spec("mlp", "down_lora_b") == (None, None, None, "fsdp")
    assert layout.opt_state[1][0].mu["blocks"]["mlp"]["up_lora_b"].spec == blocks["mlp"]["up_lora_b"].spec


def test_record_of_the_base_says_where_it_lay(base, trained):
    workdir, _ = trained
    record = load_checkpoint(workdir).about["base"]
    assert record == dict(checkpoint=str(base), checksum=checksum(load_checkpoint(base).params))
    assert json.dumps(record)
