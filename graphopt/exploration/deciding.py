"""Whether a trial that reports at a rung goes on: with which others it is compared, and what is written of it."""

from __future__ import annotations

from graphopt.exploration.early_stopping import ASHA
from graphopt.exploration.history import History, Trial
from graphopt.exploration.limits import Limits
from graphopt.exploration.study_file import Event

__all__ = ["decide"]


def decide(
    stopping: ASHA, history: History, limits: Limits, trial: Trial, rung: int, step: int, value: float
) -> tuple[bool, list[Event]]:
    """Whether ``trial`` goes on, and the rows of that. An earlier attempt may have been at the rung: what it reported
    counts, as a later one begins in the middle."""
    events = []
    if rung not in trial.rungs:
        events.append(Event("report", trial.number, {"rung": rung, "step": step, "value": value}))
    value = trial.rungs.get(rung, value)
    sign = history.objectives.signs[history.objectives.main]
    others = _compared(history, limits, trial)
    values = [sign * other.rungs[rung] for other in others if other is not trial and rung in other.rungs]
    return stopping.goes_on(sign * value, values), events


def _compared(history: History, limits: Limits, trial: Trial) -> list[Trial]:
    """In a reproducible search a trial is compared with those whose results its request could use: all of them have
    ended, whoever is fast."""
    if limits.window is None:
        return history.trials
    first = trial.number
    while first > 0 and history.trials[first - 1].request == trial.request:
        first -= 1
    return [other for other in history.trials[:first] if limits.uses(first, other.number)]
