"""Solvers: ways from noise to images, each a table of numbers with one row per evaluation of the network.

On a path x_t = alpha x_0 + sigma noise, every solver here is linear in a small state: x, where the network is
evaluated next; base, where a step of several evaluations began; and the estimates m_1 .. m_K of the last K
evaluations, the newest first. An estimate is x_0, the noise or the velocity, as the solver wants it. A rule is written
once, as formulas on unit vectors (x, base, [m_1 .. m_K]), in float64 on the host; what comes out are the weights. One
compiled step then runs every table (`samplers.py`).

Multistep solvers have no history at first: they begin with order 1 and rise by one with each evaluation, as in their
papers. A step that ends in the image itself, where the log-SNR is infinite, is one of order 1; UniPC also comes down
by one order at a time before it. So is one from pure noise, where it is infinite too, and that estimate is not used
again.

Sources: DDPM, https://arxiv.org/abs/2006.11239; learned variance, https://arxiv.org/abs/2102.09672; DDIM,
https://arxiv.org/abs/2010.02502, equations 12 and 16; DPM-Solver++, https://arxiv.org/abs/2211.01095; UniPC,
https://arxiv.org/abs/2302.04867; Heun's method as in https://arxiv.org/abs/2206.00364, without added noise; the
stochastic equation of a flow, SiT, https://arxiv.org/abs/2401.08740.
"""

import dataclasses
import typing
from collections.abc import Callable, Iterable

import jax
import numpy as np

from dydit_jax.diffusion.paths import Path
from dydit_jax.errors import InputError
from dydit_jax.registry import Registry

X0_ESTIMATE = (0.0, 1.0)
MOST_HISTORY = 8  # estimates that a rule can use


@dataclasses.dataclass(frozen=True)
class Row:
    """What is made of one evaluation of the network.

    Attributes:
      time: at which the network is evaluated, an index into the path.
      x: weights of the next x in (x, base, m_1 .. m_K).
      base: weights of the next base, None where the solver keeps none.
      estimate: (p, q) of m_1 = p x + q x_0, with x_0 after clipping; None for the network's own output.
      noise: standard deviation of what is added at random.
      learned_range: that deviation is multiplied by exp(learned_range * share), where the share, about 0 .. 1, is the
        network's own. Learned variances lie between two bounds.
    """

    time: int
    x: np.ndarray
    base: np.ndarray | None = None
    estimate: tuple[float, float] | None = X0_ESTIMATE
    noise: float = 0.0
    learned_range: float = 0.0


class Solver(typing.Protocol):
    """A rule that makes rows."""

    def __call__(self, path: Path, x, base, m: list) -> Iterable[Row]:
        """Return a row for each evaluation of the network, of weights made of x, base and m.

        Args:
          path: the times.
          x, base, m: unit vectors of the state, m[0] for the newest of `MOST_HISTORY` estimates. A formula that is
            linear in them is its own weights.

        Raises:
          InputError: too few steps, from `Path.require_steps`.
        """
        ...


# --- Tables --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class SolverForm:
    """What a table needs of the compiled step, so that it computes and keeps nothing else.

    Attributes:
      history: K.
      base: whether a base is kept.
      noise: "none", "fixed" or "learned".
    """

    history: int = 1
    base: bool = False
    noise: str = "none"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SolverTable:
    """One row per evaluation of the network, in the order of the run; float32 but for the first two, [S] but for one.

    Attributes:
      step: counts down to 0 in the last row; with an image's key it fixes the noise that is added, int32.
      timestep: the number that the network gets: an int32 of diffusion, a float32 of a flow.
      guidance: scale of classifier-free guidance; 1 is none.
      x0_from_xt, x0_from_output: x_0 = x0_from_xt x_t - x0_from_output output.
      estimate_from_x0: (p, q) of m_1 = p x_t + q x_0 [S,2], for an x_0 that was clipped.
      estimate_from_output: weights of x_t and the network's output in the same m_1, where nothing was clipped [S,2]: an
        estimate of what it predicts is then its own, to the last digit.
      weights: of the next x and base in (x, base, m_1 .. m_K) [S,2,2+K].
      noise, learned_range: see `Row`.
    """

    step: jax.Array
    timestep: jax.Array
    guidance: jax.Array
    x0_from_xt: jax.Array
    x0_from_output: jax.Array
    estimate_from_x0: jax.Array
    estimate_from_output: jax.Array
    weights: jax.Array
    noise: jax.Array
    learned_range: jax.Array

    def __len__(self) -> int:
        return len(self.step)

    @property
    def form(self) -> SolverForm:
        """What the table needs, read from its numbers."""
        noise = "learned" if self.learned_range.any() else "fixed" if self.noise.any() else "none"
        return SolverForm(self.weights.shape[-1] - 2, bool(self.weights[:, :, 1].any()), noise)


def solver_table(name: str, path: Path, timesteps) -> SolverTable:
    """Tabulate a solver, without guidance.

    Args:
      name: a key of `SOLVERS`.
      path: of n steps.
      timesteps: that the network gets at the times of the path, [n] or [n+1], int32 or float32.

    Raises:
      InputError: fewer steps than the solver needs, or a rule whose rows can't be used.
    """
    x, base, *estimates = np.eye(2 + MOST_HISTORY)
    rows = list(SOLVERS[name](path, x, base, estimates))
    if not rows:
        raise InputError(f"The solver {name} returned no rows; it must return one for each evaluation of the network.")
    weights = np.array([(row.x, np.zeros_like(x) if row.base is None else row.base) for row in rows])  # [S,2,2+K]
    column = lambda field: np.array([getattr(row, field) for row in rows])
    times = column("time")
    x0_from_xt, x0_from_output = (column_of_path[times] for column_of_path in path.x0_from_output)
    from_x0, from_output = _estimates(rows, x0_from_xt, x0_from_output)
    table = SolverTable(
        step=np.arange(len(rows), dtype=np.int32)[::-1],
        timestep=np.asarray(timesteps)[times],
        guidance=np.ones(len(rows), np.float32),
        x0_from_xt=x0_from_xt,
        x0_from_output=x0_from_output,
        estimate_from_x0=from_x0,
        estimate_from_output=from_output,
        weights=_without_unused_history(weights),
        noise=column("noise"),
        learned_range=column("learned_range"),
    )
    table = jax.tree.map(lambda values: values if values.dtype == np.int32 else values.astype(np.float32), table)
    if not all(np.isfinite(values).all() for values in jax.tree.leaves(table)):
        raise InputError(f"The solver {name} has weights that are not finite on these timesteps; take others.")
    return table


def _estimates(rows: list[Row], x0_from_xt: np.ndarray, x0_from_output: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the weights of m_1 in (x_t, x_0) and in (x_t, output), [S,2] each.

    The network's own output at the image itself says nothing of x_0: there the first are 0.
    """
    from_x0, from_output = np.zeros((2, len(rows), 2))
    for i, (row, a, b) in enumerate(zip(rows, x0_from_xt, x0_from_output)):
        if row.estimate is not None:
            p, q = row.estimate
            from_x0[i], from_output[i] = (p, q), (p + q * a, -q * b)
        else:
            from_x0[i], from_output[i] = (a / b, -1 / b) if b else (0.0, 0.0), (0.0, 1.0)
    return from_x0, from_output


def _without_unused_history(weights: np.ndarray) -> np.ndarray:
    """Return the weights without the columns of old estimates that no row reads; one estimate stays."""
    used = np.flatnonzero(weights[:, :, 2:].any((0, 1)))
    return weights[:, :, : 3 + (used.max() if used.size else 0)]


# --- The solvers ---------------------------------------------------------------------------------


def _ddpm(path: Path, x, base, m):
    """Ancestral sampling with the learned variance, equation 7 of DDPM and equation 15 of Improved DDPM."""
    kept = path.alpha**2
    for i in range(path.steps):
        left = kept[i] / kept[i + 1]  # of the signal's variance, in this step
        share = (1 - left) / path.sigma[i] ** 2
        mean = path.alpha[i + 1] * share * m[0] + np.sqrt(left) * (path.sigma[i + 1] / path.sigma[i]) ** 2 * x
        if path.ends_in_image(i):  # on the mean: there is no x_{-1} to be uncertain of
            yield Row(i, mean)
        else:  # the log-variance is between those of the posterior and of the step itself
            low, high = np.sqrt(share) * path.sigma[i + 1], np.sqrt(1 - left)
            yield Row(i, mean, noise=low, learned_range=np.log(high / low))


def _ddim(path: Path, x, base, m):
    """Implicit sampling: deterministic at eta 0, DDPM's posterior noise at eta 1."""
    for i in range(path.steps):
        left = (path.alpha[i] / path.alpha[i + 1]) ** 2
        # That of x_{i+1} given x_i and x_0; with alpha^2 + sigma^2 = 1 the root is that of 1 - left.
        rest = path.sigma[i] ** 2 - left * path.sigma[i + 1] ** 2
        deviation = path.eta * path.sigma[i + 1] / path.sigma[i] * np.sqrt(rest)
        along_noise = np.sqrt(path.sigma[i + 1] ** 2 - deviation**2) / path.sigma[i]
        yield Row(i, path.alpha[i + 1] * m[0] + along_noise * (x - path.alpha[i] * m[0]), noise=deviation)


def _dpmpp_multistep(estimates: int) -> Callable:
    """Make DPM-Solver++ from the last 2 or 3 estimates: x_0, extrapolated along the log-SNR.

    With 3 the published weights take half of the second difference: it, too, converges with order 2, from smaller
    errors. It is kept as published, and as everybody runs it.
    """

    def rule(path: Path, x, base, m):
        path.require_steps(estimates)
        log_snr = path.log_snr
        for i in range(path.steps):
            reached = 1 if path.ends_in_image(i) else min(estimates, max(1, i + 1 - path.starts_in_noise))
            h = log_snr[i + 1] - log_snr[i]
            decay = np.expm1(-h)
            following = path.sigma[i + 1] / path.sigma[i] * x - path.alpha[i + 1] * decay * m[0]
            if reached > 1:
                r0 = (log_snr[i] - log_snr[i - 1]) / h
                slope = (m[0] - m[1]) / r0
            if reached == 2:
                following = following - path.alpha[i + 1] * decay * 0.5 * slope
            elif reached == 3:
                r1 = (log_snr[i - 1] - log_snr[i - 2]) / h
                bend = (slope - (m[1] - m[2]) / r1) / (r0 + r1)
                following = following + path.alpha[i + 1] * (decay / h + 1) * (slope + r0 * bend)
                following = following - path.alpha[i + 1] * ((decay + h) / h**2 - 0.5) * bend
            yield Row(i, following)

    return rule


def _sde_dpmpp_2m(path: Path, x, base, m):
    """DPM-Solver++ of order 2 on the stochastic equation, midpoint variant."""
    path.require_steps(2)
    log_snr = path.log_snr
    for i in range(path.steps):
        h = log_snr[i + 1] - log_snr[i]
        gain = -path.alpha[i + 1] * np.expm1(-2 * h)
        following = path.sigma[i + 1] / path.sigma[i] * np.exp(-h) * x + gain * m[0]
        if i and not path.ends_in_image(i):
            following = following + 0.5 * gain * h / (log_snr[i] - log_snr[i - 1]) * (m[0] - m[1])
        yield Row(i, following, noise=path.sigma[i + 1] * np.sqrt(-np.expm1(-2 * h)))


def _unipc(order: int) -> Callable:
    """Make UniPC, B(h) = exp(h) - 1 on x_0: the evaluation at x first corrects the step that led there, from base."""

    def rule(path: Path, x, base, m):
        path.require_steps(order)
        reached = 0
        for i in range(path.steps):
            known = max(1, i + 1 - path.starts_in_noise)
            corrected = x
            if i > path.starts_in_noise:
                corrected = _unipc_step(path, i - 1, base, m[1 : 1 + reached], newest=m[0])
            left = path.steps - i if path.sigma[-1] == 0 else order
            reached = min(order, known, left)
            yield Row(i, _unipc_step(path, i, corrected, m[:reached]), base=corrected)

    return rule


def _unipc_step(path: Path, i: int, x, m: list, newest=None):
    """Step from time i to the next: with the newest estimate, made there, as the corrector, else as the predictor.

    Args:
      path, i: where.
      x: at time i.
      m: estimates at times i, i - 1, ..., one per order.
      newest: estimate at time i + 1, or None.
    """
    log_snr, order = path.log_snr, len(m)
    h = log_snr[i + 1] - log_snr[i]
    decay = np.expm1(-h)
    nodes = [(log_snr[i - j] - log_snr[i]) / h for j in range(1, order)]
    slopes = [(m[j] - m[0]) / nodes[j - 1] for j in range(1, order)]
    if newest is not None:
        nodes, slopes = [*nodes, 1.0], [*slopes, newest - m[0]]
    following = path.sigma[i + 1] / path.sigma[i] * x - path.alpha[i + 1] * decay * m[0]
    if not slopes:
        return following
    if len(slopes) == 1:
        weights = [0.5]  # equation 9 of the paper leaves one weight free; this is its own choice
    else:
        moments, moment, factorial = [], decay / -h - 1, 1
        for power in range(len(nodes)):
            moments.append(moment * factorial / decay)
            factorial *= power + 2
            moment = moment / -h - 1 / factorial
        weights = np.linalg.solve(np.vander(nodes, increasing=True).T, moments)
    return following - path.alpha[i + 1] * decay * sum(w * slope for w, slope in zip(weights, slopes))


def _euler(path: Path, x, base, m):
    """Euler's method: a straight line along the slope, which is DDIM where the network predicts the noise."""
    for i in range(path.steps):
        moved = x / path.scale[i] + (path.coordinate[i + 1] - path.coordinate[i]) * m[0]
        yield Row(i, path.scale[i + 1] * moved, estimate=path.slope_estimate(i))


def _euler_maruyama(path: Path, x, base, m):
    """Euler-Maruyama on the stochastic equation of a flow, with sigma for the diffusion coefficient: m is the velocity.

    Drift: velocity + sigma * score, with the score (t velocity - x) / sigma. The last step adds no noise: it ends on
    the mean.
    """
    time = path.coordinate
    for i in range(path.steps):
        length = time[i + 1] - time[i]
        drift = (1 + time[i]) * m[0] - x
        noise = 0.0 if i == path.steps - 1 else np.sqrt(2 * path.sigma[i] * length)
        yield Row(i, x + length * drift, estimate=path.slope_estimate(i), noise=noise)


def _heun(path: Path, x, base, m):
    """Heun's method: two evaluations per step, one in a step that ends where the network can't be evaluated."""
    path.require_steps(2)
    scale, at = path.scale, path.coordinate
    for i in range(path.steps):
        move = lambda start, slope, i=i: scale[i + 1] * (start / scale[i] + (at[i + 1] - at[i]) * slope)
        yield Row(i, move(x, m[0]), base=x, estimate=path.slope_estimate(i))
        if path.can_evaluate(i + 1):
            yield Row(i + 1, move(base, (m[0] + m[1]) / 2), estimate=path.slope_estimate(i + 1))


def _ab4(path: Path, x, base, m):
    """Linear multistep of order 4 (Adams-Bashforth), with the exact weights of unequal steps."""
    path.require_steps(4)
    scale, coordinate = path.scale, path.coordinate
    points, gauss = np.polynomial.legendre.leggauss(2)  # exact for the cubic that four nodes fix
    for i in range(path.steps):
        at, length = (points + 1) / 2, coordinate[i + 1] - coordinate[i]
        nodes = (coordinate[i - np.arange(min(4, i + 1))] - coordinate[i]) / length  # in lengths of this step
        moved = x / scale[i]
        for j, node in enumerate(nodes):
            others = np.delete(nodes, j)[:, None]
            basis = np.prod((at - others) / (node - others), axis=0)
            moved = moved + length * (gauss / 2 @ basis) * m[j]
        yield Row(i, scale[i + 1] * moved, estimate=path.slope_estimate(i))


SOLVERS = Registry(
    "solver",
    Solver,
    dict(
        ddpm=_ddpm,
        ddim=_ddim,
        dpmpp_2m=_dpmpp_multistep(2),
        dpmpp_3m=_dpmpp_multistep(3),
        sde_dpmpp_2m=_sde_dpmpp_2m,
        unipc=_unipc(2),
        unipc_3=_unipc(3),
        euler=_euler,
        euler_maruyama=_euler_maruyama,
        heun=_heun,
        ab4=_ab4,
    ),
)


def register_solver(name: str) -> Callable:
    """Return a decorator that adds a `Solver` of one's own for `sampling.sampler`; see `Registry.register`."""
    return SOLVERS.register(name)
