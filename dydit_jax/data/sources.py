"""Where training examples come from: random access by index, one source per dataset.

`DataSource` says what a source is; `batches` puts its examples in order.
"""

import dataclasses
import hashlib
import logging
import os
import reprlib
import threading
import typing
from collections.abc import Callable

import numpy as np

from dydit_jax.data.fitting import require_labels, require_shape
from dydit_jax.data.folders import list_class_folders
from dydit_jax.data.idx import WHERE_TO_GET, read_idx_split
from dydit_jax.data.images import center_crop, decode_image, read_picture
from dydit_jax.data.latent_files import CLASSES_KEY, LABELS_FILE, LATENTS_FILE, LatentFiles
from dydit_jax.data.prepared import open_prepared, read_example
from dydit_jax.errors import InputError
from dydit_jax.labels import spell_name
from dydit_jax.models.autoencoder import LOG_VARIANCE_RANGE, AutoencoderConfig
from dydit_jax.records import require_range
from dydit_jax.registry import Registry, is_built_in, require_array
from dydit_jax.runtime.files import locate
from dydit_jax.runtime.seeds import require_seed

DIGITS_HELD_OUT = 360
MOST_BATCH, MOST_THREADS = 2**20, 1024  # far beyond what anyone uses; a slip of the keyboard takes all memory

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Which examples, in which order.

    Attributes:
      name: digits, idx, images, latents, synthetic or tfds, a key of `SOURCES`.
      path: of a dataset that lies in files, empty for the others; see the sources for what it names.
      batch_size: B over all devices and processes, at most `MOST_BATCH`.
      seed: seed of the order.
      threads: threads that read ahead, per process, at most `MOST_THREADS`; 0 reads when asked.
      max_bad: unreadable pictures that are replaced by their neighbours before the run stops.
      flip: show pictures and latents as their mirror images half of the time; off for writing and for faces. Digits are
        never mirrored.
      image_key: name of the picture in the examples of a tfds dataset.
      label_key: name of the class in them.
    """

    name: str
    batch_size: int
    path: str = ""
    seed: int = 0
    threads: int = 2
    max_bad: int = 100
    flip: bool = True
    image_key: str = "image"
    label_key: str = "label"

    def __post_init__(self):
        SOURCES.require("dataset", self.name)
        require_seed("data.seed", self.seed)
        require_range("data.batch_size", self.batch_size, low=1, high=MOST_BATCH)
        require_range("data.threads", self.threads, low=0, high=MOST_THREADS)
        require_range("data.max_bad", self.max_bad, low=0)


class DataSource(typing.Protocol):
    """Examples to train on, by their number.

    A source may also have `draw(example, generator)`, which makes the example of a step from what `__getitem__` returns
    and a `numpy.random.Generator`: a mirror image, a crop. All that is random belongs there. It may have `classes`,
    their number, for `model.classes=-1`, and `class_names`, by label, which the trained weights then keep.

    Attributes:
      fingerprint: what it holds, for people and to notice that data have changed: a name, a count, a checksum.
    """

    fingerprint: str

    def __init__(self, config: DataConfig, model):
        """Open the source.

        Args:
          config: the section `data`, with the path.
          model: a `DiTConfig`: images must be of its side and channels, labels below its classes.
        """

    def __len__(self) -> int:
        """Return the number of examples, at least 1."""

    def __getitem__(self, index: int) -> dict:
        """Return {"image": float32 [side,side,C], "label": a whole number}, or what `draw` makes it of.

        Images lie in [-1, 1]; latents are shifted and scaled as their autoencoder says. Called from several threads.
        """


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
        (self.images, self.labels), self.classes = digits("train"), 10
        require_shape("digits", self.images.shape[1:], self.classes, model)
        self.fingerprint = f"digits {_digest(self.images.tobytes())}"

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return {"image": self.images[index], "label": self.labels[index]}


class Synthetic:
    """Gaussian noise and random labels in the model's shape: for timing, never for training."""

    def __init__(self, config, model):
        self.shape, self.classes = (model.side, model.side, model.channels), model.classes
        self.fingerprint = "synthetic"

    def __len__(self):
        return 4096

    def __getitem__(self, index):
        generator = np.random.default_rng(index)
        image = generator.standard_normal(self.shape, np.float32)
        return {"image": image, "label": np.int32(generator.integers(max(self.classes, 1)))}


class Latents:
    """Moments of an autoencoder, computed once and packed; every epoch draws new flips and latents.

    `path` is a folder of the files that `latent_files` describes; `tools/prepare_latents.py` makes one.
    """

    def __init__(self, config, model):
        folder = locate(config.path) if config.path else None
        if "://" in config.path:
            raise InputError(f"Latents are read where they lie: mount {config.path} as a folder, or copy it to a disk.")
        if folder is None or not all((folder / name).is_file() for name in (LATENTS_FILE, LABELS_FILE)):
            raise InputError(
                f"Dataset latents needs data.path, a folder with {LATENTS_FILE} and {LABELS_FILE}, not "
                f"{config.path!r}. Make one with tools/prepare_latents.py."
            )
        self.files, self.flip = LatentFiles(folder), config.flip
        _, _, *side, channels = self.files.shape
        self.class_names = tuple(map(spell_name, self.files.info.get(CLASSES_KEY, ())))
        require_labels(folder / LABELS_FILE, self.files.labels, len(self.class_names) or model.classes or np.inf)
        self.classes = len(self.class_names) or model.classes or int(self.files.labels.max()) + 1
        require_shape("latents", (*side, channels // 2), self.classes, model, self.class_names)
        self.labels = self.files.labels.astype(np.int32)
        self.autoencoder, self.record = self.files.autoencoder, self.files.record
        self.autoencoder_checksum = self.files.info.get("autoencoder_checksum", "")
        checksum = self.files.info.get("checksum") or _digest(self.labels.tobytes())
        record = "" if self.record == AutoencoderConfig() else f" {_digest(repr(self.record).encode())}"
        self.fingerprint = f"latents {len(self.labels)} {checksum}{record}"

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return {"moments": self.files.read(index), "label": self.labels[index]}

    def draw(self, example, generator: np.random.Generator):
        """Choose the image or its mirror image, and a latent from its Gaussian, whose variance has limits."""
        view = generator.integers(2) if self.flip else 0
        moments = np.asarray(example["moments"][view], np.float32)
        mean, log_variance = np.split(moments, 2, axis=-1)
        noise = generator.standard_normal(mean.shape, np.float32)
        latents = mean + np.exp(0.5 * np.clip(log_variance, *LOG_VARIANCE_RANGE)) * noise
        return {"image": self.record.to_model(latents), "label": example["label"]}


class _Pictures:
    """Pictures with labels, cropped to the model's side and mirrored at random; unreadable ones are replaced.

    They are read in colour, or in grey for a model of one channel.
    """

    def __init__(self, config, model):
        self.side, self.max_bad, self.flip = model.side, config.max_bad, config.flip
        self.channels = 1 if model.channels == 1 else 3
        self._bad, self._lock = set(), threading.Lock()

    def __getitem__(self, index):
        """Return the picture uint8 [side,side,C]; in place of an unreadable one the next that can be read."""
        for offset in range(len(self)):
            place = (index + offset) % len(self)
            name = self._name(place)
            try:
                content, label = self._read(place)
                image = decode_image(content, name)
            except InputError as error:
                self._count(name, error)
                continue
            require_labels(name, label, self.classes)
            pixels = center_crop(image if self.channels == 3 else image.convert("L"), self.side)
            return {"pixels": pixels.reshape(self.side, self.side, self.channels), "label": np.int32(label)}
        raise InputError("No picture of the dataset can be read.")

    def _count(self, name: str, error: InputError) -> None:
        with self._lock:
            if name in self._bad:
                return
            self._bad.add(name)
            count = len(self._bad)
        logger.warning("%s It is replaced by the next one; %d so far.", error, count)
        if count > self.max_bad:
            raise InputError(
                f"{count} pictures can't be read, the last of them {name}; data.max_bad allows {self.max_bad}."
            ) from error

    def draw(self, example, generator: np.random.Generator):
        """Choose the picture or its mirror image, in [-1, 1]."""
        mirrored = self.flip and generator.integers(2)
        pixels = example["pixels"][:, :: -1 if mirrored else 1]
        return {"image": pixels.astype(np.float32) / 127.5 - 1, "label": example["label"]}


class Images(_Pictures):
    """A folder with one sub-folder per class, in alphabetical order: <path>/n01440764/*.JPEG."""

    def __init__(self, config, model):
        super().__init__(config, model)
        folder = locate(config.path) if config.path else None
        if folder is None or not folder.is_dir():
            raise InputError(
                f"Dataset images needs data.path, a folder with one sub-folder per class, not {config.path!r}."
            )
        self.files, self.labels = list_class_folders(folder)
        self.class_names = tuple(dict.fromkeys(spell_name(file.parent.name) for file in self.files))
        self.classes = len(self.class_names)
        require_shape("images", (model.side, model.side, self.channels), self.classes, model, self.class_names)
        names = "\n".join(f"{file.parent.name}/{file.name}" for file in self.files)
        self.fingerprint = f"images {len(self.files)} {_digest(os.fsencode(names))}"

    def __len__(self):
        return len(self.files)

    def _name(self, index):
        return str(self.files[index])

    def _read(self, index):
        return read_picture(self.files[index]), self.labels[index]


class Prepared(_Pictures):
    """A dataset that tensorflow_datasets or `tools/prepare_imagenet.py` prepared as array_record: no TensorFlow needed.

    `path` is <folder with dataset_info.json>/<split>, or <name known to tensorflow_datasets>/<split>.
    """

    def __init__(self, config, model):
        super().__init__(config, model)
        info, self._source = open_prepared(config.path, config.image_key)
        self._keys = (config.image_key, config.label_key)
        features = dict(info.features.items())
        if not hasattr(features.get(config.label_key), "num_classes"):
            raise InputError(
                f"{config.path!r} has no classes named {config.label_key!r} but {', '.join(features)}; "
                "name them with data.label_key."
            )
        self.class_names = tuple(map(spell_name, features[config.label_key].names))
        self.classes = len(self.class_names)
        require_shape("tfds", (model.side, model.side, self.channels), self.classes, model, self.class_names)
        keys = "" if self._keys == ("image", "label") else " " + " ".join(self._keys)
        self.fingerprint = f"tfds {info.full_name} {config.path.rpartition('/')[2]} {len(self._source)}{keys}"

    def __len__(self):
        return len(self._source)

    def _name(self, index):
        return f"Example {index} of {self.fingerprint}"

    def _read(self, index):
        example = read_example(self._source, index, self._name(index))
        return tuple(example[key] for key in self._keys)


class Idx(_Pictures):
    """The training split of an IDX set such as MNIST or Fashion-MNIST; `path` is the folder of its gzip files."""

    def __init__(self, config, model):
        super().__init__(config, model)
        if not config.path:
            raise InputError(f"Dataset idx needs data.path, the folder of its files. {WHERE_TO_GET}.")
        self.images, self.labels = read_idx_split(config.path, "train")
        self.classes = int(self.labels.max()) + 1
        require_shape("idx", (*self.images.shape[1:], 1), self.classes, model)
        self.fingerprint = f"idx {len(self.labels)} {_digest(self.images.tobytes() + self.labels.tobytes())}"

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return {"pixels": self.images[index][..., None], "label": np.int32(self.labels[index])}


BUILT_IN = {
    "digits": Digits,
    "idx": Idx,
    "images": Images,
    "latents": Latents,
    "synthetic": Synthetic,
    "tfds": Prepared,
}
SOURCES = Registry("data source", DataSource, BUILT_IN)


def register_source(name: str) -> Callable:
    """Return a decorator that adds a `DataSource` of one's own as `data.name`; see `Registry.register`."""
    return SOURCES.register(name)


def open_source(config: DataConfig, model) -> DataSource:
    """Open a dataset.

    Args:
      config: which one.
      model: the model's config, for its input's shape.

    Raises:
      InputError: not there, broken, or of another shape; or a user's class whose methods return something else than
        `DataSource` says.
    """
    source = SOURCES[config.name](config, model)
    if not is_built_in(type(source)):
        _require_source(source, (model.side, model.side, model.channels), model.classes)
    return source


def draw_example(source: DataSource, index: int) -> dict:
    """Return an example as a step might see it, the same at every call."""
    example = source[index]
    return source.draw(example, np.random.default_rng(index)) if hasattr(source, "draw") else example


def _require_source(source: DataSource, shape: tuple[int, ...], classes: int | None) -> None:
    """Raise unless a user's source is what `DataSource` says, its first example included."""
    name = type(source).__name__
    if not isinstance(getattr(source, "fingerprint", None), str):
        raise InputError(f"{name}.__init__ must set `fingerprint`, a text that says what the source holds.")
    if len(source) < 1:
        raise InputError(f"{name}.__len__ must return the number of examples, at least 1, not {len(source)}.")
    method = f"{name}.draw" if hasattr(source, "draw") else f"{name}.__getitem__"
    example = draw_example(source, 0)
    if not isinstance(example, dict) or set(example) != {"image", "label"}:
        raise InputError(f'{method} must return {{"image": ..., "label": ...}}, not {reprlib.repr(example)}.')
    require_array(example["image"], shape, "float32", method=method, returns='the "image"')
    if np.shape(example["label"]) != ():
        raise InputError(
            f'{method} must return one "label", a whole number, not an array {np.shape(example["label"])}.'
        )
    require_labels(method, example["label"], classes or np.inf)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
