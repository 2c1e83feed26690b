"""The history of a study: all models and what became of them, built from the events of its store.

The master applies each event after it is on file; a reader applies those it finds. Both see the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from graphopt.exploration.outcome import Objectives
from graphopt.exploration.pool import Model, Result
from graphopt.exploration.search_space import Point, SearchSpace
from graphopt.exploration.study_file import Event

__all__ = ["History", "Refusal", "Trial"]

OPEN = ("queued", "running")
"""States of models that have no result yet."""


@dataclass
class Trial:
    """A model of the study and what became of it.

    Attributes:
        number: models are counted from 0 in the order in which they were generated.
        state: queued, running, done, pruned (stopped early), invalid (no score), failed.
        sizes: of the architecture; hyper_parameters: those that count.
        metrics: as the trial returned them; ``final``: of the final retraining.
        scores: of each objective, the larger the better; None where there are none.
        predicted: (value, low, high) by name. parent: the number of the model it was made from. how: by what.
        attempts: how often it was started. seconds: of the trial. cause: why it failed, is invalid or was stopped.
        curve: some of the (step, value) it reported. rungs: values at the rungs of early stopping.
    """

    number: int
    key: str
    point: Point
    sizes: dict[str, Any]
    hyper_parameters: dict[str, Any]
    state: str = "queued"
    metrics: dict[str, float] = field(default_factory=dict)
    scores: tuple[float, ...] | None = None
    predicted: dict[str, tuple[float, float, float]] = field(default_factory=dict)
    parent: int | None = None
    how: str = ""
    request: int = 0
    attempts: int = 0
    deaths: int = 0
    kills: int = 0
    seconds: float = 0.0
    cause: str = ""
    curve: list[tuple[int, float]] = field(default_factory=list)
    rungs: dict[int, float] = field(default_factory=dict)
    final: dict[str, float] = field(default_factory=dict)
    worker: int | None = None
    out_of_memory: bool = False

    def model(self) -> Model:
        """Its row in the pool."""
        return Model(self.number, self.key, self.point, self.request, self.parent, self.how, self.predicted)

    def result(self) -> Result:
        """The row of its result in the pool."""
        measured = dict(self.metrics) | ({"out_of_memory": 1.0} if self.out_of_memory else {})
        return Result(self.number, self.state, self.scores if self.state == "done" else None, measured)


@dataclass(frozen=True)
class Refusal:
    """A candidate that the gate refused: never built. ``predicted``: (value, low, high) by name."""

    key: str
    point: Point
    predicted: dict[str, tuple[float, float, float]]
    why: str


class History:
    """Trials by number, refusals by key, and the order in which trials ended."""

    def __init__(self, space: SearchSpace, objectives: Objectives):
        self.space = space
        self.objectives = objectives
        self.trials: list[Trial] = []
        self.refusals: dict[str, Refusal] = {}
        self.refused = 0  # candidates, those beyond what is kept of a request too; each counts once in a run
        self.requests = 0
        self.ended: list[int] = []
        self.nothing: dict[str, Any] | None = None
        self.seconds = 0.0  # of all runs before this one
        self.runs = 0

    def apply(self, event: Event) -> None:
        """Take in one event."""
        getattr(self, f"_{event.kind}", self._unknown)(event)

    def replay(self, events: Iterable[Event]) -> None:
        """Take in all events of a store."""
        for event in events:
            self.apply(event)

    def _unknown(self, event: Event) -> None:
        """An event of a later version of the library that does not change what is known here."""

    def _model(self, event: Event) -> None:
        body, point = event.body, tuple(event.body["point"])
        self.trials.append(
            Trial(
                len(self.trials), str(event.key), point, self.space.sizes(point), self.space.hyper_parameters(point),
                predicted=_predicted(body), parent=body.get("parent"), how=body.get("how", ""),
                request=body["request"],
            )
        )  # fmt: skip

    def _request(self, event: Event) -> None:
        self.requests = int(event.number or 0) + 1
        self.refused += event.body["refused"]
        for row in event.body["kept"]:
            self.refusals[row["key"]] = Refusal(row["key"], tuple(row["point"]), _predicted(row), row["why"])
        if event.body.get("nothing"):
            self.nothing = dict(event.body["nothing"])

    def _start(self, event: Event) -> None:
        trial = self._of(event)
        trial.attempts += 1
        trial.worker = event.body.get("worker")
        if not event.body.get("final"):
            trial.state = "running"

    def _report(self, event: Event) -> None:
        self._of(event).rungs[int(event.body["rung"])] = float(event.body["value"])

    def _died(self, event: Event) -> None:
        trial = self._of(event)
        trial.kills += bool(event.body["killed"])
        trial.deaths += not event.body["killed"]
        if trial.state == "running":
            trial.state = "queued"

    def _end(self, event: Event) -> None:
        trial, body = self._of(event), event.body
        if body.get("final"):
            trial.final = dict(body["metrics"]) if body["state"] == "done" else {}
            return
        trial.state, trial.metrics, trial.cause = body["state"], dict(body["metrics"]), body.get("cause", "")
        trial.seconds, trial.out_of_memory = float(body["seconds"]), bool(body.get("out_of_memory"))
        trial.curve = [(int(step), float(value)) for step, value in body.get("curve", ())]
        if trial.state == "done":
            trial.scores = self.objectives.scores(trial.metrics)
        self.ended.append(trial.number)

    def _run(self, event: Event) -> None:
        self.runs += 1
        for trial in self.trials:  # what ran when the last master ended is to be run again
            if trial.state == "running":
                trial.state = "queued"

    def _pause(self, event: Event) -> None:
        self.seconds += float(event.body["seconds"])

    def _of(self, event: Event) -> Trial:
        assert event.number is not None
        return self.trials[event.number]

    # -- what is asked of it ----------------------------------------------------------------------------------------

    def done(self, budget: Mapping[str, float] | None = None) -> list[Trial]:
        """Trials with scores that keep ``budget``, by what was measured and else by what was predicted."""
        return [
            trial
            for trial in self.trials
            if trial.scores is not None and all(within(trial, name, limit) for name, limit in (budget or {}).items())
        ]


def within(trial: Trial, name: str, limit: float) -> bool:
    """Whether ``trial`` keeps a limit, as far as is known."""
    if name in trial.metrics:
        return trial.metrics[name] <= limit
    return name not in trial.predicted or trial.predicted[name][0] <= limit


def _predicted(body: Mapping[str, Any]) -> dict[str, tuple[float, float, float]]:
    return {name: (v[0], v[1], v[2]) for name, v in body.get("predicted", {}).items()}
