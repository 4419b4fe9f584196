"""The plan of a job from its first batch to its last: found, calibrated, corrected and kept, all in one place.

A plan needs nothing but the weights and the schedule. What else it may know are the tokens: a long job draws a few of
its images in the mode `gated` first, chooses capacities by their usage and the fastest execution by a benchmark. Where
a batch overflows all the same, its usage is added. The plan is kept for later jobs with the same weights and settings,
but where the routers are a user's code, which may have changed by then.
"""

import dataclasses
import hashlib
import json
import logging

import jax
import numpy as np
from etils import epath

from dydit_jax.errors import InputError
from dydit_jax.fast.autotune import fastest_execution
from dydit_jax.fast.execution.registry import available_executions, find_execution
from dydit_jax.fast.plan import Plan
from dydit_jax.registry import is_built_in
from dydit_jax.runtime.cache import cache_folder
from dydit_jax.runtime.processes import from_main
from dydit_jax.runtime.progress import Progress
from dydit_jax.runtime.sharding import round_up
from dydit_jax.sampling.generate import Samples, SamplingRun
from dydit_jax.sampling.segment import microbatch_size

logger = logging.getLogger(__name__)

CALIBRATED_FROM_BATCHES = 4  # a job of fewer is over before calibration pays
# The more images calibrate, the fewer empty rows: a sixty-fourth of the job's, within these bounds.
CALIBRATED_PART, LEAST_CALIBRATED, MOST_CALIBRATED = 1 / 64, 8, 32


class JobPlan:
    """The plan of `fast` for one job.

    Attributes:
      plan: as it is now.
    """

    def __init__(self, run: SamplingRun, checksum: str, *, images: int, segments: int | None = None):
        """Make the plan, or find that of an earlier job with equally many segments, which may know more of the tokens.

        Args:
          run: what is sampled.
          checksum: of the weights.
          images: of the whole job.
          segments: into how many programs the schedule is cut; None takes the number that suits the job.

        Raises:
          InputError: a number of segments that the schedule does not have.
        """
        self.plan = run.plan(segments, images=images)
        self._run, self._path = run, _plan_path(run, checksum, self.plan)
        self.plan = self._load() or self.plan
        logger.info("Plan: %s.\n%s", self.plan.summary(), self.plan.table(run.table.timestep))

    def tune(self, labels, indices: np.ndarray, *, seed: int, batch: int) -> None:
        """Calibrate and choose the execution, if the job is long enough and no earlier one did.

        Args:
          labels: of all images of the job.
          indices: of those that it draws.
          seed: of the job.
          batch: images drawn at once.
        """
        packs = self._run.model.config.routers != "none" and not self.plan.whole
        if not packs or self.plan.usage is not None or -(-len(indices) // batch) < CALIBRATED_FROM_BATCHES:
            return
        most = max(LEAST_CALIBRATED, min(MOST_CALIBRATED, batch))
        count = np.clip(int(len(indices) * CALIBRATED_PART), LEAST_CALIBRATED, most)
        count = round_up(int(count), self._run.devices)
        few = indices[np.arange(count) % len(indices)]
        logger.info("Calibrating token capacities on %d images.", len(few))
        with Progress(len(self._run.table), "step", "calibrating") as progress:
            settings = dict(seed=seed, mode="gated", report=progress.advance)
            usage = self._run.draw(labels[few], indices=few, **settings).usage
        plan = self.plan.with_usage(usage.without_max_rows())
        self.plan = dataclasses.replace(plan, execution=self._fastest_execution(plan, batch))

    def observe(self, samples: Samples) -> None:
        """Correct the capacities after a batch that overflowed, where the next batch would pay for it as well."""
        if self._may_overflow:
            self._widen(samples)

    def keep(self, job: Samples) -> None:
        """Write the plan for later jobs, corrected by the record of the whole job."""
        if self._path is None:
            return
        if not self._may_overflow:  # other capacities are other programs: not before the job is over
            self._widen(job)
        try:
            self.plan.save(self._path)
        except InputError as error:
            logger.warning("The plan is not kept for the next job: %s", error)

    @property
    def _may_overflow(self) -> bool:
        return find_execution(self.plan.execution, self._run.model.platform).may_overflow

    def _widen(self, samples: Samples) -> None:
        if self.plan.usage is not None and samples.overflow_count.any():
            self.plan = self.plan.with_usage(samples.usage)

    def _fastest_execution(self, plan: Plan, batch: int) -> str:
        run = self._run
        evaluations = int(run.evaluations.max())
        images = microbatch_size(run.model, evaluations, -(-batch // run.devices))
        name = fastest_execution(run.model, run.params, plan, images=images, evaluations=evaluations)
        names = [execution.name for execution in available_executions(run.model, images * evaluations)]
        [number] = from_main([names.index(name)], len(names))  # other processes may have found another one
        return names[number]

    def _load(self) -> Plan | None:
        # Other processes may have kept another one, or none.
        if self._path is None or not self._path.exists() or jax.process_count() > 1:
            return None
        try:
            return Plan.load(self._path, self._run.model.config.macs)
        except Exception as error:  # whatever a damaged file makes of it
            logger.warning("Planned again: %s cannot be used (%s).", self._path, " ".join(str(error).split()))
            return None


def _plan_path(run: SamplingRun, checksum: str, plan: Plan) -> epath.Path | None:
    """Return where a plan is kept; None where that does not say all that it depends on, or for a whole plan."""
    if plan.whole or not all(map(is_built_in, run.model.routers.classes)):
        return None
    device = jax.devices()[0].device_kind
    settings = map(str, (run.model.config, run.sampling, run.process))
    described = json.dumps([checksum, device, len(plan.segments), run.table.timestep.tolist(), *settings])
    return epath.Path(cache_folder() / "plans" / f"{hashlib.sha256(described.encode()).hexdigest()}.npz")
