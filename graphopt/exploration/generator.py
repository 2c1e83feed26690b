"""The generator's work: a replica of the pool, and answers to requests. It runs in a process of its own beside each
trainer, or in the master; its answers are the same."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from graphopt.exploration.gate import Gate, Predictor
from graphopt.exploration.pool import Model, Pool, Result
from graphopt.exploration.proposers import Answer, Proposer, answer
from graphopt.exploration.search_space import SearchSpace
from graphopt.exploration.sieve import Request

__all__ = ["Generator", "GeneratorSetup", "Row"]

Row = Model | Result


@dataclass(frozen=True)
class GeneratorSetup:
    """All that a generator needs, sent to it once. See `graphopt.explore` for what they are."""

    space: SearchSpace
    proposer: Proposer
    seed: int
    budget: Mapping[str, float]
    predictor: Predictor | None
    confidence: float
    learns: bool


class Generator:
    """Answers requests, in the order of their numbers."""

    def __init__(self, setup: GeneratorSetup):
        self._setup = setup
        self._pool = Pool(setup.space)
        self._gate = Gate(setup.space, setup.budget, setup.predictor, confidence=setup.confidence, learns=setup.learns)
        self._learned = 0

    def feed(self, rows: Iterable[Row]) -> None:
        """The next rows of the pool."""
        for row in rows:
            if isinstance(row, Model):
                self._pool.add_model(row)
            else:
                self._pool.add_result(row)

    def answer(self, request: Request) -> Answer:
        """Propose models. Raises what the proposer raises."""
        view = self._pool.view(request.models, request.results)
        for result in view.results[self._learned :]:
            self._gate.learn(view.model(result.number).predicted, result)
        self._learned = len(view.results)
        return answer(self._setup.proposer, self._setup.seed, request, view, self._gate)
