"""The gate: nothing is built or trained that is not expected to fit the budget.

A predictor gives what a point will need, with an interval that holds 90 % of measurements. The gate asks how likely it
is that the measured value keeps the limit, and refuses what is less likely than ``confidence``. As trials measure what
was predicted, the gate learns by which factor predictions are off, and how much they scatter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import Any

import numpy as np

from graphopt.errors import ExplorationError
from graphopt.exploration.pool import Result, finite_number
from graphopt.exploration.search_space import Point, SearchSpace

__all__ = ["Gate", "Predictor", "Verdict", "check_budget"]

Prediction = tuple[float, float, float]
"""Value, and the ends (low, high) of the interval that holds 90 % of measurements."""

Predictor = Callable[[dict[str, Any], dict[str, Any]], Mapping[str, Any]]
"""From sizes of the net and hyper-parameters to what they need, by name: a number (exact) or (value, low, high). It
must give the same for the same point, in any process. ``cheap = False`` on it says that it takes more than a few
milliseconds: then only models about to be taken are predicted, not every neighbour that is looked at."""

_NORMAL = NormalDist()
_HALF_WIDTH = _NORMAL.inv_cdf(0.95)  # standard deviations from the middle to an end of the interval
_LEAST_SPREAD = 1e-3
_LEARN_FROM = 8  # measurements, before the gate trusts them more than the predictor's own interval
_KEPT = 50_000  # predictions


@dataclass(frozen=True)
class Verdict:
    """``excess``: how far the worst of the needs is above its limit, as a logarithm; above 0 it is refused."""

    admitted: bool
    predicted: dict[str, Prediction] = field(default_factory=dict)
    why: str = ""
    excess: float = 0.0


class Gate:
    """Admits and refuses points. Its decisions depend on the predictor and on the results it has learned from alone.

    Args:
        space: of the points.
        budget: limits by name.
        predictor: see `Predictor`; None admits all.
        confidence: how likely a model must be to keep each limit.
        learns: whether measured values correct the predictions. Measured times differ between runs: a search that must
            be reproducible does without.
    """

    def __init__(
        self,
        space: SearchSpace,
        budget: Mapping[str, float] | None = None,
        predictor: Predictor | None = None,
        *,
        confidence: float = 0.9,
        learns: bool = True,
    ):
        self._space = space
        self.budget = check_budget(budget)
        self._predictor = predictor
        self._needed = _NORMAL.inv_cdf(confidence)
        self._learns = learns
        self._ratios: dict[str, list[float]] = {}
        self._correction: dict[str, tuple[float, float]] = {}
        self._memory_margin = 0.0
        self._known: dict[str, dict[str, Prediction] | str] = {}
        self.cheap = bool(getattr(predictor, "cheap", True))

    @property
    def open(self) -> bool:
        """Whether it admits everything."""
        return not self.budget

    def judge(self, point: Point, key: str) -> Verdict:
        """Whether the model of ``point`` may be built."""
        if self._predictor is None:
            return Verdict(True)
        predicted = self._known.get(key)
        if predicted is None:
            if len(self._known) >= _KEPT:
                self._known.clear()
            predicted = self._known[key] = self._predict(point)
        if isinstance(predicted, str):
            return Verdict(False, {}, predicted, math.inf)
        reasons, worst = [], -math.inf
        for name, limit in self.budget.items():
            if name not in predicted:
                continue  # a limit on what is only measured
            value, low, high = predicted[name]
            shift, spread = self._error(name, low, high)
            excess = math.log(value / limit) + shift + self._needed * spread if value > 0 else -math.inf
            worst = max(worst, excess)
            if excess > 0:
                reasons.append(
                    f"{name} is predicted as {value:.4g} ({low:.4g} to {high:.4g}), "
                    f"{value * math.exp(shift + self._needed * spread):.4g} with the margin; the budget is {limit:.4g}"
                )
        return Verdict(not reasons, predicted, "; ".join(reasons), worst)

    def _predict(self, point: Point) -> dict[str, Prediction] | str:
        assert self._predictor is not None
        try:
            given = self._predictor(self._space.sizes(point), self._space.hyper_parameters(point))
        except Exception as error:  # a point that cannot be priced is not run: said with the refusal
            return f"it cannot be predicted: {type(error).__name__}: {error}"
        found: dict[str, Prediction] = {}
        for name, value in given.items():
            parts = tuple(value) if isinstance(value, (tuple, list)) else (value, value, value)
            if len(parts) != 3 or not all(finite_number(part) for part in parts):
                return f"{name} is predicted as {value!r}; expected a finite number or (value, low, high)"
            middle, low, high = (float(part) for part in parts)
            found[name] = (middle, min(low, middle), max(high, middle))
        return found

    def _error(self, name: str, low: float, high: float) -> tuple[float, float]:
        """Shift and spread of the logarithm of measured / predicted."""
        if name in self._correction:
            shift, spread = self._correction[name]
        else:
            shift, spread = 0.0, (math.log(high / low) / (2 * _HALF_WIDTH) if 0 < low < high else 0.0)
        if name == "peak_bytes":
            shift += self._memory_margin
        return shift, spread

    def learn(self, predicted: Mapping[str, Prediction], result: Result) -> None:
        """Take in a result, in the order of release."""
        if not self._learns:
            return
        if result.state == "failed" and result.measured.get("out_of_memory"):
            self._memory_margin = min(self._memory_margin + 0.05, 0.7)
        for name, measured in result.measured.items():
            if name not in predicted or measured <= 0 or predicted[name][0] <= 0:
                continue
            if predicted[name][1] == predicted[name][2]:
                continue  # counted exactly, not predicted
            ratios = self._ratios.setdefault(name, [])
            ratios.append(math.log(measured / predicted[name][0]))
            if len(ratios) >= _LEARN_FROM:
                recent = np.array(ratios[-200:])
                middle = float(np.median(recent))
                spread = 1.4826 * float(np.median(np.abs(recent - middle)))
                # Few values say little of the spread: it is taken larger, by the factor of a t-distribution.
                n = len(recent)
                spread *= math.sqrt((n + 1) / n) * (1 + 2 / n)
                self._correction[name] = (middle, max(spread, _LEAST_SPREAD))


def check_budget(budget: Mapping[str, float] | None) -> dict[str, float]:
    """``budget`` as a dict. Raises ExplorationError for limits that are no positive numbers."""
    found = dict(budget or {})
    for name, limit in found.items():
        if not finite_number(limit) or limit <= 0:
            raise ExplorationError(f"budget: expected a positive number for {name!r}, got {limit!r}")
    return found
