"""The master: schedules trials, owns the pool and its store, decides who goes on.

Each turn of its loop fills idle slots from the queue, asks for models where the queue runs low, waits for what happens,
and writes all of it in one transaction *before* anything follows from it: whatever is killed when, the store knows
every result that anything was based on.

Requests are answered one after the other: each sees all models before it, which is what keeps duplicates out. Which
results it sees is named in it: all of them as they come; or, in a reproducible search, those of the models numbered up
to ``window`` before its own, in the order of their numbers, whenever they came.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from graphopt.errors import BudgetTooTight
from graphopt.exploration.durations import Durations
from graphopt.exploration.early_stopping import ASHA
from graphopt.exploration.engines import Answered, Died, Ended, Engine, Happening, Ready, Reported
from graphopt.exploration.history import History, Trial, end_event, model_event
from graphopt.exploration.limits import Limits
from graphopt.exploration.outcome import Outcome
from graphopt.exploration.pool import Model, Result
from graphopt.exploration.ranking import best_first
from graphopt.exploration.sieve import Request, described
from graphopt.exploration.store import Event
from graphopt.exploration.trainer import Task

__all__ = ["Master"]

KEPT_REFUSALS = 32
"""Of each request; the others are counted."""

_DEATHS = 2
_KILLS = 4
"""Times that a trial may take its process with it, or lose it to a signal from outside, before it has failed."""


@dataclass
class _Running:
    trial: Trial
    since: float
    final: bool = False


@dataclass
class Master:
    """Runs a search until a limit is reached, nothing is left to try, or `stopping` is set.

    Args:
        write: keeps events, whole or not at all, before it returns.
        progress: called after each turn.
        budget: for ``best``: which models the final retraining takes.
    """

    engine: Engine
    history: History
    limits: Limits
    seed: int
    write: Callable[[list[Event]], None]
    stopping: ASHA | None = None
    progress: Callable[[Master], None] = lambda master: None
    budget: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.stop_asked = False
        self.running: dict[int, _Running] = {}
        self._idle: list[int] = []
        self._queue: list[int] = []
        self._finals: list[int] | None = None
        self._asked: Request | None = None
        self._released: list[int] = []
        self._ended: set[int] = set()
        self._refused = set(self.history.refusals)  # keys: what is refused again is not counted again
        self._contiguous = 0  # all models below this number have ended
        self._durations = Durations()
        self.started = self.engine.now()

    # -- the loop ---------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Search. The engine is left to the caller to close.

        Raises:
            BudgetTooTight: nothing was found that fits the budget.
            StoreError: the store cannot be written to.
            ExplorationError: processes or a proposer cannot go on.
        """
        self._take_up()
        while True:
            self._dispatch()
            self._request()
            if not self.running and self._asked is None and self._over():
                if self._finals is None and self.limits.retrain and not self.stop_asked:
                    self._finals = self._best_numbers()
                    continue
                if not self._finals or self.stop_asked:
                    self.progress(self)
                    return
            self._handle(self.engine.wait(self._patience()))
            self._stop_hung()
            self.progress(self)

    def _take_up(self) -> None:
        """Where the store left off."""
        rows: list[Model | Result] = []
        for trial in self.history.trials:
            rows.append(Model(trial.number, trial.key, trial.point, trial.request, trial.parent, trial.how,
                              trial.predicted))  # fmt: skip
            if trial.state == "queued":
                heapq.heappush(self._queue, trial.number)
        self.engine.feed(rows)
        for number in self.history.ended:
            self._end(self.history.trials[number])
        if self.history.nothing is not None:
            self.history.nothing = None  # another budget may be given now: asked again

    def _over(self) -> bool:
        """Whether no more models are to be tried."""
        return self.stop_asked or self._out_of_time() or (not self._waits() and not self._wants_models())

    def _waits(self) -> bool:
        """Whether a model waits for a trainer. Those beyond the number of trials wait for a later run."""
        return bool(self._queue) and (self.limits.trials is None or self._queue[0] < self.limits.trials)

    def _out_of_time(self) -> bool:
        seconds = self.limits.seconds
        return seconds is not None and self.engine.now() - self.started >= seconds

    def _dispatch(self) -> None:
        """Give idle trainers what waits: the lowest number first."""
        events, starts = [], []
        while self._idle and not self.stop_asked:
            if self._finals is not None:
                if not self._finals:
                    break
                number, final = self._finals.pop(0), True
            elif self._waits() and not self._out_of_time():
                number, final = heapq.heappop(self._queue), False
            else:
                break
            slot = self._idle.pop(0)
            trial = self.history.trials[number]
            body: dict[str, Any] = {"worker": slot} | ({"final": True} if final else {})
            events.append(Event("start", number, body))
            starts.append((slot, trial, final))
        if not starts:
            return
        self._record(events)
        for slot, trial, final in starts:
            self.running[slot] = _Running(trial, self.engine.now(), final)
            self.engine.start(slot, self._task(trial, final))

    def _task(self, trial: Trial, final: bool) -> Task:
        predicted = {name: value for name, (value, _, _) in trial.predicted.items()}
        seed = int(np.random.SeedSequence([self.seed, trial.number]).generate_state(1)[0])
        effort = self.limits.effort if final else 1.0
        return Task(trial.number, trial.point, seed, trial.deaths + trial.kills, predicted, effort, final)

    # -- models -----------------------------------------------------------------------------------------------------

    def _wants_models(self) -> bool:
        trials = self.limits.trials
        return self.history.nothing is None and (trials is None or len(self.history.trials) < trials)

    def _request(self) -> None:
        """Ask for models, so that the next one is ready before a trainer asks."""
        if self._asked is not None or self.stop_asked or self._out_of_time() or self._finals is not None:
            return
        if len(self._queue) >= self.limits.ahead or not self._wants_models():
            return
        models = len(self.history.trials)
        results = len(self._released)
        if self.limits.window is not None:
            results = max(0, models - self.limits.window)
            if results > len(self._released):
                return  # a slow trial is waited for
        count = self.limits.queue
        if self.limits.trials is not None and self.limits.window is None:  # else requests do not depend on it
            count = min(count, self.limits.trials - models)
        self._asked = Request(self.history.requests, count, models, results)
        self.engine.ask(self._asked)

    def _answered(self, happening: Answered, events: list[Event]) -> None:
        answer, request = happening.answer, self._asked
        if request is None or answer.request != request:
            return  # the answer of a generator that was replaced after it had answered
        self._asked = None
        fresh = [row for row in answer.refused if row.key not in self._refused]
        self._refused.update(row.key for row in fresh)
        kept = [
            {"key": row.key, "point": list(row.point), "why": row.why,
             "predicted": {name: [_short(v) for v in values] for name, values in row.predicted.items()}}
            for row in fresh[:KEPT_REFUSALS]
        ]  # fmt: skip
        body: dict[str, Any] = {"refused": len(fresh), "kept": kept, "results": request.results}
        nothing = answer.nothing
        if nothing is not None:
            body["nothing"] = described(self.history.space, nothing)
        events.append(Event("request", request.number, body))
        models = [
            Model(request.models + i, c.key, c.point, request.number, c.parent, c.how,
                  {name: (_short(v[0]), _short(v[1]), _short(v[2])) for name, v in c.predicted.items()})
            for i, c in enumerate(answer.models)
        ]  # fmt: skip
        events += [model_event(model) for model in models]
        if nothing is not None and not nothing.exhausted and not self.history.trials:
            self._record(events)
            raise _too_tight(body["nothing"])
        self._after.append(lambda: self._enqueue(models))

    def _enqueue(self, models: list[Model]) -> None:
        self.engine.feed(models)
        for model in models:
            heapq.heappush(self._queue, model.number)

    # -- what happens -----------------------------------------------------------------------------------------------

    def _handle(self, happenings: list[Happening]) -> None:
        """Write all that happened in one transaction, then let follow what follows."""
        events: list[Event] = []
        self._after: list[Callable[[], None]] = []
        for happening in happenings:
            if isinstance(happening, Ready):
                self._idle.append(happening.slot)
            elif isinstance(happening, Answered):
                self._answered(happening, events)
            elif isinstance(happening, Reported):
                self._reported(happening, events)
            elif isinstance(happening, Ended):
                if (running := self.running.pop(happening.slot, None)) is not None:
                    self._end_of(running, happening.outcome, events)
                    if not happening.outcome.out_of_memory:
                        self._idle.append(happening.slot)
            elif isinstance(happening, Died):
                self._died(happening, events)
        self._record(events)
        for follow in self._after:
            follow()

    def _record(self, events: list[Event]) -> None:
        if events:
            self.write(events)
            for event in events:
                self.history.apply(event)

    def _end_of(self, running: _Running, outcome: Outcome, events: list[Event]) -> None:
        events.append(end_event(running.trial.number, outcome, running.final))
        if not running.final:
            self._after.append(lambda: self._ended_now(running.trial))

    def _ended_now(self, trial: Trial) -> None:
        # Only whole trials of this run say how long others take: one stopped early says nothing of those that survive,
        # and an earlier run may have been on another machine.
        if trial.state == "done":
            self._durations.add(trial)
        self._end(trial)

    def _end(self, trial: Trial) -> None:
        """A trial has a result: release it to the pool."""
        self._ended.add(trial.number)
        if self.limits.window is None:
            released = [trial.number]
        else:
            released = []
            while self._contiguous in self._ended:
                released.append(self._contiguous)
                self._contiguous += 1
        self._released += released
        self.engine.feed([self.history.trials[number].result() for number in released])

    def _died(self, happening: Died, events: list[Event]) -> None:
        running = self.running.pop(happening.slot, None)
        if happening.slot in self._idle:
            self._idle.remove(happening.slot)
        if running is None:
            return
        trial = running.trial
        events.append(Event("died", trial.number, {"cause": happening.cause, "killed": happening.killed}))
        deaths, kills = trial.deaths + (not happening.killed), trial.kills + happening.killed
        if deaths >= _DEATHS or kills >= _KILLS:
            cause = f"{happening.cause}\n(after {deaths + kills} attempts)"
            self._end_of(running, Outcome("failed", {}, cause, self.engine.now() - running.since), events)
        elif running.final:
            assert self._finals is not None
            self._finals.insert(0, trial.number)
        else:
            self._after.append(lambda: heapq.heappush(self._queue, trial.number))

    # -- early stopping ---------------------------------------------------------------------------------------------

    def _reported(self, happening: Reported, events: list[Event]) -> None:
        running = self.running.get(happening.slot)
        if running is None or happening.rung is None:
            return
        goes_on = self._decided(running.trial, happening.rung, happening.step, happening.value, events)

        def answer() -> None:
            # Its process may have died meanwhile: the one that replaced it waits for a task, not for this.
            if self.running.get(happening.slot) is running:
                self.engine.decide(happening.slot, goes_on)

        self._after.append(answer)

    def decide_now(self, number: int, step: int, value: float, rung: int | None) -> bool:
        """For engines that run the trial in this thread: the answer to a report, when it comes."""
        if rung is None:
            return True
        events: list[Event] = []
        goes_on = self._decided(self.history.trials[number], rung, step, value, events)
        self._record(events)
        return goes_on

    def _decided(self, trial: Trial, rung: int, step: int, value: float, events: list[Event]) -> bool:
        """Whether a trial that reports at ``rung`` goes on. An earlier attempt may have been there: what it reported
        counts, as a later one begins in the middle."""
        if rung not in trial.rungs:
            events.append(Event("report", trial.number, {"rung": rung, "step": step, "value": value}))
        return self.goes_on(trial, rung, trial.rungs.get(rung, value))

    def goes_on(self, trial: Trial, rung: int, value: float) -> bool:
        """Whether a trial with ``value`` at ``rung`` is among the best. In a reproducible search it is compared with
        those whose results its request could use: all of them have ended, whoever is fast."""
        assert self.stopping is not None
        sign = self.history.objectives.signs[self.history.objectives.main]
        others = self.history.trials
        if self.limits.window is not None:
            first = trial.number
            while first > 0 and others[first - 1].request == trial.request:
                first -= 1
            others = others[: max(0, first - self.limits.window)]
        values = [sign * other.rungs[rung] for other in others if other is not trial and rung in other.rungs]
        return self.stopping.goes_on(sign * value, values)

    # -- trials that hang -------------------------------------------------------------------------------------------

    def _allowed(self, running: _Running) -> tuple[float, float | None]:
        """Seconds that a trial may take, and what it is expected to take, None if that is not known."""
        effort = self.limits.effort if running.final else 1.0
        expected = self._durations.expected(running.trial, self.engine.alike)
        if expected is None:
            return self.limits.first_seconds * effort, None
        return max(self.limits.hang_after * expected * effort, self.limits.least_seconds), expected * effort

    def _stop_hung(self) -> None:
        now = self.engine.now()
        for slot, running in list(self.running.items()):
            allowed, expected = self._allowed(running)
            took = now - running.since
            if took <= allowed:
                continue
            del self.running[slot]
            self.engine.stop(slot)
            told = f"{expected:.3g} s were expected" if expected is not None else "nothing was known of its duration"
            self._after = []
            events: list[Event] = []
            self._end_of(running, Outcome("failed", {}, f"it hung: stopped after {took:.3g} s; {told}", took), events)
            self._record(events)
            for follow in self._after:
                follow()

    def _patience(self) -> float:
        """Seconds until something has to be done though nothing happened."""
        now, found = self.engine.now(), 1.0
        for running in self.running.values():
            found = min(found, running.since + self._allowed(running)[0] - now + 1e-3)
        if self.limits.seconds is not None:
            found = min(found, self.started + self.limits.seconds - now + 1e-3)
        return max(found, 0.001)

    # -- the end ----------------------------------------------------------------------------------------------------

    def _best_numbers(self) -> list[int]:
        """The models of the final retraining: of the best, those that an earlier run has not retrained."""
        trials = self.history.done(self.budget)
        if not trials:
            return []
        scores = np.array([trial.scores for trial in trials])
        best = [trials[place] for place in best_first(scores, self.limits.retrain)]
        return [trial.number for trial in best if not trial.final]


def _too_tight(nothing: dict[str, Any]) -> BudgetTooTight:
    return BudgetTooTight(
        f"no model fits the budget. The nearest one that was found: {nothing['nearest']}. {nothing['why']}",
        nothing["nearest"] or "",
        nothing["needs"],
    )


def _short(value: float) -> float:
    return float(f"{value:.6g}")
