"""Datasets that lie as array_record files, read without TensorFlow, for training and evaluation alike."""

from etils import epath

from dydit_jax.errors import InputError


def open_prepared(path: str, image_key: str = "image"):
    """Open a dataset that lies as array_record files, without TensorFlow.

    Args:
      path: <folder with dataset_info.json>/<split>, or <name known to tensorflow_datasets>/<split>.
      image_key: name of the picture in its examples.

    Returns:
      Its `DatasetInfo` and a random-access source of examples, pictures as the bytes of their files.

    Raises:
      InputError: not there, without such pictures, or prepared in another form.
    """
    import tensorflow_datasets as tfds

    name, _, split = path.rpartition("/")
    try:
        found = (epath.Path(name) / "dataset_info.json").is_file()
        builder = tfds.builder_from_directory(name) if found else tfds.builder(name)
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
