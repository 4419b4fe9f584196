"""One device, as in a laptop, or one GPU or TPU, does what four do."""

import csv
import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from conftest import ROOT
from every_job import do_every_job
from PIL import Image

ROUNDING = 1  # of 255: other shapes of products may move a value across a rounding boundary


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Every job on one device and on all of these, at the same time."""
    one, all_of_them = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("all")
    process = subprocess.Popen(
        [sys.executable, ROOT / "tests" / "every_job.py", one],
        env=dict(os.environ, JAX_PLATFORMS="cpu", JAX_NUM_CPU_DEVICES="1", PYTHONPATH=str(ROOT)),
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        do_every_job(all_of_them)
        _, said = process.communicate(timeout=240)
    finally:
        process.kill()
    assert process.returncode == 0, said
    assert jax.device_count() == 4
    return one, all_of_them


def pixels(path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def test_training_leaves_the_same_measures_and_pictures(folders):
    ours, theirs = (
        [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()] for folder in folders
    )
    assert [line["step"] for line in ours] == [line["step"] for line in theirs] == [1, 2]
    for name in ("loss/total", "ema/macs_share", "ema/loss_t500"):
        np.testing.assert_allclose([line[name] for line in ours], [line[name] for line in theirs], rtol=1e-4)
    one, other = (pixels(folder / "run" / "samples" / "00000002.png") for folder in folders)
    assert np.abs(one - other).max() <= ROUNDING


def test_sampling_draws_the_same_images(folders):
    one, other = (np.load(folder / "set" / "samples.npz") for folder in folders)
    np.testing.assert_array_equal(one["labels"], other["labels"])
    assert one["arr_0"].shape == (6, 8, 8, 1)
    assert np.abs(one["arr_0"].astype(int) - other["arr_0"]).max() <= ROUNDING


def test_analysis_finds_the_same_losses(folders):
    one, other = (list(csv.DictReader((folder / "analysis" / "losses.csv").open())) for folder in folders)
    assert len(one) == len(other) == 3
    for ours, theirs in zip(one, other):
        np.testing.assert_allclose(float(ours["loss"]), float(theirs["loss"]), rtol=1e-4)
    assert (folders[0] / "analysis" / "report.html").is_file()


def test_preparation_packs_the_same_latents(folders):
    one, other = (np.load(folder / "latents" / "moments.npy") for folder in folders)
    assert one.shape == (6, 2, 2, 2, 8)
    np.testing.assert_array_equal(one, other)
