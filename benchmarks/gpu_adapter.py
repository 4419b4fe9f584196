"""All that `gpu.py` asks of the package: a model to sample, a training step, a checkpoint."""

import dataclasses
import time

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from profiles import SWINGS, profiled_params

from dydit_jax.checkpoints import WEIGHTS_FILE, Weights, save_autoencoder, save_weights
from dydit_jax.diffusion.process import Diffusion
from dydit_jax.diffusion.samplers import SamplingConfig
from dydit_jax.fast.execution.registry import available_executions, default_execution
from dydit_jax.fast.usage import TokenUsage
from dydit_jax.models import autoencoder
from dydit_jax.models.config import DiTConfig, published_config
from dydit_jax.models.dit import Model
from dydit_jax.models.precision import build_model, resolve_precision
from dydit_jax.runtime.peaks import FLOPS_PER_MAC, flops_utilisation
from dydit_jax.runtime.sharding import MeshConfig, batch_sharding, make_mesh, shardings
from dydit_jax.sampling.generate import SamplingRun
from dydit_jax.sampling.guidance import evaluations_per_step
from dydit_jax.sampling.table import make_table
from dydit_jax.training.experiment import build_update, read_experiment
from dydit_jax.training.optimizer import build_optimizer
from dydit_jax.training.update import batch_shapes, compile_update, init_state

__all__ = ["DiTConfig", "Drawn", "Job", "Subject", "Training", "other_kernels", "published_config", "write_checkpoint"]

PROFILE = (0.65, 0.65, 0.65)  # of open heads, groups and tokens
LONG_STEPS = 250  # a shorter run changes its heads and groups at the pace of one of so many
GUIDANCE = 1.5


@dataclasses.dataclass(frozen=True)
class Job:
    """A sampling run to be measured.

    Attributes:
      config: the model, with routers of the layout "free".
      precision: as `sample.py` has it.
      batch: images at once.
      steps: of DDPM.
      segments: that `fast` cuts them into.
      way: execution of its tokens; None takes the default.
    """

    config: DiTConfig
    precision: str
    batch: int
    steps: int
    segments: int
    way: str | None = None

    @property
    def swings(self) -> float:
        """Of every unit's logit over the run."""
        return SWINGS * self.steps / LONG_STEPS

    @property
    def settings(self) -> dict:
        """Of a `SamplingRun`."""
        # Clipping keeps the images of a random network in the range of real ones.
        sampling = SamplingConfig(sampler="ddpm", steps=str(self.steps), guidance=GUIDANCE, clip=1.0)
        return dict(sampling=sampling, process=Diffusion())

    @property
    def rows(self) -> int:
        """Images in the network, guidance included."""
        return self.batch * int(evaluations_per_step(make_table(**self.settings).guidance).max())


@dataclasses.dataclass(frozen=True)
class Drawn:
    """A batch of images.

    Attributes:
      images: [B,side,side,C].
      tokens: mean gates [S,L,N].
      macs: of an image and a pass, mean over the run.
      overflow_count: how often more tokens were open than the largest capacity.
      usage: of tokens, which calibrates a plan.
    """

    images: np.ndarray
    tokens: np.ndarray
    macs: float
    overflow_count: int
    usage: TokenUsage


class Subject:
    """A model with weights of the profile, and plans to run it by.

    Attributes:
      job: what it was made for.
      plan: of `fast`; not calibrated before `calibrate`.
    """

    def __init__(self, job: Job):
        self.job = job
        self._model = Model(job.config, *resolve_precision(job.precision))
        timesteps = make_table(**job.settings).timestep
        # In float32 whatever the precision is: in all of them the same weights.
        self._params = profiled_params(Model(job.config), timesteps, PROFILE, swings=job.swings)
        # One for `fast` and one for the others: as in a job, which narrows its weights from batch to batch.
        self._runs = {mode: SamplingRun(self._model, self._params, **job.settings) for mode in ("fast", "whole")}
        self.plan = self._runs["fast"].plan(job.segments)
        if job.way is not None:
            self.take(job.way)

    @property
    def about(self) -> dict:
        """What the plan is, in words and numbers."""
        return dict(
            precision=self._model.dtype.name,
            batch=self.job.batch,
            steps=self.job.steps,
            segments=len(self.plan.segments),
            plan=self.plan.summary(),
            padding=self.plan.padding,
            way=self.way,
        )

    @property
    def ways(self) -> tuple[str, ...]:
        """The executions of tokens that this device can run, by name."""
        return tuple(execution.name for execution in available_executions(self._model, self.job.rows))

    @property
    def way(self) -> str:
        """The execution that is taken."""
        return self.plan.execution

    def take(self, way: str) -> None:
        """Take one of `ways` from now on."""
        self.plan = dataclasses.replace(self.plan, execution=way)

    def calibrate(self, drawn: Drawn) -> None:
        """Let `fast` choose capacities by the usage of other images."""
        self.plan = self.plan.with_usage(drawn.usage.without_max_rows())

    def draw(self, mode: str, first: int = 0) -> Drawn:
        """Draw a batch of images whose indices begin with `first`; returns when they are on the host."""
        indices = first + np.arange(self.job.batch)
        run = self._runs["fast" if mode == "fast" else "whole"]
        plan = self.plan if mode == "fast" else None
        samples = run.draw(indices % self.job.config.classes, indices=indices, mode=mode, plan=plan)
        tokens = np.asarray(samples.routing.tokens)
        return Drawn(samples.images, tokens, samples.mean_macs, int(samples.overflow_count.sum()), samples.usage)


def other_kernels(job: Job) -> tuple[str, ...]:
    """Return the executions in kernels for GPUs that this device can run beside the default."""
    model = Model(job.config, *resolve_precision(job.precision))
    names = {execution.name for execution in available_executions(model, job.rows)} - {default_execution(model).name}
    return tuple(sorted(name for name in names if name.startswith("triton")))


class Training:
    """A training step on one device, compiled, with a state and a batch.

    Attributes:
      macs: of a step's forward passes, as far as they are part of the model: nothing that is computed again.
      compile_seconds: that the step took.
      compiled: it, a `jax.stages.Compiled`.
    """

    def __init__(self, config: DiTConfig, precision: str, batch: int, passes: tuple[str, ...]):
        mesh = make_mesh(MeshConfig(), jax.devices()[:1])
        sections = dict(
            model=dataclasses.asdict(config),
            data=dict(name="synthetic", batch_size=batch),
            optimizer=dict(learning_rate=1e-4),
            train=dict(steps=1),
        )
        experiment = read_experiment(sections)
        model = build_model(config, precision=precision, mesh=mesh, remat="auto")
        make_state = lambda: init_state(model.init(jax.random.key(0)), build_optimizer(experiment.optimizer))
        abstract = jax.eval_shape(make_state)
        began = time.perf_counter()
        self.compiled = compile_update(
            build_update(experiment, model, passes), abstract, batch_shapes(config, batch), mesh
        )
        self.compile_seconds = time.perf_counter() - began
        self._state = jax.jit(make_state, out_shardings=shardings(mesh, abstract))()
        image = jax.random.normal(jax.random.key(1), (batch, config.side, config.side, config.channels))
        label = jnp.arange(batch, dtype=jnp.int32) % config.classes
        self._batch = jax.device_put(dict(image=image, label=label), batch_sharding(mesh))
        self._dtype = model.dtype
        routers = config.macs.routers if "gated" in passes else 0
        self.macs = batch * (len(passes) * config.macs.complete + routers)

    def run(self, steps: int) -> float:
        """Take steps and wait for the last; return the loss."""
        for _ in range(steps):
            self._state, metrics = self.compiled(self._state, self._batch)
        return float(jax.block_until_ready(metrics)["loss/total"])

    def utilisation(self, seconds: float) -> dict:
        """Return what share of the device's peak a step of so many seconds has, and the peak; nothing if unknown."""
        share = flops_utilisation(self.macs / seconds, self._dtype)
        if share is None:
            return {}
        return dict(utilisation=share, peak_tflops=FLOPS_PER_MAC * self.macs / seconds / share / 1e12)


def write_checkpoint(folder, job: Job, *, decoder: str | None) -> None:
    """Write the weights of a job into a folder that `sample.py` takes as a checkpoint.

    Args:
      folder: where to.
      job: whose weights and sampling.
      decoder: "random" also writes an autoencoder with random weights, which its latents are decoded by.
    """
    settings, folder = job.settings, epath.Path(folder)
    if decoder:
        path = folder / "autoencoder.safetensors"
        save_autoencoder(path, jax.jit(autoencoder.init)(jax.random.key(0)), {})
        settings |= dict(sampling=dataclasses.replace(settings["sampling"], autoencoder=str(path)))
    timesteps = make_table(**settings).timestep
    params = jax.device_get(profiled_params(Model(job.config), timesteps, PROFILE, swings=job.swings))
    save_weights(folder / WEIGHTS_FILE, Weights(job.config, params=params, about={}, **settings))
