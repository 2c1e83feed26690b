"""Proposers: which models to try next.

A proposer is asked for models by number, with a view of the pool, and fills a sieve. Its answer is a function of the
seed, the number of the request and the view: it keeps nothing between requests that does not follow from these.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from graphopt.errors import ExplorationError
from graphopt.exploration.gate import Gate
from graphopt.exploration.pool import View
from graphopt.exploration.proposers.annealing import Annealing
from graphopt.exploration.proposers.evolution import Evolution
from graphopt.exploration.proposers.plain_annealing import PlainAnnealing
from graphopt.exploration.proposers.random_search import RandomSearch
from graphopt.exploration.sieve import Candidate, Nothing, Refused, Request, Sieve

__all__ = ["PROPOSERS", "Answer", "Proposer", "answer", "as_proposer"]


class Proposer(Protocol):
    """What proposes models. One of the user's own has these two members."""

    @property
    def name(self) -> str:
        """How it is called in tables."""

    def propose(self, request: Request, view: View, sieve: Sieve, random: np.random.Generator) -> Nothing | None:
        """Choose ``request.count`` models by `Sieve.take`; or say that there is nothing left."""


PROPOSERS: dict[str, Callable[[], Proposer]] = {
    "anneal": Annealing,
    "anneal_plain": PlainAnnealing,
    "evolve": Evolution,
    "random": RandomSearch,
}
"""Those that have a name; and ``optuna:CLASS``."""


def as_proposer(given: Any) -> Proposer:
    """A proposer from its name, or the user's own. Raises ExplorationError where it is neither."""
    if isinstance(given, str):
        if given in PROPOSERS:
            return PROPOSERS[given]()
        kind, _, sampler = given.partition(":")
        if kind == "optuna":
            from graphopt.exploration.proposers.optuna_sampler import OptunaSampler

            return OptunaSampler(sampler or "TPESampler")
    elif callable(getattr(given, "propose", None)) and isinstance(getattr(given, "name", None), str):
        return given
    raise ExplorationError(
        f"proposer: expected one of {', '.join(PROPOSERS)}, 'optuna:CLASS' or an object with a name and propose(), got "
        f"{given!r}"
    )


class Answer:
    """What a generator answers: ``models`` that are new and fit, those ``refused``, and ``nothing`` where too few are
    left."""

    def __init__(self, request: Request, models: list[Candidate], refused: list[Refused], nothing: Nothing | None):
        self.request = request
        self.models = models
        self.refused = refused
        self.nothing = nothing


def answer(proposer: Proposer, seed: int, request: Request, view: View, gate: Gate) -> Answer:
    """Let ``proposer`` answer ``request``. The random stream belongs to the request."""
    sieve = Sieve(view, gate)
    nothing = proposer.propose(request, view, sieve, np.random.default_rng([seed, request.number]))
    return Answer(request, sieve.chosen[: request.count], list(sieve.refused.values()), nothing)
