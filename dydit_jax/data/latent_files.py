"""The files of prepared latents: `tools/prepare_latents.py` writes them, `data.name=latents` reads them.

    <folder>/moments.npy    floats [n,2,side,side,2C], of an image and of its mirror image: mean, then log-variance
    <folder>/labels.npy     integers [n]
    <folder>/checksums.npy  uint32 [n]: the CRC-32 of an example's moments and label, compared whenever it is read
    <folder>/info.json      what made them, scale and shift with which a model sees them, mean and deviation per channel

The first two are enough: latents that were made in another way have no checksums, and damage to them goes unnoticed.
Without a scale and a shift in `info.json` they are those of Stable Diffusion.
"""

import logging
import os
import pathlib
import typing
import zlib

import numpy as np

from dydit_jax.errors import InputError, name_file
from dydit_jax.models.autoencoder import AutoencoderConfig
from dydit_jax.records import read_mapping, read_record
from dydit_jax.runtime.files import read_json

LATENTS_FILE, LABELS_FILE, CHECKSUMS_FILE, INFO_FILE = "moments.npy", "labels.npy", "checksums.npy", "info.json"
CLASSES_KEY = "classes"  # of info.json: names of the classes by label
AUTOENCODER_FILE = "autoencoder.safetensors"  # the latents' own, where they were normalised

logger = logging.getLogger(__name__)


class LatentsInfo(typing.TypedDict, total=False):
    """What is read of `info.json`."""

    classes: tuple[str, ...]
    checksum: str
    autoencoder: str
    autoencoder_checksum: str
    normalized: bool


class LatentFiles:
    """Prepared latents, read one by one.

    By ordinary reads, not through a memory map: with a map, a disk that fails or a file that is cut meanwhile kills the
    program without a message.

    Attributes:
      labels: [n], as stored.
      shape: of the moments, [n,2,side,side,2C].
      info: what made them, {} if that is not known.
      autoencoder: which one decodes them, "" if that is not known.
      record: its channels, and the scale and shift with which a model sees these latents.
    """

    def __init__(self, folder):
        """Open a folder.

        Raises:
          InputError: files that are not there, damaged, or do not belong together.
        """
        folder = pathlib.Path(folder)
        self._path = folder / LATENTS_FILE
        moments = load_array(self._path, mmap_mode="r")
        self.labels, self.shape = load_array(folder / LABELS_FILE), moments.shape
        if len(self.shape) != 5 or self.shape[1] != 2 or self.labels.shape != self.shape[:1]:
            raise InputError(
                f"{folder} holds moments {self.shape} and {self.labels.size} labels; it must be "
                "[n,2,side,side,2C] and n."
            )
        if moments.dtype.kind != "f":
            raise InputError(f"{self._path} holds {moments.dtype}, not floats; save it again from moments as float32.")
        if not moments.flags.c_contiguous:
            raise InputError(f"{self._path} is in Fortran's order; save it again from np.ascontiguousarray(moments).")
        self._dtype, self._offset, self._size = moments.dtype, moments.offset, moments[:1].nbytes
        self._file = self._path.open("rb")
        self._checksums = None
        if (folder / CHECKSUMS_FILE).exists():
            self._checksums = load_array(folder / CHECKSUMS_FILE)
            if self._checksums.shape != self.labels.shape:
                raise InputError(f"{folder / CHECKSUMS_FILE} is of other latents: {self._checksums.shape}; remove it.")
        else:
            logger.info("%s has no %s: damage to its latents goes unnoticed.", folder, CHECKSUMS_FILE)
        described = read_json(folder / INFO_FILE) if (folder / INFO_FILE).exists() else {}
        with name_file(folder / INFO_FILE):
            self.info = read_mapping(LatentsInfo, described, "info")
            known = {name: self.info[name] for name in ("scale", "shift") if name in self.info}
            self.record = read_record(AutoencoderConfig, dict(known, channels=self.shape[-1] // 2), "info")
        own = folder / AUTOENCODER_FILE if self.info.get("normalized") else ""
        self.autoencoder = str(own or self.info.get("autoencoder", ""))

    def __len__(self):
        return len(self.labels)

    def read(self, index: int) -> np.ndarray:
        """Return the moments [2,side,side,2C] of one example.

        Raises:
          InputError: they can't be read, or are not what was written.
        """
        try:
            content = os.pread(self._file.fileno(), self._size, self._offset + index * self._size)
        except OSError as error:
            raise InputError(f"{self._path} can't be read at example {index} ({error.strerror}).") from error
        if len(content) < self._size:
            raise InputError(f"{self._path} is cut short before example {index}; copy or make it again.")
        moments = np.frombuffer(content, self._dtype).reshape(self.shape[1:])
        if self._checksums is not None and _checksum(moments, self.labels[index]) != self._checksums[index]:
            raise InputError(
                f"{self._path} is damaged at example {index}: its checksum is another one. Copy the folder again, or "
                "make it again with tools/prepare_latents.py."
            )
        return moments


def load_array(path, mmap_mode: str | None = None) -> np.ndarray:
    """Read an `.npy` file, or map it into memory.

    Raises:
      InputError: not there, of another kind, or cut short.
    """
    try:
        array = np.load(path, mmap_mode)
    except Exception as error:  # noqa: BLE001 (whatever a damaged file makes of it)
        reason = " ".join(str(error).split())
        raise InputError(f"{path} is missing, cut short or no .npy file of numbers ({reason}).") from error
    if not isinstance(array, np.ndarray):
        raise InputError(f"{path} is an .npz file; it must be an .npy file of one array.")
    return array


def checksums_of(moments: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return the checksums uint32 [n] of examples: moments [n,2,side,side,2C], labels [n]."""
    return np.array([_checksum(row, label) for row, label in zip(moments, labels)], np.uint32)


def _checksum(moments: np.ndarray, label) -> int:
    """Return the CRC-32 of one example; that of labels is the same for every kind of integer."""
    return zlib.crc32(np.int64(label).tobytes(), zlib.crc32(np.ascontiguousarray(moments)))
