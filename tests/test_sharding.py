"""Meshes fit the devices or say so; every parameter has a rule; sharding changes no number."""

import dataclasses
from unittest import mock

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from dydit_jax.errors import InputError
from dydit_jax.models.config import DiTConfig
from dydit_jax.models.dit import Model
from dydit_jax.runtime.sharding import (
    MeshConfig,
    _across_slices,
    batch_sharding,
    make_constrain_fn,
    make_mesh,
    require_divisible,
    shardings,
)
from dydit_jax.training.experiment import build_update, read_experiment
from dydit_jax.training.optimizer import build_optimizer
from dydit_jax.training.update import compile_update, init_state

EXPERIMENT = dict(
    model=dict(depth=2, width=32, heads=4, patch=2, side=8, channels=1, classes=10, routers="first_on"),
    data=dict(name="digits", batch_size=8),
    optimizer=dict(learning_rate=1e-3),
    train=dict(steps=3),
)


def test_minus_one_takes_the_devices_that_are_left():
    assert dict(make_mesh(MeshConfig(data=-1, tensor=2)).shape) == {"data": 2, "fsdp": 1, "tensor": 2}


@pytest.mark.parametrize("sizes", [(3, 1, 1), (2, 4, 1), (-1, 3, 1), (8, 1, 1)])
def test_mesh_that_does_not_fit_is_refused(sizes):
    with pytest.raises(InputError, match="there are 4"):
        make_mesh(MeshConfig(*sizes))


def test_slices_share_the_data_axis_alone():
    chips = [
        mock.Mock(slice_index=n // 4, process_index=n // 4, platform="cpu", device_kind="chip", id=n) for n in range(8)
    ]
    found = _across_slices(chips, [4, 2, 1], slices=2)
    assert [[{chip.slice_index for chip in row} for row in part] for part in found.reshape(2, 2, 2)] == [
        [{0}] * 2,
        [{1}] * 2,
    ]
    with pytest.raises(InputError, match="mesh.data must be a multiple of the 2 slices, not 1"):
        _across_slices(chips, [1, 8, 1], slices=2)


def test_batch_that_does_not_divide_is_refused():
    with pytest.raises(InputError, match="A batch of 6 does not divide over 4 devices"):
        require_divisible(make_mesh(MeshConfig()), 6)


@pytest.mark.parametrize("routers", ["none", "free", "first_on"])
def test_every_leaf_of_a_training_state_has_a_rule(routers):
    experiment = read_experiment(EXPERIMENT)
    config = DiTConfig(**{**vars(experiment.model), "routers": routers})
    optimizer = build_optimizer(experiment.optimizer)
    state = jax.eval_shape(lambda params: init_state(params, optimizer), Model(config).abstract_params())
    layout = shardings(make_mesh(MeshConfig(data=1, fsdp=2, tensor=2)), state)
    spec = layout.params["blocks"]["attention"]["qkv"].spec
    assert spec == PartitionSpec(None, None, "fsdp", "tensor", None)
    assert layout.opt_state[1][0].mu["blocks"]["attention"]["qkv"].spec == spec


def test_parameters_of_a_router_of_ones_own_are_copied_whatever_their_names():
    of_router = {name: np.zeros((4, 8, 8)) for name in ("mlp/up", "attention/out", "modulation/kernel", "anything")}
    tree = dict(head_router=of_router, group_router=of_router, blocks=dict(token_router=of_router))
    for sharding in jax.tree.leaves(shardings(make_mesh(MeshConfig(data=1, fsdp=2, tensor=2)), tree)):
        assert sharding.is_fully_replicated


def test_leaf_without_a_rule_is_an_error():
    with pytest.raises(ValueError, match="No sharding rule matches mystery"):
        shardings(make_mesh(MeshConfig()), {"mystery": np.zeros(3)})


@pytest.mark.slow  # test_processes.py holds the same of two processes
@pytest.mark.parametrize("sizes", [(1, 2, 2), (4, 1, 1)])
def test_training_is_the_same_on_every_mesh(tiny, sizes):
    model, params = tiny
    experiment = read_experiment(EXPERIMENT)
    batch = dict(
        image=np.random.default_rng(0).uniform(-1, 1, (8, 8, 8, 1)).astype(np.float32),
        label=np.arange(8, dtype=np.int32),
    )
    losses = {}
    for shape in ((1, 1, 1), sizes):
        mesh = make_mesh(MeshConfig(*shape), devices=jax.devices()[: int(np.prod(shape))])
        placed = dataclasses.replace(model, constrain=make_constrain_fn(mesh))
        with jax.set_mesh(mesh):
            state = init_state(params, build_optimizer(experiment.optimizer))
            state = jax.device_put(jax.tree.map(np.array, state), shardings(mesh, state))
            update = compile_update(build_update(experiment, placed, ("gated",)), state, batch, mesh)
            for _ in range(20):
                state, metrics = update(state, jax.device_put(batch, batch_sharding(mesh)))
            losses[shape] = float(metrics["loss/total"])
    np.testing.assert_allclose(list(losses.values()), losses[1, 1, 1], rtol=1e-5)
