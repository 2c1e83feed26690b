"""`anneal`: simulated annealing over the pool of all history models, guided by a surrogate.

The scheme of AIPerf (Ren et al., Big Data Mining and Analytics 4(3), 2021), with its weaknesses mended. All known
models stand in a queue, best first. At a temperature that halves from 1 to 1e-4, the first one is taken out and
accepted as a target base with probability min(1, exp((a - a_best) / T)); its neighbours (one knob changed) are judged
by the surrogate and enter the queue themselves, so that one call makes chains of several moves from a model of the
pool.

What is different: energies of old and new models are the same quantity (the upper confidence bound of the surrogate);
scores are scaled by their own spread, so that the temperature means the same for accuracies and for losses; the gate
stands inside the chain; hyper-parameters are inherited and mutated with the architecture; chains end in a descent at
temperature 0 (a quench), which looks at all neighbours; and each model is chosen with another share of curiosity, so
that workers who are served at the same time do not all go to one place (Hutter, Hoos, Leyton-Brown, Parallel algorithm
configuration, LION 2012).
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass

import numpy as np

from graphopt.exploration.pool import View, scale_of
from graphopt.exploration.proposers.start import start
from graphopt.exploration.ranking import best_first, scalarised
from graphopt.exploration.search_space import Point, SearchSpace
from graphopt.exploration.sieve import Nothing, Request, Sieve
from graphopt.exploration.surrogate import Kernel, Surrogate, choose_kernel, first_kernel, rows_to_keep

__all__ = ["Annealing"]

_FITTED = 200  # rows that a kernel is chosen from
_LONGEST = 20  # moves of a quench
_EXCHANGES = 2  # refused neighbours that are gone through at an edge
_LOOKS = 10  # admitted ones that are looked for behind each


@dataclass(frozen=True)
class _Step:
    """A candidate of a chain: its base in the pool and how it is valued."""

    value: float
    point: Point
    parent: int


@dataclass(frozen=True)
class _Judge:
    """Values points: the mean that is expected of them, and ``caution`` standard deviations."""

    space: SearchSpace
    surrogate: Surrogate
    caution: float

    def __call__(self, given: list[tuple[Point, int]]) -> list[_Step]:
        """A step for each (point, parent)."""
        if not given:
            return []
        mean, deviation = self.surrogate.predict(self.space.levels([point for point, _ in given]))
        values = (mean + self.caution * deviation).tolist()
        return [_Step(value, point, parent) for value, (point, parent) in zip(values, given)]


class Annealing:
    """The default proposer.

    Args:
        initial: models before the surrogate is asked: landmarks, then by chance.
        neighbours: of a base that is accepted.
        bases: models of the pool that a chain may begin from.
        chains: for each model; more look further.
        descents: of the best candidates of the chains, from how many a quench begins.
        caution: standard deviations that are added to the mean, on average: how much the unknown attracts.
        by_chance: share of models that are drawn without a surrogate.
    """

    name = "anneal"

    def __init__(
        self,
        initial: int = 16,
        neighbours: int = 8,
        bases: int = 16,
        chains: int = 3,
        descents: int = 2,
        caution: float = 1.0,
        by_chance: float = 0.05,
    ):
        self.initial = initial
        self.neighbours = neighbours
        self.bases = bases
        self.chains = chains
        self.descents = descents
        self.caution = caution
        self.by_chance = by_chance
        self._chosen: tuple[int, Kernel] | None = None

    def propose(self, request: Request, view: View, sieve: Sieve, random: np.random.Generator) -> Nothing | None:
        """Fill ``sieve.chosen``; see `graphopt.exploration.proposers.Proposer`."""
        if nothing := start(self.initial, request, view, sieve, random):
            return nothing
        if len(sieve.chosen) == request.count:
            return None
        values = scalarised(view.scores, random)
        surrogate = self._surrogate(view, values)
        while len(sieve.chosen) < request.count:
            judge = _Judge(view.space, surrogate, self.caution * float(random.exponential()))
            if random.random() < self.by_chance or not self._anneal(view, values, judge, sieve, random):
                if nothing := sieve.take_by_chance(random, "chance"):
                    return nothing
            last = sieve.chosen[-1]
            surrogate = surrogate.with_pending(view.space.levels([last.point]))
        return None

    # -- the surrogate ----------------------------------------------------------------------------------------------

    def _surrogate(self, view: View, values: np.ndarray) -> Surrogate:
        """Of all trials with scores, and of those that failed or were stopped as bad ones; pending ones as expected."""
        middle, spread = scale_of(values)
        # A trial that diverged says that it is bad, not how bad: far outliers would hide all else.
        scaled = np.clip((values - middle) / spread, -3.0, 6.0)
        numbers = [result.number for result in view.scored]
        bad = view.bad
        numbers = numbers + bad
        scaled = np.concatenate([scaled, np.full(len(bad), min(-1.0, float(np.quantile(scaled, 0.1))))])
        kept = rows_to_keep(scaled)
        rows = view.space.levels([view.model(numbers[i]).point for i in kept])
        pending = [model.point for model in view.pending[-64:]]
        surrogate = Surrogate(self._kernel(view), view.space.distances, rows, scaled[kept])
        return surrogate.with_pending(view.space.levels(pending)) if pending else surrogate

    def _kernel(self, view: View) -> Kernel:
        """Chosen from the results that were there when their number had last grown by a tenth: choosing takes many
        times as long as using it, and a generator that starts late must come to the same."""
        count = 8
        while (more := count + max(4, count // 10)) <= len(view.results):
            count = more
        if self._chosen is None or self._chosen[0] != count:
            earlier = view.earlier(min(count, len(view.results)))
            if not earlier.scored:
                return first_kernel(len(view.space.free))
            columns = [(column - scale_of(column)[0]) / scale_of(column)[1] for column in earlier.scores.T]
            scores = np.clip(np.mean(columns, 0), -3.0, 6.0)
            kept = rows_to_keep(scores, _FITTED)
            rows = view.space.levels([view.model(earlier.scored[i].number).point for i in kept])
            self._chosen = (count, choose_kernel(view.space.distances, rows, scores[kept]))
        return self._chosen[1]

    # -- the chain --------------------------------------------------------------------------------------------------

    def _anneal(self, view: View, values: np.ndarray, judge: _Judge, sieve: Sieve, random: np.random.Generator) -> bool:
        """Choose the best candidate of some chains. False where none was new and admitted."""
        found: dict[Point, _Step] = {}
        bases = self._bases(view, values, random)
        for _ in range(self.chains):
            self._chain(view, bases, judge, sieve, random, found)
        for step in _best(found, self.descents):
            self._quench(step, judge, sieve, random, found)
        most = 400 if sieve.gate.cheap else 20
        return any(sieve.take(step.point, step.parent, self.name) for step in _best(found, most))

    def _bases(self, view: View, values: np.ndarray, random: np.random.Generator) -> list[int]:
        """Places in ``view.scored``: the best, and a few of all others."""
        column = view.scores if view.scores.shape[1] > 1 else values[:, None]
        best = best_first(column, self.bases)
        others = random.integers(len(values), size=max(1, self.bases // 4)).tolist()
        return list(dict.fromkeys(best + others))

    def _chain(
        self,
        view: View,
        bases: list[int],
        judge: _Judge,
        sieve: Sieve,
        random: np.random.Generator,
        found: dict[Point, _Step],
    ) -> None:
        models = [view.model(view.scored[place].number) for place in bases]
        steps = judge([(model.point, model.number) for model in models])
        queue = [(-step.value, i, step) for i, step in enumerate(steps)]
        heapq.heapify(queue)
        entered, temperature, highest = len(queue), 1.0, -math.inf
        while queue and temperature > 1e-4:
            _, _, base = heapq.heappop(queue)
            highest = max(highest, base.value)
            if random.random() < math.exp((base.value - highest) / temperature):
                fresh = {}
                for _ in range(self.neighbours):
                    # In each space of both kinds, three moves of ten are of the training.
                    kind = "hp" if random.random() < 0.3 else "net"
                    point = view.space.move(base.point, random, kind)
                    if point not in found and sieve.plausible(point):
                        fresh[point] = base.parent
                for step in judge(list(fresh.items())):
                    found[step.point] = step
                    heapq.heappush(queue, (-step.value, entered, step))
                    entered += 1
            temperature *= 0.5

    def _quench(
        self, step: _Step, judge: _Judge, sieve: Sieve, random: np.random.Generator, found: dict[Point, _Step]
    ) -> None:
        """From ``step`` to its best neighbour, and on from there, until none is better.

        At the edge of a budget what is better is refused: to gain in one knob another one has to give. So where no
        neighbour is better and admitted, neighbours of the best ones that are refused are looked at."""
        for _ in range(_LONGEST):
            better = self._better(step, step.value, judge, random, found)
            best = next((other for other in better if sieve.plausible(other.point)), None)
            for refused in better[:_EXCHANGES] if best is None and not sieve.gate.open else ():
                through = self._better(refused, step.value, judge, random, found)
                if (best := next((o for o in through[:_LOOKS] if sieve.plausible(o.point)), None)) is not None:
                    break
            if best is None:
                return
            step = found[best.point] = best

    def _better(
        self, step: _Step, value: float, judge: _Judge, random: np.random.Generator, found: dict[Point, _Step]
    ) -> list[_Step]:
        """Neighbours of ``step`` that are worth more than ``value``, the best first."""
        around = [(point, step.parent) for point in judge.space.neighbours(step.point, random) if point not in found]
        return sorted((other for other in judge(around) if other.value > value), key=_by_value)


def _by_value(step: _Step) -> float:
    return -step.value


def _best(found: dict[Point, _Step], count: int) -> list[_Step]:
    return sorted(found.values(), key=_by_value)[:count]
