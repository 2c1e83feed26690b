"""The pool of all models: what a proposer sees of the search so far.

The master owns the pool; each generator keeps a replica that is fed row by row. There are two kinds of rows: a model,
when it is generated, and a result, when it is released. A request names the prefix of both that it may use. Two
replicas that were fed the same rows answer it alike, wherever they are and whenever they were started.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from graphopt.exploration.search_space import Point, SearchSpace

__all__ = ["Model", "Pool", "Result", "View"]


@dataclass(frozen=True)
class Model:
    """A model as it was generated. ``number`` counts all models of a study from 0; ``parent`` is the number of the one
    it was made from, if any; ``how`` it came about; ``predicted``: (value, low, high) by name."""

    number: int
    key: str
    point: Point
    request: int
    parent: int | None = None
    how: str = ""
    predicted: dict[str, tuple[float, float, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Result:
    """What became of a model: ``state`` is done, pruned, failed or invalid; ``scores``: of each objective, the larger
    the better, None where there is none; ``measured``: what the trial measured of what was predicted."""

    number: int
    state: str
    scores: tuple[float, ...] | None = None
    measured: dict[str, float] = field(default_factory=dict)


class Pool:
    """Models by number, and results in the order of their release."""

    def __init__(self, space: SearchSpace):
        self.space = space
        self.models: list[Model] = []
        self.results: list[Result] = []
        self._numbers: dict[str, int] = {}
        self._released: dict[int, int] = {}  # place of a model's result
        self._scored: list[Result] = []
        self._scored_by = [0]  # by the number of results, how many have scores
        self._scores = np.empty((64, 1))

    def add_model(self, model: Model) -> None:
        """The next model. Raises ValueError where its number or key cannot be."""
        if model.number != len(self.models) or model.key in self._numbers:
            raise ValueError(f"model {model.number} ({model.key}): expected number {len(self.models)} and a new key")
        self._numbers[model.key] = model.number
        self.models.append(model)

    def add_result(self, result: Result) -> None:
        """The next result that is released."""
        self._released[result.number] = len(self.results)
        self.results.append(result)
        if result.state == "done" and result.scores is not None:
            count = len(self._scored)
            if not count:
                self._scores = np.empty((64, len(result.scores)))
            elif count == len(self._scores):
                self._scores = np.concatenate([self._scores, np.empty_like(self._scores)])
            self._scores[count] = result.scores
            self._scored.append(result)
        self._scored_by.append(len(self._scored))

    def number_of(self, key: str) -> int | None:
        """The model with this key, if there is one."""
        return self._numbers.get(key)

    def view(self, models: int, results: int) -> View:
        """The pool as it was with so many models and results. Raises ValueError where it has fewer."""
        if models > len(self.models) or results > len(self.results):
            raise ValueError(
                f"a replica with {len(self.models)} models and {len(self.results)} results was asked for {models} and "
                f"{results}"
            )
        return View(self, models, results)


class View:
    """A prefix of the pool. All that a proposer may know of the search."""

    def __init__(self, pool: Pool, models: int, results: int):
        self.space = pool.space
        self.count = models
        self.results: Sequence[Result] = pool.results[:results]
        self._pool = pool

    def model(self, number: int) -> Model:
        """A model of the view."""
        if number >= self.count:
            raise IndexError(number)
        return self._pool.models[number]

    def earlier(self, results: int) -> View:
        """The same models with the first ``results`` results."""
        return View(self._pool, self.count, results)

    def has(self, key: str) -> bool:
        """Whether a model with this key was generated before."""
        number = self._pool.number_of(key)
        return number is not None and number < self.count

    @cached_property
    def scored(self) -> list[Result]:
        """Results of finished trials that have all scores: they may be parents."""
        return self._pool._scored[: self._pool._scored_by[len(self.results)]]

    @cached_property
    def bad(self) -> list[int]:
        """Numbers of models whose trials failed, were stopped early or gave no score."""
        return [] if len(self.scored) == len(self.results) else [r.number for r in self.results if r.state != "done"]

    @cached_property
    def pending(self) -> list[Model]:
        """Models without a result in this view: queued, running, or not yet released."""
        released, results = self._pool._released, len(self.results)
        return [m for m in self._pool.models[: self.count] if released.get(m.number, results) >= results]

    @cached_property
    def scores(self) -> np.ndarray:
        """Of `scored`, float64 of shape (results, objectives), the larger the better."""
        return self._pool._scores[: len(self.scored)]


def scale_of(values: np.ndarray) -> tuple[float, float]:
    """The middle of ``values`` and how far they lie from it (median absolute deviation, as a standard deviation): what
    makes scores of any unit comparable. The scale is never 0."""
    if not len(values):
        return 0.0, 1.0
    middle = float(np.median(values))
    spread = 1.4826 * float(np.median(np.abs(values - middle)))
    if spread <= 0:  # most are equal
        spread = float(np.std(values))
    return middle, spread if spread > 0 and math.isfinite(spread) else 1.0


def finite_number(value: Any) -> bool:
    """Whether ``value`` can be a score: a finite int or float (of numpy too), no boolean."""
    if isinstance(value, (bool, np.bool_)):
        return False
    return isinstance(value, (int, float, np.integer, np.floating)) and math.isfinite(value)
