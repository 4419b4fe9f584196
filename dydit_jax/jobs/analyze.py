"""The job behind `analyze.py`: where a model's work goes, and whether it has to.

    <out>/losses             loss over timesteps of every model, and the difference to the first
    <out>/loss_maps          loss over patches at chosen timesteps
    <out>/macs               cost over timesteps
    <out>/<model>/routing    heads, groups and tokens on, over timesteps and layers
    <out>/<model>/tokens     tokens on, over the images that come out
    <out>/<model>/plan       segments of the fast path

each as .png, .svg and, the numbers, .csv. The first two are what DyDiT starts from (https://arxiv.org/abs/2410.03456,
figure 1): some timesteps are easy, and so are some patches. Examples, noise and timesteps are the same for all models.
"""

import dataclasses
import functools
import logging
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from dydit_jax.checkpoints import Weights, package_versions, without_places
from dydit_jax.convert.hub import is_address
from dydit_jax.data.batches import examples
from dydit_jax.data.sources import DataConfig, open_source
from dydit_jax.diffusion.process import Process, format_time, noise_first, spread_times
from dydit_jax.drawing import figures, loss_figures
from dydit_jax.drawing.pictures import to_uint8
from dydit_jax.drawing.report import ANALYSIS_FILE, write_report
from dydit_jax.drawing.style import save_figure, save_table, spread_indices
from dydit_jax.errors import InputError, StopError
from dydit_jax.labels import read_labels
from dydit_jax.latents import require_decoder
from dydit_jax.loading import load_checkpoint, load_decoder
from dydit_jax.models.precision import build_model
from dydit_jax.models.routing import Routing
from dydit_jax.pipeline import Pipeline
from dydit_jax.records import require_range
from dydit_jax.runtime.files import locate, write_json
from dydit_jax.runtime.origin import origin
from dydit_jax.runtime.progress import Progress
from dydit_jax.runtime.seeds import require_seed
from dydit_jax.runtime.settings import own_settings
from dydit_jax.runtime.sharding import MeshConfig, batch_sharding, make_mesh, replicated
from dydit_jax.sampling.generate import Samples, SamplingRun
from dydit_jax.sampling.guidance import require_trained
from dydit_jax.sampling.noise import image_keys
from dydit_jax.training.probe import patch_losses

logger = logging.getLogger(__name__)

MOST = dict(num_examples=1_000_000, num_timesteps=1000, batch_size=65_536)
MOST_DEFAULT_LABELS = 4
MAPS_SHOWN = 6
LAYERS_SHOWN = 6


@dataclasses.dataclass(frozen=True)
class Analysis:
    """What a user asks of `analyze.py`.

    Attributes:
      checkpoints: models, with commas between them, each as for `sample.py --checkpoint`; the first is what the others
        are compared with.
      out: folder for the pictures; must be new or empty.
      base: of adapters among the models: the weights that they were trained on; those that each names by default.
      data: dataset to measure losses on; the first model's training data by default.
      data_path: folder of these examples, where they lie in files.
      num_examples: examples, spread evenly over the data.
      num_timesteps: timesteps, spread evenly over all.
      labels: labels of the images to draw with each dynamic model, or names of classes where the first of these
        models knows them; by default the first classes, at most four.
      seed: seed of all noise.
      batch_size: examples at once; does not change the results.
      precision: auto, bfloat16, float32 or highest.
      report: also collect everything in one page, report.html.
    """

    checkpoints: tuple[str, ...]
    out: str
    base: str = ""
    data: str = ""
    data_path: str = ""
    num_examples: int = 256
    num_timesteps: int = 50
    labels: tuple | None = None
    seed: int = 0
    batch_size: int = 64
    precision: str = "auto"
    report: bool = False

    def __post_init__(self):
        for name, low in (("num_examples", 2), ("num_timesteps", 2), ("batch_size", 1)):
            require_range(f"--{name}", getattr(self, name), low=low, high=MOST[name])
        require_seed("--seed", self.seed)
        if not self.checkpoints or not self.out:
            raise InputError("--checkpoints must name one model or several, with commas between them, --out a folder.")


@own_settings()
def analyze(request: Analysis) -> dict:
    """Carry out a request.

    Returns:
      The losses of every model by name, [examples, timesteps].

    Raises:
      InputError: models that can't be compared, data that do not fit them, latents without their decoder, or a folder
        that is not empty.
    """
    models = _named([load_checkpoint(path, base=request.base) for path in request.checkpoints], request.checkpoints)
    batch = _examples(request, models)
    request = dataclasses.replace(request, labels=_labels(request, models))
    mesh = make_mesh(MeshConfig())
    _require_decoders(models, mesh)
    out = locate(request.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} is not empty; name another --out.")
    out.mkdir(parents=True, exist_ok=True)
    write_json(
        out / ANALYSIS_FILE, dataclasses.asdict(request) | dict(made=origin() | dict(versions=package_versions()))
    )
    process = next(iter(models.values())).process
    timesteps = spread_times(process, request.num_timesteps)
    with jax.set_mesh(mesh):
        losses, maps = {}, {}
        for name, weights in models.items():
            losses[name], maps[name] = measure_losses(weights, batch, timesteps, request, mesh, name)
        _draw_losses(out, process, timesteps, losses, maps)
        costs = {}
        for name, weights in models.items():
            if weights.model.routers != "none":
                costs[name] = _draw_routing(out / name, weights, request, mesh)
    if costs:
        _draw_costs(out, models, costs)
    for path in sorted(out.glob("*.png")) + sorted(out.glob("*/*.png")):
        logger.info("Wrote %s (also .svg, .csv)", path)
    if request.report:
        logger.info("Wrote %s", write_report(out))
    return losses


def _named(weights: list[Weights], paths: tuple[str, ...]) -> dict[str, Weights]:
    """Name models by what tells their paths apart.

    Raises:
      InputError: models of different inputs or processes.
    """
    first = weights[0]
    shape = lambda model: (model.side, model.channels, model.classes)
    for path, other in zip(paths, weights):
        if (shape(other.model), other.process) != (shape(first.model), first.process):
            raise InputError(
                f"{path} has inputs {shape(other.model)} (side, channels, classes) and {other.process}, {paths[0]} "
                f"{shape(first.model)} and {first.process}; losses of the same examples can't be compared."
            )
    names = short_names([_parts(str(path)) for path in paths])
    if names is None:
        raise InputError(f"--checkpoints names a model twice: {', '.join(paths)}.")
    return dict(zip(names, weights))


def _parts(path: str) -> tuple[str, ...]:
    """Return the parts of a path or an address, the latter without an account, a query and a checksum.

    Where a path is relative to what has another name, such as "." or "..", they are those of what it is.
    """
    if is_address(path):
        return pathlib.PurePosixPath(without_places(path).partition("#")[0].removesuffix(".safetensors")).parts
    path = pathlib.PurePosixPath(path.removesuffix(".safetensors"))
    return pathlib.Path(path).resolve().parts if not path.parts or ".." in path.parts else path.parts


def short_names(paths: list[tuple[str, ...]]) -> list[str] | None:
    """Return a name for each path, given in parts: the last part by which all differ, else the shortest ends that do.

    None where two paths are the same.
    """
    alone = [[path[-depth] for path in paths] for depth in range(1, min(map(len, paths)) + 1)]
    ends = [["-".join(path[-depth:]) for path in paths] for depth in range(2, max(map(len, paths)) + 1)]
    return next(([name.strip("/") for name in names] for names in alone + ends if len(set(names)) == len(names)), None)


def _examples(request: Analysis, models: dict[str, Weights]) -> dict:
    """Return the examples to measure on: {"image": [n,side,side,C], "label": [n]}."""
    first = next(iter(models.values()))
    trained_on = first.about.get("config", {}).get("data") or {}
    name, path = request.data or trained_on.get("name", ""), request.data_path
    if not name:
        raise InputError("The first model does not say what it was trained on; name --data (and --data_path).")
    settings = {}
    if not request.data:
        path = path or trained_on.get("path", "")
        settings = {key: trained_on[key] for key in ("flip", "image_key", "label_key") if key in trained_on}
        logger.info("The data are those that %s names: %s %s", request.checkpoints[0], name, path)
    source = open_source(DataConfig(name=name, path=path, batch_size=1, **settings), first.model)
    return examples(source, count=min(request.num_examples, len(source)))


def _labels(request: Analysis, models: dict[str, Weights]) -> tuple[int, ...]:
    """Return the labels of the images to draw; () where there are static models alone, which are not sampled."""
    sampled = [weights for weights in models.values() if weights.model.routers != "none"]
    if not sampled:
        return ()
    classes = sampled[0].model.classes
    words = range(max(1, min(classes, MOST_DEFAULT_LABELS))) if request.labels is None else request.labels
    labels = read_labels(words, classes, sampled[0].class_names, "--labels")
    for weights in sampled:
        require_trained(weights.about.get("config", {}), weights.sampling, labels=labels, classes=classes)
    return tuple(labels.tolist())


def _require_decoders(models: dict[str, Weights], mesh) -> None:
    """Raise where the images of a dynamic model could not be shown; losses, which come first, take long."""
    for weights in models.values():
        if weights.model.routers != "none":
            decoded = weights.sampling.autoencoder, weights.model.channels
            require_decoder(*decoded)
            load_decoder(*decoded, mesh)


# --- Losses --------------------------------------------------------------------------------------


def measure_losses(weights: Weights, batch: dict, timesteps, request: Analysis, mesh, name: str):
    """Return a model's losses on given examples: per example [n,T], and per patch, mean over the examples, [T,N]."""
    model = build_model(weights.model, precision=request.precision, mesh=mesh, lora=weights.lora)
    params = jax.device_put(weights.params, replicated(mesh))
    mode = "complete" if weights.model.routers == "none" else "gated"
    measure = functools.partial(patch_losses, model=model, process=weights.process, mode=mode)
    count = len(batch["label"])
    size = -(-min(request.batch_size, count) // mesh.size) * mesh.size
    losses = np.zeros((count, len(timesteps)))
    maps = np.zeros((len(timesteps), weights.model.tokens))
    with Progress(count * len(timesteps), "pass", f"losses of {name}") as progress:
        for first in range(0, count, size):
            indices = np.arange(first, first + size).clip(max=count - 1)  # one shape for all batches
            kept = min(size, count - first)
            rows = {name: batch[name][indices] for name in ("image", "label")}
            arrays = jax.device_put((rows, image_keys(request.seed, jnp.asarray(indices))), batch_sharding(mesh))
            for column, timestep in enumerate(timesteps):
                found = np.asarray(measure(params, *arrays, timestep), np.float64)[:kept]
                _require_finite(found, name, timestep, first)
                losses[first : first + kept, column] = found.mean(-1)
                maps[column] += found.sum(0) / count
                progress.advance(kept)
    return losses, maps


def _require_finite(losses, name: str, timestep, first: int) -> None:
    """Raise where a loss of the examples from `first` on, [n,N], is NaN or infinite."""
    wrong = np.flatnonzero(~np.isfinite(losses).all(1))
    if wrong.size:
        raise StopError(
            f"The loss of {name} on example {first + wrong[0]} at timestep {format_time(timestep)} is not finite; look "
            "at its weights, or take --precision=highest."
        )


def _draw_losses(out, process: Process, timesteps, losses: dict, maps: dict) -> None:
    order = noise_first(process, timesteps)
    figure = loss_figures.draw_losses(timesteps[order], {name: loss[:, order] for name, loss in losses.items()})
    _save(out / "losses", figure, loss_figures.loss_table(timesteps, losses))
    shown = order[spread_indices(len(timesteps), MAPS_SHOWN)]
    chosen, fields = timesteps[shown], {name: field[shown] for name, field in maps.items()}
    _save(out / "loss_maps", loss_figures.draw_loss_maps(chosen, fields), loss_figures.loss_map_table(chosen, fields))


# --- Routing -------------------------------------------------------------------------------------


def _draw_routing(out, weights: Weights, request: Analysis, mesh) -> Samples:
    """Draw images with a dynamic model, one at a time so that each has its own record, and show what was on."""
    out.mkdir()
    pipeline = Pipeline(weights, precision=request.precision, mesh=mesh)
    run = SamplingRun(pipeline.model, weights.params, sampling=weights.sampling, process=weights.process)
    plan, steps = run.plan(), len(run.table)
    with Progress(len(request.labels) * steps, "step", f"images of {out.name}") as progress:
        draw = functools.partial(run.draw, seed=request.seed, mode="gated", report=progress.advance)
        each = [draw([label], indices=np.array([index])) for index, label in enumerate(request.labels)]
    tokens = np.stack([samples.routing.tokens for samples in each])  # [I,S,L,N]
    record = each[0].routing
    mean = dataclasses.replace(
        each[0],
        routing=Routing(record.heads, record.groups, tokens.mean(0)),
        macs=np.mean([samples.macs for samples in each], 0),
    )
    _save(out / "routing", figures.draw_routing(mean, weights.model.macs), figures.routing_table(mean))
    _save(out / "plan", figures.draw_plan(plan, mean.timesteps), figures.plan_table(plan, mean.timesteps))
    images = to_uint8(pipeline.decode(np.concatenate([samples.images for samples in each])), what=f"{out.name}'s image")
    shown, layers = spread_indices(steps, MAPS_SHOWN), spread_indices(weights.model.depth, LAYERS_SHOWN)
    chosen = mean.timesteps[shown]
    table = figures.token_table(tokens[:, shown], chosen)
    _save(out / "tokens", figures.draw_tokens(images, tokens[:, shown], chosen, layers), table)
    one = figures.draw_tokens(images[:1], tokens[:1, shown], chosen, layers)
    _save(out / "tokens_by_layer", one, [row for row in table if row["image"] == 0])
    return mean


def _draw_costs(out, models: dict, costs: dict) -> None:
    timesteps, macs = ({name: getattr(c, key) for name, c in costs.items()} for key in ("timesteps", "macs"))
    complete = {name: models[name].model.macs.complete for name in costs}
    table = [
        dict(model=name, timestep=format_time(t), macs=float(m), complete=complete[name])
        for name, cost in costs.items()
        for t, m in zip(cost.timesteps, cost.macs)
    ]
    _save(out / "macs", figures.draw_macs(timesteps, macs, complete), table)


def _save(path, figure, table: list[dict]) -> None:
    for suffix in (".png", ".svg"):
        save_figure(path.with_name(path.name + suffix), figure)
    save_table(path.with_name(path.name + ".csv"), table)
