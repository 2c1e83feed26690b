"""The surrogate: what a trial would give, guessed from those that ended.

A Gaussian process over the knobs. Its kernel is a mixture of a part that sums over knobs (each knob a piecewise linear
effect of its own) and a part that decays with the distance in all of them together (any interaction). Which mixture,
reach and noise fit best is chosen by the marginal likelihood.

All of it is a function of the rows it is given, in their order.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.linalg import LinAlgError, cho_solve, cholesky, solve_triangular
from scipy.spatial.distance import cdist

__all__ = ["LARGEST", "Kernel", "Surrogate", "choose_kernel"]

LARGEST = 300
"""Rows that a surrogate is made from at most: the best, the latest, and some of the others."""

_MIXTURES = (0.0, 0.5, 0.9)
_REACHES = (0.1, 0.3, 1.0)
_NOISES = (1e-3, 1e-2, 1e-1)


@dataclass(frozen=True)
class Kernel:
    """``mixture``: the share of the part with interactions, else of the sum over knobs; ``reach``: of that part, as a
    share of the diameter of the space; ``noise``: variance of a result, in units of the variance of scores; ``weights``
    of the columns: how much each matters."""

    mixture: float
    reach: float
    noise: float
    weights: np.ndarray

    def between(self, one: np.ndarray, other: np.ndarray) -> np.ndarray:
        """Covariances, of shape (rows of one, rows of other)."""
        distance = cdist(one * self.weights, other * self.weights, "cityblock") / max(float(self.weights.sum()), 1e-12)
        # 1 - |difference| is a kernel on [0, 1]; a sum of kernels is one.
        return self.mixture * np.exp(-distance / self.reach) + (1 - self.mixture) * (1 - distance)


class Surrogate:
    """Mean and standard deviation of scores anywhere, given some.

    Args:
        rows: features of shape (rows, columns), `SearchSpace.features`.
        scores: of shape (rows,), in units of their spread around 0.
    """

    def __init__(self, kernel: Kernel, rows: np.ndarray, scores: np.ndarray):
        self._kernel = kernel
        self._rows = rows
        self._scores = scores
        self._factor, self._weights = _solved(kernel, rows, scores)

    def predict(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation at ``rows``."""
        cross = self._kernel.between(rows, self._rows)
        mean = cross @ self._weights
        solved = solve_triangular(self._factor, cross.T, lower=True, check_finite=False)
        variance = 1.0 - np.einsum("ij,ij->j", solved, solved)
        return mean, np.sqrt(np.maximum(variance, 1e-12))

    def with_pending(self, rows: np.ndarray) -> Surrogate:
        """The same after ``rows`` gave what is expected of them: the mean stays, what is near becomes certain."""
        if not len(rows):
            return self
        mean, _ = self.predict(rows)
        return Surrogate(self._kernel, np.vstack([self._rows, rows]), np.concatenate([self._scores, mean]))


def _solved(kernel: Kernel, rows: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    covariance = kernel.between(rows, rows)
    covariance[np.diag_indices_from(covariance)] += kernel.noise + 1e-8
    factor = cholesky(covariance, lower=True, overwrite_a=True, check_finite=False)
    return factor, cho_solve((factor, True), scores, check_finite=False)


def _likelihood(kernel: Kernel, rows: np.ndarray, scores: np.ndarray) -> float:
    """The logarithm of the marginal likelihood, with the scale of the scores chosen best."""
    try:
        factor, weights = _solved(kernel, rows, scores)
    except LinAlgError:
        return -np.inf
    n = len(scores)
    variance = max(float(scores @ weights) / n, 1e-12)
    return -0.5 * n * float(np.log(variance)) - float(np.log(np.diag(factor)).sum())


def choose_kernel(rows: np.ndarray, scores: np.ndarray) -> Kernel:
    """The kernel under which ``scores`` are likeliest, of a grid; then with weights of the columns, one column at a
    time, wherever that makes them likelier still."""
    even = np.ones(rows.shape[1])
    grid = [Kernel(m, r, n, even) for m in _MIXTURES for r in (_REACHES if m else _REACHES[:1]) for n in _NOISES]
    values = [_likelihood(kernel, rows, scores) for kernel in grid]
    best = grid[int(np.argmax(values))]
    top = max(values)
    weights = even.copy()
    for factor in (0.25, 4.0):
        for column in range(rows.shape[1]):
            tried = weights.copy()
            tried[column] *= factor
            kernel = Kernel(best.mixture, best.reach, best.noise, tried)
            if (value := _likelihood(kernel, rows, scores)) > top + 0.5:
                top, weights = value, tried
    return Kernel(best.mixture, best.reach, best.noise, weights)


def rows_to_keep(scores: np.ndarray, limit: int = LARGEST) -> np.ndarray:
    """Places of at most ``limit`` rows: a third the best, a third the latest, the others spread evenly."""
    n = len(scores)
    if n <= limit:
        return np.arange(n)
    third = limit // 3
    best = np.argsort(-scores, kind="stable")[:third]
    kept = np.union1d(best, np.arange(n - third, n))
    others = np.setdiff1d(np.arange(n), kept)
    spread = others[np.linspace(0, len(others) - 1, limit - len(kept)).astype(int)]
    return np.union1d(kept, spread)
