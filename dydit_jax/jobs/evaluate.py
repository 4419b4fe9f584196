"""The job behind `evaluate.py`: sets of images in, FID, sFID, Inception score, precision and recall out.

The features are those of the Inception network of 2015 (`metrics/inception`), computed in float32 on all devices. A
result tells all that made it: checksums and counts of both sides, the network, devices and versions.
"""

import dataclasses
import functools
import json
import logging
import time

import numpy as np
from etils import epath

from dydit_jax.checkpoints import checksum, package_versions
from dydit_jax.convert.published import fetch, known_names
from dydit_jax.convert.torch_files import read_tensors
from dydit_jax.data.image_sets import IMAGES_ENTRY, ZIP_ERRORS, ImageSet, npz_shapes, open_images, require_packing
from dydit_jax.drawing.report import EVALUATION_FILE, write_report
from dydit_jax.errors import InputError
from dydit_jax.metrics.distances import NEIGHBOURS, frechet_distance, inception_score, moments, precision_recall
from dydit_jax.metrics.inception import convert_inception, features
from dydit_jax.records import require_range
from dydit_jax.runtime.files import locate, parse_json, write_atomically, write_json
from dydit_jax.runtime.origin import origin
from dydit_jax.runtime.progress import Progress
from dydit_jax.runtime.settings import own_settings
from dydit_jax.runtime.sharding import MeshConfig, make_mesh, map_in_slices

logger = logging.getLogger(__name__)

MOST_BATCH, MOST_SIDE = 65_536, 4096
DEFAULT_INCEPTION = "inception-2015"
# The names in ADM's reference batches. Other tools keep the first two.
MOMENT_SHAPES = dict(mu=(2048,), sigma=(2048, 2048), mu_s=(2023,), sigma_s=(2023, 2023))
MOMENTS = tuple(MOMENT_SHAPES)
TEXTS, MOST_TEXT_BYTES = ("network", "about", "told"), 2**20
ENOUGH = dict(fid=50_000, sfid=50_000, inception_score=50_000, precision=10_000, recall=10_000)


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What a user asks of `evaluate.py`.

    Attributes:
      samples: sets of images to judge, with commas between them.
      reference: set to compare with: images, an ADM reference batch, or statistics; those with mu and sigma alone give
        the FID alone. Without a reference only the Inception score is given.
      out: file for the results, JSON.
      inception: file of the published PyTorch port of the network, or its name to have it fetched.
      save_statistics: file for the statistics of the reference, to be reused.
      batch_size: images at once; does not change the results.
      side: crop pictures of folders and datasets to this side, as ADM does; 0 leaves them as they are.
      report: also write the results into the folder of each set, as evaluation.json and on its page.
      image_key: name of the picture in the examples of a prepared dataset.
    """

    samples: tuple[str, ...]
    reference: str = ""
    out: str = ""
    inception: str = DEFAULT_INCEPTION
    save_statistics: str = ""
    batch_size: int = 64
    side: int = 0
    report: bool = False
    image_key: str = "image"

    def __post_init__(self):
        if not self.samples:
            raise InputError("--samples is empty; name one set of images or several, with commas between them.")
        require_range("--batch_size", self.batch_size, low=1, high=MOST_BATCH)
        require_range("--side", self.side, low=0, high=MOST_SIDE)
        for path in (self.out, self.save_statistics):
            locate(path)  # what can't be written is refused before anything is computed
        if self.save_statistics and not self.reference:
            raise InputError("--save_statistics keeps those of --reference; name one.")
        if self.report and not all(locate(path).is_dir() for path in self.samples):
            raise InputError(f"--report needs folders, such as sample.py writes, not {', '.join(self.samples)}.")


@dataclasses.dataclass(frozen=True)
class Statistics:
    """What is known of a set of images.

    Attributes:
      about: name, count and checksum, for the record.
      moments: "mu" [2048], "sigma" [2048,2048], "mu_s" [2023], "sigma_s" [2023,2023], float64; the latter two may be
        unknown.
      pool: features [n,2048], or None where only the moments are known.
      logits: [n,1008], or None.
    """

    about: dict
    moments: dict
    pool: np.ndarray | None = None
    logits: np.ndarray | None = None


@own_settings()
def evaluate(request: Evaluation) -> list[dict]:
    """Carry out a request.

    Returns:
      One record per set of samples.

    Raises:
      InputError: anything wrong with the files, as far as possible before anything is computed.
    """
    open_set = functools.partial(open_images, side=request.side, image_key=request.image_key)
    sets = [open_set(path) for path in request.samples]
    params, network = load_inception(request.inception)
    mesh = make_mesh(MeshConfig())
    measure = functools.partial(image_statistics, params=params, mesh=mesh, batch_size=request.batch_size)
    reference = None
    if request.reference:
        reference = load_reference(request.reference, network, measure, open_set)
        if request.save_statistics:
            save_statistics(request.save_statistics, reference, network)
    records = []
    for images in sets:
        began = time.monotonic()
        found = measure(images)
        scores = compare(found, reference)
        _warn_of_few(scores, found, reference)
        records.append(
            dict(
                samples=found.about,
                reference=reference and reference.about,
                **scores,
                network=network,
                precision_of_features="float32",
                **origin(),
                seconds=time.monotonic() - began,
                versions=package_versions(),
            )
        )
    logger.info("%s", _table(records))
    if request.out:
        write_json(request.out, records)
        logger.info("Wrote %s", request.out)
    if request.report:
        for path, record in zip(request.samples, records):
            write_json(epath.Path(path) / EVALUATION_FILE, [record])
            logger.info("Wrote %s", write_report(path))
    return records


def load_inception(inception: str) -> tuple[dict, str]:
    """Return the network's parameters and their checksum.

    Args:
      inception: a file of the published PyTorch port, or its name.

    Raises:
      InputError: no such file, or another network.
    """
    path = locate(inception)
    if not path.exists():
        if inception not in known_names("judge"):
            raise InputError(
                f"There is no file {inception}; --inception wants one, or {DEFAULT_INCEPTION} to fetch it."
            )
        path = fetch(inception)
    params = convert_inception(read_tensors(path))
    return params, checksum(params)


def image_statistics(images: ImageSet, *, params: dict, mesh, batch_size: int) -> Statistics:
    """Compute the features of all images, and their moments.

    Raises:
      InputError: a single image, or features that are not finite, with the number of the image.
    """
    if images.count < 2:
        raise InputError(f"{images.name} has one image; a distance needs at least two.")
    parts = []
    with Progress(images.count, "image", f"features of {images.name}") as progress:
        for batch in images.batches(batch_size):
            found = map_in_slices(features, params, batch, mesh, slice_size=batch_size)
            wrong = np.flatnonzero(~np.isfinite(found["pool"]).all(1))
            if wrong.size:
                raise InputError(f"Image {progress.done + wrong[0]} of {images.name} has features that are not finite.")
            parts.append(found)
            progress.advance(len(batch))
    pool, spatial, logits = (np.concatenate([part[name] for part in parts]) for name in ("pool", "spatial", "logits"))
    about = dict(name=images.name, count=images.count, checksum=images.checksum)
    return Statistics(about, dict(zip(MOMENTS, (*moments(pool), *moments(spatial)))), pool, logits)


def compare(samples: Statistics, reference: Statistics | None) -> dict:
    """Return the metrics that the two sides allow; None where there are too few images, and "missing": why."""
    scores = dict(inception_score=inception_score(samples.logits))
    if reference is None:
        return scores
    ours, theirs = samples.moments, reference.moments
    scores["fid"] = frechet_distance(ours["mu"], ours["sigma"], theirs["mu"], theirs["sigma"])
    scores |= dict(sfid=None, precision=None, recall=None)
    missing = {}
    if "mu_s" in theirs:
        scores["sfid"] = frechet_distance(ours["mu_s"], ours["sigma_s"], theirs["mu_s"], theirs["sigma_s"])
    else:
        missing["sfid"] = "the reference has no mu_s and sigma_s"
    if reference.pool is None:
        missing |= dict.fromkeys(("precision", "recall"), "the reference has moments alone, no features of images")
    else:
        scores["precision"], scores["recall"] = precision_recall(reference.pool, samples.pool)
        sides = dict(precision=("the reference", reference.pool), recall=("the set", samples.pool))
        missing |= {
            name: f"{side} has {len(pool)} images; {NEIGHBOURS} nearest neighbours of each need {NEIGHBOURS + 1}"
            for name, (side, pool) in sides.items()
            if scores[name] is None
        }
    return scores | dict(missing=missing)


def load_reference(path: str, network: str, measure, open_set) -> Statistics:
    """Read or compute a reference.

    Args:
      path: statistics, an ADM batch with moments, or plain images.
      network: checksum of the network that makes the features.
      measure: images -> their `Statistics`.
      open_set: path -> `ImageSet`.

    Raises:
      InputError: nothing of the kind, damaged, or statistics of another network.
    """
    shapes = npz_shapes(path) if path.endswith(".npz") and locate(path).is_file() else {}
    names = MOMENTS if all(name in shapes for name in MOMENTS) else MOMENTS[:2]
    if not all(name in shapes for name in names):
        return measure(open_set(path))
    read = [name for name in (*names, "pool", *TEXTS) if name in shapes]
    _require_features(path, {name: shapes[name] for name in read})
    require_packing(path, read)
    try:
        with epath.Path(path).open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            other = "network" in arrays and str(arrays["network"]) != network
            known = {name: np.asarray(arrays[name], np.float64) for name in names}
            record = arrays.get("about", arrays.get("told"))  # its name in earlier versions
            pool = arrays.get("pool")
    except ZIP_ERRORS as error:
        raise InputError(f"{path} holds no statistics, or is damaged ({error}); make it again.") from error
    if other:
        raise InputError(f"{path} holds statistics of another network; make them again with --save_statistics.")
    numbers = known if pool is None else known | dict(pool=pool)
    wrong = [name for name, array in numbers.items() if not np.isfinite(array).all()]
    if wrong:
        raise InputError(f"{path} holds numbers that are not finite, in {', '.join(wrong)}; make it again.")
    about = dict(name=path)
    if record is not None:
        about = parse_json(str(record), f"The record in {path}", remedy="make it again with --save_statistics")
    if pool is None and IMAGES_ENTRY in shapes:
        # The moments of ADM's batches are those of the whole training set, the images a part of it.
        images = measure(open_set(path))
        about, pool = images.about | dict(moments="from the file"), images.pool
    return Statistics(about, known, pool)


def _require_features(path, found: dict) -> None:
    """Raise unless arrays, whose shapes and dtypes are known by name, are moments of these features, and features.

    Raises:
      InputError: others, before they take memory.
    """
    pooled = (*found["pool"][0][:1], *MOMENT_SHAPES["mu"]) if "pool" in found else None
    wanted = MOMENT_SHAPES | dict(pool=pooled)
    is_number = lambda name, shape, dtype: shape == wanted[name] and dtype.kind in "iuf"
    is_text = lambda name, shape, dtype: shape == () and dtype.itemsize <= MOST_TEXT_BYTES
    wrong = [name for name in found if not (is_text if name in TEXTS else is_number)(name, *found[name])]
    if wrong:
        shown = ", ".join(f"{name} is {found[name][1]} {list(found[name][0])}" for name in wrong)
        raise InputError(f"{path} holds moments of other features: {shown}; make it again with --save_statistics.")


def save_statistics(path, statistics: Statistics, network: str) -> None:
    """Write what later evaluations need of a reference, whole or not at all."""
    arrays = dict(statistics.moments, network=network, about=json.dumps(statistics.about))
    if statistics.pool is not None:
        arrays["pool"] = statistics.pool
    with write_atomically(path) as partial, partial.open("wb") as file:
        np.savez(file, **arrays)
    logger.info("Wrote %s", path)


def _warn_of_few(scores: dict, samples: Statistics, reference: Statistics | None) -> None:
    count = samples.about["count"]
    few = [f"{name} ({ENOUGH[name]:,})" for name in ENOUGH if scores.get(name) is not None and count < ENOUGH[name]]
    if few:
        logger.warning("%s has %d images; usual are, by metric: %s.", samples.about["name"], count, ", ".join(few))
    for name, reason in scores.get("missing", {}).items():
        logger.warning("%s has no %s: %s.", samples.about["name"], name, reason)
    if reference is not None and reference.pool is not None and len(reference.pool) < ENOUGH["precision"]:
        logger.warning("The reference has %d images; precision and recall usually take 10,000.", len(reference.pool))


def _table(records: list[dict]) -> str:
    """Return the records as lines of text, one per set of samples."""
    names = [name for name in ("fid", "sfid", "inception_score", "precision", "recall") if name in records[0]]
    width = max(len(record["samples"]["name"]) for record in records)
    lines = [f"{'samples':{width}s}  " + "  ".join(f"{name:>15s}" for name in names)]
    for record in records:
        values = "  ".join(f"{'none':>15s}" if record[name] is None else f"{record[name]:15.4f}" for name in names)
        lines.append(f"{record['samples']['name']:{width}s}  {values}")
    return "\n".join(lines)
