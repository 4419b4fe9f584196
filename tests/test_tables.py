"""Conversion uses every tensor once, both ways bitwise equal, and lists all that does not fit."""

import numpy as np
import pytest

from dydit_jax.convert.tables import convert_state_dict, export_state_dict, rows_of, source_shapes
from dydit_jax.errors import InputError
from dydit_jax.models.dit import Model
from dydit_jax.trees import flatten


def test_there_and_back_is_bitwise_equal(golden):
    exported = export_state_dict(golden.params, golden.config)
    assert exported.keys() == golden.state_dict.keys()
    for name, tensor in golden.state_dict.items():
        np.testing.assert_array_equal(exported[name], tensor, err_msg=name)


def test_every_parameter_has_exactly_one_row(golden):
    paths = [row.path for row in rows_of(golden.config)]
    assert sorted(paths) == sorted(flatten(Model(golden.config).abstract_params()))


def test_source_shapes_are_those_of_the_files(golden):
    shapes = {name: tensor.shape for name, tensor in golden.state_dict.items() if name != "pos_embed"}
    assert source_shapes(golden.config) == shapes


def test_all_problems_are_listed_at_once(golden_v2):
    broken = dict(golden_v2.state_dict)
    del broken["blocks.0.attn.qkv.bias"]
    broken["extra"] = np.zeros(3)
    broken["blocks.1.mlp.fc1.bias"] = np.zeros(7)
    with pytest.raises(InputError) as caught:
        convert_state_dict(broken, golden_v2.config)
    message = str(caught.value)
    for part in (
        "3 problems",
        "missing blocks.0.attn.qkv.bias",
        "surplus extra",
        r"blocks.1.mlp.fc1.bias is (7,)",
    ):
        assert part in message
