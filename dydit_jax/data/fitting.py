"""Whether a dataset fits a model: the shape of its images, the number of its classes, its labels."""

from collections.abc import Sequence

import numpy as np

from dydit_jax.errors import InputError, some_of


def require_shape(name: str, shape: tuple[int, ...], classes: int, model, class_names: Sequence[str] = ()) -> None:
    """Raise unless a dataset fits a model; a model without classes takes any number of them.

    Args:
      name: of the dataset.
      shape: of its images.
      classes: their number.
      model: has side, channels and classes; None and 0 for the last take any number.
      class_names: by label; those that the model has no row for are named.

    Raises:
      InputError: another shape, or another number of classes.
    """
    wanted = (model.side, model.side, model.channels)
    if shape == wanted and model.classes in (None, 0, classes):
        return
    surplus = class_names[model.classes :] if model.classes else ()
    named = f" No row is left for {some_of(map(repr, surplus))}." if surplus else ""
    raise InputError(
        f"Dataset {name} has images {shape} and {classes} classes; the model is made for {wanted} and "
        f"{model.classes}.{named} Set model.side, model.channels and model.classes."
    )


def require_labels(where, labels, classes: int) -> None:
    """Raise unless labels, one or an array, are whole numbers from 0 to classes - 1.

    Raises:
      InputError: with the first that is not.
    """
    labels = np.atleast_1d(labels)
    if not labels.size or labels.dtype.kind not in "iuf":
        raise InputError(f"{where} has {labels.size} labels of type {labels.dtype}; whole numbers are needed.")
    wrong = labels[(labels < 0) | (labels >= classes) | (labels != np.floor(labels))]
    if wrong.size:
        raise InputError(
            f"{where} has label {wrong[0]}; labels are whole numbers from 0 to {classes - 1}. Mend the data, or set "
            "model.classes."
        )
