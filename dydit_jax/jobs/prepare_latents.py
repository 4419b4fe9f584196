"""The job behind `tools/prepare_latents.py`: pictures through the autoencoder once, packed for training.

    <out>/moments.npy    float16 [n,2,side/f,side/f,2C]: mean and log-variance of each picture and of its mirror image
    <out>/labels.npy     int32 [n]
    <out>/checksums.npy  uint32 [n]: of each picture's moments and label, for those who read them
    <out>/info.json      what made them, scale and shift with which a model sees them, mean and standard deviation of
                         each channel, and a checksum per chunk
    <out>/autoencoder.safetensors  with --normalize: the autoencoder with the latents' own scale and shift
    <out>/lock.json      who makes them now (`runtime/locks.py`)

Training draws new flips and latents in every epoch, as with pictures; `data.flip=False` takes the pictures alone.
Several processes share the chunks, each with the devices of its own machine and a journal of its own. A job that was
killed makes only the chunks that are in no journal (`jobs/latents_folder.py`), with any number of processes.
"""

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import itertools
import json
import logging
import types
from collections.abc import Iterator

import jax
import numpy as np
from etils import epath

from dydit_jax.checkpoints import checksum, package_versions, save_autoencoder
from dydit_jax.data.latent_files import AUTOENCODER_FILE, INFO_FILE, LatentFiles
from dydit_jax.data.sources import MOST_THREADS, DataConfig, DataSource, open_source
from dydit_jax.errors import InputError
from dydit_jax.jobs.latents_folder import (
    JOB_FILE,
    Arrays,
    begin_folder,
    describe_autoencoder,
    find_statistics,
    finish_folder,
    read_journals,
    require_shared,
)
from dydit_jax.latents import encode_moments
from dydit_jax.loading import load_autoencoder
from dydit_jax.models.autoencoder import Autoencoder
from dydit_jax.records import require_range
from dydit_jax.runtime.files import locate, read_json, write_json
from dydit_jax.runtime.locks import FolderLock, claim_folder
from dydit_jax.runtime.processes import is_main, on_all_processes, require_same
from dydit_jax.runtime.progress import Progress
from dydit_jax.runtime.settings import own_settings
from dydit_jax.runtime.sharding import MeshConfig, make_mesh

logger = logging.getLogger(__name__)

MOST_CHUNK, MOST_SIDE = 65_536, 4096


@dataclasses.dataclass(frozen=True)
class LatentsRequest:
    """What a user asks of `tools/prepare_latents.py`.

    Attributes:
      out: folder for the latents, on a disk that all processes share.
      path: where the pictures are: their folder, or <folder or name>/<split> of a prepared dataset.
      data: "images" (a folder per class) or "tfds" (a prepared dataset).
      autoencoder: a file or a published name.
      side: side of the cropped pictures, in pixels.
      normalize: give a model latents of mean 0 and deviation 1 in each channel: writes the autoencoder with that scale
        and shift beside them, for sampling.autoencoder to name. A folder that is finished may be normalised later.
      chunk: pictures that a process makes at once, between two points to go on from.
      threads: threads that read pictures.
      max_bad: unreadable pictures that are replaced by their neighbours before the job stops.
      image_key: name of the picture in the examples of a prepared dataset.
      label_key: name of the class in them.
    """

    out: str
    path: str = ""
    data: str = "images"
    autoencoder: str = "sd-vae-ft-ema"
    side: int = 256
    normalize: bool = False
    chunk: int = 1024
    threads: int = 4
    max_bad: int = 100
    image_key: str = "image"
    label_key: str = "label"

    def __post_init__(self):
        if not self.path:
            raise InputError("--path is empty; name the pictures.")
        if self.data not in ("images", "tfds"):
            raise InputError(f"--data must be images or tfds, not {self.data!r}.")
        if self.side < 8 or self.side % 8:
            raise InputError(f"--side must be a multiple of 8, not {self.side}.")
        require_range("--side", self.side, high=MOST_SIDE)
        require_range("--chunk", self.chunk, low=1, high=MOST_CHUNK)
        require_range("--threads", self.threads, low=1, high=MOST_THREADS)
        require_range("--max_bad", self.max_bad, low=0)
        if not self.out:
            raise InputError("--out must be a folder.")
        if "://" in self.out:
            raise InputError(f"--out must be a folder on a disk, or a bucket mounted as one, not {self.out}.")


@own_settings()
def prepare_latents(request: LatentsRequest, *, remedy: str = "name another --out") -> epath.Path:
    """Carry out a request, or what is left of it; with several processes all of them call this.

    Args:
      request: what to make.
      remedy: what the user can do where the folder holds other latents, for the message.

    Returns:
      The folder, which is what `data.path` should be.

    Raises:
      InputError: pictures or an autoencoder that can't be read, or a folder of another job or in use.
    """
    source, autoencoder = on_all_processes(lambda: _open(request))
    job = _describe(request, source, autoencoder)
    require_same("source or autoencoder", json.dumps(job))
    out = locate(request.out)
    with contextlib.ExitStack() as held:
        prepare = lambda: _prepare_out(out, job, request, remedy)
        lock = on_all_processes(lambda: held.enter_context(prepare()) if is_main() else None)
        on_all_processes(lambda: require_shared(out))
        if (out / INFO_FILE).is_file():
            logger.info("%s is complete.", out)
        else:
            _make_missing(job, source, autoencoder, request, lock)
        if request.normalize:
            on_all_processes(lambda: _normalize(out, autoencoder) if is_main() else None)
    return out


def _open(request: LatentsRequest) -> tuple[DataSource, Autoencoder]:
    """Open the pictures and the autoencoder, whose factor their side is a multiple of."""
    settings = dict(max_bad=request.max_bad, image_key=request.image_key, label_key=request.label_key)
    config = DataConfig(name=request.data, path=request.path, batch_size=1, **settings)
    source = open_source(config, types.SimpleNamespace(side=request.side, channels=3, classes=None))
    autoencoder = load_autoencoder(request.autoencoder)
    if request.side % autoencoder.config.factor:
        raise InputError(
            f"--side must be a multiple of {autoencoder.config.factor}, the factor of {request.autoencoder}, not "
            f"{request.side}."
        )
    return source, autoencoder


def _describe(request: LatentsRequest, source: DataSource, autoencoder: Autoencoder) -> dict:
    """Return all that makes the latents."""
    return dict(
        source=source.fingerprint,
        count=len(source),
        side=request.side,
        autoencoder=request.autoencoder,
        autoencoder_checksum=checksum(autoencoder.params),
        autoencoder_record=describe_autoencoder(autoencoder.config),
        chunk=request.chunk,
    )


@contextlib.contextmanager
def _prepare_out(out, job: dict, request: LatentsRequest, remedy: str) -> Iterator[FolderLock | None]:
    """Hold the folder of a job; one that is finished, and is to stay as it is, is only compared with the job."""
    if (out / INFO_FILE).is_file() and not request.normalize:
        begin_folder(out, job, remedy)
        yield None
    else:
        with claim_folder(out, INFO_FILE, JOB_FILE) as lock:
            begin_folder(out, job, remedy)
            yield lock


def _make_missing(
    job: dict, source: DataSource, autoencoder: Autoencoder, request: LatentsRequest, lock: FolderLock | None
) -> None:
    """Make what is left of the latents, each process its share, and finish the folder."""
    out = locate(request.out)
    done = on_all_processes(lambda: read_journals(out))
    left = [first for first in range(0, len(source), request.chunk) if first not in done]
    mine = left[jax.process_index() :: jax.process_count()]
    # For hours: a process that fails here ends the others by the line between them, not where they all are done.
    _make_chunks(mine, source, autoencoder, request, lock)
    on_all_processes(lambda: None)  # all chunks are there
    on_all_processes(lambda: finish_folder(out, job, source.class_names) if is_main() else None)
    logger.info("Wrote %s: use data.name=latents, data.path=%s", out, out)


def _make_chunks(
    starts: list[int], source: DataSource, autoencoder: Autoencoder, request: LatentsRequest, lock: FolderLock | None
) -> None:
    """Make the chunks that begin at these pictures, each kept before the next."""
    mesh = make_mesh(MeshConfig(), jax.local_devices())
    chunk_at = lambda first: range(first, min(first + request.chunk, len(source)))
    with (
        concurrent.futures.ThreadPoolExecutor(request.threads) as readers,
        Progress(sum(len(chunk_at(first)) for first in starts), "picture", "latents") as progress,
        Arrays(epath.Path(request.out), lock) as arrays,
    ):
        read = lambda first: [readers.submit(source.__getitem__, index) for index in chunk_at(first)]
        ahead = read(starts[0]) if starts else []
        for first, following in itertools.zip_longest(starts, starts[1:]):
            examples = [future.result() for future in ahead]
            ahead = [] if following is None else read(following)  # while the devices work
            pixels = np.stack([example["pixels"] for example in examples])
            moments = _encode(autoencoder, pixels, mesh, progress)
            _require_finite(moments, first, request.autoencoder)
            arrays.write(first, moments, np.array([example["label"] for example in examples], np.int32))


def _encode(autoencoder: Autoencoder, pixels: np.ndarray, mesh, progress: Progress) -> np.ndarray:
    """Return the moments float16 [n,2,side/f,side/f,2C] of pictures uint8 [n,side,side,3] and their mirror images."""
    report = lambda pictures: progress.advance(pictures / 2)
    views = (pixels, pixels[:, :, ::-1])
    both = [encode_moments(autoencoder, view.astype(np.float32) / 127.5 - 1, mesh, report) for view in views]
    packed = [np.concatenate([moments.mean, moments.log_variance], axis=-1) for moments in both]
    with np.errstate(over="ignore"):  # what float16 can't hold is found, and named, as infinite
        return np.stack(packed, axis=1).astype(np.float16)


def _require_finite(moments: np.ndarray, first: int, autoencoder: str) -> None:
    """Raise where a value of the moments of the pictures from `first` on is NaN or infinite."""
    wrong = np.flatnonzero(~np.isfinite(moments).reshape(len(moments), -1).all(1))
    if wrong.size:
        raise InputError(
            f"The latents of picture {first + wrong[0]} are not finite, or too large for {moments.dtype}; check the "
            f"weights of the autoencoder {autoencoder}, and the precision that they were saved in."
        )


def _normalize(out, autoencoder: Autoencoder) -> None:
    """Write the autoencoder whose scale and shift give these latents mean 0 and deviation 1 in each channel.

    Raises:
      InputError: a channel in which all latents are equal.
    """
    info = read_json(out / INFO_FILE)
    # Folders of earlier versions have none.
    statistics = info if "std" in info else find_statistics(out, info["chunk"], {})
    mean, std = statistics["mean"], statistics["std"]
    if not all(value > 0 for value in std):
        raise InputError(
            f"Channel {std.index(min(std))} of the latents in {out} is constant; --normalize can't scale it."
        )
    config = dataclasses.replace(autoencoder.config, scale=tuple(1 / value for value in std), shift=tuple(mean))
    about = dict(autoencoder=info["autoencoder"], latents=info["checksum"], versions=package_versions())
    save_autoencoder(out / AUTOENCODER_FILE, Autoencoder(config, autoencoder.params), about)
    record = dict(scale=list(config.scale), shift=list(config.shift), mean=mean, std=std)
    write_json(out / INFO_FILE, info | record | dict(normalized=True))
    logger.info("Wrote %s: use sampling.autoencoder=%s", out / AUTOENCODER_FILE, out / AUTOENCODER_FILE)


@own_settings()
def verify_latents(folder) -> None:
    """Read all of a finished folder and compare it with the checksums that were taken when it was made.

    Raises:
      InputError: not finished, or other numbers; with the first chunk that differs.
    """
    folder = locate(folder)
    if not (folder / INFO_FILE).is_file():
        raise InputError(f"{folder} has no {INFO_FILE}: it is not finished, or not of this tool.")
    files = LatentFiles(folder)
    chunk, expected = files.info.get("chunk"), files.info.get("chunks")
    if type(chunk) is not int or chunk < 1 or not isinstance(expected, list):
        raise InputError(f"{folder / INFO_FILE} holds no checksums of chunks: it is damaged, or not of this tool.")
    with Progress(len(files), "picture", "verifying") as progress:
        for number, first in enumerate(range(0, len(files), chunk)):
            rows = range(first, min(first + chunk, len(files)))
            digest = hashlib.sha256()
            for index in rows:
                digest.update(files.read(index))
            digest.update(files.labels[first : rows.stop].tobytes())
            if expected[number : number + 1] != [digest.hexdigest()]:
                raise InputError(f"{folder} is damaged: pictures {first} to {rows.stop - 1} have other checksums.")
            progress.advance(len(rows))
    logger.info("%s: %d chunks, as they were made.", folder, len(expected))
