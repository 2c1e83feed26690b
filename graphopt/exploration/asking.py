"""Requests for models: when the next one is due, which results it may use, and what its answer becomes.

Requests are answered one after the other: each sees all models before it, which is what keeps duplicates out. Which
results it sees is named in it: all of them as they come; or, in a reproducible search, those that `Limits` says by
their numbers, in an order of its own, whenever they came.
"""

from __future__ import annotations

from graphopt.exploration.events import as_model, model_event, request_event
from graphopt.exploration.history import History
from graphopt.exploration.limits import Limits
from graphopt.exploration.pool import Model
from graphopt.exploration.proposers import Answer
from graphopt.exploration.sieve import Request
from graphopt.exploration.study_file import Event

__all__ = ["Asking"]


class Asking:
    """``asked``: the request that is being answered, if any."""

    def __init__(self, history: History, limits: Limits):
        self.asked: Request | None = None
        self._history, self._limits = history, limits
        self._released = 0  # results that generators have
        self._ended: set[int] = set()  # models whose results wait for those that come into use before them
        self._order = limits.order() if limits.window is not None else iter(())
        self._due = next(self._order, None)
        self._refused = set(history.refusals)  # keys: what is refused again is not counted again

    def wants_models(self) -> bool:
        """Whether there are models to be generated yet."""
        trials = self._limits.trials
        return self._history.nothing is None and (trials is None or len(self._history.trials) < trials)

    def next(self, queued: int) -> Request | None:
        """The request that is due when so many models wait for a trainer, None if none is."""
        if self.asked is not None or queued >= self._limits.ahead or not self.wants_models():
            return None
        models = len(self._history.trials)
        results = self._limits.usable(models)
        if results is None:
            results = self._released
        elif results > self._released:
            return None  # a slow trial is waited for
        count = self._limits.queue
        if self._limits.trials is not None and self._limits.window is None:  # else requests do not depend on it
            count = min(count, self._limits.trials - models)
        self.asked = Request(self._history.requests, count, models, results)
        return self.asked

    def answered(self, answer: Answer) -> tuple[list[Event], list[Model]]:
        """The rows and the models of an answer; none of one that came twice, from a generator that was replaced after
        it had answered."""
        request = self.asked
        if request is None or answer.request != request:
            return [], []
        self.asked = None
        refused = [row for row in answer.refused if row.key not in self._refused]
        self._refused.update(row.key for row in refused)
        models = [as_model(request.models + i, request.number, found) for i, found in enumerate(answer.models)]
        told = request_event(self._history.space, request, refused, answer.nothing)
        return [told, *map(model_event, models)], models

    def release(self, number: int) -> list[int]:
        """Model ``number`` has ended: those whose results generators are to be given now, in this order."""
        if self._limits.window is None:
            released = [number]
        else:
            self._ended.add(number)
            released = []
            while self._due in self._ended:
                self._ended.remove(self._due)
                released.append(self._due)
                self._due = next(self._order, None)
        self._released += len(released)
        return released
