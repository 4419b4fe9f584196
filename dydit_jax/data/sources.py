"""Where training examples come from: random access by index, one source per dataset.

A source has a length, its shape, and gives example i as {"image": float32 [side,side,C] in [-1, 1] or a latent,
"label": int32}. Batches are a pure function of seed and step: resuming needs the step alone.
"""

import dataclasses

import grain
import numpy as np

from dydit_jax.errors import InputError, require_known

DIGITS_HELD_OUT = 360


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Which examples, in which order.

    Attributes:
      name: a key of `SOURCES`.
      batch_size: B over all devices and processes.
      seed: of the order.
      threads: that read ahead, per process; 0 reads when asked.
    """

    name: str
    batch_size: int
    seed: int = 0
    threads: int = 2

    def __post_init__(self):
        require_known("dataset", self.name, SOURCES)
        if self.batch_size < 1 or self.threads < 0:
            raise InputError(f"data.batch_size must be at least 1 and data.threads at least 0: {self}.")


def digits(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Return scikit-learn's handwritten digits, 8x8 with 17 grey levels.

    Args:
      split: "train" (1437 images) or "test" (360), stratified and always the same.

    Returns:
      Images float32 [n,8,8,1] in [-1, 1] and labels int32 [n].
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data = load_digits()
    images = (data.images[..., None] / 8 - 1).astype(np.float32)
    labels = data.target.astype(np.int32)
    train_images, test_images, train_labels, test_labels = train_test_split(
        images, labels, test_size=DIGITS_HELD_OUT, random_state=0, stratify=labels
    )
    return (train_images, train_labels) if split == "train" else (test_images, test_labels)


class Digits:
    """The training split of scikit-learn's digits."""

    def __init__(self, model):
        self.images, self.labels = digits("train")
        _require_shape("digits", self.images.shape[1:], 10, model)

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return {"image": self.images[index], "label": self.labels[index]}


class Synthetic:
    """Gaussian noise and random labels in the model's shape: for timing, never for training."""

    def __init__(self, model):
        self.shape, self.classes = (model.side, model.side, model.channels), model.classes

    def __len__(self):
        return 4096

    def __getitem__(self, index):
        generator = np.random.default_rng(index)
        image = generator.standard_normal(self.shape, np.float32)
        return {"image": image, "label": np.int32(generator.integers(self.classes))}


SOURCES = {"digits": Digits, "synthetic": Synthetic}


def _require_shape(name: str, shape: tuple[int, ...], classes: int, model) -> None:
    wanted = (model.side, model.side, model.channels)
    if shape != wanted or classes != model.classes:
        raise InputError(
            f"Dataset {name} has images {shape} and {classes} classes; the model is made for {wanted} and "
            f"{model.classes}. Set model.side, model.channels and model.classes."
        )


def batches(config: DataConfig, model, *, start: int):
    """Iterate over the global batches from step `start` on, endlessly.

    Args:
      config: which examples and how many at once.
      model: the model's config, for its input's shape.
      start: the first step's number.

    Returns:
      An iterator of {"image": [B,side,side,C], "label": [B]}; every epoch is shuffled anew.
    """
    source = SOURCES[config.name](model)
    dataset = grain.MapDataset.source(source).seed(config.seed).shuffle().repeat().batch(config.batch_size)
    options = grain.ReadOptions(num_threads=config.threads, prefetch_buffer_size=4 * config.threads)
    return iter(dataset[start:].to_iter_dataset(options))
