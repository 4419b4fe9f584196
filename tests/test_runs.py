"""Checkpoints of a run: kept, restored bit for bit, damage distinguished from misfit, and passed over."""

import json
import pathlib
import resource
import shutil
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from buckets import memory_for_buckets
from conftest import STATIC, changed
from etils import epath
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dydit_jax.checkpoints import CheckpointConfig, Run, reading, runs
from dydit_jax.checkpoints.digests import _digest_each, digests
from dydit_jax.errors import DamageError, InputError, StopError
from dydit_jax.jobs.train import train_and_evaluate
from dydit_jax.loading import load_checkpoint

MESH = Mesh(np.asarray(jax.devices()).reshape(2, 2), ("x", "y"))


def test_checkpoints_of_a_run_lie_where_its_path_says(tmp_path, monkeypatch):
    given = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runs, "read_best", lambda workdir: None)
    monkeypatch.setattr(ocp, "CheckpointManager", lambda path, options: given.append(str(path)))
    for workdir in ("gs://bucket/run", "runs/run", "/runs/run"):
        Run(workdir, CheckpointConfig())
    assert given == ["gs://bucket/run/checkpoints", f"{tmp_path}/runs/run/checkpoints", "/runs/run/checkpoints"]


def test_run_keeps_the_newest_and_restores_bit_for_bit(tmp_path):
    tree = {"a": {"b": jax.numpy.arange(6.0)}}
    with Run(tmp_path, CheckpointConfig(keep=2)) as run:
        for step in (2, 4, 6):
            run.save(step, dict(params=jax.tree.map(lambda leaf, s=step: leaf + s, tree)), {"n": step})
        run.save(9, dict(params=tree), {"n": 9})
        run.save(9, dict(params=tree), {"n": 9})  # it is there
    with Run(tmp_path, CheckpointConfig()) as run:
        assert run.latest_step == 9
        restored = run.restore(6, dict(params=jax.eval_shape(lambda: tree)))
        np.testing.assert_array_equal(restored["params"]["a"]["b"], np.arange(6.0) + 6)
        assert restored["about"] == {"n": 6}
    kept = sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir())
    assert kept == [6, 9]


def test_run_of_another_shape_is_refused(tmp_path):
    with Run(tmp_path, CheckpointConfig()) as run:
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
        Run(tmp_path, CheckpointConfig()) as run,
    ):
        run.save(1, dict(params=tree), {})
        run.wait()
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, kept[1]))  # writing more fails, as on a full disk
        try:
            run.save(2, dict(params=tree), {})
            run.wait()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, kept)
    with Run(tmp_path, CheckpointConfig()) as run:
        assert run.latest_step == 1
        np.testing.assert_array_equal(run.restore(1, dict(params=tree))["params"]["leaf"], tree["leaf"])


# --- Digests -------------------------------------------------------------------------------------

ARRAYS = dict(
    float32=np.random.default_rng(0).standard_normal((8, 6)).astype(np.float32),
    bfloat16=np.random.default_rng(1).standard_normal((4, 2)).astype(jnp.bfloat16),
    int32=np.arange(16, dtype=np.int32).reshape(4, 2, 2),
    bool=np.arange(4) % 3 == 0,
    scalar=np.int32(7),
)


def by_hand(array) -> int:
    """The digest's definition, with Python's integers."""
    bits = np.asarray(array)
    bits = bits.astype(np.uint8) if bits.dtype == bool else bits.view(f"u{bits.dtype.itemsize}")
    total = 0
    for position, value in enumerate(bits.reshape(-1).tolist()):
        mixed = (value + position * 0x9E3779B9) % 2**32
        mixed = (mixed ^ mixed >> 16) * 0x85EBCA6B % 2**32
        mixed = (mixed ^ mixed >> 13) * 0xC2B2AE35 % 2**32
        total += mixed ^ mixed >> 16
    return total % 2**32


def test_digests_are_those_of_the_definition_on_every_mesh():
    expected = {name: by_hand(array) for name, array in ARRAYS.items()}
    assert digests(ARRAYS) == expected
    for axes in (("x",), ("x", "y"), (("x", "y"),), (None, "y"), ()):
        place = lambda array, axes=axes: jax.device_put(
            array, NamedSharding(MESH, PartitionSpec(*axes) if array.ndim >= 2 else PartitionSpec())
        )
        assert digests(jax.tree.map(place, ARRAYS)) == expected


def test_digest_changes_with_every_bit_and_with_the_order():
    array = ARRAYS["float32"]
    whole, seen = digests(dict(a=array))["a"], set()
    for bit in range(32):
        flipped = array.copy()
        flipped.view(np.uint32)[3, 2] ^= np.uint32(1 << bit)
        seen.add(digests(dict(a=flipped))["a"])
    swapped = array.copy()
    swapped[[0, 1]] = swapped[[1, 0]]
    seen |= {digests(dict(a=other))["a"] for other in (swapped, array[::-1], np.zeros_like(array))}
    assert whole not in seen and len(seen) == 35


def test_digests_gather_nothing():
    arrays = [jax.ShapeDtypeStruct((1024, 64), "float32", sharding=NamedSharding(MESH, PartitionSpec("x", "y")))]
    text = jax.jit(_digest_each, out_shardings=NamedSharding(MESH, PartitionSpec())).lower(arrays).compile().as_text()
    assert "all-reduce" in text and "all-gather" not in text and "all-to-all" not in text
    assert "u32[1024,64]" not in text and "f32[1024,64]" not in text


# --- Damage --------------------------------------------------------------------------------------


def save_two(workdir) -> dict:
    """Save steps 1 and 2 of a tree on four devices; return it."""
    tree = dict(params={"a": {"b": jnp.arange(4000.0) ** 0.5}, "c": jnp.ones((), jnp.int32)})
    tree = jax.device_put(tree, NamedSharding(MESH, PartitionSpec()))
    tree["params"]["a"]["b"] = jax.device_put(tree["params"]["a"]["b"], NamedSharding(MESH, PartitionSpec(("x", "y"))))
    with Run(workdir, CheckpointConfig()) as run:
        for step in (1, 2):
            run.save(step, tree, {"data": "d"})
    return tree


def files_of(folder) -> list[pathlib.Path]:
    return sorted(path for path in pathlib.Path(folder).rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "run"
    return workdir, save_two(workdir)


def restored_on(devices: int, run: Run, tree: dict, step: int) -> dict:
    sharding = NamedSharding(Mesh(jax.devices()[:devices], "x"), PartitionSpec())
    return run.restore(step, jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), tree))


@pytest.mark.parametrize("devices", [1, 2, 4])
def test_digests_hold_on_fewer_devices(two_steps, devices):
    workdir, tree = two_steps
    with Run(workdir, CheckpointConfig()) as run:
        restored = restored_on(devices, run, tree, 2)
    assert restored.pop("about") == {"data": "d"}
    jax.tree.map(np.testing.assert_array_equal, restored, tree)


def test_no_damage_is_restored_in_silence(two_steps, tmp_path):
    """A flip, a cut or a loss in every file: the same values, or an error of one line that names the place."""
    shutil.copytree(two_steps[0], tmp_path / "run")
    noticed = 0
    with Run(tmp_path / "run", CheckpointConfig()) as run:
        for number, path in enumerate(files_of(tmp_path / "run" / "checkpoints" / "2")):
            whole = path.read_bytes()
            middle = len(whole) // 2
            flipped = whole[:middle] + bytes([whole[middle] ^ 4]) + whole[middle + 1 :]
            for content in (flipped, (None, whole[:middle])[number % 2]):
                path.unlink() if content is None else path.write_bytes(content)
                try:
                    restored = restored_on(1, run, two_steps[1], 2)
                except DamageError as error:
                    noticed += 1
                    assert "checkpoints/2" in str(error) and "\n" not in str(error) and len(str(error)) < 400
                else:
                    assert restored.pop("about") == {"data": "d"}
                    jax.tree.map(np.testing.assert_array_equal, restored, two_steps[1])
            path.write_bytes(whole)
    assert noticed > 5


def damage(folder) -> None:
    """Flip a bit in the middle of the largest file."""
    path = max(files_of(folder), key=lambda path: path.stat().st_size)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)


def test_record_of_another_content_is_damage(two_steps, tmp_path):
    shutil.copytree(two_steps[0], tmp_path / "run")
    about = tmp_path / "run" / "checkpoints" / "2" / "about" / "metadata"
    about.write_text(about.read_text().replace('"d"', '"e"'))
    with Run(tmp_path / "run", CheckpointConfig()) as run, pytest.raises(DamageError, match="2/about is damaged"):
        restored_on(1, run, two_steps[1], 2)


NO_ARRAYS = ([], dict(params=3), *(dict(params=dict(a=entry)) for entry in (1, ["float32", [3]], ["float32", 3, 0])))


@pytest.mark.parametrize("content", [7, ["arrays"], dict(data=5), dict(base="b"), *(dict(arrays=a) for a in NO_ARRAYS)])
def test_record_of_a_stranger_is_damage_whatever_it_holds(tmp_path, monkeypatch, content):
    if isinstance(content, dict):
        content = content | dict(checksum=reading._checksum(content))
    monkeypatch.setattr(reading, "_read", lambda *_: content)
    with pytest.raises(DamageError, match="1/about is damaged: record"):
        reading.read_about(tmp_path, 1)


def test_wrong_digest_names_checkpoint_and_tensor(two_steps, tmp_path):
    shutil.copytree(two_steps[0], tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints" / "2" / "params"
    shutil.rmtree(folder)  # whole, but of other values
    other = dict(two_steps[1]["params"], a={"b": two_steps[1]["params"]["a"]["b"] + 1})
    with ocp.StandardCheckpointer() as writer:
        writer.save(folder, other)
    expected = "checkpoints/2/params is damaged: a/b not as written"
    with Run(tmp_path / "run", CheckpointConfig()) as run, pytest.raises(DamageError, match=expected):
        restored_on(1, run, two_steps[1], 2)


def test_checkpoint_from_before_digests_is_restored(tmp_path):
    manager = ocp.CheckpointManager(tmp_path / "checkpoints")
    arguments = ocp.args.Composite(
        params=ocp.args.StandardSave({"a": jnp.arange(3)}), about=ocp.args.JsonSave({"n": 1})
    )
    manager.save(1, args=arguments)
    manager.close()
    with Run(tmp_path, CheckpointConfig()) as run:
        restored = run.restore(1, dict(params={"a": jax.ShapeDtypeStruct((3,), "int32")}))
    np.testing.assert_array_equal(restored["params"]["a"], np.arange(3))
    assert restored["about"] == {"n": 1}


# --- Going on past damage ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A work directory with checkpoints of steps 2 and 4."""
    workdir = tmp_path_factory.mktemp("trained") / "run"
    state = train_and_evaluate(STATIC, workdir)
    return workdir, state


@pytest.fixture
def workdir(trained, tmp_path):
    return shutil.copytree(trained[0], tmp_path / "run")


def steps_in(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []


def test_training_goes_on_past_a_damaged_checkpoint_to_the_same_end(trained, workdir, caplog):
    damage(workdir / "checkpoints" / "4")
    state = train_and_evaluate(STATIC, workdir)
    jax.tree.map(np.testing.assert_array_equal, state, trained[1])
    assert "checkpoints/4" in caplog.text and "Trying an older checkpoint" in caplog.text
    assert steps_in(workdir / "checkpoints") == ["2", "4"] and steps_in(workdir / "set_aside") == ["4"]
    jax.tree.map(np.testing.assert_array_equal, load_checkpoint(workdir).params, load_checkpoint(trained[0]).params)


def test_checkpoints_in_a_bucket_are_set_aside(monkeypatch, caplog):
    monkeypatch.setattr(ocp, "CheckpointManager", mock.Mock())  # Orbax asks Google about the bucket
    with memory_for_buckets() as bucket:
        for step in (2, 4):
            folder = epath.Path("gs://bucket/run/checkpoints") / str(step)
            for name in ("params/d/0", "about/metadata", "commit_success.txt"):
                (folder / name).write_text(f"{name} of {step}")
        with Run("gs://bucket/run", CheckpointConfig()) as run:
            for _ in range(2):  # the second time nothing is left to be moved
                run.set_aside(after=2)
        assert bucket.cat("gs://bucket/run/set_aside/4/params/d/0") == b"params/d/0 of 4"
        assert not bucket.exists("gs://bucket/run/checkpoints/4") and bucket.exists("gs://bucket/run/checkpoints/2")
    assert caplog.text.count("Checkpoint 4 lies in gs://bucket/run/set_aside/4 now.") == 1


def test_half_copied_checkpoint_is_passed_over(trained, workdir):
    for path in files_of(workdir / "checkpoints" / "4")[::2]:
        path.unlink()
    jax.tree.map(np.testing.assert_array_equal, train_and_evaluate(STATIC, workdir), trained[1])


def test_no_whole_checkpoint_ends_the_training_with_all_of_them_named(workdir):
    before = steps_in(workdir / "checkpoints")
    for step in before:
        damage(workdir / "checkpoints" / step)
    with pytest.raises(InputError, match="No checkpoint of .* is whole: .*checkpoints/4.*checkpoints/2") as caught:
        train_and_evaluate(STATIC, workdir)
    assert "\n" not in str(caught.value)
    assert steps_in(workdir / "checkpoints") == before and not (workdir / "set_aside").exists()


def test_training_goes_back_once_when_asked(trained, workdir):
    longer = changed(STATIC, train=dict(steps=6))
    whole = train_and_evaluate(longer, workdir, from_step=2)
    assert steps_in(workdir / "checkpoints") == ["4", "6"] and steps_in(workdir / "set_aside") == ["4"]
    # The same command goes on from what it has saved since, it does not go back again.
    again = train_and_evaluate(longer, workdir, from_step=2)
    jax.tree.map(np.testing.assert_array_equal, whole, again)
    assert steps_in(workdir / "set_aside") == ["4"]
    with pytest.raises(InputError, match="no checkpoint of step 3; there are: 4, 6"):
        train_and_evaluate(longer, workdir, from_step=3)
    with pytest.raises(InputError, match="has no checkpoint yet"):
        train_and_evaluate(longer, workdir.parent / "new", from_step=3)
    assert not (workdir.parent / "new").exists()


def test_reading_names_the_whole_step_and_takes_it_when_asked(trained, workdir):
    damage(workdir / "checkpoints" / "4" / "ema")
    with pytest.raises(InputError, match=r"checkpoints/4/ema.*; step 2 is whole: --from_step=2 takes it\.") as caught:
        load_checkpoint(workdir)
    assert "\n" not in str(caught.value)
    asked = load_checkpoint(workdir, from_step=2)
    assert asked.about["step"] == 2
    jax.tree.map(np.testing.assert_array_equal, asked.params, load_checkpoint(trained[0], from_step=2).params)
    jax.tree.map(np.testing.assert_array_equal, asked.params, load_checkpoint(workdir / "checkpoints" / "2").params)
    with pytest.raises(InputError, match="no checkpoint of step 3; there are: 2, 4"):
        load_checkpoint(workdir, from_step=3)
    with pytest.raises(InputError, match="--from_step=2 needs a training's work directory"):
        load_checkpoint(workdir / "weights.safetensors", from_step=2)


def test_reading_takes_the_newer_step_where_a_training_has_removed_the_one_it_read(workdir, monkeypatch):
    def read(path, step, items, before=runs.read_checkpoint):
        if step == 2:  # as if it had been saved, and step 2 removed, while step 2 was read
            (workdir / "later").rename(workdir / "checkpoints" / "4")
            shutil.rmtree(workdir / "checkpoints" / "2")
        return before(path, step, items)

    (workdir / "checkpoints" / "4").rename(workdir / "later")
    monkeypatch.setattr(runs, "read_checkpoint", read)
    assert load_checkpoint(workdir).about["step"] == 4


def listing(folder) -> list:
    """All files and folders with what a write, a rename or a removal would change."""
    found = {path: path.stat() for path in (folder, *folder.rglob("*"))}
    return sorted((path, stat.st_mtime_ns, stat.st_ino, stat.st_size) for path, stat in found.items())


def test_reading_changes_nothing_in_a_work_directory_that_is_trained_in(workdir):
    saving = workdir / "checkpoints" / "6.orbax-checkpoint-tmp"  # a save in progress, as it lies there
    shutil.copytree(workdir / "checkpoints" / "4", saving)
    (workdir / "lock.json").write_text("{}")
    before = listing(workdir)
    assert load_checkpoint(workdir).about["step"] == 4
    assert listing(workdir) == before
    # That the name is one that Orbax clears: a training of its own does away with it.
    with Run(workdir, CheckpointConfig()) as run:
        run.save(5, dict(params={"a": jnp.ones(1)}), {})
    assert not saving.exists()


@pytest.mark.parametrize("content", ["", "   ", '{"model": {', "[1]", "{}", '{"model": {}, "optimizer": [1]}'])
def test_damaged_configuration_of_a_work_directory_is_one_line(workdir, content):
    (workdir / "config.json").write_text(content)
    with pytest.raises(InputError, match=r"config\.json") as caught:
        load_checkpoint(workdir)
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match=r"config\.json"):
        train_and_evaluate(STATIC, workdir)
    assert (workdir / "config.json").read_text() == content


@pytest.mark.parametrize(
    "sections, message",
    [
        (dict(train=[1]), r"config.json: config.train must be a section with keys, not \[1\]"),
        (dict(train=dict(trainable=5)), "config.json: config.train.trainable must be a tuple, not 5"),
        (dict(train=dict(trainable=["x"])), "config.json: train.trainable must be .*some of routers, labels, lora"),
        (dict(train=dict(ema_decay=2)), "config.json: config.train.ema_decay must be from 0.0 to 1.0, not 2"),
        (dict(model=dict(depth="x")), "config.json: model.depth must be of type int, not 'x'"),
        (dict(process=dict(name="x")), "config.json: Unknown process.name 'x'"),
    ],
)
def test_configuration_of_a_stranger_is_one_line_that_names_the_file(tmp_path, sections, message):
    (tmp_path / "config.json").write_text(json.dumps(dict(model=STATIC["model"]) | sections))
    with pytest.raises(InputError, match=message):
        load_checkpoint(tmp_path)
