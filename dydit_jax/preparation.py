"""The job behind `tools/prepare_latents.py`: pictures through the autoencoder once, packed for training.

    <out>/moments.npy   float16 [n,2,side/8,side/8,8]: mean and log-variance of each picture and of its mirror image
    <out>/labels.npy    int32 [n]
    <out>/info.json     what made them, and a checksum per chunk

Training draws flip and latent anew in every epoch, as with pictures. A job that was killed goes on at the chunk that
it was at: a chunk counts once its line is in progress.jsonl, which is written after its numbers are on the disk.
"""

import concurrent.futures
import dataclasses
import hashlib
import json
import logging
import types

import numpy as np
from etils import epath
from tqdm import tqdm

from dydit_jax.checkpoints import checksum
from dydit_jax.data.sources import INFO_FILE, LABELS_FILE, LATENTS_FILE, DataConfig, open_source
from dydit_jax.errors import InputError
from dydit_jax.latents import encode_moments
from dydit_jax.loading import load_autoencoder
from dydit_jax.sharding import MeshConfig, make_mesh

logger = logging.getLogger(__name__)

PROGRESS_FILE, JOB_FILE = "progress.jsonl", "job.json"


@dataclasses.dataclass(frozen=True)
class LatentsRequest:
    """What a user asks of `tools/prepare_latents.py`.

    Attributes:
      data, path: the pictures, as `data.name` ("images" or "tfds") and `data.path` of a config.
      autoencoder: a file or a published name.
      out: folder for the results, on a disk of this machine.
      side: of the cropped pictures, in pixels.
      chunk: pictures between two points to go on from.
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


def prepare_latents(request: LatentsRequest) -> epath.Path:
    """Carry out a request, or what is left of it.

    Returns:
      The folder, which is what `data.path` should be.

    Raises:
      InputError: pictures or an autoencoder that can't be read, or a folder of another job.
    """
    config = DataConfig(name=request.data, path=request.path, batch_size=1, max_bad=request.max_bad)
    source = open_source(config, types.SimpleNamespace(side=request.side, channels=3, classes=None))
    params = load_autoencoder(request.autoencoder)
    job = dict(
        source=source.fingerprint,
        count=len(source),
        side=request.side,
        autoencoder=request.autoencoder,
        autoencoder_checksum=checksum(params),
        chunk=request.chunk,
    )
    out = _prepare_out(request.out, job)
    if (out / INFO_FILE).is_file():
        logger.info("%s is complete.", out)
        return out
    moments, labels, done = _open_partial(out, job)
    mesh = make_mesh(MeshConfig())
    starts = range(len(done) * request.chunk, len(source), request.chunk)
    indices = lambda first: range(first, min(first + request.chunk, len(source)))
    with (
        concurrent.futures.ThreadPoolExecutor(request.threads) as readers,
        tqdm(total=len(source), initial=len(done) * request.chunk, unit="picture", desc="latents") as progress,
        (out / PROGRESS_FILE).open("a") as journal,
    ):
        read = lambda first: [readers.submit(source.__getitem__, index) for index in indices(first)]
        ahead = read(starts[0]) if starts else []
        for first in starts:
            examples, following = [future.result() for future in ahead], first + request.chunk
            ahead = read(following) if following < len(source) else []  # while the devices work
            chunk = slice(first, first + len(examples))
            moments[chunk] = _encode(params, np.stack([example["pixels"] for example in examples]), mesh)
            labels[chunk] = [example["label"] for example in examples]
            moments.flush()
            labels.flush()
            done.append(_digest(moments[chunk], labels[chunk]))
            journal.write(json.dumps(dict(first=first, sha256=done[-1])) + "\n")
            journal.flush()
            progress.update(len(examples))
    del moments, labels
    for name in (LATENTS_FILE, LABELS_FILE):
        _current(out, name).replace(out / name)
    told = hashlib.sha256("".join(done).encode()).hexdigest()
    partial = out / f"{INFO_FILE}.partial"
    partial.write_text(json.dumps(dict(job, checksum=told, chunks=done), indent=2) + "\n")
    partial.replace(out / INFO_FILE)
    (out / PROGRESS_FILE).unlink()
    logger.info("Wrote %s: use data.name=latents, data.path=%s", out, out)
    return out


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


def _prepare_out(name: str, job: dict) -> epath.Path:
    """Make the folder, or find that it is this job's."""
    out = epath.Path(name)
    known = next((out / file for file in (INFO_FILE, JOB_FILE) if (out / file).is_file()), None)
    if known is not None:
        found = json.loads(known.read_text())
        changed = [key for key in job if found.get(key) != job[key]]
        if changed:
            raise InputError(f"{out} holds latents made otherwise ({', '.join(changed)} differ); name another --out.")
        return out
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} is not empty and holds no latents; name another --out.")
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / JOB_FILE).write_text(json.dumps(job, indent=2) + "\n")
    except OSError as error:
        raise InputError(f"Can't write to {out}: {error}.") from error
    return out


def _open_partial(out, job: dict):
    """Return the arrays under way and the checksums of the chunks that are done."""
    count, side = job["count"], job["side"] // 8
    lines = (out / PROGRESS_FILE).read_text().splitlines() if (out / PROGRESS_FILE).is_file() else []
    whole = [line for line in lines if line.endswith("}")]  # a kill may have cut the last one
    (out / PROGRESS_FILE).write_text("".join(line + "\n" for line in whole))
    done = [json.loads(line)["sha256"] for line in whole]
    shapes = {LATENTS_FILE: ((count, 2, side, side, 8), np.float16), LABELS_FILE: ((count,), np.int32)}
    mode = "r+" if done else "w+"
    moments, labels = (
        np.lib.format.open_memmap(_current(out, name), mode, dtype=dtype, shape=shape)
        for name, (shape, dtype) in shapes.items()
    )
    last = slice((len(done) - 1) * job["chunk"], len(done) * job["chunk"])
    if done and _digest(moments[last], labels[last]) != done[-1]:
        raise InputError(f"{out} is damaged: its last chunk has another checksum; remove the folder and start again.")
    return moments, labels, done


def _current(out, name: str):
    """Return where an array lies as long as the job is not finished; a kill while it finished may have renamed it."""
    return out / name if (out / name).is_file() else out / f"{name}.partial"


def _encode(params, pixels: np.ndarray, mesh) -> np.ndarray:
    """Return the moments float16 [n,2,side/8,side/8,8] of pictures uint8 [n,side,side,3] and their mirror images."""
    both = [encode_moments(params, view.astype(np.float32) / 127.5 - 1, mesh) for view in (pixels, pixels[:, :, ::-1])]
    packed = [np.concatenate([moments.mean, moments.log_variance], axis=-1) for moments in both]
    return np.stack(packed, axis=1).astype(np.float16)


def _digest(moments: np.ndarray, labels: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(moments).tobytes() + np.ascontiguousarray(labels).tobytes()).hexdigest()
