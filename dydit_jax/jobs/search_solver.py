"""The job behind `dydit-search-solver`: a solver with few evaluations that fits one model, in a small file.

    <out>/solver.json         the solver, for --sampling.sampler, and what was measured on the way
    <out>/job.json            the request, so that another one is not continued
    <out>/measured.json       errors found so far
    <out>/reference-000.npy   the long trajectories, while the job runs
    <out>/lock.json           who searches here now (`runtime/locks.py`)

Everything that takes long is kept as soon as it is known, and found again by a job that was killed: it ends with the
same solver. How the search goes is said in `sampling/search.py`.
"""

import dataclasses
import itertools
import json
import logging
from collections.abc import Callable

import numpy as np
from etils import epath

from dydit_jax.checkpoints import Weights, checksum
from dydit_jax.diffusion.process import process_sections
from dydit_jax.diffusion.samplers import SEARCHED
from dydit_jax.diffusion.solvers import SOLVERS, SolverTable
from dydit_jax.errors import InputError, StopError
from dydit_jax.loading import load_checkpoint
from dydit_jax.models.dit import Model
from dydit_jax.models.precision import resolve_precision
from dydit_jax.records import require_range
from dydit_jax.runtime.files import locate, read_json, write_atomically, write_json
from dydit_jax.runtime.locks import FolderLock, claim_folder
from dydit_jax.runtime.origin import origin
from dydit_jax.runtime.progress import Progress, counted
from dydit_jax.runtime.seeds import require_seed
from dydit_jax.runtime.settings import own_settings
from dydit_jax.sampling.guidance import require_trained
from dydit_jax.sampling.search import GRIDS, Fit, Teacher, first_positions, number_of_moves, search
from dydit_jax.sampling.searched import FORMAT, fitted_to, listed
from dydit_jax.sampling.settings import choose_sampling
from dydit_jax.sampling.table import warn_of_unlearnt_times

logger = logging.getLogger(__name__)

SOLVER_FILE, JOB_FILE, MEASURED_FILE = "solver.json", "job.json", "measured.json"
LEAST_EVALUATIONS, MOST_EVALUATIONS = 3, 50
MOST_NOISES = 10_000
FAILURE = "failure"  # the journal's name for why there is no solver
CHOSEN_HERE = ("sampler", "steps", "eta", "guidance_scales", "preset")


@dataclasses.dataclass(frozen=True)
class SearchRequest:
    """What a user asks of `dydit-search-solver`.

    Attributes:
      checkpoint: a .safetensors file, a folder with one, a training's work directory, or a known name such as digits.
      out: folder for the solver: new, empty, or of the same job, which goes on.
      evaluations: of the network, 3 to 50.
      train_noises: images that the solver is fitted to.
      held_out_noises: others, which decide what is kept.
      reference: timesteps of the long trajectory, such as 1000 or ddim100; the solver's are among them.
      batch_size: images at once; changes the solver by rounding alone.
      seed: of noises and labels.
      precision: auto, bfloat16, float32 or highest.
      overrides: guidance and clipping, which win over the checkpoint's.
    """

    checkpoint: str
    out: str
    evaluations: int = 10
    train_noises: int = 200
    held_out_noises: int = 100
    reference: str = "1000"
    batch_size: int = 100
    seed: int = 0
    precision: str = "auto"
    overrides: dict = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        require_range("--evaluations", self.evaluations, low=LEAST_EVALUATIONS, high=MOST_EVALUATIONS)
        for name in ("train_noises", "held_out_noises", "batch_size"):
            require_range(f"--{name}", getattr(self, name), low=1, high=MOST_NOISES)
        require_seed("--seed", self.seed)
        chosen = [name for name in CHOSEN_HERE if name in self.overrides]
        if chosen:
            raise InputError(f"sampling.{chosen[0]} is what this command finds, or can't depend on; leave it out.")
        if not self.out:
            raise InputError("--out is empty; name a folder.")


class Journal:
    """What was measured, by name, kept in a file at once.

    Args:
      path: of the file.
      lock: of its folder, asked for before every save.
    """

    def __init__(self, path, lock: FolderLock):
        self._path, self._lock = epath.Path(path), lock
        self._known = read_json(self._path) if self._path.is_file() else {}

    @property
    def failure(self) -> str:
        """Why the search ended without a solver; "" where it did not."""
        return self._known.get(FAILURE, "")

    def recall(self, name: str, measure: Callable):
        """Return what was measured before under a name, or measure and keep it."""
        if name not in self._known:
            self._known[name] = measure()
            self._lock.require_held()
            write_json(self._path, self._known)
        return self._known[name]


@own_settings()
def search_solver(request: SearchRequest) -> dict:
    """Carry out a request, or what is left of it.

    Returns:
      What `solver.json` holds.

    Raises:
      InputError: a checkpoint or settings that can't be used, or a folder of another job or in use.
      StopError: no fit is better than the best built-in solver.
    """
    weights = load_checkpoint(request.checkpoint)
    own = checksum(weights.params)
    sampling = choose_sampling(weights.sampling, request.overrides, process=weights.process, checksum=lambda: own)
    if sampling.guidance_scales is not None:
        raise InputError(
            f"{request.checkpoint} has sampling.guidance_scales, a scale for each evaluation of its own solver; a "
            "search needs one for all evaluations: give sampling.guidance."
        )
    sampling = dataclasses.replace(sampling, sampler="ddim", eta=0.0, searched_weights=None)
    require_trained(weights.about.get("config", {}), sampling, classes=weights.model.classes)
    dtype, matmul_precision = resolve_precision(request.precision)
    model = Model(weights.model, dtype, matmul_precision, lora=weights.lora)
    settings = dict(steps=request.reference, seed=request.seed, batch_size=request.batch_size)
    teacher = Teacher(model, weights.params, sampling, weights.process, **settings)
    warn_of_unlearnt_times(weights.about.get("config", {}), teacher.table)
    if len(teacher.table) < 2 * request.evaluations:
        raise InputError(
            f"--reference={request.reference} has too few timesteps for {request.evaluations} evaluations."
        )
    out, about = locate(request.out), _about(request, weights, own, teacher)
    with claim_folder(out, JOB_FILE) as lock:
        _begin(out, about | dict(batch_size=request.batch_size))
        if (out / SOLVER_FILE).is_file():
            logger.info("%s is complete.", out)
            return read_json(out / SOLVER_FILE)
        found = _find_solver(request, teacher, out, Journal(out / MEASURED_FILE, lock))
        solver = about | found | dict(made=origin())
        lock.require_held()
        write_json(out / SOLVER_FILE, solver)
        _remove_reference(out)
    _log_summary(solver, out)
    return solver


def _about(request: SearchRequest, weights: Weights, own: str, teacher: Teacher) -> dict:
    """Return what the solver is for and what it was fitted to."""
    return dict(
        format=FORMAT,
        checksum=own,
        process=process_sections(weights.process),
        evaluations=request.evaluations,
        sampling=fitted_to(teacher.sampling),
        reference=request.reference,
        noises=dict(train=request.train_noises, held_out=request.held_out_noises, seed=request.seed),
        precision=teacher.model.dtype.name,
    )


def _begin(out, job: dict) -> None:
    """Say whose folder it is, or find it with the same job."""
    job = json.loads(json.dumps(job))  # as it reads when it comes back
    if (out / JOB_FILE).is_file():
        found = read_json(out / JOB_FILE)
        changed = [key for key in sorted(job | found) if found.get(key) != job.get(key)]
        if changed:
            raise InputError(f"{out} holds another search ({', '.join(changed)} differ); name another --out.")
    write_json(out / JOB_FILE, job)


def _find_solver(request: SearchRequest, teacher: Teacher, out, journal: Journal) -> dict:
    """Return the solver and what was measured; a search that ended without one is not repeated.

    Raises:
      StopError: no fit is better than the best built-in solver.
    """
    if not journal.failure:
        reference = _reference(request, teacher, out)
        try:
            return _search(request, teacher, reference, journal)
        except StopError as error:
            reason = str(error)
            journal.recall(FAILURE, lambda: reason)
    _remove_reference(out)
    raise StopError(journal.failure)


def _remove_reference(out) -> None:
    """Remove the long trajectories, which may take gigabytes."""
    for path in out.glob("reference-*.npy"):
        path.unlink()


def _reference(request: SearchRequest, teacher: Teacher, out) -> np.ndarray:
    """Draw the long trajectories of all noises, or find them, float32 [S+1,n,side,side,C]."""
    images, steps = np.arange(request.train_noises + request.held_out_noises), len(teacher.table)
    batches = teacher.batches(len(images))
    paths = [out / f"reference-{number:03d}.npy" for number in range(len(batches))]
    done = sum(path.is_file() for path in paths)
    with Progress(steps * len(batches), "step", "reference", done=steps * done) as progress:
        for path, batch in zip(paths, batches):
            if not path.is_file():
                states = teacher.reference(images[batch], progress.advance)
                with write_atomically(path) as partial, partial.open("wb") as file:
                    np.save(file, states)
    return np.concatenate([np.load(path) for path in paths], axis=1)


# --- The search ----------------------------------------------------------------------------------


def _search(request: SearchRequest, teacher: Teacher, reference: np.ndarray, journal: Journal) -> dict:
    """Return the solver and what was measured."""
    kept = teacher.table.timestep
    train = np.arange(request.train_noises)
    held_out = request.train_noises + np.arange(request.held_out_noises)

    def error(table: SolverTable, images) -> float:
        return float(np.sqrt(np.mean(np.square(teacher.draw(table, images) - reference[-1][images]))))

    def measure(table: SolverTable) -> dict:
        return dict(train=error(table, train), held_out=error(table, held_out))

    built_in = _built_in(teacher, request.evaluations)
    for name in counted(built_in, len(built_in), "solver", "built-in solvers"):
        built_in[name] |= journal.recall(name, lambda name=name: measure(teacher.tabulate(**built_in[name])))
    fit = Fit(teacher, reference[:, train])
    steps = lambda positions: [kept[position].item() for position in positions]
    accepted = []

    def fit_error(positions) -> float:
        name = " ".join(map(str, ["fit", *steps(positions)]))
        return journal.recall(name, lambda: fit.error(positions))

    def accept(positions) -> None:
        found = dict(timesteps=steps(positions), weights=[list(row) for row in fit.weights(positions)])
        name = " ".join(map(str, ["accepted", *found["timesteps"]]))
        accepted.append(found | journal.recall(name, lambda: measure(_tabulate(teacher, found))))

    with Progress(number_of_moves(request.evaluations), "move", "searching") as progress:
        start = first_positions(teacher, request.evaluations)
        search(start, len(kept), error=fit_error, accept=accept, report=progress.advance)
    return _result(built_in, accepted)


def _built_in(teacher: Teacher, evaluations: int) -> dict[str, dict]:
    """Return the settings of every solver on every named grid, with at most so many evaluations.

    Those that add noise end elsewhere than the reference, and are left out.
    """
    found = {}
    for solver, grid in itertools.product(SOLVERS, GRIDS):
        for steps in (evaluations, (evaluations + 1) // 2):  # the second where a step is two evaluations
            settings = dict(sampler=solver, steps=f"{grid}:{steps}", eta=0.0)
            try:
                table = teacher.tabulate(**settings)
            except InputError:  # too few steps for this solver, or not for this process
                continue
            if len(table) <= evaluations:
                if table.form.noise == "none":
                    found[f"{solver} {grid}:{steps}"] = settings
                break
    return found


def _tabulate(teacher: Teacher, found: dict) -> SolverTable:
    """Return the table of a fitted solver."""
    weights = tuple(map(tuple, found["weights"]))
    return teacher.tabulate(sampler=SEARCHED, steps=listed(found["timesteps"]), searched_weights=weights)


def _result(built_in: dict, accepted: list[dict]) -> dict:
    """Return what the held-out noises choose: a fitted solver, or the best built-in one on the training noises."""
    best = min(built_in, key=lambda name: built_in[name]["train"])
    chosen = min(range(len(accepted)), key=lambda i: accepted[i]["held_out"])
    kept, found = f"fit {chosen + 1} of {len(accepted)}", accepted[chosen]
    before = built_in[best]
    if before["held_out"] <= found["held_out"]:
        raise StopError(
            f"No fit is better than {before['sampler']} with {before['steps']} on the held-out noises "
            f"({found['held_out']:.4g}, {before['held_out']:.4g}); take that, or give more --train_noises and another "
            "--out."
        )
    errors = {name: row["held_out"] for name, row in built_in.items()}
    return dict(
        timesteps=found["timesteps"],
        weights=found["weights"],
        kept=kept,
        error=found["held_out"],
        train_error=found["train"],
        start=dict(name=best, error=before["held_out"], train_error=before["train"]),
        errors_of_built_in=dict(sorted(errors.items(), key=lambda item: item[1])),
    )


def _log_summary(solver: dict, out) -> None:
    name, error = next(iter(solver["errors_of_built_in"].items()))
    logger.info(
        "On the held-out noises the error is %.4g, %.2f of the best built-in solver's (%s, %.4g); kept: %s.",
        *(solver["error"], solver["error"] / error, name, error, solver["kept"]),
    )
    logger.info("Wrote %s: use --sampling.sampler=%s", out / SOLVER_FILE, out / SOLVER_FILE)
