"""The job behind `sample.py`: checkpoint -> images in a folder, resumable, with a manifest beside them.

    <out>/manifest.json      all that made the images: weights' checksum, sampler, every step, seed, precision, versions
    <out>/grid.png           for --labels
    <out>/images/000000.png  each image, written whole or not at all
    <out>/samples.npz        for a set: arr_0 uint8 [n,side,side,channels] and labels int32 [n]
    <out>/routing.png        what was on over the timesteps
    <out>/plan.png           the segments of `fast`
    <out>/steps.png          timestep, guidance, passes, MACs and segment of every step, and steps.csv
    <out>/growth.gif         the first images as they grow, and growth.png (`jobs/growth.py`)
    <out>/cost.json          MACs, also of every step, shares on and seconds of the last job that drew something
    <out>/report.html        all of it on one page
    <out>/lock.json          who draws here now (`runtime/locks.py`)

An image is a function of the weights, the settings, the seed and its index. A job that was killed therefore makes just
the images that are missing when it is started again.
"""

import concurrent.futures
import contextlib
import dataclasses
import logging
import math
import time

import jax
import numpy as np

from dydit_jax.checkpoints import Weights, checksum, package_versions
from dydit_jax.diffusion.process import process_sections
from dydit_jax.drawing import figures
from dydit_jax.drawing.pictures import draw_grid, label_texts, read_image, save_image
from dydit_jax.drawing.report import COST_FILE, MANIFEST_FILE, write_report
from dydit_jax.drawing.steps import draw_steps, step_columns, step_lines, step_table
from dydit_jax.drawing.style import save_figure, save_table
from dydit_jax.errors import InputError, require_known
from dydit_jax.fast.plan import require_segments
from dydit_jax.jobs.growth import draw_growth
from dydit_jax.jobs.label_files import read_words
from dydit_jax.jobs.sample_folder import (
    MOST_IMAGES,
    image_path,
    labels_digest,
    missing_images,
    prepare_folder,
    segments_begun_with,
    write_image,
    write_set,
)
from dydit_jax.labels import read_labels
from dydit_jax.latents import require_decoder
from dydit_jax.loading import load_checkpoint
from dydit_jax.models.cost import format_count
from dydit_jax.models.precision import resolve_precision
from dydit_jax.pipeline import DrawJob, DrawResult, Pipeline
from dydit_jax.records import require_range
from dydit_jax.runtime.files import locate, write_json
from dydit_jax.runtime.locks import FolderLock
from dydit_jax.runtime.origin import origin
from dydit_jax.runtime.processes import from_main, is_main, on_all_processes
from dydit_jax.runtime.seeds import require_seed
from dydit_jax.runtime.settings import own_settings
from dydit_jax.sampling.generate import MODES, Samples, SamplingRun
from dydit_jax.sampling.guidance import require_trained
from dydit_jax.sampling.noise import uniform_labels
from dydit_jax.sampling.settings import choose_sampling
from dydit_jax.sampling.table import make_table

logger = logging.getLogger(__name__)

ROUTING_FILE = "routing.png"
WRITERS = 4
MOST_GRID_IMAGES = 10_000  # of one picture, which is made in memory
MOST_GROWTH = 16
LIMITS = dict(rows=MOST_GRID_IMAGES, batch_size=65_536, num_images=MOST_IMAGES, growth=MOST_GROWTH, segments=None)


@dataclasses.dataclass(frozen=True)
class Request:
    """What a user asks of `sample.py`.

    Attributes:
      checkpoint: a .safetensors file, a folder with one, a training's work directory, or a known name such as digits.
      out: folder for the images: new, empty, or of the same job, which goes on.
      labels: labels of a grid, one column each: 0,1,2, or names of classes where the checkpoint knows them. Exactly one
        of this, `num_images` and `labels_file` is given.
      rows: rows of the grid: images of each label.
      num_images: number of images with uniform labels, also as samples.npz; a larger number lets a set grow.
      labels_file: file with one label per line, a number or a name: a set with these labels.
      seed: seed of all noise and of uniform labels, 0 to 2^64 - 1.
      batch_size: images at once; does not change them.
      mode: "fast" (only what is open is computed), "gated" (all is computed and multiplied by its gate) or
        "complete" (all gates open).
      segments: programs that fast cuts the schedule into, 0 to leave nothing out; by itself it takes as many as are
        worth compiling for so many images.
      token_capacity: share of each image's tokens that pass an MLP at most: one number, or one per block; the
        checkpoint's own by default.
      process: diffusion or flow, for a job that takes no other checkpoint; what it is, it says itself.
      precision: auto, bfloat16, float32 or highest.
      routing: also draw what was on over the timesteps, and say what the steps were: routing.png, steps.png and
        plan.png, with their numbers as .csv.
      growth: of the first images, also draw how they grow, with the tokens that were open: growth.gif and growth.png,
        for which they are drawn a second time.
      report: also write one page about the job, report.html; it shows the routing too.
      overrides: sampling settings that win over the checkpoint's, and `preset`, see `choose_sampling`.
      from_step: step of a work directory's checkpoint; the newest by default.
      weights: of a work directory: ema, or params, the raw parameters.
      base: of an adapter: the weights that it was trained on, by any name of a checkpoint; those that it names by
        default.
    """

    checkpoint: str
    out: str
    labels: list | None = None
    rows: int = 1
    num_images: int | None = None
    labels_file: str | None = None
    seed: int = 0
    batch_size: int = 100
    mode: str = "fast"
    segments: int | None = None
    token_capacity: list | None = None
    process: str = ""
    precision: str = "auto"
    routing: bool = False
    growth: int = 0
    report: bool = False
    overrides: dict = dataclasses.field(default_factory=dict)
    from_step: int | None = None
    weights: str = "ema"
    base: str = ""

    def __post_init__(self):
        given = [name for name in ("labels", "num_images", "labels_file") if getattr(self, name) is not None]
        if len(given) != 1:
            raise InputError(
                "Give one of --labels (a grid), --num_images (a set with uniform labels) and --labels_file (a set with "
                f"these labels), not {' and '.join(given) or 'none'}."
            )
        for name, most in LIMITS.items():
            if getattr(self, name) is not None:
                low = 0 if name in ("segments", "growth") else 1
                require_range(f"--{name}", getattr(self, name), low=low, high=most)
        if self.labels is not None and len(self.labels) * self.rows > MOST_GRID_IMAGES:
            raise InputError(
                f"A grid of {len(self.labels)} labels and {self.rows} rows has more than {MOST_GRID_IMAGES} images; "
                "lower --rows, or draw a set (--labels_file)."
            )
        require_seed("--seed", self.seed)
        require_known("mode", self.mode, MODES)
        if not self.out:
            raise InputError("--out is empty; name a folder.")


@own_settings()
def sample(request: Request) -> Samples:
    """Carry out a request.

    Returns:
      The images of the last batch, with the record of the whole job; None if nothing was missing.

    Raises:
      InputError: anything wrong with the request, or a folder that is in use, before anything is compiled or written.
    """
    weights = _weights(request)
    labels = _labels(request, weights)
    require_trained(weights.about.get("config", {}), weights.sampling, labels=labels, classes=weights.model.classes)
    pipeline = Pipeline(weights, precision=request.precision)
    run = pipeline.prepare(weights.sampling)
    require_decoder(weights.sampling.autoencoder, weights.model.channels)
    segments = _segments_given(request, run, len(labels))
    manifest = _manifest(request, pipeline, labels) | dict(segments=segments)
    size = 0 if request.labels is not None else len(labels) * math.prod(pipeline.image_shape)
    out, set_labels = locate(request.out), labels if request.labels is None else None
    prepare = lambda: prepare_folder(out, manifest, sample_bytes=size, labels=set_labels)
    with contextlib.ExitStack() as held:
        lock = on_all_processes(lambda: held.enter_context(prepare()) if is_main() else None)
        drawn = _draw_missing(request, pipeline, labels, manifest, lock)
        if lock is not None:
            lock.require_held()
            _write_records(request, weights, out, drawn)
        if request.growth:  # of all processes, which would wait for the one that packs a set
            draw_growth(pipeline, labels[: request.growth], out, seed=request.seed, mode=request.mode)
        if lock is not None:
            lock.require_held()
            _write_pictures(request, weights, labels, out)
            if request.report:
                write_report(out)
    if is_main():
        _log_summary(drawn, weights, out)
    return drawn.samples


def _weights(request: Request) -> Weights:
    """Load the checkpoint, with the settings that the request replaces."""
    weights = load_checkpoint(request.checkpoint, request.from_step, request.weights, request.base)
    if request.process not in ("", weights.process.name):
        raise InputError(
            f"{request.checkpoint} was trained as a {weights.process.name} and predicts nothing that could be sampled "
            f"as {request.process}; leave --process out."
        )
    own = dict(process=weights.process, checksum=lambda: checksum(weights.params))
    weights = dataclasses.replace(weights, sampling=choose_sampling(weights.sampling, request.overrides, **own))
    if request.token_capacity is None:
        return weights
    capacity = tuple(_number(share, "--token_capacity") for share in request.token_capacity)
    return dataclasses.replace(weights, model=dataclasses.replace(weights.model, token_capacity=capacity))


def _segments_given(request: Request, run: SamplingRun, images: int) -> int | None:
    """Return the number of segments that was asked for, or that the job began with; None if it is to be chosen."""
    if request.segments is not None:
        require_segments(request.segments, run.evaluations, "--segments")
    if request.mode != "fast" or request.segments is not None:
        return request.segments
    begun = on_all_processes(lambda: segments_begun_with(request.out, images) if is_main() else None)
    # The other processes may not see the folder.
    known = from_main([] if begun is None else [min(begun, len(run.table))], len(run.table) + 1)
    return known[0] if known else None


def _draw_missing(
    request: Request, pipeline: Pipeline, labels: np.ndarray, manifest: dict, lock: FolderLock | None
) -> DrawResult:
    """Draw the images that are not in the folder, in the number of segments that the manifest says, or will say."""
    out, segments, sampling = locate(request.out), manifest["segments"], pipeline.weights.sampling
    missing = missing_images(out, len(labels), pipeline.image_shape) if is_main() else []
    missing = from_main(missing, len(labels))  # the others may not see the folder
    logger.info("%d of %d images to draw into %s.", len(missing), len(labels), out)
    if not missing:
        return DrawResult()
    if request.mode == "fast" and segments is None:
        segments = pipeline.prepare(sampling).plan(images=len(labels)).narrowed_segments
        if is_main():
            write_json(out / MANIFEST_FILE, manifest | dict(segments=segments))
    settings = dict(seed=request.seed, mode=request.mode, batch_size=request.batch_size, segments=segments)
    return _draw(pipeline, DrawJob(labels, np.asarray(missing), sampling, **settings), out, lock)


def _draw(pipeline: Pipeline, job: DrawJob, out, lock: FolderLock | None) -> DrawResult:
    """Draw the images of a job; the process with the lock writes files while the next batch is computed."""
    began, written, result = time.monotonic(), [], DrawResult()
    with concurrent.futures.ThreadPoolExecutor(WRITERS) as writers:
        for batch in pipeline.draw(job):
            for future in written:  # a full disk ends the job now, not after its last batch
                future.result()
            if lock is not None:
                lock.require_held()
                written = [
                    writers.submit(write_image, image_path(out, index), pixels)
                    for index, pixels in zip(batch.indices, batch.pixels)
                ]
            result = batch.result
        for future in written:
            future.result()
    return dataclasses.replace(result, images=len(job.indices), seconds=time.monotonic() - began)


def _write_records(request: Request, weights: Weights, out, drawn: DrawResult) -> None:
    """Write what is known of the images that this job drew: cost, routing, steps and plan.

    No later job can do so, when all images are there: this comes first.
    """
    samples, plan, wanted = drawn.samples, drawn.plan, request.routing or request.report
    if samples is None:
        if wanted and not (out / ROUTING_FILE).is_file():
            logger.warning(
                "%s gets no %s: it is recorded while images are drawn, and all are there. Name another --out, or let a "
                "set grow (--num_images).",
                *(out, ROUTING_FILE),
            )
        return
    steps = step_table(samples, make_table(weights.sampling, weights.process).guidance, plan)
    write_json(out / COST_FILE, _cost(drawn, weights) | dict(steps=step_columns(steps)))
    if not wanted:
        return
    save_figure(out / ROUTING_FILE, figures.draw_routing(samples, weights.model.macs))
    save_table(out / "routing.csv", figures.routing_table(samples))
    save_table(out / "steps.csv", steps)
    save_figure(out / "steps.png", draw_steps(steps, weights.model.macs.complete))
    logger.info("Steps of the run:\n%s", step_lines(steps))
    if plan is not None:
        save_figure(out / "plan.png", figures.draw_plan(plan, samples.timesteps))
        save_table(out / "plan.csv", figures.plan_table(plan, samples.timesteps))


def _write_pictures(request: Request, weights: Weights, labels: np.ndarray, out) -> None:
    """Write all images in one file: a grid, or a set."""
    if request.labels is None:
        write_set(out, labels)
        return
    pixels = np.stack([read_image(image_path(out, index)) for index in range(len(labels))])
    save_image(out / "grid.png", draw_grid(pixels, len(request.labels), label_texts(labels, weights.model.classes)))


def _cost(drawn: DrawResult, weights: Weights) -> dict:
    """Return what a pass and the job cost, for the record."""
    samples = drawn.samples
    return dict(
        macs_complete=weights.model.macs.complete,
        macs=samples.mean_macs,
        macs_executed=samples.mean_executed_macs,
        passes_per_image=int(samples.evaluations.sum()),
        **{name: float(np.mean(gates)) for name, gates in vars(samples.routing).items()},
        images=drawn.images,
        seconds=drawn.seconds,
        compile_seconds=drawn.compile_seconds,
        macs_of_all_images=_macs_of_all(drawn),
        made=origin(),
    )


def _macs_of_all(drawn: DrawResult) -> float:
    """Return what was executed for all images of the job, decoding not included."""
    samples = drawn.samples
    return drawn.images * float(samples.evaluations @ samples.executed_macs)


def _log_summary(drawn: DrawResult, weights: Weights, out) -> None:
    """Say what it cost and where the results are."""
    samples, plan = drawn.samples, drawn.plan
    if samples is not None:
        complete, needed, executed = weights.model.macs.complete, samples.mean_macs, samples.mean_executed_macs
        logger.info(
            "%d passes per image. MACs per image and pass: %s complete, %s needed (%.1f %%), %s executed (%.1f %%).",
            samples.evaluations.sum(),
            *(format_count(complete), format_count(needed), 100 * needed / complete),
            *(format_count(executed), 100 * executed / complete),
        )
        logger.info(
            "Drew %d images in %.1f s, %.1f s of them compiling; %s MACs in all.",
            *(drawn.images, drawn.seconds, drawn.compile_seconds, format_count(_macs_of_all(drawn))),
        )
        if plan is not None and plan.usage is not None and samples.overflow_count.any():
            logger.info(
                "In %d passes through an MLP more tokens were open than its capacity holds; these ran on all tokens.",
                samples.overflow_count.sum(),
            )
    for path in sorted(path for path in out.iterdir() if path.is_file()):
        logger.info("Wrote %s", path)


def _number(text, where: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise InputError(f"{where} must be a number, or several with commas between them, not {text!r}.") from error


def _labels(request: Request, weights: Weights) -> np.ndarray:
    """Return the label of every image of the job, [n] int32."""
    classes, names = weights.model.classes, weights.class_names
    if request.num_images is not None:
        return np.asarray(uniform_labels(request.seed, np.arange(request.num_images), classes), np.int32)
    if request.labels is not None:
        return np.tile(read_labels(request.labels, classes, names, "--labels"), request.rows)
    return read_labels(read_words(request.labels_file), classes, names, str(request.labels_file))


def _manifest(request: Request, pipeline: Pipeline, labels: np.ndarray) -> dict:
    """Describe all that makes the images."""
    weights, run = pipeline.weights, pipeline.prepare(pipeline.weights.sampling)
    return dict(
        labels=labels_digest(labels) if request.labels is None else request.labels,
        num_images=len(labels),
        checkpoint=str(request.checkpoint),
        checksum=pipeline.checksum,
        model=dataclasses.asdict(weights.model),
        **process_sections(weights.process),
        sampling=dataclasses.asdict(weights.sampling),
        steps=dict(
            timestep=run.table.timestep.tolist(),
            guidance=run.table.guidance.tolist(),
            passes=run.evaluations.tolist(),
        ),
        seed=request.seed,
        mode=request.mode,
        precision=resolve_precision(request.precision)[0].name,
        matmul_precision=resolve_precision(request.precision)[1],
        device=jax.devices()[0].device_kind,
        versions=package_versions(),
    )
