"""IDX files: the gzip files of MNIST and of the datasets that follow it (Fashion-MNIST, EMNIST, KMNIST).

A set is four files of one folder:

    *train-images-idx3-ubyte.gz  *train-labels-idx1-ubyte.gz  *t10k-images-idx3-ubyte.gz  *t10k-labels-idx1-ubyte.gz

The end of the test files' names may also be `test-...`, as EMNIST has it. Pictures are taken as they are stored; EMNIST
stores its own transposed. Format: two zero bytes, a code of the type (8 for uint8), the number of axes, the length of
each axis as 4 bytes, big-endian, then the values (https://yann.lecun.com/exdb/mnist/).
"""

import gzip
import math
import struct
import zlib

import numpy as np
from etils import epath

from dydit_jax.errors import InputError
from dydit_jax.runtime.files import locate

SPLITS = {"train": ("train",), "test": ("t10k", "test")}
UINT8_CODE = 8
MOST_BYTES = 2**32  # 5 million pictures of MNIST's size; a header that claims more is damaged
WHERE_TO_GET = (
    "Fashion-MNIST comes with Debian and Ubuntu (apt-get install dataset-fashion-mnist, then "
    "data.path=/usr/share/datasets/fashion-mnist) or from https://github.com/zalandoresearch/fashion-mnist"
)


def read_idx_split(folder, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Read the pictures and labels of a split.

    Args:
      folder: with the gzip files.
      split: a key of `SPLITS`.

    Returns:
      Images uint8 [n,height,width] and labels uint8 [n].

    Raises:
      InputError: files that are not there, are no gzip, are cut or damaged, or do not belong together.
    """
    folder = locate(folder)
    if not folder.is_dir():
        raise InputError(f"There is no folder {folder} with IDX files. {WHERE_TO_GET}.")
    images_file, labels_file = _find(folder, split, "images-idx3"), _find(folder, split, "labels-idx1")
    images, labels = read_idx(images_file, axes=3), read_idx(labels_file, axes=1)
    if len(images) != len(labels) or not len(images):
        raise InputError(
            f"{images_file} holds {len(images)} pictures and {labels_file.name} {len(labels)} labels; there must be "
            f"one for each. {WHERE_TO_GET}."
        )
    return images, labels


def read_idx(path, axes: int) -> np.ndarray:
    """Read one file.

    Args:
      path: of the gzip file.
      axes: number of axes that it must have.

    Returns:
      uint8, of the shape in the header.

    Raises:
      InputError: no such file, no gzip, another magic number, or less or more than the header says.
    """
    path = epath.Path(path)
    try:
        with path.open("rb") as file, gzip.open(file) as content:
            header = content.read(4 + 4 * axes)
            if len(header) < 4 or header[:3] != bytes((0, 0, UINT8_CODE)) or header[3] != axes:
                raise InputError(
                    f"{path} begins with {header[:4].hex()}, not with the magic number 000008{axes:02x} of an IDX file "
                    f"of bytes with {axes} {'axis' if axes == 1 else 'axes'}. {WHERE_TO_GET}."
                )
            if len(header) < 4 + 4 * axes:
                raise EOFError("it ends within its header")
            shape = struct.unpack(f">{axes}I", header[4:])
            size = math.prod(shape)
            if size > MOST_BYTES:
                raise EOFError(f"its header claims {size} bytes, and at most {MOST_BYTES} are read")
            values = content.read(size + 1)
    except FileNotFoundError:
        raise InputError(f"There is no file {path}. {WHERE_TO_GET}.") from None
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path} is no gzip file, or damaged: {error}. {WHERE_TO_GET}.") from error
    if len(values) != size:
        more_or_less = "more than" if len(values) > size else f"{len(values)} of"
        raise InputError(f"{path} holds {more_or_less} the {size} bytes that its header says. {WHERE_TO_GET}.")
    return np.frombuffer(values, np.uint8).reshape(shape)


def _find(folder, split: str, kind: str):
    """Return the one file of a split and kind.

    Raises:
      InputError: none, or several.
    """
    ends = [f"{name}-{kind}-ubyte.gz" for name in SPLITS[split]]
    found = [path for path in sorted(folder.iterdir()) if path.name.endswith(tuple(ends))]
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise InputError(f"{folder} must have one file *{' or *'.join(ends)}, and has {names}. {WHERE_TO_GET}.")
    return found[0]
