"""The job behind `sample.py`: checkpoint -> images in a folder, resumable, with a manifest beside them.

    <out>/manifest.json      all that made the images: weights' checksum, sampler, guidance, seed, precision, versions
    <out>/grid.png           for --labels
    <out>/images/000000.png  each image, written whole or not at all
    <out>/samples.npz        for a set: arr_0 uint8 [n,side,side,channels] and labels int32 [n]
    <out>/routing.png        what was on over the timesteps
    <out>/plan.png           the segments of `fast`
    <out>/cost.json          MACs, shares on and seconds of the last job that drew something
    <out>/report.html        all of it on one page

An image is a function of the weights, the settings, the seed and its index. A job that was killed therefore makes just
the images that are missing when it is started again.
"""

import concurrent.futures
import dataclasses
import functools
import hashlib
import json
import logging
import math
import time
from collections.abc import Callable

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh
from tqdm import tqdm

from dydit_jax.checkpoints import Weights, checksum, package_versions
from dydit_jax.diffusion.samplers import SamplingConfig
from dydit_jax.drawing import figures
from dydit_jax.drawing.pictures import draw_grid, read_image, save_image, to_uint8
from dydit_jax.drawing.report import COST_FILE, write_report
from dydit_jax.errors import InputError, require_known
from dydit_jax.fast.autotune import fastest_form
from dydit_jax.fast.narrow import NarrowedBlocks
from dydit_jax.fast.plan import CUTTING, Plan
from dydit_jax.fast.tokens import CHECKED_FORMS, default_form, forms_of
from dydit_jax.jobs.sample_folder import image_path, missing_images, prepare_folder, write_image, write_set
from dydit_jax.latents import LATENT_FACTOR, decode_latents
from dydit_jax.loading import load_autoencoder, load_checkpoint
from dydit_jax.models.dit import Model
from dydit_jax.models.routing import Routing
from dydit_jax.records import read_record, require_range
from dydit_jax.runtime.cache import cache_folder
from dydit_jax.runtime.files import write_json
from dydit_jax.runtime.processes import from_main, is_main, together
from dydit_jax.runtime.seeds import require_seed
from dydit_jax.runtime.settings import own_settings
from dydit_jax.runtime.sharding import MeshConfig, make_mesh, replicated
from dydit_jax.sampling.generate import (
    MODES,
    Samples,
    generate,
    images_of_pass,
    plan_sampling,
    runs_per_image,
    steps_of,
)
from dydit_jax.sampling.guidance import require_no_class
from dydit_jax.sampling.noise import uniform_labels
from dydit_jax.training.experiment import build_model, resolve_precision

logger = logging.getLogger(__name__)

WRITERS = 4
MOST_IMAGES = 1_000_000  # their names have six digits
MOST_GRID_IMAGES = 10_000  # of one picture, which is made in memory
LIMITS = dict(rows=MOST_GRID_IMAGES, batch_size=65_536, num_images=MOST_IMAGES, segments=None)
LABEL_BYTES = 12  # of a line in a file of labels, at most
SHOWN_BYTES = 20  # of what stands in the place of a label
CALIBRATION_IMAGES = 8  # at least
CALIBRATED_PART, MOST_CALIBRATION_IMAGES = 1 / 64, 32  # of the images of a larger job; the more, the fewer empty places
CALIBRATED_FROM_BATCHES = 4  # a job of fewer is over before calibration pays


@dataclasses.dataclass(frozen=True)
class Request:
    """What a user asks of `sample.py`.

    Attributes:
      checkpoint: where the weights are.
      from_step: of a work directory's checkpoint; None takes the newest.
      weights: of a work directory: "ema" or "params", the raw parameters.
      out: folder for the results.
      labels: of a grid's columns; or None.
      rows: of the grid.
      num_images: images with uniform labels; or None.
      labels_file: file with one label per line, for a set with these labels; or None. Exactly one of `labels`,
        `num_images` and `labels_file` is given.
      seed: of noise and uniform labels.
      batch_size: images at once.
      mode: "fast", "gated" or "complete".
      segments: into how many programs `fast` cuts the schedule; None decides by itself.
      token_capacity: shares of an image's tokens, see `DiTConfig`; None leaves the checkpoint's.
      precision: see `build.PRECISIONS`.
      draw_routing: whether routing.png and plan.png are drawn, and their numbers written as .csv.
      report: whether a page about the job is written; it shows the routing too.
      overrides: sampling settings that win over the checkpoint's.
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
    precision: str = "auto"
    draw_routing: bool = False
    report: bool = False
    overrides: dict = dataclasses.field(default_factory=dict)
    from_step: int | None = None
    weights: str = "ema"

    def __post_init__(self):
        given = [name for name in ("labels", "num_images", "labels_file") if getattr(self, name) is not None]
        if len(given) != 1:
            raise InputError(
                "Give one of --labels (a grid), --num_images (a set with uniform labels) and --labels_file (a set with "
                f"these labels), not {' and '.join(given) or 'none'}."
            )
        for name, most in LIMITS.items():
            if getattr(self, name) is not None:
                require_range(f"--{name}", getattr(self, name), low=1, high=most)
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
      InputError: anything wrong with the request, before anything is compiled or written.
    """
    weights = load_checkpoint(request.checkpoint, request.from_step, request.weights)
    settings = dict(dataclasses.asdict(weights.sampling), **request.overrides)
    weights = dataclasses.replace(weights, sampling=read_record(SamplingConfig, settings, "sampling"))
    if request.token_capacity is not None:
        capacity = tuple(_number(share, "--token_capacity") for share in request.token_capacity)
        weights = dataclasses.replace(weights, model=dataclasses.replace(weights.model, token_capacity=capacity))
    steps = len(steps_of(weights.sampling, weights.diffusion).timestep)
    if request.segments is not None and request.segments > steps:
        raise InputError(f"--segments must be at most the {steps} steps of the run, not {request.segments}.")
    labels = _labels(request, weights.model.classes)
    require_no_class(weights.about.get("config", {}), weights.sampling, labels=labels, classes=weights.model.classes)
    mesh = make_mesh(MeshConfig())
    decode = make_decode_fn(weights, mesh)
    manifest = _manifest(request, weights, labels)
    shape = _image_shape(weights)
    size = 0 if request.labels is not None else len(labels) * math.prod(shape)
    prepare = functools.partial(prepare_folder, request.out, manifest, sample_bytes=size)
    out = together(lambda: prepare() if is_main() else epath.Path(request.out))
    missing = missing_images(out, len(labels), shape) if is_main() else []
    missing = from_main(missing, len(labels))  # the others may not see the folder
    logger.info("%d of %d images to draw into %s.", len(missing), len(labels), out)
    samples, plan, began = None, None, time.monotonic()
    if missing:
        samples, plan = _draw(request, weights, mesh, decode, labels, missing, out, manifest["checksum"])
    if is_main():
        drawn = dict(images=len(missing), seconds=time.monotonic() - began)
        _finish(request, weights, labels, out, samples, plan, drawn)
    return samples


def _finish(
    request: Request, weights: Weights, labels, out, samples: Samples | None, plan: Plan | None, drawn: dict
) -> None:
    """Write everything but the single images. Without `samples` they had all been there."""
    if samples is not None:
        cost = _cost(samples, weights) | drawn
        write_json(out / COST_FILE, cost)
    if request.labels is not None:
        pixels = np.stack([read_image(image_path(out, index)) for index in range(len(labels))])
        save_image(out / "grid.png", draw_grid(pixels, columns=len(request.labels)))
    else:
        write_set(out, labels)
    if (request.draw_routing or request.report) and samples is not None:
        figures.save_figure(out / "routing.png", figures.draw_routing(samples, weights.model.macs))
        figures.save_table(out / "routing.csv", figures.routing_table(samples))
        if plan is not None:
            figures.save_figure(out / "plan.png", figures.draw_plan(plan, samples.timesteps))
            figures.save_table(out / "plan.csv", figures.plan_table(plan, samples.timesteps))
    if request.report:
        write_report(out)
    _tell(samples, plan, weights, out)


def _cost(samples: Samples, weights: Weights) -> dict:
    """Return what a pass cost, for the record."""
    return dict(
        macs_complete=weights.model.macs.complete,
        macs=float(samples.macs.mean()),
        **{name: float(np.mean(gates)) for name, gates in vars(samples.routing).items()},
    )


def _tell(samples: Samples | None, plan: Plan | None, weights: Weights, out) -> None:
    """Say what it cost and where the results are."""
    if samples is not None:
        complete, dynamic = weights.model.macs.complete, samples.macs.mean()
        logger.info(
            "MACs per image and pass: %.4f G complete, %.4f G here (%.1f %%).",
            *(complete / 1e9, dynamic / 1e9, 100 * dynamic / complete),
        )
        if plan is not None and plan.shares is not None and samples.over.any():
            logger.info(
                "In %d passes through an MLP more tokens were on than calibration allows for: computed in full.",
                samples.over.sum(),
            )
    for path in sorted(path for path in out.iterdir() if path.is_file()):
        logger.info("Wrote %s", path)


def _number(text, where: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise InputError(f"{where} must be a number, or several with commas between them, not {text!r}.") from error


def _labels(request: Request, classes: int) -> np.ndarray:
    """Return the label of every image of the job, [n] int32."""
    if request.num_images is not None:
        return np.asarray(uniform_labels(request.seed, np.arange(request.num_images), classes), np.int32)
    if request.labels is not None:
        return np.tile(_label_numbers(request.labels, classes, "--labels"), request.rows)
    return _label_numbers(_read_words(request.labels_file), classes, str(request.labels_file))


def _read_words(path) -> list[str]:
    """Read a file of labels, as far as it can be one."""
    path = epath.Path(path)
    if not path.is_file():
        raise InputError(f"There is no file {path} (--labels_file).")
    most = MOST_IMAGES * LABEL_BYTES
    try:
        with path.open("rb") as file:
            text = file.read(most + 1).decode()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} can't be read as text; --labels_file wants one label per line ({error}).") from error
    words = text.split()
    if len(text) > most or len(words) > MOST_IMAGES:
        raise InputError(f"{path} is too long for labels; at most {MOST_IMAGES} images are drawn at once.")
    return words


def _label_numbers(labels: list, classes: int, where: str) -> np.ndarray:
    """Read labels, of which `classes` itself stands for "no class"."""
    words = [str(label).strip() for label in labels]
    wrong = [word for word in words if not word.isdecimal() or len(word) > LABEL_BYTES or int(word) > classes]
    if wrong or not words:
        raise InputError(
            f"{where} must hold numbers from 0 to {classes - 1} ({classes} for no class), not "
            f"{', '.join(ascii(word[:SHOWN_BYTES])[1:-1] for word in wrong[:5]) or 'nothing'}."
        )
    return np.asarray([int(word) for word in words], np.int32)


def make_decode_fn(weights: Weights, mesh: Mesh) -> Callable:
    """Make the function from samples [B,...] to images [B,side,side,channels] in [-1, 1]."""
    if not weights.sampling.autoencoder:
        return lambda samples: samples
    params = jax.device_put(load_autoencoder(weights.sampling.autoencoder), replicated(mesh))
    return functools.partial(decode_latents, params, mesh=mesh)


def _image_shape(weights: Weights) -> tuple[int, int, int]:
    """Return height, width and channels of the pictures."""
    model = weights.model
    if not weights.sampling.autoencoder:
        return model.side, model.side, model.channels
    return model.side * LATENT_FACTOR, model.side * LATENT_FACTOR, 3


def _keep_plan(plan: Plan, path) -> None:
    """Keep a plan for the next job, which can do without it."""
    try:
        plan.save(path)
    except (OSError, InputError) as error:
        logger.warning("The plan is not kept for the next job: %s", " ".join(str(error).split()))


def _manifest(request: Request, weights: Weights, labels: np.ndarray) -> dict:
    """Describe all that makes the images."""
    return dict(
        labels=hashlib.sha256(labels).hexdigest() if request.labels is None else request.labels,
        num_images=len(labels),
        checkpoint=str(request.checkpoint),
        checksum=checksum(weights.params),
        model=dataclasses.asdict(weights.model),
        diffusion=dataclasses.asdict(weights.diffusion),
        sampling=dataclasses.asdict(weights.sampling),
        seed=request.seed,
        mode=request.mode,
        precision=resolve_precision(request.precision)[0].name,
        matmul_precision=resolve_precision(request.precision)[1],
        device=jax.devices()[0].device_kind,
        versions=package_versions(),
    )


# --- The drawing ---------------------------------------------------------------------------------


def _draw(
    request: Request, weights: Weights, mesh: Mesh, decode, labels, missing: list[int], out, checksum: str
) -> tuple[Samples, Plan | None]:
    """Draw the missing images batch by batch; files are written while the next batch is computed.

    Returns:
      The last batch's images with the record of the whole job, and the plan of `fast`.
    """
    size = -(-min(request.batch_size, len(missing)) // mesh.size) * mesh.size
    steps = len(steps_of(weights.sampling, weights.diffusion).timestep)
    batches = [missing[first : first + size] for first in range(0, len(missing), size)]
    model = build_model(weights.model, precision=request.precision, mesh=mesh)
    params = jax.device_put(weights.params, replicated(mesh))
    blocks = NarrowedBlocks(params["blocks"], dtype=model.dtype, platform=model.platform)  # once, not for every batch
    params = params | dict(blocks=blocks.whole)
    draw = functools.partial(
        generate,
        model,
        params,
        sampling=weights.sampling,
        diffusion=weights.diffusion,
        seed=request.seed,
        blocks=blocks,
        mesh=mesh if mesh.size > 1 else None,
    )
    plan, path = None, _plan_path(weights, checksum, request.segments)
    with jax.set_mesh(mesh):
        if request.mode == "fast":
            plan = _plan(path, model, params, weights, request.segments)
            if len(batches) >= CALIBRATED_FROM_BATCHES:
                plan = _tuned(plan, model, params, weights, draw, labels, missing, size)
    segments_are_checked = plan is not None and (plan.form or default_form(model)) in CHECKED_FORMS
    with (
        jax.set_mesh(mesh),
        concurrent.futures.ThreadPoolExecutor(WRITERS) as writers,
        tqdm(total=len(batches) * steps, unit="step", desc="sampling") as progress,
    ):
        written, job, done = [], None, 0
        for batch in batches:
            # One shape for all batches; the last one is filled up and cut again.
            indices = np.asarray(batch + [batch[-1]] * (size - len(batch)))
            samples = draw(labels[indices], indices=indices, mode=request.mode, plan=plan, report=progress.update)
            if segments_are_checked:  # where some had to be computed again, the next batch would need them as well
                plan = _widened(plan, samples)
            job = samples if job is None else _joined(job, samples, done, len(batch))
            done += len(batch)
            pixels = to_uint8(decode(samples.images), indices=indices)
            if is_main():
                written += [writers.submit(write_image, image_path(out, i), p) for i, p in zip(batch, pixels)]
        for future in written:
            future.result()
    if plan is not None and is_main():
        kept = plan if segments_are_checked else _widened(plan, job)
        _keep_plan(kept, path)
    return job, plan


def _joined(job: Samples, samples: Samples, done: int, count: int) -> Samples:
    """Add a batch of `count` images to the record of a job of `done`; only its own images are kept."""
    mean = lambda before, now: (done * before + count * now) / (done + count)
    return Samples(
        samples.images,
        job.timesteps,
        Routing(job.routing.heads, job.routing.groups, mean(job.routing.tokens, samples.routing.tokens)),
        mean(job.macs, samples.macs),
        job.shares.with_more(samples.shares),
        job.over + samples.over,
    )


def _tuned(plan: Plan, model: Model, params, weights: Weights, draw, labels, missing: list[int], batch: int) -> Plan:
    """Find out for a long job how many tokens are on and how to run them, unless an earlier one did."""
    if weights.model.routers == "none":
        return plan
    if plan.shares is None:
        most = max(CALIBRATION_IMAGES, min(MOST_CALIBRATION_IMAGES, batch))
        count = np.clip(int(len(missing) * CALIBRATED_PART), CALIBRATION_IMAGES, most)
        count = -(-count // jax.device_count()) * jax.device_count()
        few = np.asarray(missing)[np.arange(count) % len(missing)]
        logger.info("Calibrating token capacities on %d images.", len(few))
        plan = plan.calibrated(draw(labels[few], indices=few, mode="gated").shares)
    if plan.form is None:
        images = images_of_pass(model, weights.sampling, -(-batch // jax.device_count()))
        runs = runs_per_image(weights.sampling)
        form, forms = fastest_form(model, params, plan, images=images, runs=runs), forms_of(model, images * runs)
        [number] = from_main([forms.index(form)], len(forms))  # other processes may have found another one
        plan = dataclasses.replace(plan, form=forms[number])
    return plan


def _widened(plan: Plan, samples: Samples) -> Plan:
    """Add to a calibrated plan what was on, if it fell short. Other capacities are other programs."""
    return plan.widened(samples.shares) if plan.shares is not None and samples.over.any() else plan


def _plan_path(weights: Weights, checksum: str, segments: int | None):
    device = jax.devices()[0].device_kind
    run = map(str, (weights.model, weights.sampling, weights.diffusion))
    told = json.dumps([checksum, device, segments or CUTTING, *run])
    return epath.Path(cache_folder() / "plans" / f"{hashlib.sha256(told.encode()).hexdigest()}.npz")


def _plan(path, model: Model, params, weights: Weights, segments: int | None) -> Plan:
    """Return the plan kept from an earlier job, or make it."""
    plan = None
    if path.exists() and jax.process_count() == 1:  # other processes may have kept another one, or none
        try:
            plan = Plan.load(path, weights.model.macs)
        except Exception as error:  # whatever a damaged file makes of it
            logger.warning("Planned again: %s cannot be used (%s).", path, " ".join(str(error).split()))
    if plan is None:
        plan = plan_sampling(model, params, sampling=weights.sampling, diffusion=weights.diffusion, segments=segments)
    timesteps = steps_of(weights.sampling, weights.diffusion).timestep
    logger.info("Plan: %s.\n%s", plan.in_words(), plan.table(timesteps))
    return plan
