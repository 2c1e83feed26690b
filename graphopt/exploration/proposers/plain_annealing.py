"""`anneal_plain`: the source document read literally. Base models are picked from the pool, target bases among them by
simulated annealing on raw scores, and a new model is one change away from a target base. There is no surrogate."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from graphopt.exploration.pool import View, scale_of
from graphopt.exploration.proposers.start import start
from graphopt.exploration.ranking import best_first, scalarised
from graphopt.exploration.sieve import Nothing, Request, Sieve

__all__ = ["PlainAnnealing"]


@dataclass(frozen=True)
class PlainAnnealing:
    """``initial``: models by chance before it begins; ``tries``: before a model is drawn by chance instead."""

    initial: int = 16
    tries: int = 64
    name: str = "anneal_plain"

    def propose(self, request: Request, view: View, sieve: Sieve, random: np.random.Generator) -> Nothing | None:
        """Fill ``sieve.chosen``; see `graphopt.exploration.proposers.Proposer`."""
        if nothing := start(self.initial, request, view, sieve, random):
            return nothing
        while len(sieve.chosen) < request.count:
            targets = self._targets(view, random)
            for turn in range(self.tries):
                base = view.model(targets[turn % len(targets)])
                if sieve.take(view.space.move(base.point, random), base.number, self.name):
                    break
            else:
                if nothing := sieve.take_by_chance(random, "chance"):
                    return nothing
        return None

    def _targets(self, view: View, random: np.random.Generator) -> list[int]:
        """Numbers of the models that annealing accepts: best first, at a temperature that halves."""
        values = scalarised(view.scores, random)
        _, spread = scale_of(values)
        order = best_first(view.scores if view.scores.shape[1] > 1 else values[:, None], 14)
        best, temperature, accepted = values[order[0]], 1.0, []
        for place in order:
            if random.random() < math.exp(min(0.0, (values[place] - best) / (temperature * spread))):
                accepted.append(view.scored[place].number)
            temperature *= 0.5
        random.shuffle(accepted)
        return accepted or [view.scored[order[0]].number]
