"""The job behind `tools/prepare_latents.py`: pictures through the autoencoder once, packed for training.

    <out>/moments.npy   float16 [n,2,side/8,side/8,8]: mean and log-variance of each picture and of its mirror image
    <out>/labels.npy    int32 [n]
    <out>/info.json     what made them, and a checksum per chunk

Training draws flip and latent anew in every epoch, as with pictures. Several processes share the chunks, each with
the devices of its own machine and a journal of its own, progress-<process>.jsonl. A job that was killed makes only
the chunks that are in no journal, with any number of processes: a line is written after its chunk is on the disk.
"""

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import itertools
import json
import logging
import os
import pathlib
import types

import jax
import numpy as np
from etils import epath
from tqdm import tqdm

from dydit_jax.checkpoints import checksum
from dydit_jax.data.sources import INFO_FILE, LABELS_FILE, LATENTS_FILE, DataConfig, open_source
from dydit_jax.errors import InputError
from dydit_jax.latents import encode_moments
from dydit_jax.loading import load_autoencoder
from dydit_jax.runtime.processes import is_main, require_same, together
from dydit_jax.runtime.settings import own_settings
from dydit_jax.runtime.sharding import MeshConfig, make_mesh

logger = logging.getLogger(__name__)

JOB_FILE, JOURNALS = "job.json", "progress-*.jsonl"


@dataclasses.dataclass(frozen=True)
class LatentsRequest:
    """What a user asks of `tools/prepare_latents.py`.

    Attributes:
      data, path: the pictures, as `data.name` ("images" or "tfds") and `data.path` of a config.
      autoencoder: a file or a published name.
      out: folder for the results, on a disk that all processes share.
      side: of the cropped pictures, in pixels.
      chunk: pictures that a process makes at once, between two points to go on from.
      threads: that read pictures.
      max_bad: unreadable pictures that are replaced by their neighbours before the job stops.
    """

    data: str
    path: str
    autoencoder: str
    out: str
    side: int = 256
    chunk: int = 1024
    threads: int = 4
    max_bad: int = 100

    def __post_init__(self):
        if self.data not in ("images", "tfds"):
            raise InputError(f"--data must be images or tfds, not {self.data!r}.")
        if self.side < 8 or self.side % 8:
            raise InputError(f"--side must be a multiple of 8, not {self.side}.")
        if min(self.chunk, self.threads) < 1 or not self.out:
            raise InputError("--chunk and --threads must be at least 1, and --out a folder.")
        if "://" in self.out:
            raise InputError(f"--out must be a folder on a disk, or a bucket mounted as one, not {self.out}.")


@own_settings()
def prepare_latents(request: LatentsRequest) -> epath.Path:
    """Carry out a request, or what is left of it; with several processes all of them call this.

    Returns:
      The folder, which is what `data.path` should be.

    Raises:
      InputError: pictures or an autoencoder that can't be read, or a folder of another job.
    """
    config = DataConfig(name=request.data, path=request.path, batch_size=1, max_bad=request.max_bad)
    pictures = types.SimpleNamespace(side=request.side, channels=3, classes=None)
    source, params = together(lambda: (open_source(config, pictures), load_autoencoder(request.autoencoder)))
    job = dict(
        source=source.fingerprint,
        count=len(source),
        side=request.side,
        autoencoder=request.autoencoder,
        autoencoder_checksum=checksum(params),
        chunk=request.chunk,
    )
    require_same("source or autoencoder", json.dumps(job))
    out = epath.Path(request.out)
    together(lambda: _prepare_out(out, job) if is_main() else None)
    together(lambda: _require_shared(out))
    if (out / INFO_FILE).is_file():
        logger.info("%s is complete.", out)
        return out
    done = together(lambda: _read_journals(out))
    left = [first for first in range(0, len(source), request.chunk) if first not in done]
    mine = left[jax.process_index() :: jax.process_count()]
    together(lambda: _make_chunks(mine, source, params, request, out))  # too many bad pictures in one end all
    together(lambda: _finish(out, job) if is_main() else None)
    logger.info("Wrote %s: use data.name=latents, data.path=%s", out, out)
    return out


def _make_chunks(starts: list[int], source, params, request: LatentsRequest, out) -> None:
    """Make the chunks that begin at these pictures, each kept before the next."""
    mesh = make_mesh(MeshConfig(), jax.local_devices())
    chunk_at = lambda first: range(first, min(first + request.chunk, len(source)))
    with (
        concurrent.futures.ThreadPoolExecutor(request.threads) as readers,
        tqdm(total=sum(len(chunk_at(first)) for first in starts), unit="picture", desc="latents") as progress,
        _Arrays(out) as arrays,
    ):
        read = lambda first: [readers.submit(source.__getitem__, index) for index in chunk_at(first)]
        ahead = read(starts[0]) if starts else []
        for first, following in itertools.zip_longest(starts, starts[1:]):
            examples = [future.result() for future in ahead]
            ahead = [] if following is None else read(following)  # while the devices work
            moments = _encode(params, np.stack([example["pixels"] for example in examples]), mesh)
            arrays.write(first, moments, np.array([example["label"] for example in examples], np.int32))
            progress.update(len(examples))


@own_settings()
def verify_latents(folder) -> None:
    """Read all of a finished folder and compare it with the checksums that were taken when it was made.

    Raises:
      InputError: not finished, or other numbers; with the first chunk that differs.
    """
    folder = epath.Path(folder)
    if not (folder / INFO_FILE).is_file():
        raise InputError(f"{folder} has no {INFO_FILE}: it is not finished, or not of this tool.")
    info = json.loads((folder / INFO_FILE).read_text())
    moments, labels = (np.load(folder / name, mmap_mode="r") for name in (LATENTS_FILE, LABELS_FILE))
    for number, expected in enumerate(tqdm(info["chunks"], unit="chunk", desc="verifying")):
        chunk = slice(number * info["chunk"], (number + 1) * info["chunk"])
        if _digest(moments[chunk], labels[chunk]) != expected:
            raise InputError(f"{folder} is damaged: pictures {chunk.start} to {chunk.stop - 1} have other checksums.")
    logger.info("%s: %d chunks, as they were made.", folder, len(info["chunks"]))


# --- The folder of a job under way ---------------------------------------------------------------


def _prepare_out(out, job: dict) -> None:
    """Make the folder and its empty arrays, or find that they are this job's and what is in the journals is whole."""
    known = next((out / file for file in (INFO_FILE, JOB_FILE) if (out / file).is_file()), None)
    if known is None:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise InputError(f"{out} is not empty and holds no latents; name another --out.")
        try:
            out.mkdir(parents=True, exist_ok=True)
            (out / JOB_FILE).write_text(json.dumps(job, indent=2) + "\n")
        except OSError as error:
            raise InputError(f"Can't write to {out}: {error}.") from error
    else:
        found = json.loads(known.read_text())
        changed = [key for key in job if found.get(key) != job[key]]
        if changed:
            raise InputError(f"{out} holds latents made otherwise ({', '.join(changed)} differ); name another --out.")
    if not (out / INFO_FILE).is_file():
        _make_arrays(out, job)
        _require_whole(out, job["chunk"])


def _make_arrays(out, job: dict) -> None:
    """Make what is not there of the arrays, of zeros that take no room yet."""
    count, side = job["count"], job["side"] // 8
    shapes = {LATENTS_FILE: ((count, 2, side, side, 8), np.float16), LABELS_FILE: ((count,), np.int32)}
    missing = {name: told for name, told in shapes.items() if not _current(out, name).is_file()}
    if missing and any(out.glob(JOURNALS)):
        raise InputError(f"{out} lacks {', '.join(missing)}; remove the folder and start again.")
    for name, (shape, dtype) in missing.items():
        np.lib.format.open_memmap(_current(out, name), "w+", dtype=dtype, shape=shape)


def _require_whole(out, chunk: int) -> None:
    """Compare the last chunk of every journal with its checksum; what a kill has cut off a journal is dropped."""
    moments, labels = (np.load(_current(out, name), mmap_mode="r") for name in (LATENTS_FILE, LABELS_FILE))
    for path in out.glob(JOURNALS):
        lines = [line for line in path.read_text().splitlines() if line.endswith("}")]
        path.write_text("".join(line + "\n" for line in lines))
        for line in map(json.loads, lines[-1:]):
            rows = slice(line["first"], line["first"] + chunk)
            if _digest(moments[rows], labels[rows]) != line["sha256"]:
                raise InputError(
                    f"{out} is damaged: pictures from {line['first']} on have another checksum; remove the folder and "
                    "start again."
                )


def _require_shared(out) -> None:
    if not (out / INFO_FILE).is_file() and not (out / JOB_FILE).is_file():
        raise InputError(f"{out} is not what process 0 sees there; name a folder that all machines share.")


def _read_journals(out) -> dict[int, str]:
    """Return the checksum of every chunk that is done, by its first picture, ascending."""
    lines = [json.loads(line) for path in out.glob(JOURNALS) for line in path.read_text().splitlines()]
    return {line["first"]: line["sha256"] for line in sorted(lines, key=lambda line: line["first"])}


class _Arrays:
    """The arrays of a job, written by rows. Use as a context.

    By ordinary writes, not through a memory map, which writes whole pages: other machines write the neighbouring rows.
    """

    def __init__(self, out):
        self._offsets = [np.load(_current(out, name), mmap_mode="r").offset for name in (LATENTS_FILE, LABELS_FILE)]
        self._stack = contextlib.ExitStack()
        paths = [pathlib.Path(_current(out, name)) for name in (LATENTS_FILE, LABELS_FILE)]
        self._files = [self._stack.enter_context(path.open("r+b")) for path in paths]
        journal = out / JOURNALS.replace("*", str(jax.process_index()))
        self._journal = self._stack.enter_context(journal.open("a"))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._stack.close()

    def write(self, first: int, moments: np.ndarray, labels: np.ndarray) -> None:
        """Write rows from `first` on, and then say so in the journal."""
        for file, offset, rows in zip(self._files, self._offsets, (moments, labels)):
            file.seek(offset + first * rows[0].nbytes)
            file.write(np.ascontiguousarray(rows).tobytes())
            file.flush()
            os.fsync(file.fileno())
        self._journal.write(json.dumps(dict(first=first, sha256=_digest(moments, labels))) + "\n")
        self._journal.flush()


def _finish(out, job: dict) -> None:
    """Give the arrays their names and describe them; the journals are not needed any more."""
    chunks = list(_read_journals(out).values())
    for name in (LATENTS_FILE, LABELS_FILE):
        _current(out, name).replace(out / name)
    told = hashlib.sha256("".join(chunks).encode()).hexdigest()
    partial = out / f"{INFO_FILE}.partial"
    partial.write_text(json.dumps(dict(job, checksum=told, chunks=chunks), indent=2) + "\n")
    partial.replace(out / INFO_FILE)
    for path in out.glob(JOURNALS):
        path.unlink()


def _current(out, name: str):
    """Return where an array lies as long as the job is not finished; a kill while it finished may have renamed it."""
    return out / name if (out / name).is_file() else out / f"{name}.partial"


# --- One chunk -----------------------------------------------------------------------------------


def _encode(params, pixels: np.ndarray, mesh) -> np.ndarray:
    """Return the moments float16 [n,2,side/8,side/8,8] of pictures uint8 [n,side,side,3] and their mirror images."""
    both = [encode_moments(params, view.astype(np.float32) / 127.5 - 1, mesh) for view in (pixels, pixels[:, :, ::-1])]
    packed = [np.concatenate([moments.mean, moments.log_variance], axis=-1) for moments in both]
    return np.stack(packed, axis=1).astype(np.float16)


def _digest(moments: np.ndarray, labels: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(moments).tobytes() + np.ascontiguousarray(labels).tobytes()).hexdigest()
