"""The study: is a dynamic model worth its cost on pictures that are not easy, and which part of it brings what.

    python benchmarks/study.py --plan                  what would run, in which order, and for how many hours
    python benchmarks/study.py --runs runs/fashion     run it; the same command goes on where it was stopped

Given several times at once, on parts of the cores or on several GPUs, the command shares the work: each takes the next
model that no other works on.

Trains the models of `study_models.py`, the most important first, each in a process of its own, and measures each
as soon as it has ended: accuracy, Fréchet distance, precision and recall by the judge, of images without guidance, the
classes in turn, with several seeds of sampling. Three models of the first question also go through `analyze.py`.

    <runs>/study.json             every measurement, with command, hardware and date
    <runs>/study.md               the tables, in Markdown
    <runs>/cost.png, parts.png    the figures; analysis/ those of analyze.py
    <runs>/<model>/seed_<n>/      work directories

Differences are given in units of sqrt(s1^2 + s2^2), s being the standard deviation over training seeds.
"""

import contextlib
import dataclasses
import json
import re
import statistics
import sys
import time
from collections.abc import Iterator

from absl import flags
from etils import epath
from studies import measure, provenance, train_to_end
from study_models import DYNAMIC, NARROWER, OF_A_NUMBER, STUDIES, TRAINED_ON, Study, ordered_runs
from study_pages import draw_cost, draw_parts, plan_table, tables

from dydit_jax.checkpoints import WEIGHTS_FILE
from dydit_jax.drawing.style import save_figure
from dydit_jax.errors import InputError
from dydit_jax.jobs.analyze import Analysis, analyze
from dydit_jax.pipeline import Pipeline
from dydit_jax.runtime.console import run
from dydit_jax.runtime.files import hold_lock, read_json, write_atomically, write_json
from dydit_jax.runtime.locks import FolderLock
from dydit_jax.sampling.table import make_table
from dydit_jax.training.experiment import Experiment, read_experiment
from dydit_jax.training.objective import passes_at

DATA = flags.DEFINE_enum("data", "fashion", sorted(STUDIES), "Data, with its models and its judge.")
RUNS = flags.DEFINE_string("runs", "runs/fashion", "Folder of the work directories and of the results.")
PLAN = flags.DEFINE_bool("plan", False, "Only say what would run and how long it takes.")
NUM_IMAGES = flags.DEFINE_integer("num_images", 5000, "Images per measurement, the classes in turn.")
SAMPLING_SEEDS = flags.DEFINE_integer("sampling_seeds", 2, "Seeds of sampling per model.")
STEPS = flags.DEFINE_integer("steps", 0, "Steps of every training instead of its config's, to try the command.")

RESULTS, TABLES, ANALYSIS = "study.json", "study.md", "analysis"
ANALYSED = (NARROWER, TRAINED_ON, DYNAMIC)
FORWARD_AND_BACKWARD = 3  # a gradient costs twice as much as the pass that it is of
SECONDS_OF_HOUR = 3600
SECONDS_BETWEEN_LOOKS = 20  # for a model to be free, or for the end of one that it starts from


@dataclasses.dataclass(frozen=True)
class Training:
    """A training of the study.

    Attributes:
      study: whose model it is.
      model: name of the contestant.
      seed: of training: initial values, noise, order of the data.
    """

    study: Study
    model: str
    seed: int

    @property
    def folder(self) -> epath.Path:
        """The work directory."""
        return epath.Path(RUNS.value) / re.sub(r"\W+", "_", self.model).lower() / f"seed_{self.seed}"

    @property
    def start(self) -> "Training | None":
        """The training that it starts from."""
        name = self.study.contestants[self.model].start
        return Training(self.study, name, 0) if name else None

    @property
    def settings(self) -> dict:
        """What is set beside the config."""
        settings = {"train.seed": self.seed, "data.seed": self.seed}
        if self.start:
            settings["train.init_from"] = str(self.start.folder)
        if self.model in OF_A_NUMBER:
            settings["model.token_capacity"] = (passing_tokens() or 0.5,)
        if STEPS.value:
            settings |= {"train.steps": STEPS.value, "optimizer.decay_steps": STEPS.value, "optimizer.warmup_steps": 0}
        return settings

    @property
    def experiment(self) -> Experiment:
        """The whole config, checked."""
        return read_experiment(self.study.contestants[self.model].sections(self.settings))

    @property
    def can_begin(self) -> bool:
        """Whether what it starts from has ended, and what it needs has been measured."""
        if self.model in OF_A_NUMBER and passing_tokens() is None:
            return False
        return self.start is None or self.start.has_ended

    @property
    def has_ended(self) -> bool:
        """Whether its weights are there."""
        return (self.folder / WEIGHTS_FILE).is_file()

    def run(self) -> None:
        """Train to the end, unless that is done."""
        contestant = self.study.contestants[self.model]
        train_to_end(
            contestant.config, self.folder, {**contestant.settings, **self.settings}, "benchmarks/study_train.py"
        )

    def reports(self) -> list[dict]:
        """Return what the training has said of its steps so far."""
        file = self.folder / "metrics.jsonl"
        lines = file.read_text().splitlines() if file.is_file() else []
        return [json.loads(line) for line in lines if line.endswith("}")]  # the last one may be cut

    @property
    def steps_done(self) -> int:
        """The last step that it has reported."""
        return max((row["step"] for row in self.reports()), default=0)


def passing_tokens() -> float | None:
    """Return the share of tokens that pass in the DyDiT with a threshold, in whole percent; None before it is known."""
    path = epath.Path(RUNS.value) / RESULTS
    rows = read_json(path)["results"] if path.is_file() else []
    first = [row["tokens"] for row in rows if (row["model"], row["seed"], row["sampling_seed"]) == (DYNAMIC, 0, 0)]
    return round(first[0], 2) if first else None


def training_macs(experiment: Experiment) -> float:
    """Return the MACs of a whole training, every pass counted as if all gates were open."""
    steps, loss = experiment.train.steps, experiment.loss
    both = len(passes_at(0, model=experiment.model, loss=loss)) == 2
    passes = 1 + (steps if loss.complete_steps < 0 else min(loss.complete_steps, steps)) / steps * both
    passes += loss.guidance_free / FORWARD_AND_BACKWARD  # its second prediction has no gradient
    return steps * passes * FORWARD_AND_BACKWARD * experiment.data.batch_size * experiment.model.macs.complete


def sampling_macs(experiment: Experiment) -> float:
    """Return the MACs of all images of a model."""
    sampling = dataclasses.replace(experiment.sampling, guidance=1.0)
    evaluations = len(make_table(sampling, experiment.process))
    return SAMPLING_SEEDS.value * NUM_IMAGES.value * evaluations * experiment.model.macs.complete


def measured_rate(trainings: list[Training], default: float) -> float:
    """Return MACs per second of training: the median over the trainings that have reported, or a default."""
    rates = []
    for training in trainings:
        speeds = [row["time/steps_per_second"] for row in training.reports() if "time/steps_per_second" in row]
        if speeds:
            experiment = training.experiment
            rates.append(statistics.median(speeds) * training_macs(experiment) / experiment.train.steps)
    return statistics.median(rates) if rates else default


def plan(study: Study, results: list[dict]) -> str:
    """Return what would run, in its order, with the hours that it takes by the speed so far."""
    trainings = [Training(study, *key) for key in ordered_runs()]
    rate, rows = measured_rate(trainings, study.macs_per_second), []
    for training in trainings:
        experiment = training.experiment
        hours = [macs / rate / SECONDS_OF_HOUR for macs in (training_macs(experiment), sampling_macs(experiment))]
        done = training.steps_done / experiment.train.steps
        measured = sum((row["model"], row["seed"]) == (training.model, training.seed) for row in results)
        left = hours[0] * (0 if training.has_ended else 1 - done) + hours[1] * (1 - measured / SAMPLING_SEEDS.value)
        state = "trained" if training.has_ended else f"step {training.steps_done}" if done else "to do"
        state += f", measured {measured} of {SAMPLING_SEEDS.value}" if training.has_ended else ""
        names = dict(model=training.model, seed=training.seed, steps=experiment.train.steps)
        rows.append(names | dict(macs=experiment.model.macs.complete, hours=sum(hours), left=left, state=state))
    return plan_table(rows, rate)


class Results:
    """What has been measured, kept at once; other processes may add to it.

    Attributes:
      found: the content of `study.json`.
    """

    def __init__(self, study: Study):
        """Read what is there.

        Raises:
          InputError: results of other images or other data.
        """
        self._path, self._study = epath.Path(RUNS.value) / RESULTS, study
        self.found = {}
        self.read()

    def read(self) -> None:
        """Read what is there by now.

        Raises:
          InputError: results of other images, other data, or trainings of another length.
        """
        about = dict(data=DATA.value, images=NUM_IMAGES.value, steps=STEPS.value)
        self.found = read_json(self._path) if self._path.is_file() else dict(about, results=[])
        changed = [key for key in about if self.found.get(key, 0) != about[key]]
        if changed:
            raise InputError(f"{self._path} was measured otherwise ({', '.join(changed)} differ); name another --runs.")

    @contextlib.contextmanager
    def adding(self) -> Iterator[None]:
        """Hold the file, as it is by now, for what is added to `found` within."""
        with hold_lock(self._path.with_suffix(".lock"), to="to add a result"):
            self.read()
            yield
            write_json(self._path, self.found | provenance())

    @property
    def rows(self) -> list[dict]:
        """All measurements: model, seed, sampling_seed, and what `studies.measure` returns."""
        return self.found["results"]

    def judge_real(self, judge) -> None:
        """Measure the real test pictures, once."""
        if "real" not in self.found:
            real = judge.measure(*self._study.real_pictures(NUM_IMAGES.value))
            with self.adding():
                self.found["real"] = real

    def missing_seeds(self, training: Training) -> list[int]:
        """Return the seeds of sampling that a model has not been measured with."""
        same = lambda row: (row["model"], row["seed"]) == (training.model, training.seed)
        known = {row["sampling_seed"] for row in self.rows if same(row)}
        return [seed for seed in range(SAMPLING_SEEDS.value) if seed not in known]

    def measure(self, training: Training, judge) -> None:
        """Measure a model with the seeds of sampling that are missing, and write tables and figures again."""
        self.read()
        missing = self.missing_seeds(training)
        pipeline = Pipeline.load(training.folder, precision="float32") if missing else None
        for seed in missing:
            settings = dict(images=NUM_IMAGES.value, seed=seed)
            row = measure(pipeline, judge, pipeline.sampling(guidance=1.0), **settings)
            with self.adding():
                self.rows.append(dict(model=training.model, seed=training.seed, sampling_seed=seed, **row))
        if missing:
            self.write_pages()

    def write_pages(self) -> None:
        """Write the tables, and the figures of what there is."""
        with write_atomically(self._path.with_name(TABLES)) as partial:
            partial.write_text(tables(self.found))
        for name, draw in (("cost", draw_cost), ("parts", draw_parts)):
            figure = draw(self.found)
            if figure is not None:
                save_figure(self._path.with_name(f"{name}.png"), figure)


def analyze_models(study: Study) -> None:
    """Draw where the work is, by `analyze.py`, once the models for it are there."""
    trainings = [Training(study, model, 0) for model in ANALYSED]
    out = epath.Path(RUNS.value) / ANALYSIS
    with hold_lock(out.with_suffix(".lock"), to="to analyze the models"):
        if out.exists() or not all(training.has_ended for training in trainings):
            return
        partial = out.with_name(f"{ANALYSIS}.partial")
        if partial.exists():  # of an analysis that was killed
            partial.rmtree()
        folders, examples = tuple(str(training.folder) for training in trainings), min(1024, NUM_IMAGES.value)
        analyze(Analysis(folders, str(partial), num_examples=examples))
        partial.rename(out)


def work(training: Training, results: Results, judge) -> bool:
    """Train a model to its end and measure it; return False, at once, where another process does."""
    claim = training.folder.with_suffix(".study")
    claim.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(FolderLock(claim))
        except InputError:
            return False
        training.run()
        results.measure(training, judge)
    return True


def main():
    study = STUDIES[DATA.value]
    results = Results(study)
    sys.stdout.write(plan(study, results.rows))
    if PLAN.value:
        return
    judge = study.make_judge()
    results.judge_real(judge)
    left = [Training(study, *key) for key in ordered_runs()]
    while left:
        done = next((training for training in left if training.can_begin and work(training, results, judge)), None)
        if done is None:
            time.sleep(SECONDS_BETWEEN_LOOKS)
        else:
            left.remove(done)
            analyze_models(study)
    results.read()
    sys.stdout.write(tables(results.found))


if __name__ == "__main__":
    run(main, about=__doc__)
