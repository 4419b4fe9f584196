"""The steps of a run, and what it keeps of them: reports, checkpoints, pictures and scores, each when it is due."""

import dataclasses
import functools
import logging
from collections.abc import Iterator

import jax
from etils import epath
from jax.sharding import Mesh

from dydit_jax.checkpoints import Run
from dydit_jax.data.batches import batches
from dydit_jax.data.sources import DataConfig, DataSource
from dydit_jax.jobs.ema import draw_samples, measure_ema, place_examples
from dydit_jax.jobs.endings import checkpoint_named, require_finite, require_progress, stopped_at
from dydit_jax.jobs.judging import Judge
from dydit_jax.loading import load_decoder
from dydit_jax.models.dit import Model
from dydit_jax.runtime.peaks import best_case, flops_utilisation
from dydit_jax.runtime.processes import PreemptionNotice, is_main
from dydit_jax.runtime.sharding import batch_sharding, process_rows, replicated
from dydit_jax.runtime.tracking import Clock, Profile, StallWatchdog, duration
from dydit_jax.runtime.writers import Writers, open_writers
from dydit_jax.training.experiment import Experiment, build_update
from dydit_jax.training.objective import passes_at
from dydit_jax.training.update import TrainState, all_finite, batch_shapes, compile_update

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Parts:
    """What a run works with; `about` is kept with every checkpoint, and without metrics there is no judge."""

    run: Run
    workdir: epath.Path
    model: Model
    experiment: Experiment
    mesh: Mesh
    data: DataSource
    about: dict
    judge: Judge | None


def run_steps(state: TrainState, parts: Parts) -> TrainState:
    """Step to the end, and keep of the steps what is due.

    Args:
      state: the first one, or that of a checkpoint.
      parts: what the run works with.

    Raises:
      StopError: asked to leave, too many bad batches in a row, or a checkpoint that can't be written.
    """
    experiment, mesh, step = parts.experiment, parts.mesh, int(state.step)
    last, tracking = experiment.train.steps, experiment.tracking
    shapes = jax.eval_shape(lambda state: state, state), batch_shapes(parts.model.config, experiment.data.batch_size)
    update_of = functools.partial(build_update, experiment, parts.model)
    compiled = functools.cache(lambda passes: compile_update(update_of(passes), *shapes, mesh))
    passes = functools.partial(passes_at, model=experiment.model, loss=experiment.loss)
    source, notice = _placed_batches(parts.data, experiment.data, mesh, start=step), PreemptionNotice()
    records = Records(parts, step, notice)
    if step < last:
        records.require_finite(step, state)
        logger.info("Compiling a step.")
        compiled(passes(step))  # before the clock starts
        _log_time_estimate(step, parts.model, experiment)
    clock, profile, watch = Clock(step, last), Profile(tracking.profile, parts.workdir), records.watch
    with records.writers, profile, watch, notice:
        records.judge_first(step, state)
        while step < last:
            profile.at(step)
            watch.now(f"the batch of step {step + 1}")
            with checkpoint_named(parts.run, parts.workdir):
                batch = next(source)
            watch.now(f"step {step + 1}")
            state, metrics = compiled(passes(step))(state, batch)
            step += 1
            if step % tracking.every_steps == 0 or step == last:
                records.report(step, metrics, clock)
                profile.look(step)
            leaving = notice.came()
            records.save(step, state, leaving=leaving)
            if leaving:
                raise stopped_at(step)
            records.draw(step, state)
            records.judge(step, state)
        watch.now("the last checkpoint")
        parts.run.wait()
    return state


class Records:
    """What a run keeps of its steps.

    Args:
      parts: what the run works with.
      step: the one that it starts from.
      notice: to leave, which is also heard while images are judged.
    """

    def __init__(self, parts: Parts, step: int, notice: PreemptionNotice):
        experiment, mesh = parts.experiment, parts.mesh
        settings = dataclasses.asdict(experiment)
        self.watch = StallWatchdog(experiment.tracking.stall_seconds)
        self.writers = Writers([])
        if is_main():
            self.writers = open_writers(experiment.tracking, parts.workdir, step, settings)
        self._parts, self._notice = parts, notice
        self._all_finite = jax.jit(all_finite, out_shardings=replicated(mesh))
        if experiment.tracking.samples_every_steps:
            # An autoencoder that is not there must not end the run days later.
            self._shown = place_examples(parts.data, experiment, mesh)
            self._decode = load_decoder(experiment.sampling.autoencoder, parts.model.config.channels, mesh)

    def require_finite(self, step: int, state: TrainState) -> None:
        """Stop before a state with a value that is not a number is trained or saved."""
        require_finite(self._all_finite, step, state, self._parts.workdir)

    def report(self, step: int, metrics: dict, clock: Clock) -> None:
        """Write the metrics of a step and one line for people; stop a run that gets nowhere."""
        parts = self._parts
        self.watch.now(f"the results of step {step}")
        metrics = {name: float(value) for name, value in jax.device_get(metrics).items()}
        pace, seconds_left = clock.read(step)
        metrics["time/steps_per_second"] = pace
        macs = _step_macs(step - 1, parts.model, parts.experiment)
        utilisation = flops_utilisation(macs * pace, parts.model.dtype)
        if utilisation is not None:
            metrics["time/mfu"] = utilisation
        with checkpoint_named(parts.run, parts.workdir):
            self.writers.write(step, metrics)
            if is_main():
                logger.info(_line(step, parts.experiment.train.steps, metrics, seconds_left))
        require_progress(step, metrics, parts.run, parts.experiment)

    def save(self, step: int, state: TrainState, *, leaving: bool) -> None:
        """Save a checkpoint if one is due, or the run is `leaving`; then wait until it is written."""
        parts = self._parts
        self.watch.now(f"the checkpoint of step {step}")
        every, last = parts.experiment.checkpoint.every_steps, parts.experiment.train.steps
        if step % every == 0 or step == last or leaving or self._judges(step):
            self.require_finite(step, state)
            parts.run.save(step, checkpoint_items(state), parts.about)
        if leaving:
            parts.run.wait()

    def draw(self, step: int, state: TrainState) -> None:
        """Draw images with the EMA, and measure its loss, if that is due."""
        parts, every = self._parts, self._parts.experiment.tracking.samples_every_steps
        if not every or step % every != 0:
            return
        self.watch.now(f"the samples of step {step}")
        settings = parts.workdir, parts.model, parts.experiment, parts.mesh
        with checkpoint_named(parts.run, parts.workdir):
            grid, seen = draw_samples(step, state, *settings, self._decode)
            self.writers.draw(step, grid)
            self.writers.write(step, seen | measure_ema(state, parts.model, parts.experiment, self._shown))

    def judge_first(self, step: int, state: TrainState) -> None:
        """Open the judge, and judge the step that the run was stopped at before it had been judged."""
        parts = self._parts
        if parts.judge is not None:
            with checkpoint_named(parts.run, parts.workdir):
                parts.judge.open(parts.workdir, parts.run, step)
            self.judge(step, state)

    def judge(self, step: int, state: TrainState) -> None:
        """Measure the EMA's images if that is due; its checkpoint, which may be the best, must be there by then.

        Raises:
          StopError: asked to leave meanwhile; the run that goes on measures them.
        """
        parts = self._parts

        def moved(awaited: str) -> None:
            self.watch.now(awaited)
            if self._notice.came():
                raise stopped_at(step)

        if self._judges(step):
            parts.run.wait()
            with checkpoint_named(parts.run, parts.workdir):
                self.watch.now(f"the metrics of step {step}")
                self.writers.write(step, parts.judge.measure(step, state, moved))

    def _judges(self, step: int) -> bool:
        return self._parts.judge is not None and self._parts.judge.is_due(step)


def _line(step: int, last: int, metrics: dict, seconds_left: float) -> str:
    """Return what people read about a step."""
    parts = [f"step {step}/{last}", f"loss {metrics['loss/total']:.4f}"]
    if "cost/ratio" in metrics:
        parts.append(f"ratio {metrics['cost/ratio']:.3f} (target {metrics['cost/target']:.3f})")
    if metrics["optimizer/skipped_batches"]:
        parts.append(f"skipped {metrics['optimizer/skipped_batches']:.0f}")
    parts.append(f"{metrics['time/steps_per_second']:.1f} steps/s")
    if "time/mfu" in metrics:
        parts.append(f"MFU {100 * metrics['time/mfu']:.0f} %")
    return "  ".join([*parts, f"{duration(seconds_left)} left"])


def checkpoint_items(state: TrainState) -> dict:
    """Split a state into what a checkpoint stores under separate names, so that the EMA can be read alone."""
    rest = {name: leaf for name, leaf in vars(state).items() if name not in ("params", "ema", "frozen")}
    return dict(params=state.params, ema=state.ema, rest=rest)


def _placed_batches(data: DataSource, config: DataConfig, mesh: Mesh, *, start: int) -> Iterator[dict]:
    """Iterate over the batches from a step on, split over the devices of all processes."""
    sharding, size = batch_sharding(mesh), config.batch_size
    place = lambda leaf: jax.make_array_from_process_local_data(sharding, leaf, (size, *leaf.shape[1:]))
    for batch in batches(data, config, start=start, rows=process_rows(mesh, size)):
        yield jax.tree.map(place, batch)


def _step_macs(step: int, model: Model, experiment: Experiment) -> float:
    """Return the MACs of a step's forward passes: what counts as use of the chips, with every gate open."""
    passes = passes_at(step, model=experiment.model, loss=experiment.loss)
    return len(passes) * experiment.data.batch_size * model.config.macs.complete


def _log_time_estimate(step: int, model: Model, experiment: Experiment) -> None:
    """Say before the first step how long the run takes at least, where the chips' peak is known."""
    found = best_case(_step_macs(step, model, experiment), model.dtype, model.remat)
    if found is not None and is_main():
        seconds, utilisation = found
        logger.info(
            "At the chips' peak a step takes %.3f s, the %d steps to go %s; MFU at most %.0f %%.",
            *(seconds, experiment.train.steps - step, duration(seconds * (experiment.train.steps - step))),
            100 * utilisation,
        )
