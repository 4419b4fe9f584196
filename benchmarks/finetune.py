"""Digits that a model has not seen: the steps that training takes from its weights, and from nothing.

    python benchmarks/finetune.py --runs runs/finetune --out docs/finetune.json

A static DiT is trained on folders of the digits 0 to 4. Then the same model is trained on folders of 5 to 9, once from
these weights with new rows for its classes, once from nothing: for a few steps, in which the learning rate falls to 0,
then for more, each a training of its own, until the EMA's images reach the accuracy. There are 100 of each class,
judged as in benchmarks/digits.py.
"""

import json
import platform
import sys
import time

import jax
import numpy as np
from absl import flags
from etils import epath
from judge import Judge
from PIL import Image

from dydit_jax.configs import digits_dit
from dydit_jax.data.sources import digits
from dydit_jax.drawing.pictures import to_uint8
from dydit_jax.jobs.train import train_and_evaluate
from dydit_jax.pipeline import Pipeline
from dydit_jax.runtime.console import run

RUNS = flags.DEFINE_string("runs", "runs/finetune", "Folder of the pictures and the work directories.")
OUT = flags.DEFINE_string("out", "docs/finetune.json", "File for the results.")
SOURCE_STEPS = flags.DEFINE_integer("source_steps", 2000, "Steps of training on the digits 0 to 4.")
MOST_STEPS = flags.DEFINE_integer("most_steps", 2000, "Steps after which a training on 5 to 9 is given up.")
EVERY_STEPS = flags.DEFINE_integer("every_steps", 200, "Steps that the next training has more.")
NUM_IMAGES = flags.DEFINE_integer("num_images", 500, "Images of a training.")
SEEDS = flags.DEFINE_list("seeds", ["0"], "Seeds of the trainings.")

ACCURACY = 0.95
SEEN, UNSEEN = range(0, 5), range(5, 10)


def write_folders(name: str, wanted: range) -> str:
    """Write the training digits of some classes as a folder of class folders; returns it."""
    folder = epath.Path(RUNS.value) / name
    images, labels = digits("train")
    for index, (pixels, label) in enumerate(zip(to_uint8(images), labels)):
        if label in wanted:
            place = folder / str(label)
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels[..., 0]).save(place / f"{index:04d}.png")
    return str(folder)


def config_of(pictures: str, *, steps: int, seed: int, init_from: str = "") -> dict:
    """Return the config of a training on a folder of class folders."""
    config = digits_dit.get_config()
    config.model.classes = -1
    config.data.update(name="images", path=pictures, flip=False, seed=seed, batch_size=32)
    config.optimizer.decay_steps = steps
    config.train.update(steps=steps, seed=seed, ema_decay=0.99, init_from=init_from)
    return config.to_dict()


def accuracy_of(workdir: str, judge: Judge) -> float:
    """Draw digits 5 to 9 from a run's EMA and return the share that the judge takes for what they should be."""
    pipe = Pipeline.load(workdir)
    labels = np.arange(NUM_IMAGES.value) % len(UNSEEN)
    seen = pipe(labels, steps="25", mode="complete").pixels.astype(np.float32) / 127.5 - 1
    return judge.measure(seen, labels + UNSEEN[0])["accuracy"]


def find_steps(name: str, pictures: str, judge: Judge, *, seed: int, init_from: str) -> list[dict]:
    """Train longer and longer until the accuracy is reached; returns steps and accuracy of every training.

    They are kept beside the work directories: a study that was stopped goes on.
    """
    folder = f"{RUNS.value}/{name.replace(' ', '_')}_{seed}"
    kept = epath.Path(f"{folder}.trainings.json")
    trainings = json.loads(kept.read_text()) if kept.exists() else []
    for steps in range(EVERY_STEPS.value * (len(trainings) + 1), MOST_STEPS.value + 1, EVERY_STEPS.value):
        if trainings and trainings[-1]["accuracy"] >= ACCURACY:
            break
        workdir = f"{folder}_{steps}"
        train_and_evaluate(config_of(pictures, steps=steps, seed=seed, init_from=init_from), workdir)
        trainings.append(dict(steps=steps, accuracy=accuracy_of(workdir, judge)))
        kept.write_text(json.dumps(trainings))
        sys.stderr.write(f"{name}, seed {seed}: {trainings[-1]}\n")
    return trainings


def main():
    judge, results = Judge(), []
    seen, unseen = write_folders("seen", SEEN), write_folders("unseen", UNSEEN)
    for seed in map(int, SEEDS.value):
        source = f"{RUNS.value}/source_{seed}"
        train_and_evaluate(config_of(seen, steps=SOURCE_STEPS.value, seed=seed), source)
        for name, init_from in (("fine-tuned", source), ("from nothing", "")):
            trainings = find_steps(name, unseen, judge, seed=seed, init_from=init_from)
            results.append(dict(start=name, seed=seed, trainings=trainings))
    about = dict(
        command="python " + " ".join(sys.argv),
        machine=f"{platform.machine()}, {jax.devices()[0].device_kind}, {jax.device_count()} device",
        date=time.strftime("%Y-%m-%d"),
        images=NUM_IMAGES.value,
    )
    epath.Path(OUT.value).write_text(json.dumps(dict(about, results=results), indent=1) + "\n")
    for row in results:
        last = row["trainings"][-1]
        sys.stdout.write(
            f"{row['start']}, seed {row['seed']}: accuracy {last['accuracy']:.3f} in {last['steps']} steps\n"
        )


if __name__ == "__main__":
    run(main)
