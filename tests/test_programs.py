"""A compiled program is found by what it is made of, and whatever is wrong with its file it is only made again."""

import concurrent.futures
import dataclasses
import functools
import hashlib
import logging
import os
import pathlib
import pickle
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
from conftest import ROOT
from jax.experimental import serialize_executable

from dydit_jax.diffusion.process import Diffusion
from dydit_jax.diffusion.samplers import SamplingConfig
from dydit_jax.models.config import DiTConfig
from dydit_jax.runtime import aot, cache
from dydit_jax.runtime.aot import compile_for, compiled, compiled_ahead, describe_call
from dydit_jax.runtime.cache import program_folder as program_folder_of_scripts
from dydit_jax.runtime.sharding import MeshConfig, make_mesh
from dydit_jax.sampling import runner


@functools.partial(jax.jit, static_argnames="factor")
def scaled(x, *, factor):
    return {"scaled": factor * x}


def made(call):
    with compiled_ahead([call]) as (program,):
        return program.result()


def forbidden():
    raise AssertionError("compiled although it is there")


def test_a_program_is_found_by_the_next_start_without_being_made(program_folder):
    x = np.arange(3.0, dtype=np.float32)
    call = describe_call(scaled, (x,), dict(factor=2))
    np.testing.assert_array_equal(made(call)(x)["scaled"], [0, 2, 4])
    assert [path.name for path in program_folder.iterdir()] == [f"{call.name}.program"]
    compiled.cache_clear()  # as if the process had ended
    found = made(dataclasses.replace(call, lower=forbidden))
    np.testing.assert_array_equal(found(x)["scaled"], [0, 2, 4])


def test_what_jax_finds_in_its_own_cache_is_not_written_again(program_folder):
    x = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)
    call = describe_call(jax.jit(lambda x: jnp.sort(jnp.tanh(x @ x))), (x,), {})
    first = np.asarray(made(call)(x))
    next(program_folder.iterdir()).unlink()
    for _ in range(2):
        compiled.cache_clear()
        jax.clear_caches()
        np.testing.assert_array_equal(made(call)(x), first)
    assert not list(program_folder.iterdir())


def test_what_differs_has_another_name(monkeypatch):
    x = jax.ShapeDtypeStruct((3,), jnp.float32)
    name = lambda *arguments, function=scaled, **settings: (
        describe_call(function, arguments, dict(factor=2) | settings).name
    )
    names = [
        name(x),
        name(x, factor=3),
        name(jax.ShapeDtypeStruct((4,), jnp.float32)),
        name(jax.ShapeDtypeStruct((3,), jnp.int32)),
        name((x,)),
        name(x, function=jax.jit(forbidden)),
        *(name(jax.device_put(np.zeros(3, np.float32), device)) for device in jax.devices()[:2]),
    ]
    with jax.default_matmul_precision("highest"):
        names.append(name(x))
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=true")
    names.append(name(x))
    assert len(set(names)) == len(names)


NAME_OF_A_SEGMENT = """
import sys
import jax, numpy as np
sys.path.insert(0, "tests")
import conftest
from dydit_jax.diffusion.samplers import Sampler
from dydit_jax.fast.execution.xla import Switch
from dydit_jax.sampling.segment import SegmentSettings, run_segment
from dydit_jax.models.config import DiTConfig
from dydit_jax.models.dit import Model
from dydit_jax.runtime import aot, cache
from dydit_jax.runtime.aot import describe_call
from dydit_jax.runtime.sharding import MeshConfig, batch_sharding, make_mesh

mesh = make_mesh(MeshConfig(data=4))
model = Model(DiTConfig(depth=2, width=32, heads=4, patch=2, side=8, channels=1, classes=10, routers="free"))
executions = (Switch("cpu", (8, 16)),) * 2
settings = dict(settings=SegmentSettings(model, Sampler(), "all", 2, executions, mesh))
shape = jax.ShapeDtypeStruct((4, 8), np.float32, sharding=batch_sharding(mesh))
name = describe_call(run_segment, (shape, {"kernel": np.zeros(3)}), settings).name
"""


def test_a_program_with_code_of_a_user_is_not_kept_and_shared_with_no_other_class(program_folder):
    x, classes = np.ones(2, np.float32), [type("Own", (), {"__module__": "own"}) for _ in range(2)]
    calls = [describe_call(scaled, (x,), dict(factor=4), code=(DiTConfig, cls)) for cls in classes]
    assert len({call.name for call in calls}) == 2
    np.testing.assert_array_equal(made(calls[0])(x)["scaled"], [4, 4])
    assert not program_folder.exists()
    made(describe_call(scaled, (x,), dict(factor=4), code=(DiTConfig,)))
    assert len(list(program_folder.iterdir())) == 1


def test_a_name_is_the_same_in_another_process():
    here = {}
    exec(NAME_OF_A_SEGMENT, here)
    command = [sys.executable, "-c", NAME_OF_A_SEGMENT + "sys.stdout.write(name)"]
    there = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert there.stdout == here["name"]


def test_arrays_and_their_shapes_have_one_name():
    x = jnp.zeros(3)
    names = {
        describe_call(scaled, (leaf,), {}).name for leaf in (x, np.zeros(3, np.float32), jax.eval_shape(lambda: x))
    }
    assert len(names) == 1


def cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


def flipped(part: float):
    """Return what flips a bit at this part of a file."""

    def flip(content: bytes) -> bytes:
        place = int(part * (len(content) - 1))
        return content[:place] + bytes([content[place] ^ 1 << place % 8]) + content[place + 1 :]

    return flip


@pytest.mark.parametrize(
    "damage", [lambda _: b"", lambda _: b"no program", cut, *(flipped(part) for part in np.linspace(0, 1, 20))]
)
def test_a_damaged_file_is_made_again(damage, program_folder, caplog):
    x = np.ones(2, np.float32)
    call = describe_call(scaled, (x,), dict(factor=5))
    made(call)
    (path,) = program_folder.iterdir()
    path.write_bytes(damage(path.read_bytes()))
    compiled.cache_clear()
    with caplog.at_level(logging.WARNING):
        np.testing.assert_array_equal(made(call)(x)["scaled"], [5, 5])
    assert f"Compiled again: {path} cannot be used (it is damaged)" in caplog.text
    compiled.cache_clear()
    np.testing.assert_array_equal(made(dataclasses.replace(call, lower=forbidden))(x)["scaled"], [5, 5])


def test_a_whole_file_under_the_name_of_another_program_is_not_run(program_folder, caplog):
    x = np.ones(2, np.float32)
    two, three = (describe_call(scaled, (x,), dict(factor=factor)) for factor in (2, 3))
    made(two)
    (program_folder / f"{two.name}.program").rename(program_folder / f"{three.name}.program")
    np.testing.assert_array_equal(made(three)(x)["scaled"], [3, 3])
    assert "it is damaged" in caplog.text


class Planted:
    """What must not be unpickled."""

    def __reduce__(self):
        return forbidden, ()


@pytest.mark.parametrize("opened", ["the folder", "JAX's folder", "the owner of the folder", "the file"])
def test_what_others_could_have_put_there_is_never_unpickled(opened, program_folder, caplog, monkeypatch):
    x = np.ones(2, np.float32)
    call = describe_call(scaled, (x,), dict(factor=11))
    made(call)
    assert program_folder.stat().st_mode & 0o777 == 0o700
    (path,) = program_folder.iterdir()
    content = pickle.dumps(Planted())
    path.write_bytes(hashlib.sha256(call.name.encode() + content).digest() + content)
    compiled.cache_clear()
    if opened == "the owner of the folder":
        monkeypatch.setattr(os, "getuid", lambda: path.stat().st_uid + 1)
    else:
        place = {"the folder": program_folder, "JAX's folder": program_folder.parent, "the file": path}[opened]
        place.chmod(place.stat().st_mode | 0o020)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            np.testing.assert_array_equal(made(call)(x)["scaled"], [11, 11])
            compiled.cache_clear()
    assert len([record for record in caplog.records if "others can write to" in record.message]) == 1
    assert "compiled although" not in caplog.text  # what unpickling would have said


def test_programs_are_not_read_from_a_bucket(program_folder):
    jax.config.update("jax_compilation_cache_dir", "gs://bucket/programs")
    x = np.ones(2, np.float32)
    call = describe_call(scaled, (x,), dict(factor=12))
    assert aot._path_of(call) is None
    jax.config.update("jax_compilation_cache_dir", str(program_folder.parent))
    assert aot._path_of(call) == program_folder / f"{call.name}.program"


def test_scripts_give_jax_a_folder_of_this_user_alone_or_none(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(cache, "_is_own_group", lambda gid: True)
    monkeypatch.setenv("DYDIT_JAX_CACHE", str(tmp_path / "new" / "cache"))
    before = os.umask(0o002)  # of systems where every user has a group
    try:
        folder = pathlib.Path(program_folder_of_scripts())
    finally:
        os.umask(before)
    assert folder == tmp_path / "new" / "cache" / "programs" and folder.stat().st_mode & 0o777 == 0o700
    assert folder.parent.stat().st_mode & 0o777 == 0o775  # the rest of the cache may be shared
    folder.chmod(0o777)
    assert program_folder_of_scripts() is None
    assert f"chmod go-w {folder}" in caplog.text
    folder.chmod(0o700)
    monkeypatch.setenv("DYDIT_JAX_CACHE", "/proc/cache")  # where nobody can write
    assert program_folder_of_scripts() is None
    assert "Compiled programs are not kept" in caplog.text


@pytest.mark.parametrize("mode, kept", [(0o775, False), (0o757, False), (0o1777, True), (0o755, True)])
def test_programs_are_kept_elsewhere_where_others_could_put_another_folder(tmp_path, monkeypatch, caplog, mode, kept):
    monkeypatch.setattr(cache, "_is_own_group", lambda gid: False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(cache, "_is_closed", lambda found: False)  # as pytest's folders are
    shared = tmp_path / "shared"
    (shared / "deeper").mkdir(parents=True)
    shared.chmod(mode)
    (tmp_path / "home").mkdir()
    (tmp_path / "link").symlink_to(shared / "deeper")
    for name in ("shared/deeper/cache", "link/cache"):
        monkeypatch.setenv("DYDIT_JAX_CACHE", str(tmp_path / name))
        own = tmp_path / "home" / ".cache" / "dydit-jax" / "programs"
        assert program_folder_of_scripts() == str(tmp_path / name / "programs" if kept else own)
        assert (f"others can write to {shared}, or own it" in caplog.text) != kept
    (tmp_path / "home").chmod(0o777)
    assert (program_folder_of_scripts() is None) != kept


def test_what_others_can_not_come_to_is_ones_own_whatever_its_mode(tmp_path, monkeypatch):
    (tmp_path / "closed" / "open").mkdir(parents=True)
    (tmp_path / "closed").chmod(0o700)
    (tmp_path / "closed" / "open").chmod(0o777)
    monkeypatch.setenv("DYDIT_JAX_CACHE", str(tmp_path / "closed" / "open"))
    assert program_folder_of_scripts() == str(tmp_path / "closed" / "open" / "programs")


def test_the_cache_at_home_is_made_for_its_user_alone(tmp_path, monkeypatch):
    monkeypatch.delenv("DYDIT_JAX_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = pathlib.Path(program_folder_of_scripts())
    assert folder == tmp_path / ".cache" / "dydit-jax" / "programs"
    assert {path.stat().st_mode & 0o777 for path in (folder, *folder.parents[:2])} == {0o700}


def test_a_group_is_ones_own_where_it_bears_ones_name_and_has_nobody_else(monkeypatch):
    groups = {1: ("me", []), 2: ("me", ["me"]), 3: ("me", ["me", "you"]), 4: ("staff", [])}
    monkeypatch.setattr(cache.pwd, "getpwuid", lambda uid: types.SimpleNamespace(pw_name="me"))
    found = lambda gid: types.SimpleNamespace(gr_name=groups[gid][0], gr_mem=groups[gid][1])
    monkeypatch.setattr(cache.grp, "getgrgid", found)
    assert [cache._is_own_group(gid) for gid in range(1, 6)] == [True, True, False, False, False]


def test_a_folder_that_cannot_be_written_costs_only_the_file(program_folder, caplog):
    program_folder.write_text("a file where the folder should be")
    x = np.ones(2, np.float32)
    np.testing.assert_array_equal(made(describe_call(scaled, (x,), dict(factor=7)))(x)["scaled"], [7, 7])
    assert f"Compiled programs are not kept in {program_folder}" in caplog.text


def test_what_cannot_be_written_runs_all_the_same(program_folder, monkeypatch):
    def refuse(program):
        raise jax.errors.JaxRuntimeError("UNIMPLEMENTED: a sort is not serializable")  # as a CPU says of some

    monkeypatch.setattr(serialize_executable, "serialize", refuse)
    x = np.ones(2, np.float32)
    np.testing.assert_array_equal(made(describe_call(scaled, (x,), dict(factor=9)))(x)["scaled"], [9, 9])
    assert not program_folder.exists()


def test_calls_of_one_name_are_one_program_and_errors_reach_the_caller(program_folder):
    x = np.ones(2, np.float32)
    two, three = (describe_call(scaled, (x,), dict(factor=factor)) for factor in (2, 3))
    with compiled_ahead([two, three, two]) as programs:
        programs = list(programs)
        assert not concurrent.futures.wait(programs, timeout=60).not_done  # all of them, before the first has run
        assert [float(run.result()(x)["scaled"][0]) for run in programs] == [2, 3, 2]
    assert len(list(program_folder.iterdir())) == 2
    broken = dataclasses.replace(two, name="broken", lower=forbidden)
    with compiled_ahead([three, broken]) as programs:
        next(programs).result()
        with pytest.raises(AssertionError, match="compiled although"):
            next(programs).result()


def test_options_that_this_xla_does_not_know_are_left_out_and_told_once(monkeypatch, caplog):
    monkeypatch.setattr("dydit_jax.runtime.aot.OPTIONS", {"cpu": {"xla_of_the_past": 1}})
    lowered = jax.jit(lambda x: 2 * x).lower(np.ones(2))
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            np.testing.assert_array_equal(compile_for("cpu", lowered)(np.ones(2)), [2, 2])
    assert "xla_of_the_past" in caplog.text and len(caplog.records) == 1


@pytest.mark.parametrize("devices", [pytest.param(1, marks=pytest.mark.slow), 4])
def test_images_of_a_second_start_are_those_of_the_first(devices, tiny, program_folder, monkeypatch):
    model, params = tiny
    settings = dict(sampling=SamplingConfig(sampler="ddim", steps="6", guidance=2.0), process=Diffusion())
    mesh = make_mesh(MeshConfig(data=devices)) if devices > 1 else None
    draw = lambda: runs.draw(model, params, [0, 1, 2, 3], mesh=mesh, **settings)
    first = draw()
    assert len(list(program_folder.iterdir())) == 2
    compiled.cache_clear()
    monkeypatch.setattr(
        runner,
        "describe_call",
        lambda *described, **code: dataclasses.replace(describe_call(*described, **code), lower=forbidden),
    )
    np.testing.assert_array_equal(draw().images, first.images)
