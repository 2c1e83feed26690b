"""The surrogate: what a trial would give, guessed from those that ended.

A Gaussian process. Two points are similar as far as their knobs are: the similarity is the mean over knobs of a Matern
function (smoothness 3/2) of how far their values are apart, where each knob has a weight and a reach of its own. The
covariance is a mixture of that similarity itself (each knob has an effect of its own, and they add up) and of its
exponential, the power series of which holds the products of two, three ... knobs: interactions of any order, with an
average order that is a parameter. Weights, reaches, mixture, order and noise are those of the highest posterior
density: of few results they are what the prior says, of many what the results say.

All of it is a function of the rows it is given, in their order.

Sources: Duvenaud et al., Additive Gaussian Processes, NeurIPS 2011 (sums over orders of interactions); Rasmussen and
Williams, Gaussian Processes for Machine Learning, 2006, section 5.4 (likelihood and its gradient).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.linalg import LinAlgError, cho_solve, cholesky, solve_triangular

__all__ = ["LARGEST", "Kernel", "Surrogate", "choose_kernel", "first_kernel", "rows_to_keep"]

LARGEST = 200
"""Rows that a surrogate is made from at most: the best, the latest, and some of the others."""

_CONSTANT = 1.0  # variance of what all results have in common, in units of that of the rest
_TRUSTED = 2.0  # results that the prior of the variance counts for

# Means and standard deviations of what is likely before anything is known; all but the weights as logarithms.
_WEIGHT, _REACH, _ORDER, _NOISE = (0.0, 1.0), (np.log(0.6), 0.8), (np.log(3.0), 0.7), (np.log(0.03), 1.3)
_MIXTURE = (0.0, 1.5)  # as log odds


@dataclass(frozen=True)
class Kernel:
    """``weights`` of the knobs, their sum is 1; ``reaches`` of the knobs, in units of their ranges; ``mixture``: the
    share of the part with interactions; ``order``: how many knobs interact on average in it; ``noise``: variance of a
    result, in units of that of what is to be learned."""

    weights: np.ndarray
    reaches: np.ndarray
    mixture: float
    order: float
    noise: float

    def covariance(self, similarity: np.ndarray) -> np.ndarray:
        """Of pairs of points that are so similar (1: the same). The variance of a point is ``1 + _CONSTANT``."""
        return (
            _CONSTANT
            + (1 - self.mixture) * similarity
            + self.mixture * np.exp(self.order * (similarity - 1))
        )  # fmt: skip


class Surrogate:
    """Mean and standard deviation of scores anywhere, given some.

    Args:
        distances: of the levels of each knob, `SearchSpace.distances`.
        rows: levels, of shape (rows, knobs), `SearchSpace.levels`.
        scores: of shape (rows,), in units of their spread around 0.
        variance: of what is to be learned, in units of ``scores``; by default by these.
    """

    def __init__(
        self,
        kernel: Kernel,
        distances: Sequence[np.ndarray],
        rows: np.ndarray,
        scores: np.ndarray,
        variance: float | None = None,
    ):
        self._kernel, self._distances, self._rows, self._scores = kernel, distances, rows, scores
        self._starts = _starts(distances)
        parts = [
            weight * _matern(distance[:, column] / reach)
            for distance, column, weight, reach in zip(distances, rows.T, kernel.weights, kernel.reaches)
        ]
        self._similar = np.concatenate(parts)  # each level of each knob to each row
        covariance = kernel.covariance(self._similarity(rows))
        covariance[np.diag_indices_from(covariance)] += kernel.noise + 1e-8
        self._factor = cholesky(covariance, lower=True, overwrite_a=True, check_finite=False)
        self._weights = cho_solve((self._factor, True), scores, check_finite=False)
        if variance is None:
            variance = (float(scores @ self._weights) + _TRUSTED) / (len(scores) + _TRUSTED)
        self.variance = variance

    def predict(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation, without the noise of a trial, at ``rows`` of levels."""
        cross = self._kernel.covariance(self._similarity(rows))
        mean = cross @ self._weights
        solved = solve_triangular(self._factor, cross.T, lower=True, check_finite=False)
        variance = 1.0 + _CONSTANT - np.einsum("ij,ij->j", solved, solved)
        return mean, np.sqrt(self.variance * np.maximum(variance, 1e-12))

    def with_pending(self, rows: np.ndarray) -> Surrogate:
        """The same after ``rows`` gave what is expected of them: the mean stays, what is near becomes certain."""
        if not len(rows):
            return self
        mean, _ = self.predict(rows)
        rows, scores = np.vstack([self._rows, rows]), np.concatenate([self._scores, mean])
        return Surrogate(self._kernel, self._distances, rows, scores, self.variance)

    def _similarity(self, rows: np.ndarray) -> np.ndarray:
        return _one_hot(rows, self._starts) @ self._similar


def _starts(distances: Sequence[np.ndarray]) -> np.ndarray:
    """Where the levels of each knob begin when those of all stand in one row; and their number."""
    return np.concatenate([[0], np.cumsum([len(distance) for distance in distances])])


def _one_hot(rows: np.ndarray, starts: np.ndarray) -> np.ndarray:
    found = np.zeros((len(rows), starts[-1]))
    np.put_along_axis(found, rows + starts[:-1], 1.0, axis=1)
    return found


def _matern(distance: np.ndarray) -> np.ndarray:
    scaled = np.sqrt(3.0) * distance
    return (1 + scaled) * np.exp(-scaled)


# -- which kernel -----------------------------------------------------------------------------------------------------


def first_kernel(knobs: int) -> Kernel:
    """The kernel before anything is known."""
    return _kernel(_priors(knobs)[0])


def choose_kernel(distances: Sequence[np.ndarray], rows: np.ndarray, scores: np.ndarray) -> Kernel:
    """The kernel of the highest posterior density, found by gradients from `first_kernel`. See `Surrogate` for the
    arguments."""
    from scipy.optimize import minimize  # it takes long to import, and the first requests do without

    posterior = Posterior(distances, rows, scores)
    mean, width = _priors(len(distances))
    bounds = list(zip(mean - 4 * width, mean + 4 * width))
    found = minimize(posterior, mean, jac=True, method="L-BFGS-B", bounds=bounds, options={"maxiter": 30})
    # Machines round sums differently; what is made of that should not depend on it.
    return _kernel(np.round(found.x, 2))


def _priors(knobs: int) -> tuple[np.ndarray, np.ndarray]:
    """Means and standard deviations of all parameters: weights, reaches, mixture, order, noise."""
    pairs = [_WEIGHT] * knobs + [_REACH] * knobs + [_MIXTURE, _ORDER, _NOISE]
    return np.array([mean for mean, _ in pairs]), np.array([width for _, width in pairs])


def _kernel(parameters: np.ndarray) -> Kernel:
    knobs = (len(parameters) - 3) // 2
    weights = np.exp(parameters[:knobs] - parameters[:knobs].max())
    mixture, order, noise = parameters[2 * knobs :]
    return Kernel(
        weights / weights.sum(), np.exp(parameters[knobs : 2 * knobs]), float(1 / (1 + np.exp(-mixture))),
        float(np.exp(order)), float(np.exp(noise)),
    )  # fmt: skip


class Posterior:
    """The negative logarithm of the posterior density of parameters (up to a constant), with its gradient. The variance
    of scores is integrated out."""

    def __init__(self, distances: Sequence[np.ndarray], rows: np.ndarray, scores: np.ndarray):
        self._scores = scores
        self._starts = _starts(distances)
        self._knob = np.repeat(np.arange(len(distances)), np.diff(self._starts))  # of each column
        self._rows = _one_hot(rows, self._starts)
        self._apart = np.concatenate([d[column] for d, column in zip(distances, rows.T)], axis=1)
        self._mean, self._width = _priors(len(distances))

    def __call__(self, parameters: np.ndarray) -> tuple[float, np.ndarray]:
        """Value and gradient at ``parameters``, an array as that of `_priors`."""
        kernel, knobs, n = _kernel(parameters), len(self._starts) - 1, len(self._scores)
        scaled = np.sqrt(3.0) * self._apart / kernel.reaches[self._knob]
        decayed = np.exp(-scaled)
        alike = (1 + scaled) * decayed  # each row to each level of each knob
        similarity = (kernel.weights[self._knob] * alike) @ self._rows.T
        joint = kernel.mixture * np.exp(kernel.order * (similarity - 1))
        covariance = _CONSTANT + (1 - kernel.mixture) * similarity + joint
        covariance[np.diag_indices(n)] += kernel.noise + 1e-8
        off = (parameters - self._mean) / self._width
        try:
            factor = cholesky(covariance, lower=True, overwrite_a=True, check_finite=False)
        except LinAlgError:
            return 1e10, np.zeros(len(parameters))
        inverse = cho_solve((factor, True), np.eye(n), check_finite=False)
        solved = inverse @ self._scores
        misfit, count = float(self._scores @ solved) + _TRUSTED, n + _TRUSTED
        value = 0.5 * count * np.log(misfit) + float(np.log(np.diag(factor)).sum()) + 0.5 * float(off @ off)

        by_covariance = 0.5 * (inverse - (count / misfit) * np.outer(solved, solved))
        by_similarity = by_covariance * ((1 - kernel.mixture) + kernel.order * joint)
        spread = by_similarity @ self._rows
        by_weight = np.add.reduceat((spread * alike).sum(0), self._starts[:-1])
        by_reach = np.add.reduceat((spread * scaled**2 * decayed).sum(0), self._starts[:-1])
        gradient = np.empty(len(parameters))
        gradient[:knobs] = kernel.weights * (by_weight - kernel.weights @ by_weight)
        gradient[knobs : 2 * knobs] = kernel.weights * by_reach
        odds = kernel.mixture * (1 - kernel.mixture)
        gradient[-3] = odds * float((by_covariance * (joint / kernel.mixture - similarity)).sum())
        gradient[-2] = kernel.order * float((by_covariance * joint * (similarity - 1)).sum())
        gradient[-1] = kernel.noise * float(np.trace(by_covariance))
        return float(value), gradient + off / self._width


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
