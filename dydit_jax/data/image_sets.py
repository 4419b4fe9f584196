"""Sets of finished images, to be judged: an `.npz` batch, a folder of pictures, a prepared tfds dataset.

Images come as uint8 [n,height,width,3], grey ones with three equal channels, a few at a time: 50,000 images of 256 px
need 10 GB of memory.
"""

import dataclasses
import hashlib
import math
import os
import zipfile
import zlib
from collections.abc import Callable, Iterator

import numpy as np
from etils import epath
from PIL import Image

from dydit_jax.data.folders import find_set, list_set
from dydit_jax.data.images import MAX_PIXELS, center_crop, decode_image, read_picture
from dydit_jax.data.prepared import open_prepared, read_example
from dydit_jax.errors import InputError
from dydit_jax.runtime.files import locate
from dydit_jax.runtime.progress import Progress, counted

IMAGES_ENTRY = "arr_0"
DATASET_PREFIX = "tfds:"
CHUNK_BYTES = 2**24
MOST_HEADER_BYTES = 2**16  # of an array, which has some hundred
# Times its bytes in the file that an array of features may have. numpy stores them as they are; deflated, random floats
# shrink twofold, floats of which nine in ten are zero sevenfold, and zeros alone a thousandfold.
MOST_PACKING = 16
# What the standard library raises for archives that are damaged, encrypted or packed in a way of their own.
ZIP_ERRORS = (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError, ValueError)


@dataclasses.dataclass(frozen=True)
class ImageSet:
    """Images that can be iterated over more than once.

    Attributes:
      name: for messages.
      count: how many.
      checksum: SHA-256 of the file, or of the names and contents of a folder's files; "" for a dataset.
      images: makes an iterator over single images, uint8 [height,width,3].
    """

    name: str
    count: int
    checksum: str
    images: Callable[[], Iterator[np.ndarray]]

    def batches(self, size: int) -> Iterator[np.ndarray]:
        """Iterate over uint8 [b,height,width,3], b the size but for the last.

        Raises:
          InputError: images of different sizes.
        """
        batch = []
        for number, image in enumerate(self.images()):
            if batch and image.shape != batch[0].shape:
                raise InputError(f"Image {number} of {self.name} is {image.shape}, those before {batch[0].shape}.")
            batch.append(image)
            if len(batch) == size:
                yield np.stack(batch)
                batch = []
        if batch:
            yield np.stack(batch)


def open_images(path, side: int = 0, *, image_key: str = "image") -> ImageSet:
    """Open a set of images.

    Args:
      path: an `.npz` with the key arr_0, uint8 [n,height,width,3], or grey: [n,height,width] or [n,height,width,1]; a
        folder of pictures, of class folders, or with a sub-folder `images` (what `sample.py` writes; without its
        manifest and beside other folders of pictures, `images` is one of the classes); or
        "tfds:<folder or name>/<split>" of a dataset that is prepared.
      side: pictures of a folder or a dataset are cropped to it as ADM does; 0 leaves them as they are.
      image_key: name of the picture in the examples of a dataset.

    Raises:
      InputError: nothing of the kind, or other content.
    """
    if str(path).startswith(DATASET_PREFIX):
        return _open_dataset(str(path), side, image_key)
    path = locate(path)
    if path.is_dir():
        return _open_folder(path, side)
    if not path.is_file():
        raise InputError(f"There is no file or folder {path}.")
    return _open_npz(path)


def npz_shapes(path) -> dict[str, tuple]:
    """Return the shape and dtype of every array of an `.npz`, without reading them.

    Raises:
      InputError: not an `.npz`.
    """
    try:
        with epath.Path(path).open("rb") as file, zipfile.ZipFile(file) as archive:
            _require_plain(archive)
            found = {}
            for entry in archive.namelist():
                with archive.open(entry) as array:
                    shape, dtype = _read_header(array)
                    length = archive.getinfo(entry).file_size - array.tell()
                    if not dtype.hasobject and length != math.prod(shape) * dtype.itemsize:
                        raise ValueError(f"{entry} is not as long as its shape {list(shape)} says")
                found[entry.removesuffix(".npy")] = shape, dtype
            return found
    except ZIP_ERRORS as error:
        raise InputError(f"{path} is not an .npz file of arrays, or damaged: {error}.") from error


def require_packing(path, names) -> None:
    """Raise where arrays of an `.npz` are much larger than their bytes in the file, before they take memory.

    Args:
      path: of the file.
      names: of the arrays, all of them in the file.

    Raises:
      InputError: naming them with both sizes.
    """
    with epath.Path(path).open("rb") as file, zipfile.ZipFile(file) as archive:
        entries = {entry.filename.removesuffix(".npy"): entry for entry in archive.infolist()}
    wrong = [
        f"{name} ({entries[name].file_size} bytes from {entries[name].compress_size})"
        for name in names
        if entries[name].file_size > MOST_PACKING * entries[name].compress_size
    ]
    if wrong:
        raise InputError(
            f"{path} holds arrays that are more than {MOST_PACKING} times as large as what is stored of them: "
            f"{', '.join(wrong)}; numbers that were measured can't be packed like that. Make it again."
        )


def _require_plain(archive: zipfile.ZipFile) -> None:
    """Raise unless members are stored or deflated, which come in pieces of any size, and no two make one array."""
    entries = archive.infolist()
    known = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
    packed = [entry.filename for entry in entries if entry.compress_type not in known]
    if packed:
        raise ValueError(f"{packed[0]!r:.80} is neither stored nor deflated, as numpy's are")
    if len({entry.filename.removesuffix(".npy") for entry in entries}) < len(entries):
        raise ValueError("two of its arrays have one name")


class _ShortHeader:
    """A file that refuses to be read in large pieces, as the header of an array would be, whatever length it states."""

    def __init__(self, file):
        self._file = file

    def read(self, size: int) -> bytes:
        if size > MOST_HEADER_BYTES:
            raise ValueError(f"array with a header of more than {MOST_HEADER_BYTES} bytes")
        return self._file.read(size)


def _read_header(file) -> tuple[tuple[int, ...], np.dtype]:
    file = _ShortHeader(file)
    version = np.lib.format.read_magic(file)
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in read:
        raise ValueError(f"array format {version}")
    shape, fortran_order, dtype = read[version](file)
    if fortran_order and len(shape) > 1:
        raise ValueError("array in Fortran order")
    return shape, dtype


def _open_npz(path) -> ImageSet:
    shapes = npz_shapes(path)
    if IMAGES_ENTRY not in shapes:
        raise InputError(f"{path} has no {IMAGES_ENTRY}; it has {', '.join(sorted(shapes)) or 'nothing'}.")
    shape, dtype = shapes[IMAGES_ENTRY]
    is_grey = len(shape) == 3 and shape[-1] > 4  # with 3 or 4 columns it is one picture with its channels
    if dtype != np.uint8 or not (is_grey or (len(shape) == 4 and shape[-1] in (1, 3))) or not shape[0]:
        raise InputError(
            f"{IMAGES_ENTRY} of {path} must be uint8 [n,height,width,3], or grey [n,height,width] or "
            f"[n,height,width,1], not {dtype} {list(shape)}."
        )
    if math.prod(shape[1:3]) > MAX_PIXELS:
        raise InputError(f"{path} has images of {shape[2]} x {shape[1]} pixels; at most {MAX_PIXELS} are read.")

    def images():
        done, entry = 0, f"{IMAGES_ENTRY}.npy"
        try:
            with path.open("rb") as file, zipfile.ZipFile(file) as archive, archive.open(entry) as array:
                _read_header(array)
                while done < shape[0]:
                    image = np.frombuffer(array.read(math.prod(shape[1:])), np.uint8).reshape(*shape[1:3], -1)
                    yield np.broadcast_to(image, (*shape[1:3], 3))
                    done += 1
        except ZIP_ERRORS as error:
            raise InputError(f"{path} is damaged, at image {done} or before: {error}.") from error

    digest, size = hashlib.sha256(), path.stat().length
    with path.open("rb") as file, Progress(size, "B", f"checksum of {path}") as progress:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
            progress.advance(len(chunk))
    return ImageSet(str(path), shape[0], digest.hexdigest(), images)


def _open_folder(path, side: int) -> ImageSet:
    folder = find_set(path)
    files = list_set(folder)
    digest = hashlib.sha256()
    for file in counted(files, len(files), "image", f"checksum of {path}"):
        digest.update(os.fsencode(file.relative_to(folder)) + hashlib.sha256(read_picture(file)).digest())
    read = lambda file: _sized(decode_image(read_picture(file), str(file)), side)
    return ImageSet(str(path), len(files), digest.hexdigest(), lambda: map(read, files))


def _open_dataset(name: str, side: int, image_key: str) -> ImageSet:
    _, source = open_prepared(name.removeprefix(DATASET_PREFIX), image_key)

    def images():
        for index in range(len(source)):
            where = f"Example {index} of {name}"
            yield _sized(decode_image(read_example(source, index, where)[image_key], where), side)

    return ImageSet(name, len(source), "", images)


def _sized(image: Image.Image, side: int) -> np.ndarray:
    return center_crop(image, side) if side else np.asarray(image)
