"""The master: schedules trials, owns the pool and its store, decides who goes on.

Each turn of its loop fills idle slots from the queue, asks for models where the queue runs low, waits for what happens,
and writes all of it in one transaction *before* anything follows from it: whatever is killed when, the store knows
every result that anything was based on.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import numpy as np

from graphopt.errors import BudgetTooTight
from graphopt.exploration.asking import Asking
from graphopt.exploration.deciding import decide
from graphopt.exploration.durations import Durations
from graphopt.exploration.early_stopping import ASHA
from graphopt.exploration.engines import Answered, Died, Ended, Engine, Happening, Ready, Reported
from graphopt.exploration.events import end_event
from graphopt.exploration.history import History, Trial
from graphopt.exploration.limits import Limits
from graphopt.exploration.outcome import Outcome
from graphopt.exploration.pool import Model, Result
from graphopt.exploration.ranking import best_first
from graphopt.exploration.sieve import described
from graphopt.exploration.study_file import Event
from graphopt.exploration.trainer import Task

__all__ = ["Master", "Watcher"]

_DEATHS = 2
_KILLS = 4
"""Times that a trial may take its process with it, or lose it to a signal from outside, before it has failed."""


class Watcher(Protocol):
    """Who is told how a search goes: a line on the terminal, logs for TensorBoard."""

    def turned(self, master: Master) -> None:
        """After each turn of the master's loop."""

    def reported(self, trial: Trial, step: int, value: float, final: bool) -> None:
        """A trial reported an intermediate value; ``final``: in the final retraining."""


@dataclass
class _Running:
    trial: Trial
    since: float
    final: bool = False


@dataclass
class _Turn:
    """What happened at a time: rows, and what follows once they are written."""

    events: list[Event] = field(default_factory=list)
    after: list[Callable[[], None]] = field(default_factory=list)


@dataclass
class Master:
    """Runs a search until a limit is reached, nothing is left to try, or `stop_asked` is set.

    Args:
        write: keeps events, whole or not at all, before it returns.
        budget: for ``best``: which models the final retraining takes.
    """

    engine: Engine
    history: History
    limits: Limits
    seed: int
    write: Callable[[list[Event]], None]
    stopping: ASHA | None = None
    watchers: Sequence[Watcher] = ()
    budget: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.stop_asked = False
        self.running: dict[int, _Running] = {}
        self._idle: list[int] = []
        self._queue: list[int] = []
        self._finals: list[int] | None = None
        self._asking = Asking(self.history, self.limits)
        self._durations = Durations(self.limits, self.engine.alike)
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
            # A request that nobody answers, for want of a machine, does not outlast the time: it is asked again later.
            ending = self.stop_asked or self._out_of_time()
            if not self.running and (ending or self._asking.asked is None) and self._over():
                if self._finals is None and self.limits.retrain and not self.stop_asked:
                    self._finals = self._best_numbers()
                    continue
                if not self._finals or self.stop_asked:
                    self._tell_watchers()
                    return
            self._handle(self.engine.wait(self._patience()))
            self._stop_hung()
            self._tell_watchers()

    def _tell_watchers(self) -> None:
        for watcher in self.watchers:
            watcher.turned(self)

    def _take_up(self) -> None:
        """Where the store left off."""
        rows: list[Model | Result] = []
        for trial in self.history.trials:
            rows.append(trial.model())
            if trial.state == "queued":
                heapq.heappush(self._queue, trial.number)
        self.engine.feed(rows)
        for number in self.history.ended:
            self._release(number)
        if self.history.nothing is not None:
            self.history.nothing = None  # another budget may be given now: asked again

    def _over(self) -> bool:
        """Whether no more models are to be tried."""
        return self.stop_asked or self._out_of_time() or (not self._waits() and not self._asking.wants_models())

    def _waits(self) -> bool:
        """Whether a model waits for a trainer. Those beyond the number of trials wait for a later run."""
        return bool(self._queue) and (self.limits.trials is None or self._queue[0] < self.limits.trials)

    def _out_of_time(self) -> bool:
        seconds = self.limits.seconds
        return seconds is not None and self.engine.now() - self.started >= seconds

    def _dispatch(self) -> None:
        """Give idle trainers what waits: the lowest number first."""
        turn = _Turn()
        for slot in [] if self.stop_asked else list(self._idle):
            if (number := self._next_for(slot)) is None:
                continue
            self._idle.remove(slot)
            trial, final = self.history.trials[number], self._finals is not None
            body: dict[str, Any] = {"worker": slot} | ({"final": True} if final else {})
            turn.events.append(Event("start", number, body))
            turn.after.append(partial(self._start, slot, trial, final))
        self._commit(turn)

    def _next_for(self, slot: int) -> int | None:
        """Take from the queue what an idle trainer is to run: the lowest number."""
        if self._finals is not None:
            return self._finals.pop(0) if self._finals else None
        if not self._waits() or self._out_of_time():
            return None
        number: int | None = self._queue[0]
        if self.limits.window is not None:
            number = self._fit_for(slot, self.limits.window)
        if number is not None:
            self._queue.remove(number)
            heapq.heapify(self._queue)
        return number

    def _fit_for(self, slot: int, window: int) -> int | None:
        """In a reproducible search, workers that are so slow that others would wait for them take those models whose
        results are used late, and leave the rest to the others, as long as there are any."""
        slow = self._durations.slow({*self.running, *self._idle, slot}, window, self.limits.patient_share)
        limit = self.limits.trials
        if not slow:
            return self._queue[0]
        fit = [n for n in self._queue if self.limits.patient(n) == (slot in slow) and (limit is None or n < limit)]
        return min(fit) if fit else None if slot in slow else self._queue[0]

    def _start(self, slot: int, trial: Trial, final: bool) -> None:
        self.running[slot] = _Running(trial, self.engine.now(), final)
        predicted = {name: value for name, (value, _, _) in trial.predicted.items()}
        seed = int(np.random.SeedSequence([self.seed, trial.number]).generate_state(1)[0])
        effort = self.limits.effort if final else 1.0
        task = Task(trial.number, trial.point, seed, trial.deaths + trial.kills, predicted, effort, final)
        self.engine.start(slot, task)

    def _request(self) -> None:
        """Ask for models, so that the next one is ready before a trainer asks."""
        if self.stop_asked or self._out_of_time() or self._finals is not None:
            return
        if (request := self._asking.next(len(self._queue))) is not None:
            self.engine.ask(request)

    # -- what happens -----------------------------------------------------------------------------------------------

    def _handle(self, happenings: list[Happening]) -> None:
        """Write all that happened in one transaction, then let follow what follows."""
        turn = _Turn()
        for happening in happenings:
            if isinstance(happening, Ready):
                self._idle.append(happening.slot)
            elif isinstance(happening, Answered):
                self._answered(happening, turn)
            elif isinstance(happening, Reported):
                self._reported(happening, turn)
            elif isinstance(happening, Ended):
                if (running := self.running.pop(happening.slot, None)) is not None:
                    self._ended(running, happening.outcome, turn)
                    if not happening.outcome.out_of_memory:
                        self._idle.append(happening.slot)
            elif isinstance(happening, Died):
                self._died(happening, turn)
        self._commit(turn)

    def _commit(self, turn: _Turn) -> None:
        if turn.events:
            self.write(turn.events)
            for event in turn.events:
                self.history.apply(event)
        for follow in turn.after:
            follow()

    def _answered(self, happening: Answered, turn: _Turn) -> None:
        events, models = self._asking.answered(happening.answer)
        if not events:
            return
        turn.events += events
        nothing = happening.answer.nothing
        if nothing is not None and not nothing.exhausted and not self.history.trials:
            self._commit(turn)
            raise _too_tight(described(self.history.space, nothing))
        turn.after.append(lambda: self._enqueue(models))

    def _enqueue(self, models: list[Model]) -> None:
        self.engine.feed(models)
        for model in models:
            heapq.heappush(self._queue, model.number)

    def _reported(self, happening: Reported, turn: _Turn) -> None:
        running = self.running.get(happening.slot)
        if running is None:
            return
        for watcher in self.watchers:
            watcher.reported(running.trial, happening.step, happening.value, running.final)
        if happening.rung is None or self.stopping is None:
            return
        goes_on, events = decide(
            self.stopping, self.history, self.limits, running.trial, happening.rung, happening.step, happening.value
        )
        turn.events += events

        def answer() -> None:
            # Its process may have died meanwhile: the one that replaced it waits for a task, not for this.
            if self.running.get(happening.slot) is running:
                self.engine.decide(happening.slot, goes_on)

        turn.after.append(answer)

    def decide_now(self, number: int, step: int, value: float, rung: int | None) -> bool:
        """For engines that run the trial in this thread: the answer to a report, when it comes."""
        trial = self.history.trials[number]
        for watcher in self.watchers:
            watcher.reported(trial, step, value, any(running.final for running in self.running.values()))
        if rung is None or self.stopping is None:
            return True
        goes_on, events = decide(self.stopping, self.history, self.limits, trial, rung, step, value)
        self._commit(_Turn(events))
        return goes_on

    def _ended(self, running: _Running, outcome: Outcome, turn: _Turn) -> None:
        trial = running.trial
        turn.events.append(end_event(trial.number, outcome, running.final))
        if not running.final:
            turn.after.append(lambda: self._result(trial))

    def _result(self, trial: Trial) -> None:
        if trial.state == "done":
            self._durations.add(trial)
        self._release(trial.number)

    def _release(self, number: int) -> None:
        """A model has a result: release it to the pool."""
        released = self._asking.release(number)
        self.engine.feed([self.history.trials[number].result() for number in released])

    def _died(self, happening: Died, turn: _Turn) -> None:
        running = self.running.pop(happening.slot, None)
        if happening.slot in self._idle:
            self._idle.remove(happening.slot)
        if running is None:
            return
        trial = running.trial
        turn.events.append(Event("died", trial.number, {"cause": happening.cause, "killed": happening.killed}))
        deaths, kills = trial.deaths + (not happening.killed), trial.kills + happening.killed
        if deaths >= _DEATHS or kills >= _KILLS:
            cause = f"{happening.cause}\n(after {deaths + kills} attempts)"
            self._ended(running, Outcome("failed", {}, cause, self.engine.now() - running.since), turn)
        elif running.final:
            assert self._finals is not None
            self._finals.insert(0, trial.number)
        else:
            turn.after.append(lambda: heapq.heappush(self._queue, trial.number))

    # -- time -------------------------------------------------------------------------------------------------------

    def _stop_hung(self) -> None:
        now = self.engine.now()
        for slot, running in list(self.running.items()):
            allowed, expected = self._durations.allowed(running.trial, running.final)
            took = now - running.since
            if took <= allowed:
                continue
            del self.running[slot]
            self.engine.stop(slot)
            told = f"{expected:.3g} s were expected" if expected is not None else "nothing was known of its duration"
            turn = _Turn()
            self._ended(running, Outcome("failed", {}, f"it hung: stopped after {took:.3g} s; {told}", took), turn)
            self._commit(turn)

    def _patience(self) -> float:
        """Seconds until something has to be done though nothing happened."""
        now, found = self.engine.now(), 1.0
        for running in self.running.values():
            found = min(found, running.since + self._durations.allowed(running.trial, running.final)[0] - now + 1e-3)
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
