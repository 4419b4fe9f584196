"""A model ready to draw: weights cast once, plans, compiled programs, devices and decoder in one object.

    pipe = Pipeline.load("dydit-xl2-256-0.7")
    drawn = pipe([207, 360], steps=100, guidance=4.0, seed=1)
    drawn.pictures[0].save("dog.png")

The command-line jobs and people use the same object. Images depend on the weights, the settings, the seed and their
index alone, not on the batch that they are drawn in.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from PIL import Image

from dydit_jax.checkpoints import Weights, checksum
from dydit_jax.diffusion.process import perturb, require_time
from dydit_jax.diffusion.samplers import SamplingConfig
from dydit_jax.drawing.pictures import draw_grid, image_of, label_texts, to_uint8
from dydit_jax.errors import InputError
from dydit_jax.fast.plan import Plan
from dydit_jax.labels import read_labels
from dydit_jax.latents import decode_latents, encode_images, require_channels, require_decoder
from dydit_jax.loading import load_autoencoder, load_checkpoint
from dydit_jax.models.autoencoder import Autoencoder
from dydit_jax.models.cost import ModelMacs
from dydit_jax.models.dit import Model
from dydit_jax.models.layers import unconstrained
from dydit_jax.models.precision import build_model
from dydit_jax.models.routing import Routing
from dydit_jax.runtime.cache import keep_programs
from dydit_jax.runtime.processes import is_main
from dydit_jax.runtime.progress import Progress, compile_seconds
from dydit_jax.runtime.settings import own_settings
from dydit_jax.runtime.sharding import MeshConfig, make_mesh, replicated, round_up
from dydit_jax.sampling.generate import Samples, SamplingRun
from dydit_jax.sampling.guidance import require_trained
from dydit_jax.sampling.noise import first_noise, image_keys
from dydit_jax.sampling.planning import JobPlan
from dydit_jax.sampling.settings import choose_sampling
from dydit_jax.sampling.table import warn_of_unlearnt_times


@dataclasses.dataclass(frozen=True)
class DrawJob:
    """Images to draw.

    Attributes:
      labels: of all images of the job [n]; `classes` stands for "no class".
      indices: of the images that are wanted, below n.
      sampling: sampler, steps, guidance.
      seed: with an image's index it fixes all its noise.
      mode: "fast", "gated" or "complete".
      batch_size: images drawn at once.
      segments: into how many programs `fast` cuts the schedule, 0 to leave nothing out; None takes the
        number that suits the whole job.
    """

    labels: np.ndarray
    indices: np.ndarray
    sampling: SamplingConfig
    seed: int = 0
    mode: str = "fast"
    batch_size: int = 100
    segments: int | None = None


@dataclasses.dataclass(frozen=True)
class DrawResult:
    """What a job has done so far.

    Attributes:
      samples: the last batch's images, with the record of all images; None before the first batch.
      plan: of `fast`, as it is now, or None.
      images: how many were drawn.
      seconds: that it took, compiling included.
      compile_seconds: of these, what it waited for programs to be compiled.
    """

    samples: Samples | None = None
    plan: Plan | None = None
    images: int = 0
    seconds: float = 0.0
    compile_seconds: float = 0.0


@dataclasses.dataclass(frozen=True)
class Batch:
    """Images of a job that were drawn together.

    Attributes:
      indices: of the images [b].
      pixels: uint8 [b,side,side,1 or 3].
      result: of the job so far.
    """

    indices: np.ndarray
    pixels: np.ndarray
    result: DrawResult


@dataclasses.dataclass(frozen=True)
class Drawn:
    """Pictures and what they cost.

    Attributes:
      pixels: uint8 [B,side,side,1 or 3].
      samples: the images in the model's own space, and how they were computed: gates, MACs, tokens.
      labels: of the images, as they are written on a grid.
    """

    pixels: np.ndarray
    samples: Samples
    labels: tuple[str, ...]

    @property
    def pictures(self) -> list[Image.Image]:
        """The images as pictures."""
        return [image_of(pixels) for pixels in self.pixels]

    @property
    def routing(self) -> Routing:
        """Open gates, means over the batch: heads [S,L,H], groups [S,L,G], tokens [S,L,N]."""
        return self.samples.routing

    @property
    def macs(self) -> float:
        """Mean MACs of one image's forward pass; guidance runs two passes per step."""
        return self.samples.mean_macs

    def grid(self, columns: int) -> Image.Image:
        """Return all pictures in one, row by row, below their labels."""
        return draw_grid(self.pixels, columns, self.labels)


class Pipeline:
    """A model that can be sampled, and all that its images share.

    Attributes:
      weights: the model, its process, its own way to be sampled.
      mesh: whose devices share a batch.
      model: the network, in its precision.
    """

    def __init__(self, weights: Weights, *, precision: str = "auto", mesh: Mesh | None = None):
        """Prepare weights for drawing.

        Args:
          weights: from `load_checkpoint`, or of a training.
          precision: "auto", "bfloat16", "float32" or "highest".
          mesh: from `make_mesh`; all devices by default.
        """
        keep_programs()
        self.weights, self.mesh = weights, mesh or make_mesh(MeshConfig())
        self.model = build_model(weights.model, precision=precision, mesh=self.mesh, lora=weights.lora)
        self._runs = {}

    @classmethod
    def load(cls, checkpoint, *, base: str = "", precision: str = "auto", mesh: Mesh | None = None) -> "Pipeline":
        """Load a checkpoint.

        Args:
          checkpoint: a `.safetensors` file, a folder with one, a training's work directory, or a known name, which is
            fetched and converted once.
          base: of an adapter: the weights that it was trained on; "" takes those that it names.
          precision, mesh: as for the class.

        Raises:
          InputError: none of these.
        """
        return cls(load_checkpoint(checkpoint, base=base), precision=precision, mesh=mesh)

    @property
    def macs(self) -> ModelMacs:
        """MACs of one image's forward pass, by part; `macs.complete` is the static model's."""
        return self.weights.model.macs

    @own_settings()
    def __call__(
        self,
        labels,
        *,
        sampler: str | None = None,
        steps=None,
        guidance=None,
        guidance_interval: tuple[float, float] | None = None,
        preset: str | None = None,
        seed: int = 0,
        mode: str = "fast",
    ):
        """Draw one image per label.

        Args:
          labels: [B], 0 .. classes; `classes` itself stands for "no class". Or names of classes, where they are known.
          sampler: such as "ddpm", "ddim" or "dpmpp_2m", or the file of a searched solver, see docs/sampling.md; None
            for the checkpoint's own.
          steps: timesteps, such as 250, "ddim50", "10,20,30" or "logsnr:10"; None for the checkpoint's own.
          guidance: scale of classifier-free guidance, 1 for none, or a list with a scale for each evaluation of the
            network; None for the checkpoint's own.
          guidance_interval: lowest and highest timestep with guidance; None for the checkpoint's own.
          preset: settings by name, such as "fast20"; the others win over it.
          seed: of all noise.
          mode: "fast" (only open gates are computed), "gated" or "complete"; see docs/fast.md.

        Returns:
          `Drawn`: the pictures, decoded where the model's images are latents, with routing and cost.

        Raises:
          InputError: labels out of range, unknown names, or settings that are not allowed.
        """
        labels, classes = self._read_labels(labels), self.weights.model.classes
        is_one = guidance is None or np.ndim(guidance) == 0
        sampling = self.sampling(
            sampler=sampler,
            steps=steps if steps is None else str(steps),
            guidance=guidance if is_one else None,
            guidance_interval=guidance_interval,
            guidance_scales=None if is_one else guidance,
            preset=preset,
        )
        trained = self.weights.about.get("config", {})
        require_trained(trained, sampling, labels=labels, classes=classes)
        job = DrawJob(labels, np.arange(len(labels)), sampling, seed=seed, mode=mode)
        batches = list(self.draw(job))
        pixels = np.concatenate([batch.pixels for batch in batches])
        images = np.concatenate([batch.result.samples.images for batch in batches])
        samples = dataclasses.replace(batches[-1].result.samples, images=images)
        return Drawn(pixels, samples, label_texts(labels, classes))

    def sampling(self, **overrides) -> SamplingConfig:
        """Return the checkpoint's sampling settings, with those replaced that are not None; NumPy's numbers pass too.

        Raises:
          InputError: an unknown setting, or a value that is not allowed.
        """
        given = {name: _plain(value) for name, value in overrides.items() if value is not None}
        own = dict(process=self.weights.process, checksum=lambda: self.checksum)
        return choose_sampling(self.weights.sampling, given, **own)

    def draw(self, job: DrawJob) -> Iterator[Batch]:
        """Draw the images of a job batch by batch, with a progress bar; the plan is calibrated, corrected and kept.

        Args:
          job: what is wanted.

        Yields:
          Each batch as soon as it is there.

        Raises:
          InputError: labels out of range, settings that are not allowed, or latents without a decoder.
          StopError: an image that is not finite.
        """
        began, compiled = time.monotonic(), compile_seconds()
        run = self.prepare(job.sampling)
        require_decoder(job.sampling.autoencoder, self.weights.model.channels)
        size = round_up(min(job.batch_size, len(job.indices)), run.devices)
        plan = (
            JobPlan(run, self.checksum, images=len(job.labels), segments=job.segments) if job.mode == "fast" else None
        )
        if plan is not None:
            plan.tune(job.labels, job.indices, seed=job.seed, batch=size)
        steps, record, done = len(run.table), None, 0
        total, unit = (steps, "step") if len(job.indices) <= size else (len(job.indices), "image")
        with Progress(total, unit, "sampling", delay=0) as progress:
            for first in range(0, len(job.indices), size):
                wanted = job.indices[first : first + size]
                units_of_step = 1 if unit == "step" else len(wanted) / steps
                report = lambda count, each=units_of_step: progress.advance(count * each)
                # One shape for all batches; the last one is filled up and cut again.
                indices = np.concatenate([wanted, np.repeat(wanted[-1:], size - len(wanted))])
                settings = dict(seed=job.seed, indices=indices, counted=len(wanted), mode=job.mode)
                samples = run.draw(job.labels[indices], **settings, plan=plan and plan.plan, report=report)
                if plan is not None:
                    plan.observe(samples)
                done += len(wanted)
                pixels = to_uint8(self.decode(samples.images, job.sampling), indices=indices)[: len(wanted)]
                samples = dataclasses.replace(samples, images=samples.images[: len(wanted)])
                record = samples if record is None else record.merge(samples, weight=len(wanted) / done)
                taken = dict(seconds=time.monotonic() - began, compile_seconds=compile_seconds() - compiled)
                yield Batch(wanted, pixels, DrawResult(record, plan and plan.plan, images=done, **taken))
        if plan is not None and is_main():
            plan.keep(record)

    def prepare(self, sampling: SamplingConfig) -> SamplingRun:
        """Return what all batches with these settings share; made once, the decoder too.

        Raises:
          InputError: steps that the schedule does not have, or an autoencoder that can't be read or has other channels.
        """
        if sampling not in self._runs:
            if sampling.autoencoder:
                self._autoencoder(sampling.autoencoder)
            mesh = self.mesh if self.mesh.size > 1 else None
            settings = dict(sampling=sampling, process=self.weights.process, mesh=mesh)
            run = SamplingRun(*self._placed, **settings)
            warn_of_unlearnt_times(self.weights.about.get("config", {}), run.table)
            # Cast, placed and folded once.
            self._placed = dataclasses.replace(self.model, lora=run.model.lora), run.params
            self._runs[sampling] = run
        return self._runs[sampling]

    @functools.cached_property
    def checksum(self) -> str:
        """SHA-256 of the parameters."""
        return checksum(self.weights.params)

    @functools.cached_property
    def _placed(self) -> tuple[Model, dict]:
        return self.model, jax.device_put(self.weights.params, replicated(self.mesh))

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of the pictures."""
        model, name = self.weights.model, self.weights.sampling.autoencoder
        if not name:
            return model.side, model.side, model.channels
        side = model.side * self._autoencoder(name).config.factor
        return side, side, 3

    def decode(self, samples, sampling: SamplingConfig | None = None) -> np.ndarray:
        """Turn samples [B,side,side,C] into images [B,side,side,1 or 3], about [-1, 1]."""
        name = (sampling or self.weights.sampling).autoencoder
        return decode_latents(self._autoencoder(name), samples, self.mesh) if name else np.asarray(samples)

    def encode(self, images) -> np.ndarray:
        """Turn images [B,side,side,1 or 3] in [-1, 1] into what the model denoises [B,side,side,C]."""
        name = self.weights.sampling.autoencoder
        return encode_images(self._autoencoder(name), images, self.mesh) if name else np.asarray(images, np.float32)

    @own_settings()
    def routing(self, images, labels, timestep: float, *, seed: int = 0) -> Routing:
        """Return the gates of images at one noise level: heads [B,L,H], groups [B,L,G], tokens [B,L,N].

        Args:
          images: [B,side,side,1 or 3] in [-1, 1].
          labels: [B], as for drawing.
          timestep: of the process: of diffusion 0 (no noise) and up, of a flow 0 (noise) to 1.
          seed: of the noise.

        Raises:
          InputError: a timestep that the process does not have, labels out of range, or not one for each image.
        """
        process, labels = self.weights.process, self._read_labels(labels)
        require_time(process, "timestep", timestep)
        if len(labels) != len(images):
            raise InputError(f"{len(images)} images came with {len(labels)} labels; give one label for each image.")
        latents, labels = jnp.asarray(self.encode(images)), jnp.asarray(labels)
        t = jnp.full(len(latents), timestep, process.time_range()[0].dtype)
        noise = first_noise(image_keys(seed, np.arange(len(latents))), latents.shape[1:])
        model = dataclasses.replace(self.model, constrain=unconstrained)  # the same one for every call: compiled once
        noisy = perturb(process, latents, noise, t)
        _, routing = _apply_gated(model)(self.weights.params, noisy, t, labels)
        return jax.device_get(routing)

    def _read_labels(self, labels) -> np.ndarray:
        """Return labels that were given by number or name, as int32 [B]."""
        words = [labels] if isinstance(labels, str) else np.atleast_1d(np.asarray(labels, object)).tolist()
        return read_labels(words, self.weights.model.classes, self.weights.class_names, "labels")

    @functools.cached_property
    def _autoencoder(self) -> Callable[[str], Autoencoder]:
        return functools.cache(self._load_autoencoder)

    def _load_autoencoder(self, name: str) -> Autoencoder:
        loaded = load_autoencoder(name)
        require_channels(loaded.config, self.weights.model.channels, name)
        return jax.device_put(loaded, replicated(self.mesh))


def _plain(value):
    """Return numbers and arrays of NumPy and JAX as Python's, also within a tuple or a list; anything else as it is."""
    if isinstance(value, (tuple, list)):
        return tuple(map(_plain, value))
    return value.tolist() if isinstance(value, (np.generic, np.ndarray, jax.Array)) else value


@functools.cache
def _apply_gated(model) -> Callable:
    return jax.jit(functools.partial(model.apply, mode="gated"))
