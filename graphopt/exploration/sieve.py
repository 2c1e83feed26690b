"""The sieve: every candidate of a request passes it. Known models and those that break the budget stay behind."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from graphopt.exploration.gate import Gate, Prediction, Verdict
from graphopt.exploration.pool import View
from graphopt.exploration.search_space import Point, SearchSpace

__all__ = ["Candidate", "Nothing", "Refused", "Request", "Sieve"]

_FEW = 50_000
"""Spaces with at most so many points are listed when chance finds nothing new."""


@dataclass(frozen=True)
class Request:
    """What the master asks of a generator: ``count`` new models, from the first ``models`` models and ``results``
    results of the pool. Its answer is a function of the request and of that prefix, wherever it is made."""

    number: int
    count: int
    models: int
    results: int


@dataclass(frozen=True)
class Candidate:
    """A model that is proposed. ``parent``: the number of the model it was made from."""

    point: Point
    key: str
    parent: int | None = None
    how: str = ""
    predicted: dict[str, Prediction] = field(default_factory=dict)


@dataclass(frozen=True)
class Refused:
    """A candidate that the gate refused, with the numbers."""

    point: Point
    key: str
    predicted: dict[str, Prediction]
    why: str


@dataclass(frozen=True)
class Nothing:
    """No new model can be proposed: ``exhausted`` if all that fit were; else ``nearest`` fits the budget best, and its
    ``why`` says by how much it does not."""

    exhausted: bool
    nearest: Point | None = None
    predicted: dict[str, Prediction] = field(default_factory=dict)
    why: str = ""


class Sieve:
    """Of one request: what was chosen, and what was refused."""

    def __init__(self, view: View, gate: Gate):
        self.space: SearchSpace = view.space
        self.view = view
        self.gate = gate
        self.chosen: list[Candidate] = []
        self.refused: dict[str, Refused] = {}
        self._chosen_keys: set[str] = set()
        self._nearest: tuple[float, Point, Verdict] | None = None

    def plausible(self, point: Point) -> bool:
        """Whether ``point`` is new and, where predictions are cheap, admitted by the gate."""
        key = self.space.key(point)
        if key in self._chosen_keys or self.view.has(key):
            return False
        return not self.gate.cheap or self._verdict(point, key).admitted

    def take(self, point: Point, parent: int | None = None, how: str = "") -> bool:
        """Choose ``point`` if it is new and admitted."""
        key = self.space.key(point)
        if key in self._chosen_keys or self.view.has(key):
            return False
        verdict = self._verdict(point, key)
        if verdict.admitted:
            self._chosen_keys.add(key)
            self.chosen.append(Candidate(point, key, parent, how, verdict.predicted))
        return verdict.admitted

    def _verdict(self, point: Point, key: str) -> Verdict:
        verdict = self.gate.judge(point, key)
        if not verdict.admitted:
            if key not in self.refused:
                self.refused[key] = Refused(point, key, verdict.predicted, verdict.why)
            if self._nearest is None or verdict.excess < self._nearest[0]:
                self._nearest = (verdict.excess, point, verdict)
        return verdict

    # -- by chance --------------------------------------------------------------------------------------------------

    def take_by_chance(self, random: np.random.Generator, how: str = "random") -> Nothing | None:
        """Choose one point by chance; what fits a tight budget is looked for among ever smaller nets, then by going
        downhill, and in small spaces by listing all. Says so where nothing is left."""
        tries = 400 if self.gate.cheap else 12
        for turn in range(tries):
            # Evenly from all at first: which models are tried must not depend on the budget more than it has to.
            bias = 1.0 if turn < tries // 4 else 1.0 + 3.0 * turn / tries
            if self.take(self._sample(random, bias), None, how):
                return None
        if self.space.size <= _FEW and self.gate.cheap:
            fresh = [point for point in self.space.all_points() if self.plausible(point)]
            if fresh:
                self.take(fresh[int(random.integers(len(fresh)))], None, how)
                return None
        elif self._downhill(random, how):
            return None
        return self._nothing(how)

    def _sample(self, random: np.random.Generator, bias: float) -> Point:
        if bias == 1.0:
            return self.space.sample(random)
        return self.space.canonical(
            tuple(
                int(k.size * random.random() ** (bias if k.kind == "net" and k.range.ordered else 1.0))
                for k in self.space.knobs
            )
        )

    def _downhill(self, random: np.random.Generator, how: str) -> bool:
        """From what was nearest to the budget, moves that come nearer to it, or leave it as near."""
        if self._nearest is None:  # nothing was refused: all that was looked at is known
            return any(self.take(self.space.move(self.space.sample(random), random), None, how) for _ in range(1000))
        for start in (self.space.landmarks()[1], self._nearest[1]):
            point = start
            excess = self._excess(point)
            for _ in range(600 if self.gate.cheap else 12):
                if self.take(point, None, how):
                    return True
                new = self.space.move(point, random)
                if (found := self._excess(new)) <= excess:
                    point, excess = new, found
        return False

    def _excess(self, point: Point) -> float:
        verdict = self._verdict(point, self.space.key(point))
        return min(verdict.excess, 0.0) if verdict.admitted else verdict.excess

    def _nothing(self, how: str) -> Nothing | None:
        """That nothing is left, with what is nearest to the budget; None where that keeps it, and is taken."""
        if self.view.count or self.chosen or self._nearest is None:
            return Nothing(exhausted=True)
        excess, point, verdict = self._nearest
        point = self._steepest(point) if math.isfinite(excess) else point
        if self.take(point, None, how):
            return None
        verdict = self.gate.judge(point, self.space.key(point))
        return Nothing(False, point, verdict.predicted, verdict.why)

    def _steepest(self, point: Point) -> Point:
        """The end of a descent that looks at each value of each knob: no single change comes nearer to the budget."""
        best = self._excess(point)
        looks = 2000 if self.gate.cheap else 20
        while looks > 0:
            better = None
            for i in self.space.free:
                for value in range(self.space.knobs[i].size):
                    looks -= 1
                    other = self.space.canonical((*point[:i], value, *point[i + 1 :]))
                    if (found := self._excess(other)) < best:
                        best, better = found, other
            if better is None:
                break
            point = better
        return point


def described(space: SearchSpace, nothing: Nothing) -> dict[str, Any]:
    """A `Nothing` as plain data."""
    return {
        "exhausted": nothing.exhausted,
        "nearest": None if nothing.nearest is None else space.describe(nothing.nearest),
        "needs": {name: value for name, (value, _, _) in nothing.predicted.items()},
        "why": nothing.why,
    }
