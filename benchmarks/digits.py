"""Train the three digits models and let an independent judge measure them.

    python benchmarks/digits.py --runs runs --out docs/digits.json

Runs that are there already are continued or reused. Measured on 1000 images per model, 100 of each class: accuracy of a
classifier trained on the real digits, Fréchet distance in its features to the real training digits, and MACs. The judge
is scikit-learn's and shares nothing with the models.
"""

import dataclasses
import json
import platform
import subprocess
import sys
import time

import jax
import numpy as np
from absl import flags
from etils import epath
from sklearn.neural_network import MLPClassifier

from dydit_jax.build import build_model
from dydit_jax.console import run
from dydit_jax.data.sources import digits
from dydit_jax.generate import generate, to_uint8
from dydit_jax.loading import load_checkpoint
from dydit_jax.metrics.distances import frechet_distance, moments
from dydit_jax.sharding import MeshConfig, make_mesh

RUNS = flags.DEFINE_string("runs", "runs", "Folder of the three work directories.")
OUT = flags.DEFINE_string("out", "docs/digits.json", "File for the results.")
NUM_IMAGES = flags.DEFINE_integer("num_images", 1000, "Images per model and guidance.")
SEEDS = flags.DEFINE_list("seeds", ["0", "1"], "Seeds of the sampling noise.")

MODELS = ("digits_dit", "digits_dydit", "digits_control")


class Judge:
    """A classifier of real digits; its last hidden layer gives the features."""

    def __init__(self):
        images, labels = digits("train")
        self._network = MLPClassifier((128, 64), alpha=1e-2, max_iter=300, random_state=0)
        self._network.fit(images.reshape(len(images), -1), labels)
        self._real = moments(self.features(images))

    def features(self, images) -> np.ndarray:
        """Return the activations of the last hidden layer [n,64]."""
        hidden = images.reshape(len(images), -1)
        for weight, bias in list(zip(self._network.coefs_, self._network.intercepts_))[:-1]:
            hidden = np.maximum(hidden @ weight + bias, 0)
        return hidden

    def measure(self, images, labels) -> dict:
        """Return accuracy and distance of images float32 [n,8,8,1] in [-1, 1]."""
        predicted = self._network.predict(images.reshape(len(images), -1))
        return dict(
            accuracy=float((predicted == labels).mean()),
            distance=frechet_distance(*moments(self.features(images)), *self._real),
        )


def train(name: str, folder: epath.Path) -> float:
    """Run train.py to its end; returns the seconds it took (little, if the run was complete)."""
    began = time.monotonic()
    overrides = [] if name == "digits_dit" else [f"--config.train.init_from={folder / MODELS[0]}"]
    command = [sys.executable, "train.py", f"--config=configs/{name}.py", f"--workdir={folder / name}", *overrides]
    subprocess.run(command, check=True)
    return time.monotonic() - began


def measure(name: str, folder: epath.Path, judge: Judge, guidance: float, seed: int) -> dict:
    """Sample one model and let the judge see what a PNG would hold."""
    weights = load_checkpoint(folder / name)
    labels = np.arange(NUM_IMAGES.value) % 10
    mesh = make_mesh(MeshConfig())
    with jax.set_mesh(mesh):
        model = build_model(weights.model, precision="float32", mesh=mesh)
        samples = generate(
            model,
            weights.params,
            labels,
            sampling=dataclasses.replace(weights.sampling, guidance=guidance),
            diffusion=weights.diffusion,
            seed=seed,
            mode="gated",  # each call has its own weights: compiling segments would take longer than sampling
        )
    macs = weights.model.macs
    blocks = macs.layers * (macs.attention + macs.mlp)
    ratio = (samples.macs.mean() - macs.fixed - macs.routers) / blocks if weights.model.routers != "none" else 1.0
    seen = to_uint8(samples.images).astype(np.float32) / 127.5 - 1
    return dict(
        judge.measure(seen, labels),
        model=name,
        guidance=guidance,
        seed=seed,
        macs=float(samples.macs.mean()),
        mac_ratio=float(ratio),
        sampler=weights.sampling.sampler,
        steps=weights.sampling.steps,
    )


def main():
    folder = epath.Path(RUNS.value)
    seconds = {name: train(name, folder) for name in MODELS}
    judge = Judge()
    test_images, test_labels = digits("test")
    results = [
        measure(name, folder, judge, guidance, int(seed))
        for name in MODELS
        for guidance in (1.0, 2.0)
        for seed in SEEDS.value
    ]
    report = dict(
        command=" ".join(sys.argv),
        machine=f"{platform.machine()}, {jax.devices()[0].device_kind}, {jax.device_count()} device",
        date=time.strftime("%Y-%m-%d"),
        images=NUM_IMAGES.value,
        real_test_digits=judge.measure(test_images, test_labels),
        seconds=seconds,
        results=results,
    )
    epath.Path(OUT.value).write_text(json.dumps(report, indent=2) + "\n")
    for row in results:
        sys.stdout.write(
            f"{row['model']:15s} guidance {row['guidance']:.0f} seed {row['seed']}: accuracy {row['accuracy']:.3f}  "
            f"distance {row['distance']:.3f}  MAC ratio {row['mac_ratio']:.3f}\n"
        )


if __name__ == "__main__":
    run(main)
