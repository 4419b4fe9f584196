"""Where training examples come from: random access by index, one source per dataset.

A source has a length, its shape, and gives example i as {"image": float32 [side,side,C] in [-1, 1] or a latent,
"label": int32}. Batches are a pure function of seed and step: resuming needs the step alone.
"""

import dataclasses

import grain
import numpy as np
from etils import epath

from dydit_jax.errors import InputError, require_known
from dydit_jax.models.autoencoder import LATENT_SCALE

DIGITS_HELD_OUT = 360


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Which examples, in which order.

    Attributes:
      name: a key of `SOURCES`.
      path: folder of a dataset that lies in files, "" for the others.
      batch_size: B over all devices and processes.
      seed: of the order.
      threads: that read ahead, per process; 0 reads when asked.
    """

    name: str
    batch_size: int
    path: str = ""
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

    def __init__(self, config, model):
        self.images, self.labels = digits("train")
        _require_shape("digits", self.images.shape[1:], 10, model)

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return {"image": self.images[index], "label": self.labels[index]}


class Synthetic:
    """Gaussian noise and random labels in the model's shape: for timing, never for training."""

    def __init__(self, config, model):
        self.shape, self.classes = (model.side, model.side, model.channels), model.classes

    def __len__(self):
        return 4096

    def __getitem__(self, index):
        generator = np.random.default_rng(index)
        image = generator.standard_normal(self.shape, np.float32)
        return {"image": image, "label": np.int32(generator.integers(self.classes))}


class Latents:
    """Moments of an autoencoder, computed once and packed; every epoch draws flip and latent anew.

    <path>/moments.npy   [n,2,side,side,8], of the image and of its mirror image: mean, then log-variance
    <path>/labels.npy    integers [n]
    """

    def __init__(self, config, model):
        folder = epath.Path(config.path) if config.path else None
        if folder is None or not all((folder / name).is_file() for name in ("moments.npy", "labels.npy")):
            raise InputError(
                f"Dataset latents needs data.path, a folder with moments.npy and labels.npy, not {config.path!r}."
            )
        self.moments = np.load(folder / "moments.npy", mmap_mode="r")
        self.labels = np.load(folder / "labels.npy").astype(np.int32)
        shape = self.moments.shape
        if len(shape) != 5 or shape[1] != 2 or shape[0] != len(self.labels):
            raise InputError(
                f"{folder} holds moments {shape} and {len(self.labels)} labels; see `Latents` for the form."
            )
        _require_shape("latents", (*shape[2:4], shape[4] // 2), max(int(self.labels.max()) + 1, model.classes), model)

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return {"moments": self.moments[index], "label": self.labels[index]}

    @staticmethod
    def draw(example, generator: np.random.Generator):
        """Choose the image or its mirror image, and a latent from its Gaussian."""
        moments = np.asarray(example["moments"][generator.integers(2)], np.float32)
        mean, log_variance = np.split(moments, 2, axis=-1)
        noise = generator.standard_normal(mean.shape, np.float32)
        return {"image": LATENT_SCALE * (mean + np.exp(0.5 * log_variance) * noise), "label": example["label"]}


SOURCES = {"digits": Digits, "latents": Latents, "synthetic": Synthetic}


def _require_shape(name: str, shape: tuple[int, ...], classes: int, model) -> None:
    wanted = (model.side, model.side, model.channels)
    if shape != wanted or classes != model.classes:
        raise InputError(
            f"Dataset {name} has images {shape} and {classes} classes; the model is made for {wanted} and "
            f"{model.classes}. Set model.side, model.channels and model.classes."
        )


def examples(config: DataConfig, model, *, count: int) -> dict:
    """Return examples spread evenly over a dataset, the same at every call.

    Args:
      config: which dataset.
      model: the model's config, for its input's shape.
      count: how many; all of a smaller dataset.

    Returns:
      {"image": [n,side,side,C], "label": [n]}.
    """
    source = SOURCES[config.name](config, model)
    rows = []
    for index in np.unique(np.linspace(0, len(source) - 1, count).round().astype(int)):
        row = source[int(index)]
        rows.append(source.draw(row, np.random.default_rng(index)) if hasattr(source, "draw") else row)
    return {name: np.stack([row[name] for row in rows]) for name in ("image", "label")}


def batches(config: DataConfig, model, *, start: int):
    """Iterate over the global batches from step `start` on, endlessly.

    Args:
      config: which examples and how many at once.
      model: the model's config, for its input's shape.
      start: the first step's number.

    Returns:
      An iterator of {"image": [B,side,side,C], "label": [B]}; every epoch is shuffled anew.
    """
    source = SOURCES[config.name](config, model)
    dataset = grain.MapDataset.source(source).seed(config.seed).shuffle().repeat()
    if hasattr(source, "draw"):
        # Before any slicing by process, so that the draws belong to the global batch.
        dataset = dataset.random_map(source.draw)
    dataset = dataset.batch(config.batch_size)
    options = grain.ReadOptions(num_threads=config.threads, prefetch_buffer_size=4 * config.threads)
    return iter(dataset[start:].to_iter_dataset(options))
