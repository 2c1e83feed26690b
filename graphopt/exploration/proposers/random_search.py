"""`random`: points drawn evenly from those that are new and fit the budget. The baseline of every search."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from graphopt.exploration.pool import View
from graphopt.exploration.sieve import Nothing, Request, Sieve

__all__ = ["RandomSearch"]


@dataclass(frozen=True)
class RandomSearch:
    """Gated random search."""

    name: str = "random"

    def propose(self, request: Request, view: View, sieve: Sieve, random: np.random.Generator) -> Nothing | None:
        """Fill ``sieve.chosen``; see `graphopt.exploration.proposers.Proposer`."""
        while len(sieve.chosen) < request.count:
            if nothing := sieve.take_by_chance(random):
                return nothing
        return None
