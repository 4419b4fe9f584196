"""Datasets that lie as array_record files, read without TensorFlow, for training and evaluation alike.

A dataset's folder names the Python classes of its features, and tensorflow_datasets imports the module of any class
that it does not know: a folder from elsewhere could so run code of its own. Therefore its files are read here first,
and classes other than those of tensorflow_datasets itself are refused.
"""

import re
from collections.abc import Iterator

from dydit_jax.errors import InputError
from dydit_jax.runtime.files import locate, parse_json, read_json

INFO_FILE, FEATURES_FILE = "dataset_info.json", "features.json"
CLASS_KEYS = ("pythonClassName", "python_class_name", "type")  # of a feature's class; the last in old datasets
# tensorflow_datasets takes more: `namespace:` for code and data that it fetches, arguments such as data_dir=...
KNOWN_NAME = re.compile(r"(?P<dataset>[A-Za-z]\w*)(/(?P<config>[\w+.-]+))?(:(?P<version>[\d.]+))?")
REMEDY = "copy the dataset again"


def open_prepared(path: str, image_key: str = "image"):
    """Open a dataset that lies as array_record files, without TensorFlow.

    Args:
      path: <folder with dataset_info.json>/<split>, or <name known to tensorflow_datasets>/<split>.
      image_key: name of the picture in its examples.

    Returns:
      Its `DatasetInfo` and a random-access source of examples, pictures as the bytes of their files.

    Raises:
      InputError: not there, without such pictures, prepared in another form, or with features of unknown classes.
    """
    import tensorflow_datasets as tfds

    name, _, split = path.rpartition("/")
    folder = locate(name).expanduser()
    found = (folder / INFO_FILE).is_file()
    if found:
        _require_own_features(folder)
    try:
        builder = tfds.builder_from_directory(str(folder)) if found else _known_builder(name)
        features = dict(builder.info.features.items())
        if not isinstance(features.get(image_key), tfds.features.Image):
            names = ", ".join(features)
            raise InputError(f"it has no picture named {image_key!r} but {names}; name it with image_key")
        return builder.info, builder.as_data_source(split, decoders={image_key: tfds.decode.SkipDecoding()})
    except Exception as error:  # noqa: BLE001 (tfds has no common error for "is not there")
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"{path!r} can't be opened as <folder or name>/<split> of a prepared dataset: {reason}"
        ) from error


def _known_builder(name: str):
    """Return the builder of a dataset that tensorflow_datasets has code for, which then says what its features are."""
    import tensorflow_datasets as tfds

    match = KNOWN_NAME.fullmatch(name)
    if not match:
        raise InputError(f"it is no folder with {INFO_FILE}, and no name of the form dataset[/config][:version]")
    return tfds.builder_cls(match["dataset"])(config=match["config"], version=match["version"])


def _require_own_features(folder) -> None:
    """Raise unless all classes that a dataset's files name are features of tensorflow_datasets itself."""
    import tensorflow_datasets as tfds

    feature = tfds.features.FeatureConnector
    own = [kind for kind in vars(tfds.features).values() if isinstance(kind, type) and issubclass(kind, feature)]
    known = {name for kind in own for name in (f"{kind.__module__}.{kind.__name__}", *kind.ALIASES)}
    described = {folder / INFO_FILE: read_json(folder / INFO_FILE, remedy=REMEDY).get("features")}
    if (folder / FEATURES_FILE).is_file():
        described[folder / FEATURES_FILE] = read_json(folder / FEATURES_FILE, remedy=REMEDY)
    for file, content in described.items():
        for name in _class_names(content, file):
            if name not in known:
                raise InputError(
                    f"{file} names the class {name[:80]!r} for a feature, whose module would be run; only those of "
                    "tensorflow_datasets itself are read, such as Image, ClassLabel, Text and Tensor. Prepare the "
                    "dataset again with these."
                )


def _class_names(content, file) -> Iterator[str]:
    """Yield the names of classes in a description of features, also in JSON that it holds as a text."""
    if isinstance(content, list):
        content = dict(enumerate(content))
    if not isinstance(content, dict):
        return
    for key, value in content.items():
        if key in CLASS_KEYS and isinstance(value, str):
            yield value
        elif key == "json" and isinstance(value, str):
            yield from _class_names(parse_json(value, file, remedy=REMEDY), file)
        else:
            yield from _class_names(value, file)


def read_example(source, index: int, name: str) -> dict:
    """Return an example of a prepared dataset.

    Args:
      source: from `open_prepared`.
      index: the example's.
      name: for the message.

    Raises:
      InputError: damaged, or its file is gone; the files hold checksums.
    """
    try:
        return source[index]
    except Exception as error:  # noqa: BLE001 (RuntimeError for damage; what else strangers' files may raise is open)
        raise InputError(f"{name} is not a readable picture: {' '.join(str(error).split())[:200]}.") from error
