"""Ranges of hyper-parameters: each is a finite list of values.

A search cannot tell a learning rate of 0.001 from one of 0.00100001, but a table of trials can, and then runs the same
trial twice. So a continuous range is a grid, dense enough for any search, and every point has one canonical key.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from graphopt.errors import ExplorationError

__all__ = ["HyperParameter", "choice", "integer", "linear", "log"]

_DIGITS = 6


@dataclass(frozen=True)
class HyperParameter:
    """The values that a hyper-parameter may have.

    Attributes:
        values: all of them; numbers, strings, booleans, None, or tuples of these.
        ordered: whether neighbours in ``values`` are alike. Moves go a few places up or down then, else anywhere.
        when: the hyper-parameter counts only where others have certain values: ``{"optimizer": ("sgd",)}``. Elsewhere
            it is not given to the trial, and points that differ in it alone are the same.
    """

    values: tuple[Any, ...]
    ordered: bool = True
    when: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.values:
            raise ExplorationError("hyper-parameter: expected at least one value, got none")
        for value in self.values:
            if not isinstance(value, (bool, int, float, str, tuple, type(None))):
                raise ExplorationError(
                    f"hyper-parameter: expected numbers, strings, booleans, tuples or None, got {value!r}; give a name "
                    "and look the object up in the trial"
                )
            if isinstance(value, float) and not math.isfinite(value):
                raise ExplorationError(f"hyper-parameter: {value!r} is no finite number")
        if len({(type(v), v) for v in self.values}) != len(self.values):
            raise ExplorationError(f"hyper-parameter: a value occurs twice in {list(self.values)}")


def log(low: float, high: float, *, steps: int = 41, when: Mapping[str, Any] | None = None) -> HyperParameter:
    """``steps`` values from ``low`` to ``high``, each the same factor above the one before.

    >>> log(1e-3, 1e-1, steps=3).values
    (0.001, 0.01, 0.1)
    """
    _check("log", low, high, steps)
    if low <= 0:
        raise ExplorationError(f"log: expected 0 < low, got low={low!r}; use linear for ranges that include 0")
    return HyperParameter(_rounded(np.geomspace(low, high, steps)), when=_when(when))


def linear(low: float, high: float, *, steps: int = 41, when: Mapping[str, Any] | None = None) -> HyperParameter:
    """``steps`` values from ``low`` to ``high``, equally far apart.

    >>> linear(0, 1, steps=3).values
    (0.0, 0.5, 1.0)
    """
    _check("linear", low, high, steps)
    return HyperParameter(_rounded(np.linspace(low, high, steps)), when=_when(when))


def integer(low: int, high: int, *, step: int = 1, when: Mapping[str, Any] | None = None) -> HyperParameter:
    """Integers from ``low`` to ``high``, both included.

    >>> integer(2, 8, step=3).values
    (2, 5, 8)
    """
    for name, value in (("low", low), ("high", high), ("step", step)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise ExplorationError(f"integer: expected an integer for {name}, got {value!r}")
    if low > high or step < 1:
        raise ExplorationError(f"integer: expected low <= high and step >= 1, got {low}, {high}, step={step}")
    if (high - low) // step >= 100_000:
        raise ExplorationError(f"integer: {low} to {high} are more than 100,000 values; give a larger step, or use log")
    return HyperParameter(tuple(range(low, high + 1, step)), when=_when(when))


def choice(*values: Any, ordered: bool | None = None, when: Mapping[str, Any] | None = None) -> HyperParameter:
    """One of ``values``. They are taken as ordered if they are ascending numbers, unless ``ordered`` says otherwise.

    >>> choice(64, 128, 256).ordered, choice("sgd", "adamw").ordered
    (True, False)
    """
    if ordered is None:
        numbers = all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values)
        ordered = numbers and list(values) == sorted(values)
    return HyperParameter(tuple(values), ordered, _when(when))


def _check(what: str, low: float, high: float, steps: int) -> None:
    for name, value in (("low", low), ("high", high)):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ExplorationError(f"{what}: expected a finite number for {name}, got {value!r}")
    if low >= high:
        raise ExplorationError(f"{what}: expected low < high, got {low!r} and {high!r}")
    if isinstance(steps, bool) or not isinstance(steps, int) or not 2 <= steps <= 10_000:
        raise ExplorationError(f"{what}: expected 2 to 10,000 steps, got {steps!r}")


def _rounded(values: np.ndarray) -> tuple[float, ...]:
    """With six digits, so that they read well, unless that made two of them equal."""
    short = tuple(float(f"{value:.{_DIGITS}g}") for value in values)
    return short if len(set(short)) == len(short) else tuple(float(value) for value in values)


def _when(given: Mapping[str, Any] | None) -> dict[str, tuple[Any, ...]]:
    """Conditions as tuples of admitted values."""
    return {
        name: tuple(values) if isinstance(values, Sequence) and not isinstance(values, str) else (values,)
        for name, values in (given or {}).items()
    }
