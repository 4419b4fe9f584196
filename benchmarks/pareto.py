"""The Pareto page: quality against MACs and against measured seconds, over models, solvers, guidance and modes.

    python benchmarks/study.py --runs runs/fashion     trains the models
    python benchmarks/pareto.py --runs runs/fashion    measures those that are there; goes on where it was stopped

At most 60 points. Each is a job of `sample.py` of 2000 images, whose manifest says how to draw them again, judged as in
the study. In the end 64 images of every job are timed several times, compiled programs at hand. The points take turns,
so that a busy minute of the machine is not the fault of one of them.

    <runs>/pareto.json               every point, with command, hardware and date
    <runs>/pareto.md, pareto.png     the table of the points that nothing beats, in Markdown, and the figure
    <runs>/pareto/<point>/           manifest.json, cost.json and samples.npz of each
"""

import dataclasses
import hashlib
import re
import statistics
import sys

import numpy as np
from absl import flags
from etils import epath
from pareto_page import draw, table
from studies import provenance
from study import DATA, NUM_IMAGES, PLAN, RUNS, SECONDS_OF_HOUR, Training, measured_rate
from study_models import DYNAMIC, LAMBDAS, ONE_PASS, SHALLOWER, STATIC, STUDIES, Study

from dydit_jax.drawing.report import COST_FILE
from dydit_jax.drawing.style import save_figure
from dydit_jax.errors import InputError
from dydit_jax.jobs.sample import Request, sample
from dydit_jax.pipeline import DrawJob, Pipeline
from dydit_jax.runtime.console import run
from dydit_jax.runtime.files import read_json, write_atomically, write_json
from dydit_jax.runtime.progress import counted
from dydit_jax.sampling.guidance import evaluations_of
from dydit_jax.sampling.table import make_table

flags.FLAGS.set_default("num_images", 2000)
TIMED_IMAGES = flags.DEFINE_integer("timed_images", 64, "Images that are timed, in one batch.")
ROUNDS = flags.DEFINE_integer("rounds", 3, "How often they are timed; the median counts.")

RESULTS = "pareto.json"
SOLVERS = {
    "ddpm, trailing:30": dict(sampler="ddpm", steps="trailing:30"),
    "sde_dpmpp_2m, trailing:20": dict(sampler="sde_dpmpp_2m", steps="trailing:20"),
    "unipc, trailing:10": dict(sampler="unipc", steps="trailing:10"),
    "unipc, trailing:6": dict(sampler="unipc", steps="trailing:6"),
}
# Without guidance nearer to real pictures than the others; they stand for all in the other modes.
NEAREST, SECOND_NEAREST = "sde_dpmpp_2m, trailing:20", "ddpm, trailing:30"
SCALE = 1.5
NONE, CONSTANT, INTERVAL = "none", "constant", "interval"
GUIDANCES = {
    NONE: dict(guidance=1.0),
    CONSTANT: dict(guidance=SCALE),
    INTERVAL: dict(guidance=SCALE, guidance_interval=(100, 700)),
}


@dataclasses.dataclass(frozen=True)
class Point:
    """A way to draw images.

    Attributes:
      model: of the study.
      solver: a key of `SOLVERS`.
      guidance: a key of `GUIDANCES`; of the model with guidance in one pass it costs one.
      mode: of sampling.
    """

    model: str
    solver: str
    guidance: str
    mode: str

    @property
    def name(self) -> str:
        """Name of its folder."""
        return re.sub(r"\W+", "_", "-".join(dataclasses.astuple(self))).lower()

    @property
    def overrides(self) -> dict:
        """Settings of sampling."""
        return SOLVERS[self.solver] | GUIDANCES[self.guidance]


def point_of(row: dict) -> Point:
    """Return the point that a row of the results is of."""
    return Point(*(row[field.name] for field in dataclasses.fields(Point)))


def all_points() -> list[Point]:
    """Return the points, the cheapest guidance first."""
    models = {STATIC: "complete", **dict.fromkeys(LAMBDAS.values(), "fast")}
    points = [
        Point(name, solver, guidance, mode)
        for guidance in GUIDANCES
        for name, mode in models.items()
        for solver in SOLVERS
    ]
    points += [Point(ONE_PASS, solver, CONSTANT, "fast") for solver in SOLVERS]
    nearest = (SECOND_NEAREST, NEAREST)
    points += [Point(DYNAMIC, solver, NONE, mode) for mode in ("gated", "complete") for solver in nearest]
    return points + [Point(SHALLOWER, NEAREST, guidance, "complete") for guidance in GUIDANCES]


def folder_of(study: Study, model: str) -> epath.Path | None:
    """Return the work directory of a model's first training seed; None where it has not ended."""
    training = Training(study, model, 0)
    return training.folder if training.has_ended else None


def estimated_hours(study: Study, points: list[Point]) -> float:
    """Return about how long points take by the speed of training so far, every pass counted as if all was open."""
    rate = measured_rate([Training(study, model, 0) for model in study.contestants], study.macs_per_second)
    macs = 0.0
    for point in points:
        experiment = Training(study, point.model, 0).experiment
        table = make_table(dataclasses.replace(experiment.sampling, **point.overrides), experiment.process)
        passes = evaluations_of(experiment.model, table.guidance).sum()
        macs += (
            float(passes)
            * experiment.model.macs.complete
            * (NUM_IMAGES.value + (1 + ROUNDS.value) * TIMED_IMAGES.value)
        )
    return macs / rate / SECONDS_OF_HOUR


def measure(point: Point, checkpoint: epath.Path, judge) -> dict:
    """Draw the images of a point, and let the judge see them."""
    out = epath.Path(RUNS.value) / "pareto" / point.name
    settings = dict(num_images=NUM_IMAGES.value, mode=point.mode, batch_size=TIMED_IMAGES.value)
    sample(Request(str(checkpoint), str(out), **settings, overrides=point.overrides))
    cost = read_json(out / COST_FILE)
    with np.load(out / "samples.npz") as samples:
        pixels, labels = samples["arr_0"], samples["labels"]
    if (out / "images").exists():  # all of them are in samples.npz
        (out / "images").rmtree()
    return dict(
        dataclasses.asdict(point),
        **judge.measure(pixels.astype(np.float32) / 127.5 - 1, labels),
        passes=cost["passes_per_image"],
        macs=cost["passes_per_image"] * cost["macs"],
        macs_executed=cost["passes_per_image"] * cost["macs_executed"],
        command=command(point, checkpoint, out, settings),
        images_sha256=hashlib.sha256(pixels.tobytes()).hexdigest(),
    )


def time_points(points: list[Point], checkpoints: dict[str, epath.Path]) -> list[list[float]]:
    """Return the seconds of the first images of each point's job, round by round, without compiling.

    Args:
      points: take turns.
      checkpoints: by model.
    """
    pipelines = {model: Pipeline.load(checkpoints[model]) for model in {point.model for point in points}}
    labels, indices = np.arange(NUM_IMAGES.value) % 10, np.arange(TIMED_IMAGES.value)
    seconds = {point: [] for point in points}
    turns = [point for _ in range(1 + ROUNDS.value) for point in points]
    for point in counted(turns, len(turns), "batch", "timing"):
        pipeline = pipelines[point.model]
        settings = dict(sampling=pipeline.sampling(**point.overrides), mode=point.mode, batch_size=TIMED_IMAGES.value)
        *_, last = pipeline.draw(DrawJob(labels, indices, **settings))
        seconds[point].append(last.result.seconds - last.result.compile_seconds)
    return [seconds[point][1:] for point in points]  # the first round brings the programs


def command(point: Point, checkpoint: epath.Path, out: epath.Path, settings: dict) -> str:
    """Return the command that draws a point's images."""
    words = {"checkpoint": checkpoint, "out": out, **settings}
    words |= {f"sampling.{key}": value for key, value in point.overrides.items()}
    text = lambda value: ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
    return " ".join(["python sample.py", *(f"--{key}={text(value)}" for key, value in words.items())])


def main():
    study, path = STUDIES[DATA.value], epath.Path(RUNS.value) / RESULTS
    about = dict(data=DATA.value, images=NUM_IMAGES.value, timed_images=TIMED_IMAGES.value)
    found = read_json(path) if path.is_file() else dict(about, points=[])
    changed = [key for key in about if found[key] != about[key]]
    if changed:
        raise InputError(
            f"{path} was measured otherwise ({', '.join(changed)} differ); remove it, or name other --runs."
        )
    done = [point_of(row) for row in found["points"]]
    folders = {model: folder_of(study, model) for model in study.contestants}
    missing = [point for point in all_points() if point not in done and folders[point.model]]
    hours = estimated_hours(study, missing)
    sys.stdout.write(f"{len(done)} points done; {len(missing)} to do, about {hours:.1f} hours.\n")
    if not any(folders.values()):
        raise InputError(f"No model in {RUNS.value} has been trained; start with benchmarks/study.py.")
    if PLAN.value:
        return
    judge = study.make_judge() if missing else None
    for point in counted(missing, len(missing), "point", "points"):
        found["points"].append(measure(point, folders[point.model], judge))
        write_json(path, found | provenance())
    if not all("seconds" in row for row in found["points"]):
        for row, seconds in zip(found["points"], time_points([point_of(row) for row in found["points"]], folders)):
            row |= dict(seconds=statistics.median(seconds) / TIMED_IMAGES.value, seconds_of_rounds=seconds)
        write_json(path, found | provenance())
    with write_atomically(path.with_suffix(".md")) as partial:
        partial.write_text(table(found["points"]))
    save_figure(path.with_suffix(".png"), draw(found["points"]))


if __name__ == "__main__":
    run(main, about=__doc__)
