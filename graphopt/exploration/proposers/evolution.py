"""`evolve`: regularised evolution (Real et al., AAAI 2019): the latest models are the population, the best of a few
drawn from it is the parent, the child is one change away. The old die, not the bad."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from graphopt.exploration.pool import View
from graphopt.exploration.proposers.start import start
from graphopt.exploration.ranking import best_first
from graphopt.exploration.sieve import Nothing, Request, Sieve

__all__ = ["Evolution"]


@dataclass(frozen=True)
class Evolution:
    """``population``: how many of the latest results live; ``tournament``: how many of them compete for a child."""

    population: int = 50
    tournament: int = 10
    tries: int = 64
    name: str = "evolve"

    def propose(self, request: Request, view: View, sieve: Sieve, random: np.random.Generator) -> Nothing | None:
        """Fill ``sieve.chosen``; see `graphopt.exploration.proposers.Proposer`."""
        # A population of half its size is enough to begin; the paper fills it by chance.
        if nothing := start(min(self.population, 20), request, view, sieve, random):
            return nothing
        while len(sieve.chosen) < request.count:
            for _ in range(self.tries):
                parent = self._parent(view, random)
                if sieve.take(view.space.move(view.model(parent).point, random), parent, self.name):
                    break
            else:
                if nothing := sieve.take_by_chance(random, "chance"):
                    return nothing
        return None

    def _parent(self, view: View, random: np.random.Generator) -> int:
        first = max(0, len(view.scored) - self.population)
        size = len(view.scored) - first
        drawn = first + random.choice(size, size=min(self.tournament, size), replace=False)
        return view.scored[drawn[best_first(view.scores[drawn], 1)[0]]].number
