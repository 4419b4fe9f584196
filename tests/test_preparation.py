"""Pictures are packed once: exactly, again after a kill, and verifiably."""

import json
import os

import numpy as np
import pytest
from conftest import changed
from stand_ins import mean_for_autoencoder, small_autoencoder, write_pictures

from dydit_jax.checkpoints import read_autoencoder_config, save_autoencoder
from dydit_jax.data.batches import batches, examples
from dydit_jax.data.latent_files import LatentFiles
from dydit_jax.data.sources import DataConfig, open_source
from dydit_jax.errors import InputError
from dydit_jax.jobs import prepare_latents as preparation
from dydit_jax.jobs.latents_folder import read_journals
from dydit_jax.jobs.prepare_latents import LatentsRequest, prepare_latents, verify_latents
from dydit_jax.jobs.sample import Request, sample
from dydit_jax.jobs.train import train_and_evaluate
from dydit_jax.jobs.training_data import open_training_data
from dydit_jax.models.autoencoder import AutoencoderConfig
from dydit_jax.models.config import DiTConfig
from dydit_jax.runtime.files import write_json
from dydit_jax.training.experiment import read_experiment

COUNT = 10


@pytest.fixture
def folder(tmp_path):
    return write_pictures(tmp_path / "pictures", COUNT)


@pytest.fixture
def encoded():
    """Put a plain mean in the autoencoder's place; returns how many images it was given."""
    with mean_for_autoencoder() as given:
        yield given


def request(folder, out, **settings):
    settings = dict(dict(side=16, chunk=4, autoencoder="vae"), **settings)
    return LatentsRequest(str(out), str(folder), **settings)


def test_latents_are_those_of_the_pictures_and_their_mirror_images(folder, encoded, tmp_path):
    out = prepare_latents(request(folder, tmp_path / "out"))
    moments, labels = np.load(out / "moments.npy"), np.load(out / "labels.npy")
    assert moments.shape == (COUNT, 2, 2, 2, 8) and moments.dtype == np.float16
    assert labels.tolist() == [0] * 5 + [1] * 5
    np.testing.assert_allclose(moments[:, 0, :, 0], moments[:, 1, :, 1], atol=1e-3)  # mirrored
    verify_latents(out)
    again = prepare_latents(request(folder, tmp_path / "out"))  # nothing left to do
    assert again == out and sum(encoded) == 2 * COUNT
    model = DiTConfig(depth=1, width=32, heads=2, patch=1, side=2, channels=4, classes=2)
    source = open_source(DataConfig(name="latents", path=str(out), batch_size=1), model)
    assert source.autoencoder == "vae" and len(source) == COUNT
    for image, mean in zip(examples(source, count=COUNT)["image"], moments[..., :4].astype(np.float32)):
        assert min(np.abs(image - 0.18215 * view).max() for view in mean) < 1e-4


def test_killed_job_goes_on_where_it_was(folder, encoded, tmp_path, monkeypatch):
    whole = prepare_latents(request(folder, tmp_path / "whole"))
    encode, calls = preparation.encode_moments, []

    def dies(*arguments):
        calls.append(1)
        if len(calls) > 3:  # in the middle of the second chunk
            raise KeyboardInterrupt
        return encode(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(preparation, "encode_moments", dies)
        prepare_latents(request(folder, tmp_path / "parts"))
    assert not (tmp_path / "parts" / "moments.npy").exists()
    with (tmp_path / "parts" / "progress-0.jsonl").open("a") as journal:
        journal.write('{"first": 4, "sha')  # a line that the kill has cut
    (tmp_path / "parts" / "job.json.0123.partial").write_text("{")  # and a file that it has cut
    encoded.clear()
    prepare_latents(request(folder, tmp_path / "parts"))
    assert sum(encoded) == 2 * (COUNT - 4)
    assert contents(tmp_path / "parts") == contents(whole)


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def half(folder, encoded, tmp_path, monkeypatch):
    """A job that was killed in its third chunk: (its folder, what a whole one holds)."""
    whole = contents(prepare_latents(request(folder, tmp_path / "whole")))
    write = preparation.Arrays.write

    def dies(self, first, *rows):
        if first == 8:
            raise KeyboardInterrupt
        write(self, first, *rows)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(preparation.Arrays, "write", dies)
        prepare_latents(request(folder, tmp_path / "half"))
    encoded.clear()
    return tmp_path / "half", whole


def end_journal(out, text: str):
    (out / "progress-0.jsonl").write_text(text)


def garble_last_line(out):
    path = out / "progress-0.jsonl"
    first, last = path.read_text().splitlines()
    path.write_bytes(f"{first}\n".encode() + b"\xff\x00{" + last.encode()[4:])


def damage_last_chunk(out):
    moments = np.load(out / "moments.npy.partial", mmap_mode="r+")
    moments[7, 0, 0, 0, 0] += 1
    moments.flush()


@pytest.mark.parametrize(
    ("damage", "made_again"),
    [
        (lambda out: end_journal(out, ""), 10),
        (lambda out: end_journal(out, '[]\n{"first": true}\n{"first": 0}\nnull\n' + "[" * 10_000), 10),
        (lambda out: end_journal(out, '{"first": 3, "sha256": ""}\n'), 10),
        (garble_last_line, 6),
        (damage_last_chunk, 6),
    ],
    ids=["empty", "strange", "another job's", "garbled", "damaged chunk"],
)
def test_what_a_journal_does_not_vouch_for_is_made_again(half, folder, encoded, damage, made_again):
    out, whole = half
    damage(out)
    prepare_latents(request(folder, out))
    assert sum(encoded) == 2 * made_again and contents(out) == whole


@pytest.mark.parametrize("content", [b"", b'{"source": "im', b"[]"])
def test_damaged_description_is_one_line(half, folder, content):
    out, _ = half
    (out / "job.json").write_bytes(content)
    with pytest.raises(InputError, match=r"job.json .*; remove .*half and start again") as raised:
        prepare_latents(request(folder, out))
    assert "\n" not in str(raised.value)


def test_full_disk_is_one_line_and_the_job_goes_on_after_it(half, folder, encoded, monkeypatch):
    out, whole = half

    def full(number):
        if os.path.sameopenfile(number, moments.fileno()):
            raise OSError(28, "No space left on device")

    moments = (out / "moments.npy.partial").open("rb")
    with monkeypatch.context() as patch, moments, pytest.raises(InputError, match="moments.npy.partial .No space left"):
        patch.setattr(os, "fsync", full)
        prepare_latents(request(folder, out))
    encoded.clear()
    prepare_latents(request(folder, out))
    assert sum(encoded) == 2 * 2 and contents(out) == whole


@pytest.mark.parametrize("value", [np.nan, -np.inf, 7e4])
def test_latents_that_are_not_finite_are_not_written(folder, encoded, tmp_path, monkeypatch, value):
    encode, out = preparation.encode_moments, tmp_path / "out"

    def spoil(*arguments):
        moments = encode(*arguments)
        if len(encoded) == 4:  # the mirror images of the second chunk
            moments.mean[2, 1, 0, 3] = value
        return moments

    with (
        monkeypatch.context() as patch,
        pytest.raises(InputError, match="of picture 6 are not finite.* autoencoder vae"),
    ):
        patch.setattr(preparation, "encode_moments", spoil)
        prepare_latents(request(folder, out))
    assert list(read_journals(out)) == [0]
    prepare_latents(request(folder, out))  # with weights that are whole
    assert np.isfinite(np.load(out / "moments.npy")).all()


def info_of(out) -> dict:
    return json.loads((out / "info.json").read_text())


def test_mean_and_deviation_are_those_of_the_latents_for_any_chunks(folder, encoded, tmp_path):
    out = prepare_latents(request(folder, tmp_path / "out"))
    mean, log_variance = np.split(np.load(out / "moments.npy").astype(np.float64).reshape(-1, 8), 2, axis=-1)
    info = info_of(out)
    np.testing.assert_allclose(info["mean"], mean.mean(0), rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(info["std"], np.sqrt(mean.var(0) + np.exp(log_variance).mean(0)), rtol=1e-12)
    assert (info["scale"], info["shift"]) == ([0.18215], [0.0])
    other = info_of(prepare_latents(request(folder, tmp_path / "other", chunk=3)))
    np.testing.assert_allclose((other["mean"], other["std"]), (info["mean"], info["std"]), rtol=1e-12)


def test_statistics_of_chunks_from_before_are_read_from_the_latents(folder, half):
    out, whole = half
    journal = out / "progress-0.jsonl"
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    lines[0].pop("sums")
    lines[1]["sums"] = [[1.0]]
    journal.write_text("".join(json.dumps(line) + "\n" for line in lines))
    prepare_latents(request(folder, out))
    assert contents(out) == whole


@pytest.mark.parametrize("keys", [(), ("mean", "std", "scale", "shift", "autoencoder_record")], ids=["new", "old"])
def test_normalised_latents_have_an_autoencoder_of_their_own(folder, encoded, tmp_path, keys):
    out = prepare_latents(request(folder, tmp_path / "out"))
    info = info_of(out)
    write_json(out / "info.json", {key: value for key, value in info.items() if key not in keys})
    assert opened(out).record == AutoencoderConfig()
    before = opened(out).fingerprint
    prepare_latents(request(folder, out, normalize=True))  # it was finished: nothing is encoded again
    assert sum(encoded) == 2 * COUNT
    source, own = opened(out), str(out / "autoencoder.safetensors")
    record = read_autoencoder_config(own)
    assert source.autoencoder == own and source.record == record and source.fingerprint != before
    assert record.scale == tuple(1 / value for value in info["std"]) and record.shift == tuple(info["mean"])
    # The stand-in's latents have next to no variance of their own.
    drawn = np.concatenate([record.to_model(source[index]["moments"][..., :4].astype(float)) for index in range(COUNT)])
    np.testing.assert_allclose(drawn.mean((0, 1, 2)), 0, atol=1e-6)
    np.testing.assert_allclose(drawn.std((0, 1, 2)), 1, rtol=1e-5)
    normalised = contents(out)
    prepare_latents(request(folder, out))
    assert contents(out) == normalised


def test_training_refuses_latents_of_another_record(folder, encoded, tmp_path):
    path = str(tmp_path / "vae.safetensors")
    out = prepare_latents(request(folder, tmp_path / "out", autoencoder=path))
    config = dict(
        model=dict(depth=1, width=32, heads=2, patch=1, side=2, channels=4, classes=2),
        data=dict(name="latents", path=str(out), batch_size=8),
        optimizer=dict(learning_rate=1e-3),
        train=dict(steps=1),
        sampling=dict(autoencoder=path),
    )
    open_training_data(read_experiment(config))  # the file is not here, so nothing contradicts
    save_autoencoder(path, small_autoencoder(), {})
    assert open_training_data(read_experiment(config)).record == AutoencoderConfig()
    save_autoencoder(path, small_autoencoder(scale=(0.5,), shift=(1.0, 2.0, 3.0, 4.0)), {})
    with pytest.raises(
        InputError, match="used with scale 0.18215 and shift 0.0; .* has 0.5 and 1.0, 2.0, 3.0, 4.0. Name"
    ):
        open_training_data(read_experiment(config))
    # One that has moved is known by its weights.
    moved = changed(config, sampling=dict(autoencoder=str(tmp_path / "moved.safetensors")))
    save_autoencoder(tmp_path / "moved.safetensors", small_autoencoder(), {})
    open_training_data(read_experiment(moved))
    write_json(out / "info.json", info_of(out) | dict(autoencoder_checksum="0"))
    with pytest.raises(InputError, match="are of .*vae.safetensors, but sampling.autoencoder is .*moved"):
        open_training_data(read_experiment(moved))
    save_autoencoder(path, small_autoencoder(channels=16), {})
    with pytest.raises(InputError, match="The model draws 4 channels, but the latents of the autoencoder .* have 16"):
        open_training_data(read_experiment(config))


@pytest.mark.slow
def test_a_model_of_16_channels_and_factor_16_is_trained_on_pictures_and_sampled(folder, tmp_path):
    path = str(tmp_path / "vae.safetensors")
    save_autoencoder(path, small_autoencoder(channels=16, widths=(32,) * 5, scale=(0.5,), shift=(0.1,)), {})
    config = dict(
        model=dict(depth=1, width=32, heads=2, patch=1, side=2, channels=16, classes=2),
        data=dict(name="images", path=str(folder), batch_size=8),
        optimizer=dict(learning_rate=1e-3),
        train=dict(steps=2, ema_decay=0.5),
        sampling=dict(sampler="ddim", steps="2", autoencoder=path),
        tracking=dict(every_steps=1, samples_every_steps=2, sample_labels=(0, 1)),
    )
    train_and_evaluate(config, tmp_path / "run")
    assert np.load(tmp_path / "run.latents" / "moments.npy").shape == (COUNT, 2, 2, 2, 32)
    sample(Request(str(tmp_path / "run"), str(tmp_path / "out"), num_images=4))
    assert np.load(tmp_path / "out" / "samples.npz")["arr_0"].shape == (4, 32, 32, 3)


LATENTS_MODEL = DiTConfig(depth=1, width=32, heads=2, patch=1, side=2, channels=4, classes=2)


def opened(out):
    return open_source(DataConfig(name="latents", path=str(out), batch_size=1), LATENTS_MODEL)


@pytest.mark.parametrize("name", ["moments.npy", "labels.npy", "checksums.npy"])
def test_every_flipped_bit_of_an_example_is_noticed_as_it_is_read(folder, encoded, tmp_path, name):
    out = prepare_latents(request(folder, tmp_path / "out"))
    path = out / name
    whole, offset = path.read_bytes(), np.load(path, mmap_mode="r").offset
    size = (len(whole) - offset) // COUNT
    for bit in range(offset * 8, len(whole) * 8, 67):  # odd, so that every place within a byte has its turn
        content = bytearray(whole)
        content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)
        damaged = (bit // 8 - offset) // size
        files = LatentFiles(out)
        with pytest.raises(InputError, match=f"moments.npy is damaged at example {damaged}:"):
            files.read(damaged)
        files.read((damaged + 1) % COUNT)
    with pytest.raises(InputError, match=f"is damaged at example {damaged}"):
        verify_latents(out)


def test_damage_ends_a_training_with_the_file_named(folder, encoded, tmp_path):
    out = prepare_latents(request(folder, tmp_path / "out"))
    moments = np.load(out / "moments.npy", mmap_mode="r+")
    moments[:, 1] += 1
    moments.flush()
    config = DataConfig(name="latents", path=str(out), batch_size=2)
    with pytest.raises(InputError, match="moments.npy is damaged at example"):
        next(batches(open_source(config, LATENTS_MODEL), config, start=0))


def test_latents_without_checksums_are_read_with_a_word(folder, encoded, tmp_path, caplog):
    out = prepare_latents(request(folder, tmp_path / "out"))
    (out / "checksums.npy").unlink()
    caplog.set_level("INFO")
    np.testing.assert_array_equal(opened(out)[3]["moments"], np.load(out / "moments.npy")[3])
    assert "has no checksums.npy: damage to its latents goes unnoticed" in caplog.text


def cut_while_open(out):
    source = opened(out)
    os.truncate(out / "moments.npy", 1000)
    return source[COUNT - 1]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda out: os.truncate(out / "moments.npy", 1000), "moments.npy is missing, cut short or no .npy file"),
        (lambda out: (out / "labels.npy").write_bytes(b""), "labels.npy is missing, cut short or no .npy file"),
        (lambda out: (out / "labels.npy").write_bytes(b"\x93NUMPY\x01\x00\x04\x00{'(\n"), "labels.npy is missing, cut"),
        (lambda out: np.save(out / "labels.npy", np.zeros(3, np.int32)), r"holds moments .* and 3 labels"),
        (lambda out: np.save(out / "checksums.npy", np.zeros(3, np.uint32)), "checksums.npy is of other latents"),
        (lambda out: (out / "info.json").write_text('{"chunks"'), "info.json is damaged or cut short"),
        (cut_while_open, "moments.npy is cut short before example 9"),
    ],
)
def test_damaged_files_are_one_line(folder, encoded, tmp_path, damage, message):
    out = prepare_latents(request(folder, tmp_path / "out"))
    with pytest.raises(InputError, match=message) as raised:
        damage(out)
        opened(out)
    assert "\n" not in str(raised.value)


def test_chunks_are_made_where_no_process_waits_for_the_others(folder, encoded, tmp_path, monkeypatch):
    waiting, depths, make = [], [], preparation._make_chunks

    def agree(action):
        waiting.append(action)
        return (action(), waiting.pop())[0]

    monkeypatch.setattr(preparation, "on_all_processes", agree)
    monkeypatch.setattr(preparation, "_make_chunks", lambda *given: (depths.append(len(waiting)), make(*given)))
    prepare_latents(request(folder, tmp_path / "out"))
    assert depths == [0]


def test_damage_and_other_jobs_are_noticed(folder, encoded, tmp_path):
    out = prepare_latents(request(folder, tmp_path / "out"))
    prepare_latents(request(folder, out, autoencoder="another name of it"))  # of the same weights
    with pytest.raises(InputError, match=r"made otherwise \(side differ\); name another --out"):
        prepare_latents(request(folder, out, side=24))
    moments = np.lib.format.open_memmap(out / "moments.npy", "r+")
    moments[5, 0, 0, 0, 0] += 1
    moments.flush()
    with pytest.raises(InputError, match="damaged at example 5"):
        verify_latents(out)
    (out / "checksums.npy").unlink()
    with pytest.raises(InputError, match="damaged: pictures 4 to 7"):
        verify_latents(out)
    with pytest.raises(InputError, match="is not finished"):
        verify_latents(folder)
    with pytest.raises(InputError, match="is not empty and has no info.json or job.json"):
        prepare_latents(request(folder, folder))
    with pytest.raises(InputError, match="--side must be a multiple of 8"):
        request(folder, out, side=20)
    for name, value in (("side", 8 * 10**9), ("chunk", 10**9), ("threads", 10**5), ("chunk", 0), ("max_bad", -1)):
        with pytest.raises(InputError, match=f"--{name} must be .*, not {value}"):
            request(folder, out, **{name: value})
    with pytest.raises(InputError, match="a bucket mounted as one"):
        request(folder, "gs://bucket/latents")
    config = dict(
        model=dict(depth=1, width=32, heads=2, patch=1, side=2, channels=4, classes=2),
        data=dict(name="latents", path=str(out), batch_size=8),
        optimizer=dict(learning_rate=1e-3),
        train=dict(steps=1),
        sampling=dict(autoencoder="another"),
    )
    with pytest.raises(InputError, match="are of vae, but sampling.autoencoder is another"):
        train_and_evaluate(config, tmp_path / "run")
