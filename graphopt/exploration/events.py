"""What the master writes of a search: models, requests with what the gate refused, ends of trials, as rows.

Numbers are written with six digits. What is decided from then on is decided by what was written, so that a master that
begins anew from the file decides the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from graphopt.exploration.outcome import Outcome
from graphopt.exploration.pool import Model
from graphopt.exploration.search_space import SearchSpace
from graphopt.exploration.sieve import Candidate, Nothing, Refused, Request, described
from graphopt.exploration.study_file import Event

__all__ = ["KEPT_REFUSALS", "as_model", "end_event", "model_event", "request_event"]

KEPT_REFUSALS = 32
"""Of each request; the others are counted."""


def as_model(number: int, request: int, candidate: Candidate) -> Model:
    """A candidate that was chosen, as the model with this number."""
    predicted = {name: (_digits(v[0]), _digits(v[1]), _digits(v[2])) for name, v in candidate.predicted.items()}
    return Model(number, candidate.key, candidate.point, request, candidate.parent, candidate.how, predicted)


def model_event(model: Model) -> Event:
    """The row of a model."""
    body: dict[str, Any] = {"point": list(model.point), "request": model.request, "how": model.how}
    if model.parent is not None:
        body["parent"] = model.parent
    if model.predicted:
        body["predicted"] = _predicted(model)
    return Event("model", model.number, body, model.key)


def request_event(space: SearchSpace, request: Request, refused: Sequence[Refused], nothing: Nothing | None) -> Event:
    """The row of an answered request: which candidates the gate refused, and that ``nothing`` is left, where it is."""
    kept = [
        {"key": row.key, "point": list(row.point), "why": row.why, "predicted": _predicted(row)}
        for row in refused[:KEPT_REFUSALS]
    ]
    body: dict[str, Any] = {"refused": len(refused), "kept": kept, "results": request.results}
    if nothing is not None:
        body["nothing"] = described(space, nothing)
    return Event("request", request.number, body)


def end_event(number: int, outcome: Outcome, final: bool = False) -> Event:
    """The row of the end of a trial."""
    body: dict[str, Any] = {"state": outcome.state, "metrics": outcome.metrics, "seconds": _digits(outcome.seconds)}
    for name, value in (("cause", outcome.cause), ("curve", [list(pair) for pair in outcome.curve])):
        if value:
            body[name] = value
    for name, flag in (("final", final), ("out_of_memory", outcome.out_of_memory)):
        if flag:
            body[name] = True
    return Event("end", number, body)


def _predicted(row: Model | Refused) -> dict[str, list[float]]:
    return {name: [_digits(value) for value in values] for name, values in row.predicted.items()}


def _digits(value: float) -> float:
    return float(f"{value:.6g}")
