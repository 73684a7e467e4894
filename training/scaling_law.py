"""A law of the validation loss, L(N, D) = E + (A / N^a + B / D^b)^c, and its fit to runs.

N is the number of parameters, with embeddings, and D the number of training tokens. With c = 1, this is the law of
Hoffmann et al. 2022, "Training Compute-Optimal Large Language Models", section 3.3. With E = 0 and b = 1, this is the
law of Kaplan et al. 2020, "Scaling Laws for Neural Language Models", equation 1.5. A fitted law holds for one recipe
and one dataset.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np

# The threshold of the Huber loss, for residuals of the logarithm of the loss, as in Hoffmann et al. 2022.
HUBER = 1e-3
STEPS = 200  # maximum number of steps of the Levenberg-Marquardt algorithm


class Law(NamedTuple):
    """L(N, D) = E + (A / N^a + B / D^b)^c in nats per token.

    The fields are log A and log B, because A and B can be too large for a float. A field may also be an array, for
    several laws.
    """

    E: float
    log_A: float
    a: float
    log_B: float
    b: float
    c: float = 1.0

    def loss(self, parameters: np.ndarray | float, tokens: np.ndarray | float) -> np.ndarray:
        """Return the loss of runs with these numbers of parameters and tokens, which may be arrays."""
        inner = np.logaddexp(self.log_A - self.a * np.log(parameters), self.log_B - self.b * np.log(tokens))
        return np.asarray(self.E + np.exp(self.c * inner))


class Form(NamedTuple):
    """A form of the law, with f <= 6 free numbers: (log E, log A, a, log B, b, c) = offset + matrix @ free numbers."""

    description: str
    matrix: np.ndarray  # (6, f)
    offset: np.ndarray  # (6,)


_EYE = np.eye(6)
_NO_FLOOR = -60.0  # log E that stands for E = 0: exp(-60) is almost 0. Minus infinity would give NaN in matrix products
FORMS = {
    "general": Form("all six numbers are fitted", _EYE, np.zeros(6)),
    "full": Form("Hoffmann et al. 2022: c = 1", _EYE[:, :5], _EYE[5]),
    "one-exponent": Form("c = 1, a = b", np.stack([*_EYE[:2], _EYE[2] + _EYE[4], _EYE[3]], axis=1), _EYE[5]),
    # the exponents of equation 10 of Hoffmann et al. 2022
    "published-exponents": Form("c = 1, a = 0.34, b = 0.28", _EYE[:, [0, 1, 3]], np.array([0, 0, 0.34, 0, 0.28, 1])),
    "joint": Form("Kaplan et al. 2020: E = 0, b = 1", _EYE[:, [1, 2, 3, 5]], np.array([_NO_FLOOR, 0, 0, 0, 1, 0])),
}


class Observations(NamedTuple):
    """Finished runs as arrays of equal length n. The size of a run is its pair (parameters, tokens)."""

    parameters: np.ndarray  # (n,) with embeddings
    tokens: np.ndarray  # (n,)
    losses: np.ndarray  # (n,) nats per token


def fit(runs: Observations, form: Form) -> Law:
    """Return the law of this form that fits the runs best. Raises ValueError if the runs have too few sizes."""
    return Law(*fit_weighted(runs, form, np.ones((1, len(runs.losses))))[0])


def fit_weighted(runs: Observations, form: Form, weights: np.ndarray, near: Law | None = None) -> np.ndarray:
    """Fit a law for each row of `weights` (k, n), which has a weight for each run. Return the fields of Law, (k, 6).

    The fit minimizes the Huber loss of the residuals log(L(N, D) / loss) with the Levenberg-Marquardt algorithm. The
    search starts at `near` or, if `near` is None, at each of `starting_points`.

    Raises ValueError if the runs have fewer different sizes than the form has free numbers.
    """
    n_sizes, n_free = len(set(zip(runs.parameters, runs.tokens, strict=True))), form.matrix.shape[1]
    if n_sizes < n_free:
        raise ValueError(f"a law with {n_free} free numbers needs runs of {n_free} sizes, but there are {n_sizes}")
    # Subtract the means of log N and log D, so that A and B are about as large as the two terms that contain them.
    centers = np.log(runs.parameters).mean(), np.log(runs.tokens).mean()
    x, y = np.log(runs.parameters) - centers[0], np.log(runs.tokens) - centers[1]
    if near is None:
        starts = starting_points(runs.losses)
    else:
        log_a, log_b = near.log_A - near.a * centers[0], near.log_B - near.b * centers[1]
        starts = np.array([[np.log(near.E), log_a, near.a, log_b, near.b, near.c]])
    free = np.tile(
        (starts - form.offset) @ np.linalg.pinv(form.matrix).T, (len(weights), 1)
    )  # (k * len(starts), n_free)
    free, errors = minimize(free, form, x, y, np.log(runs.losses), np.repeat(weights, len(starts), axis=0))
    best = errors.reshape(len(weights), -1).argmin(axis=1) + np.arange(len(weights)) * len(starts)
    log_e, log_a, a, log_b, b, c = (form.offset + free[best] @ form.matrix.T).T
    return np.stack([np.exp(log_e), log_a + a * centers[0], a, log_b + b * centers[1], b, c], axis=1)


def starting_points(losses: np.ndarray) -> np.ndarray:
    """Return 81 starting points (81, 6) for a fit to runs with these losses.

    Each row is (log E, log A, a, log B, b, c). A and B differ from those of `Law`, because `fit_weighted` subtracts the
    means from log N and log D.
    """
    mean, points = losses.mean(), []
    for floor, a, b, c in itertools.product((0.2, 0.5, 0.8), (0.2, 0.5, 1.0), (0.2, 0.5, 1.0), (0.1, 0.3, 1.0)):
        half = np.log((1 - floor) * mean) / c - np.log(2)
        points.append((np.log(floor * mean), half, a / c, half, b / c, c))
    return np.array(points)


def minimize(
    free: np.ndarray, form: Form, x: np.ndarray, y: np.ndarray, target: np.ndarray, weights: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Fit a law from each of k starting points, the rows of `free` (k, f), which are free numbers of `form`.

    For each row, minimize the sum of the Huber losses of the residuals, weighted by the same row of `weights` (k, n). x
    and y (n,) are log N and log D minus their means, and target (n,) has the logarithms of the losses. Return the free
    numbers at the minima, (k, f), and the sums there, (k,).
    """
    damping = np.full(len(free), 1e-2)
    residuals, jacobian = evaluate(free, form, x, y, target)
    errors = (weights * huber(residuals)).sum(axis=1)
    for _ in range(STEPS):
        # These weights make the gradient of a least-squares fit equal to that of the Huber loss.
        weighted = weights * np.minimum(1, HUBER / np.maximum(np.abs(residuals), 1e-12))
        gradient = np.einsum("kn,kn,knf->kf", weighted, residuals, jacobian)
        hessian = np.einsum("kn,knf,kng->kfg", weighted, jacobian, jacobian)
        diagonal = np.einsum("kff->kf", hessian)
        # The small constant keeps the matrix invertible if a term of the law has become 0.
        hessian = hessian + (damping[:, None] * diagonal + 1e-9)[:, :, None] * np.eye(free.shape[1])
        step = np.linalg.solve(hessian, gradient[:, :, None])[:, :, 0]
        moved = free - np.clip(step, -1, 1)
        new_residuals, new_jacobian = evaluate(moved, form, x, y, target)
        new_errors = (weights * huber(new_residuals)).sum(axis=1)
        better = new_errors < errors
        if not better.any() and (damping > 1e6).all():
            break
        free = np.where(better[:, None], moved, free)
        residuals = np.where(better[:, None], new_residuals, residuals)
        jacobian = np.where(better[:, None, None], new_jacobian, jacobian)
        errors = np.where(better, new_errors, errors)
        damping = np.where(better, damping / 3, damping * 4).clip(1e-9, 1e9)
    return free, errors


def evaluate(
    free: np.ndarray, form: Form, x: np.ndarray, y: np.ndarray, target: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return log L(N, D) minus the target, (k, n), and its derivative with respect to the free numbers, (k, n, f)."""
    log_e, log_a, a, log_b, b, c = (form.offset + free @ form.matrix.T).T[:, :, None]  # each (k, 1)
    of_n, of_d = log_a - a * x, log_b - b * y  # (k, n)
    inner = np.logaddexp(of_n, of_d)
    total = np.logaddexp(log_e, c * inner)
    of_e, of_c = np.exp(log_e - total), np.exp(c * inner - total)  # each term's fraction of the loss
    by_n, by_d = of_c * c * np.exp(of_n - inner), of_c * c * np.exp(of_d - inner)
    derivative = np.stack([of_e, by_n, -by_n * x, by_d, -by_d * y, of_c * inner], axis=-1)
    return total - target, derivative @ form.matrix


def huber(residuals: np.ndarray) -> np.ndarray:
    """Return the Huber loss of each residual: half its square up to HUBER, and linear above."""
    size = np.abs(residuals)
    return np.where(size <= HUBER, size**2 / 2, HUBER * (size - HUBER / 2))


def bootstrap(runs: Observations, form: Form, law: Law, count: int, seed: int = 0) -> np.ndarray:
    """Return an array (count, 7). Each row has the fields of a law that was fitted to a random sample, and a residual.

    The sample has n runs, drawn with replacement from all n runs. The residual is log(loss / loss by `law`) of a random
    run. It represents what a law cannot explain, such as the influence of the seed. Residuals are multiplied by the
    square root of n / (n - f), because those of a law with f free numbers are too small for its own runs.
    """
    generator = np.random.default_rng(seed)
    n, n_free = len(runs.losses), form.matrix.shape[1]
    residuals = np.log(runs.losses / law.loss(runs.parameters, runs.tokens)) * (n / max(1, n - n_free)) ** 0.5
    laws = fit_weighted(runs, form, generator.multinomial(n, [1 / n] * n, size=count).astype(float), law)
    return np.column_stack([laws, generator.choice(residuals, count)])


def interval(samples: np.ndarray, parameters: float, tokens: float, level: float = 0.95) -> tuple[float, float]:
    """From `samples`, rows of `bootstrap`, return the interval that contains a run's loss with probability `level`."""
    losses = Law(*samples.T[:6]).loss(parameters, tokens) * np.exp(samples[:, 6])
    low, high = np.quantile(losses, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def leave_one_size_out(runs: Observations, form: Form) -> np.ndarray:
    """Return log(predicted loss / loss) of each run, (n,).

    Each prediction comes from a law that was fitted without the runs of the same size.
    """
    sizes = np.stack([runs.parameters, runs.tokens], axis=1)
    same = (sizes[:, None] == sizes[None]).all(axis=-1)
    laws = fit_weighted(runs, form, (~same).astype(float), fit(runs, form))
    return np.log(Law(*laws.T).loss(runs.parameters, runs.tokens) / runs.losses)
