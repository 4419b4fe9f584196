"""What weights and work directories say of themselves: the keys that are read of it, and of which types they must be.

Such files may come from anybody. What else they say is kept, and shown to people.
"""

from typing import Annotated, TypedDict

Share = Annotated[float, 0.0, 1.0]


class TrainSection(TypedDict, total=False):
    """The section `train` of a config."""

    init_from: str
    ema_decay: Share
    trainable: tuple[str, ...]


class ModelSection(TypedDict, total=False):
    """The section `model` of a config."""

    guidance_free: bool


class LossSection(TypedDict, total=False):
    """The section `loss` of a config."""

    label_dropout: Share
    weighting: str
    guidance_free: bool


class DataSection(TypedDict, total=False):
    """The section `data` of a config."""

    name: str
    path: str
    flip: bool
    image_key: str
    label_key: str


class Config(TypedDict, total=False):
    """The config of a training."""

    train: TrainSection
    model: ModelSection
    loss: LossSection
    data: DataSection


class Base(TypedDict):
    """The weights that an adapter belongs to."""

    checkpoint: str
    checksum: str


class About(TypedDict, total=False):
    """What made weights."""

    class_names: tuple[str, ...]
    config: Config
    step: Annotated[int, 0, 2**53]
    versions: dict
    base: Base


class CheckpointRecord(TypedDict, total=False):
    """The record of a checkpoint of a run: the data, what the weights are, and its arrays.

    An array is described by its type, shape and digest, by item and path.
    """

    data: str
    base: Base
    class_names: tuple[str, ...]
    arrays: dict[str, dict[str, tuple[str, tuple[int, ...], int]]]
    checksum: str


class Description(TypedDict):
    """All that describes weights in a file; an adapter's has `base` too."""

    model: dict
    sampling: dict
    about: About


class AdapterDescription(Description):
    """All that describes an adapter in a file."""

    base: Base
