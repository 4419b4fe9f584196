"""A solver for one's own model: timesteps and weights fitted to a long trajectory of the same model.

The reference are images on their way from noise, drawn with DDIM in many steps. A solver with few evaluations makes the
next x of x and of its last estimates of x_0. Given its timesteps, the weights of each row are a linear regression:
they bring the training images as near as they can to where the reference is at the next timestep, from where the rows
before have brought them. The timesteps are found by moving one at a time. Noises that were not fitted decide which of
the solvers on the way is kept.

To fit a solver's few numbers to the model's own trajectories is the idea of https://arxiv.org/abs/2505.21114, which
does it by gradient descent.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from dydit_jax.diffusion import flow_grids, grids
from dydit_jax.diffusion.process import Process
from dydit_jax.diffusion.samplers import Sampler, SamplingConfig, run_sampler
from dydit_jax.diffusion.solvers import MOST_HISTORY, SolverForm, SolverTable
from dydit_jax.errors import InputError
from dydit_jax.models.dit import Model
from dydit_jax.runtime.seeds import seed_words
from dydit_jax.sampling.guidance import condition_scale, evaluations_of, guide
from dydit_jax.sampling.noise import first_noise, image_keys, uniform_labels
from dydit_jax.sampling.table import make_table

GRIDS = tuple(dict.fromkeys((*grids.GRIDS, *flow_grids.GRIDS)))
HISTORY = 4  # estimates that a row reads; more do not help
RIDGE = 1e-9  # of the mean square of what is regressed on
PIECES = 10  # programs of the reference, so that progress shows
ANY_FORM = SolverForm(history=MOST_HISTORY, base=True)  # of every deterministic solver, so that one program runs all
SHARES = (1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32)  # of the way to its neighbour that a timestep is moved


@dataclasses.dataclass(frozen=True)
class Teacher:
    """A model as it is sampled, on noises that are the same for all solvers.

    Attributes:
      model, params: the network.
      sampling: guidance and clipping; sampler and steps do not matter.
      process: that the model was trained on.
      steps: timesteps of the reference.
      seed: of the noises and their labels.
      batch_size: images at once, at most; changes the numbers by rounding alone.
    """

    model: Model
    params: dict
    sampling: SamplingConfig
    process: Process
    steps: str
    seed: int
    batch_size: int = 100

    @functools.cached_property
    def table(self) -> SolverTable:
        """DDIM on the reference's timesteps."""
        return self.tabulate(sampler="ddim", steps=self.steps, eta=0.0)

    def tabulate(self, **settings) -> SolverTable:
        """Return the table of a solver, with this guidance."""
        return make_table(dataclasses.replace(self.sampling, **settings), self.process)

    def noise(self, images) -> tuple[jax.Array, jax.Array]:
        """Return the noise [n,side,side,C] and the labels [n] of images by their numbers."""
        config = self.model.config
        shape = (config.side, config.side, config.channels)
        return _noise_and_labels(seed_words(self.seed), jnp.asarray(images), shape=shape, classes=config.classes)

    def batches(self, count: int) -> list[slice]:
        """Return the batches of so many images."""
        return [slice(first, first + self.batch_size) for first in range(0, count, self.batch_size)]

    def reference(self, images, report: Callable[[int], None]) -> np.ndarray:
        """Draw a batch and return where its images are at each timestep and in the end, float32 [S+1,n,side,side,C].

        Args:
          images: their numbers [n], at most `batch_size`.
          report: called with the number of steps done since its last call.
        """
        noise, labels = self.noise(images)
        sampler, visited = Sampler(self.table.form, self.sampling.clip), []
        state = sampler.init(noise)
        for rows in _alike(self.table):
            state, along = self._run(sampler, state, labels, rows)
            visited.append(np.asarray(along))
            report(len(rows))
        return np.concatenate([*visited, np.asarray(state.xt)[None]])

    def draw(self, table: SolverTable, images) -> np.ndarray:
        """Draw images by their numbers [n] with a deterministic solver, float32 [n,side,side,C]."""
        return np.concatenate([self._draw_batch(table, images[batch]) for batch in self.batches(len(images))])

    def estimate(self, x, labels, position: int) -> np.ndarray:
        """Return the estimates of x_0 for x [n,side,side,C] at a timestep of the reference, float32 of that shape."""
        parts = [(x[batch], labels[batch]) for batch in self.batches(len(x))]
        return np.concatenate([self._estimate_batch(*part, position) for part in parts])

    def _draw_batch(self, table: SolverTable, images) -> np.ndarray:
        noise, labels = self.noise(images)
        sampler, table = Sampler(ANY_FORM, self.sampling.clip), with_any_form(table)
        state = sampler.init(noise)
        for i in range(len(table)):
            state, _ = self._run(sampler, state, labels, _row(table, i))
        return np.asarray(state.xt)

    def _estimate_batch(self, x, labels, position: int) -> np.ndarray:
        sampler, row = Sampler(ANY_FORM, self.sampling.clip), _row(with_any_form(self.table), position)
        state, _ = self._run(sampler, sampler.init(jnp.float32(x)), labels, row)
        return np.asarray(state.x0)

    def _run(self, sampler: Sampler, state, labels, rows: SolverTable):
        evaluations = evaluations_of(self.model.config, rows.guidance).max().item()
        settings = dict(sampler=sampler, evaluations=evaluations, guided_channels=self.sampling.guided_channels)
        return _run_rows(self.params, state, labels, rows, model=self.model, **settings)


@functools.partial(jax.jit, static_argnames=("shape", "classes"))
def _noise_and_labels(seed, images, *, shape: tuple[int, ...], classes: int):
    return first_noise(image_keys(seed, images), shape), uniform_labels(seed, images, classes)


@functools.partial(jax.jit, static_argnames=("model", "sampler", "evaluations", "guided_channels"))
def _run_rows(params, state, labels, rows, *, model: Model, sampler: Sampler, evaluations: int, guided_channels: str):
    """Run rows of a table, at each of which the network runs `evaluations` times on an image."""

    def predict(x, row, _):
        beta = condition_scale(row.guidance, len(labels), config=model.config)
        network = functools.partial(model.apply, params, mode="gated", beta=beta)
        settings = dict(scale=row.guidance if evaluations == 2 else None, guided_channels=guided_channels)
        return guide(network, x, row.timestep, labels, **settings, config=model.config)[0], x

    return run_sampler(sampler, state, rows, predict=predict, noise_at=None)


def with_any_form(table: SolverTable) -> SolverTable:
    """Return a table with weights of 0 for the estimates that it does not read, up to the most that one can."""
    unread = ANY_FORM.history - table.form.history
    return dataclasses.replace(table, weights=np.pad(table.weights, ((0, 0), (0, 0), (0, unread))))


def _row(table: SolverTable, i: int) -> SolverTable:
    return jax.tree.map(lambda column: column[i : i + 1], table)


def _alike(table: SolverTable) -> list[SolverTable]:
    """Cut a table into pieces that are guided throughout or nowhere."""
    guided = table.guidance != 1.0
    size = max(1, len(table) // PIECES)
    cuts = sorted({*range(0, len(table), size), *(np.flatnonzero(np.diff(guided)) + 1).tolist(), len(table)})
    return [jax.tree.map(lambda column, a=a, b=b: column[a:b], table) for a, b in zip(cuts, cuts[1:])]


# --- Fitting -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Reached:
    """Where a fitted solver has brought the training images.

    Attributes:
      x: at the timestep reached, float64 [n,side,side,C].
      estimates: of x_0 at the timesteps before, the newest first, at most `HISTORY`.
      weights: of the rows so far: of x, then of the estimates.
    """

    x: np.ndarray
    estimates: tuple = ()
    weights: tuple = ()


class Fit:
    """Weights for any timesteps of the reference, by one regression after the other.

    Timesteps are given as positions in the reference, 0 for its noisiest. What the first rows of two solvers have in
    common is computed once.
    """

    def __init__(self, teacher: Teacher, reference: np.ndarray):
        """Take the training images: those with the first numbers.

        Args:
          teacher: the model.
          reference: of these images, from `Teacher.reference`.
        """
        self._teacher, self._reference = teacher, reference
        self._labels = teacher.noise(np.arange(reference.shape[1]))[1]
        self._reach = functools.lru_cache(maxsize=64)(self._fit_last)
        self._evaluate = functools.lru_cache(maxsize=64)(self._estimate_last)

    def weights(self, positions: tuple[int, ...]) -> tuple[tuple[float, ...], ...]:
        """Return the rows of weights of the solver with these timesteps."""
        return self._reach((*positions, len(self._reference) - 1)).weights

    def error(self, positions: tuple[int, ...]) -> float:
        """Return how far its images are from the reference: of each the root mean square, on average.

        A few noises lie where the trajectories part. In a mean of squares they would outweigh all others.
        """
        reached = self._reach((*positions, len(self._reference) - 1))
        squares = np.square(reached.x - self._reference[-1])
        return float(np.sqrt(squares.mean((1, 2, 3))).mean())

    def _estimate_last(self, positions: tuple[int, ...]) -> tuple:
        """Return the estimates with the one at the last of the positions."""
        reached = self._reach(positions)
        newest = self._teacher.estimate(reached.x, self._labels, positions[-1])
        return (newest, *reached.estimates)[:HISTORY]

    def _fit_last(self, positions: tuple[int, ...]) -> Reached:
        """Fit the row that leads to the last of the positions."""
        if len(positions) == 1:
            return Reached(self._reference[0].astype(np.float64))
        before, estimates = self._reach(positions[:-1]), self._evaluate(positions[:-1])
        columns = np.stack([part.ravel() for part in (before.x, *estimates)], axis=-1).astype(np.float64)
        squares, wanted = columns.T @ columns, columns.T @ self._reference[positions[-1]].ravel().astype(np.float64)
        weights = np.linalg.solve(squares + RIDGE * np.trace(squares) / len(squares) * np.eye(len(squares)), wanted)
        x = (columns @ weights).reshape(before.x.shape)
        return Reached(x, estimates, (*before.weights, tuple(weights.tolist())))


# --- Searching -----------------------------------------------------------------------------------


def first_positions(teacher: Teacher, evaluations: int) -> list[tuple[int, ...]]:
    """Return the positions of each named grid in the reference; all begin with the noise that it began with."""
    kept, found = teacher.table.timestep, []
    for grid in GRIDS:
        try:
            timesteps = teacher.tabulate(sampler="ddim", steps=f"{grid}:{evaluations}", eta=0.0).timestep
        except InputError:  # a grid of another process
            continue
        nearest = np.abs(kept[None] - timesteps[:, None]).argmin(1)
        nearest[0] = 0
        index = np.arange(evaluations)
        lowest = np.maximum.accumulate(nearest - index) + index  # distinct
        found.append(tuple(np.minimum(lowest, len(kept) - evaluations + index).tolist()))
    return list(dict.fromkeys(found))


def moves(positions: tuple[int, ...], total: int, share: float, i: int) -> list[tuple[int, ...]]:
    """Return the positions with the i-th moved by a share of the way to its neighbours, of `total` positions."""
    before, now, after = positions[i - 1], positions[i], positions[i + 1] if i + 1 < len(positions) else total
    places = [now + math.floor(share * (after - now)), now - math.floor(share * (now - before))]
    return [(*positions[:i], place, *positions[i + 1 :]) for place in places if before < place < after and place != now]


def search(start: list, total: int, *, error: Callable, accept: Callable, report: Callable[[int], None]) -> None:
    """Find positions with a small error: take the best start, then move one after the other, by less and less.

    Args:
      start: positions to choose from.
      total: positions that there are.
      error: positions -> what is to be small.
      accept: called with the positions of the start and of every improvement.
      report: called with the number of moves done since its last call, of `number_of_moves`.
    """
    best = min(start, key=error)
    accept(best)
    for share in SHARES:
        for i in reversed(range(1, len(best))):
            for moved in moves(best, total, share, i):
                if error(moved) < error(best):
                    best = moved
                    accept(best)
                    break
            report(1)


def number_of_moves(evaluations: int) -> int:
    """Return how often `search` reports at most."""
    return len(SHARES) * (evaluations - 1)
