"""Weights come back as they went, and files that are not ours are refused in one line."""

import json
import resource

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import safetensors.numpy

from dydit_jax.checkpoints import CheckpointConfig, Run, Weights, checksum, load_weights, save_weights
from dydit_jax.diffusion.samplers import SamplingConfig
from dydit_jax.diffusion.schedules import DiffusionConfig
from dydit_jax.errors import InputError, StopError


@pytest.fixture
def weights(tiny):
    model, params = tiny
    return Weights(model.config, DiffusionConfig(), SamplingConfig(clip=1.0, steps="20"), params, {"step": 7})


def test_weights_describe_themselves(tmp_path, weights):
    save_weights(tmp_path / "deep" / "w.safetensors", weights)
    loaded = load_weights(tmp_path / "deep" / "w.safetensors")
    assert (loaded.model, loaded.diffusion, loaded.sampling) == (weights.model, weights.diffusion, weights.sampling)
    assert loaded.about == weights.about
    jax.tree.map(np.testing.assert_array_equal, loaded.params, weights.params)
    assert checksum(loaded.params) == checksum(weights.params)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["w.safetensors"]


def test_checksum_sees_values_and_names(weights):
    changed = jax.tree.map(lambda leaf: leaf, weights.params)
    changed["label_embed"]["table"] = changed["label_embed"]["table"] + 1e-3
    assert checksum(changed) != checksum(weights.params)


def test_checkpoints_of_a_run_lie_where_its_path_says(tmp_path, monkeypatch):
    given = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ocp, "CheckpointManager", lambda path, options: given.append(str(path)))
    for workdir in ("gs://bucket/run", "runs/run", "/runs/run"):
        Run(workdir, CheckpointConfig())
    assert given == ["gs://bucket/run/checkpoints", f"{tmp_path}/runs/run/checkpoints", "/runs/run/checkpoints"]


def test_foreign_and_broken_files_are_refused(tmp_path, weights):
    path = tmp_path / "w.safetensors"
    save_weights(path, weights)
    whole = path.read_bytes()
    for name, content in (("empty", b""), ("cut", whole[: len(whole) // 2]), ("text", b"hello" * 100)):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match="not a readable .safetensors file"):
            load_weights(tmp_path / name)
    (tmp_path / "foreign").write_bytes(safetensors.numpy.save({"a": np.zeros(3)}))
    with pytest.raises(InputError, match="is not of the format"):
        load_weights(tmp_path / "foreign")


def test_file_of_another_shape_is_refused(tmp_path, weights):
    path = tmp_path / "w.safetensors"
    save_weights(path, weights)
    header = json.loads(path.read_bytes()[8 : 8 + int.from_bytes(path.read_bytes()[:8], "little")])
    leaves = safetensors.numpy.load(path.read_bytes())
    leaves["label_embed/table"] = leaves["label_embed/table"][:-1]
    path.write_bytes(safetensors.numpy.save(leaves, header["__metadata__"]))
    with pytest.raises(InputError, match="does not hold the model that it describes.*label_embed/table"):
        load_weights(path)


def test_run_keeps_the_newest_and_restores_bit_for_bit(tmp_path):
    tree = {"a": {"b": jax.numpy.arange(6.0)}}
    with Run(tmp_path, CheckpointConfig(every_steps=2, keep=2)) as run:
        for step in range(1, 8):
            run.save(step, dict(params=jax.tree.map(lambda leaf, s=step: leaf + s, tree)), {"n": step})
        assert run.save(9, dict(params=tree), {"n": 9}, force=True)
    with Run(tmp_path, CheckpointConfig()) as run:
        assert run.latest_step == 9
        restored = run.restore(6, dict(params=jax.eval_shape(lambda: tree)))
        np.testing.assert_array_equal(restored["params"]["a"]["b"], np.arange(6.0) + 6)
        assert restored["about"] == {"n": 6}
    kept = sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir())
    assert kept == [6, 9]


def test_run_of_another_shape_is_refused(tmp_path):
    with Run(tmp_path, CheckpointConfig(every_steps=1)) as run:
        run.save(1, dict(params={"a": jax.numpy.zeros(3)}), {})
    with Run(tmp_path, CheckpointConfig()) as run, pytest.raises(InputError, match="does not fit this model"):
        run.restore(
            1, dict(params={"a": jax.ShapeDtypeStruct((3,), "float32"), "b": jax.ShapeDtypeStruct((1,), "float32")})
        )


def test_full_disk_names_the_last_whole_checkpoint(tmp_path):
    tree = dict(leaf=np.random.default_rng(0).standard_normal(100_000))
    kept = resource.getrlimit(resource.RLIMIT_FSIZE)
    with (
        pytest.raises(StopError, match="could not be written .*newest whole one is of step 1"),
        Run(tmp_path, CheckpointConfig(every_steps=1)) as run,
    ):
        run.save(1, dict(params=tree), {})
        run.wait()
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, kept[1]))  # writing more fails, as on a full disk
        try:
            run.save(2, dict(params=tree), {})
            run.wait()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, kept)
    with Run(tmp_path, CheckpointConfig(every_steps=1)) as run:
        assert run.latest_step == 1
        np.testing.assert_array_equal(run.restore(1, dict(params=tree))["params"]["leaf"], tree["leaf"])
