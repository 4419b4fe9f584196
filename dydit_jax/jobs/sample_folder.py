"""The folder of a job of `sample.py`: its manifest, its pictures one by one, and what is made of all of them.

Every file is whole or not there. A manifest says whose pictures they are; a job goes on in a folder of its own only.
"""

import concurrent.futures
import contextlib
import functools
import hashlib
import json
import logging
import pathlib
import shutil
import zipfile
from collections.abc import Iterator

import numpy as np
from etils import epath
from PIL import Image

from dydit_jax.drawing.pictures import image_of, read_image, save_image
from dydit_jax.drawing.report import MANIFEST_FILE
from dydit_jax.errors import InputError
from dydit_jax.runtime.files import is_local, locate, read_json, write_atomically, write_json
from dydit_jax.runtime.locks import FolderLock, claim_folder
from dydit_jax.runtime.progress import counted

logger = logging.getLogger(__name__)

READERS = 8
MOST_IMAGES = 1_000_000  # their names have six digits
SET_FILE = "samples.npz"
MANIFEST_REMEDY = "name another --out, or remove the folder and start again"
# Of a manifest: the path of weights whose checksum is known, what changes the images by rounding alone, and what
# follows from the rest.
IRRELEVANT = ("checkpoint", "segments", "steps")


@contextlib.contextmanager
def prepare_folder(out, manifest: dict, *, sample_bytes: int, labels: np.ndarray | None = None) -> Iterator[FolderLock]:
    """Hold the folder, with the manifest in it; a folder of the same job is continued, any other is refused.

    The job of a set may have grown: it then begins with the labels of the set that is there.

    Args:
      out: the folder.
      manifest: of the job, see `MANIFEST_FILE`.
      sample_bytes: what the set takes on the disk at least.
      labels: of all images of a set; None for a grid.

    Raises:
      InputError: a folder of another job, one that another command works in, one that can't be written to, or a disk
        that is too small.
    """
    out = locate(out)
    _require_room(out, sample_bytes)
    with claim_folder(out, MANIFEST_FILE) as lock:
        _begin(out, manifest, labels)
        yield lock


def _begin(out, manifest: dict, labels: np.ndarray | None) -> None:
    """Write the manifest, where no other job's pictures are, and remove what a kill has left."""
    path = out / MANIFEST_FILE
    try:
        if path.is_file():
            _require_same_job(path, manifest, labels)
        write_json(path, manifest)
        (out / "images").mkdir(exist_ok=True)
        for partial in (*out.glob("*.partial"), *(out / "images").glob("*.partial")):
            partial.unlink(missing_ok=True)  # one may be the lock's, which comes and goes
    except OSError as error:
        raise InputError(f"Can't write to {out}: {error.strerror or error}.") from error


def segments_begun_with(out, images: int) -> int | None:
    """Return the number of segments that a job began with; None where no image is there, or it has grown since.

    Args:
      out: the folder.
      images: of the whole job.

    Raises:
      InputError: a manifest that can't be read.
    """
    path = locate(out) / MANIFEST_FILE
    found = read_json(path, remedy=MANIFEST_REMEDY) if path.is_file() else {}
    begun = found.get("segments")
    goes_on = found.get("num_images") == images and any((locate(out) / "images").glob("*.png"))
    return begun if goes_on and type(begun) is int and begun >= 0 else None


def _require_room(out, sample_bytes: int) -> None:
    if not is_local(out):
        return
    place = pathlib.Path(out).absolute()
    free = shutil.disk_usage(next(path for path in (place, *place.parents) if path.exists())).free
    if free < sample_bytes:
        raise InputError(
            f"{out} has {free / 1e9:.1f} GB left; the images take at least {sample_bytes / 1e9:.1f} GB. Make room "
            "there, name another --out, or draw fewer."
        )


def labels_digest(labels: np.ndarray) -> str:
    """Return the checksum of a set's labels [n] int32, for its manifest."""
    return hashlib.sha256(labels).hexdigest()


def _require_same_job(path, manifest: dict, labels: np.ndarray | None) -> None:
    """Raise where pictures are there that another job drew; of a set that has grown, remove the packed smaller one."""
    found = read_json(path, remedy=MANIFEST_REMEDY)
    manifest = json.loads(json.dumps(manifest))  # as it reads when it comes back
    changed = [key for key in sorted(manifest | found) if key not in IRRELEVANT and found.get(key) != manifest.get(key)]
    before, now = found.get("num_images"), manifest.get("num_images")
    if changed == ["labels", "num_images"] and labels is not None and type(before) is int:
        if 0 < before < now and labels_digest(labels[:before]) == found["labels"]:
            logger.info("%s held %d images of this set; it grows to %d.", path.parent, before, now)
            (path.parent / SET_FILE).unlink(missing_ok=True)
            return
        if before > now:
            raise InputError(f"{path.parent} holds a set of {before} images, more than {now}; name another --out.")
    if changed and any((path.parent / "images").glob("*.png")):
        raise InputError(
            f"{path.parent} holds images made otherwise ({', '.join(changed)} differ); name another --out."
        )


def image_path(out, index: int) -> epath.Path:
    """Return where the picture of an image lies."""
    return out / "images" / f"{index:06d}.png"


def missing_images(out, count: int, shape: tuple[int, int, int]) -> list[int]:
    """Return which images have no picture, or one that is damaged or of another shape, ascending.

    Args:
      out: the folder.
      count: of the job's images.
      shape: of each: height, width, channels.
    """
    state = functools.partial(_state, shape=shape)
    with concurrent.futures.ThreadPoolExecutor(READERS) as readers:
        found = readers.map(state, (image_path(out, index) for index in range(count)))
        states = list(counted(found, count, "image", "looking for images"))
    damaged = [index for index, state in enumerate(states) if state == "damaged"]
    if damaged:
        shown = ", ".join(image_path(out, index).name for index in damaged[:5])
        logger.warning("%d images in %s are damaged and drawn again: %s.", len(damaged), out, shown)
    return [index for index, state in enumerate(states) if state != "whole"]


def _state(path, shape: tuple[int, int, int]) -> str:
    """Return whether a picture is "whole", "damaged" or "missing", by its own checksums."""
    try:
        with path.open("rb") as file, Image.open(file, formats=["PNG"]) as picture:
            found = (picture.height, picture.width, len(picture.getbands()))
            picture.verify()
    except FileNotFoundError:
        return "missing"
    except Exception:  # whatever a damaged file makes of the reader
        return "damaged"
    return "whole" if found == shape else "damaged"


def write_image(path, pixels: np.ndarray) -> None:
    """Write uint8 pixels [side,side,1 or 3] as a picture."""
    save_image(path, image_of(pixels))


def write_set(out, labels: np.ndarray) -> None:
    """Pack all images, one in memory at a time, into `samples.npz` as ADM's evaluation reads it."""
    shape = (len(labels), *read_image(image_path(out, 0)).shape)
    with (
        write_atomically(out / SET_FILE) as partial,
        partial.open("wb") as file,
        zipfile.ZipFile(file, "w", allowZip64=True) as archive,
    ):
        with archive.open("arr_0.npy", "w", force_zip64=True) as entry:
            header = dict(descr="|u1", fortran_order=False, shape=shape)
            np.lib.format.write_array_header_1_0(entry, header)
            for index in counted(range(len(labels)), len(labels), "image", "packing samples.npz"):
                entry.write(read_image(image_path(out, index)).tobytes())
        with archive.open("labels.npy", "w") as entry:
            np.lib.format.write_array(entry, labels)
