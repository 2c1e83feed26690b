"""Fit the few global parameters of a price to the steps that were measured.

Log error, because a price may be wrong by a factor wherever it is; a soft-L1 loss, because single rows are wrong for
reasons of their own; priors, because a dozen rows cannot say all that a model asks (AdaptDL, OSDI 2021, and Paleo fit
in this manner; more than 40 rows did not help on the public records of single-node training).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from scipy.optimize import least_squares

from graphopt.errors import CostModelError

__all__ = ["FEWEST_ROWS", "MOST_PARAMETERS", "Fitted", "fit"]

Row = TypeVar("Row")

MOST_PARAMETERS = 12
"""More global parameters than this fit rows, not machines."""

FEWEST_ROWS = 5
"""Fewer rows than this say nothing of how good the fit is."""

PRIOR_WEIGHT = 0.2
"""A parameter that is off its prior by a factor e costs as much as a row that is off by this in log. On simulated
steps (eight parameters, priors off by 50 %, rows by 8 %, one row of twenty far off) weights of 0.02, 0.05, 0.1, 0.2,
0.3 and 0.5 gave 15, 14, 11, 10, 9 and 9 % error on other steps from 12 rows, and all the same 7 % from 40. With priors
off by a factor of e and more the smaller ones are no better; the larger ones would hold on to wrong priors longer."""

SOFT = 0.1
"""The log error from which on the loss grows linearly: about what a good model leaves."""

FURTHEST = math.log(100.0)
"""How far a parameter may leave its prior, in log. A fit that gets there has found a wrong unit, not a machine."""

UNKNOWN_HALF_WIDTH = math.log(2.0)
"""Half-width in log space where nothing was fitted: priors of other machines are within a factor of two mostly."""


@dataclass(frozen=True)
class Fitted:
    """Parameters after a fit, and how far they may be trusted.

    Attributes:
        parameters: all values by name, those that were not fitted as given.
        half_width: 90 % of times not seen are within a factor ``exp(half_width)`` of what is predicted, as far as
            leaving out each row in turn can tell.
        data_share: by fitted name, how much of the value the rows decide: 0 is the prior alone, 1 the rows alone.
        rows: how many rows were fitted; 0 when the priors were kept.
        notes: what a reader should know: priors kept, parameters at the end of their range.
    """

    parameters: dict[str, float]
    half_width: float
    data_share: dict[str, float]
    rows: int
    notes: tuple[str, ...] = ()

    @property
    def unmoved(self) -> tuple[str, ...]:
        """Fitted parameters that the rows say less of than the priors do."""
        return tuple(name for name, share in self.data_share.items() if share < 0.5)

    def interval(self, seconds: float) -> tuple[float, float]:
        """The 90 % interval around a prediction, in seconds."""
        factor = math.exp(self.half_width)
        return seconds / factor, seconds * factor


def fit(
    rows: Sequence[tuple[Row, float]],
    parameters: Sequence[str],
    predict: Callable[[Mapping[str, float], Row], float],
    priors: Mapping[str, float],
    *,
    prior_weight: float = PRIOR_WEIGHT,
) -> Fitted:
    """Fit positive parameters of a prediction to measured seconds.

    Args:
        rows: what was measured, each with its seconds; 12 to 40 of them, launch-bound and compute-bound ones.
        parameters: names to fit, at most 12; the other priors stay as they are.
        predict: seconds of a row, given all parameters by name.
        priors: all parameters by name, positive.
        prior_weight: how much a parameter holds on to its prior; see `PRIOR_WEIGHT`.

    Returns:
        The fit. With fewer than five rows the priors, and a note that says so.

    Raises:
        CostModelError: too many parameters, or unknown ones; priors, seconds or predictions that are not positive and
            finite.

    >>> rows = [(n, 0.002 + 0.001 * n) for n in (1, 2, 8, 32, 128)]
    >>> predict = lambda p, n: p["launch"] + n / p["rate"]
    >>> fitted = fit(rows, ["launch", "rate"], predict, {"launch": 0.001, "rate": 500.0})
    >>> round(fitted.parameters["rate"], -2)
    1000.0
    """
    _check(rows, parameters, priors, prior_weight)
    names = list(parameters)
    observed = np.log([seconds for _, seconds in rows])
    start = np.array([priors[name] for name in names])

    def values(x: np.ndarray) -> dict[str, float]:
        return {**priors, **dict(zip(names, (start * np.exp(x)).tolist(), strict=True))}

    def errors(x: np.ndarray) -> np.ndarray:
        at = values(x)
        return np.array([_log_prediction(predict, at, row, i) for i, (row, _) in enumerate(rows)]) - observed

    errors(np.zeros(len(names)))  # complains of what is wrong with the prediction, however many rows there are
    if len(rows) < FEWEST_ROWS or not names:
        kept = f"priors kept: {len(rows)} rows and {len(names)} parameters to fit; at least {FEWEST_ROWS} rows and 1"
        return Fitted(dict(priors), UNKNOWN_HALF_WIDTH, dict.fromkeys(names, 0.0), 0, (kept,))

    found = least_squares(
        lambda x: np.concatenate([errors(x), prior_weight * x]),
        np.zeros(len(names)),
        bounds=(-FURTHEST, FURTHEST),
        loss="soft_l1",
        f_scale=SOFT,
        x_scale=1.0,
    )
    slopes, left = _slopes(errors, found.x), errors(found.x)
    # The curvature of the loss: rows far off pull less.
    pull = 1 / np.sqrt(1 + (left / SOFT) ** 2)
    hold = prior_weight**2 / np.sqrt(1 + (prior_weight * found.x / SOFT) ** 2)
    spread = np.linalg.inv(slopes.T @ (slopes * pull[:, None]) + np.diag(hold))
    share = np.clip(1 - np.diag(spread) * hold, 0.0, 1.0)
    leverage = np.clip(np.einsum("ij,jk,ik,i->i", slopes, spread, slopes, pull), 0.0, 0.95)
    notes = [
        f"{name} is at the end of its range, a factor of {math.exp(abs(x)):.0f} off its prior: check the units"
        for name, x in zip(names, found.x, strict=True)
        if abs(x) > 0.99 * FURTHEST
    ]
    half_width = _half_width(left / (1 - leverage))
    shares = dict(zip(names, share.tolist(), strict=True))
    return Fitted(values(found.x), half_width, shares, len(rows), tuple(notes))


def _slopes(errors: Callable[[np.ndarray], np.ndarray], x: np.ndarray, step: float = 1e-4) -> np.ndarray:
    """Derivative of each row's log error to each log parameter."""
    columns = [(errors(x + step * unit) - errors(x - step * unit)) / (2 * step) for unit in np.eye(len(x))]
    return np.stack(columns, axis=1)


def _half_width(left_out: np.ndarray) -> float:
    """The 90 % quantile of log errors of rows that were left out, for a row to come (split conformal prediction)."""
    count = len(left_out)
    ordered = np.sort(np.abs(left_out))
    rank = math.ceil(0.9 * (count + 1))
    if rank <= count:
        return float(ordered[rank - 1])
    return 1.5 * float(ordered[-1])  # fewer than nine rows hold no 90 % quantile; simulated, this covers as much


def _log_prediction(
    predict: Callable[[Mapping[str, float], Row], float], values: Mapping[str, float], row: Row, index: int
) -> float:
    seconds = float(predict(values, row))
    if not 0 < seconds < math.inf:
        raise CostModelError(
            f"fit: the prediction of row {index} is {seconds!r} s with {dict(values)}; expected a positive number"
        )
    return math.log(seconds)


def _check(
    rows: Sequence[tuple[Row, float]], parameters: Sequence[str], priors: Mapping[str, float], weight: float
) -> None:
    if len(parameters) > MOST_PARAMETERS:
        raise CostModelError(
            f"fit: got {len(parameters)} parameters; expected at most {MOST_PARAMETERS}. Keep the others at their "
            "priors, or make one parameter of several."
        )
    if len(set(parameters)) != len(parameters) or not set(parameters) <= set(priors):
        raise CostModelError(f"fit: parameters={list(parameters)}; expected names of {list(priors)}, each once")
    for name, value in priors.items():
        if not 0 < value < math.inf:
            raise CostModelError(f"fit: the prior of {name!r} is {value!r}; expected a positive number")
    for index, (_, seconds) in enumerate(rows):
        if not 0 < seconds < math.inf:
            raise CostModelError(f"fit: row {index} took {seconds!r} s; expected a positive number of seconds")
    if not 0 < weight < math.inf:
        raise CostModelError(f"fit: prior_weight={weight!r}; expected a positive number")
