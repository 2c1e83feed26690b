"""What a trial is expected to take, by what others took: one that takes many times as long hangs."""

from __future__ import annotations

from statistics import median

from graphopt.exploration.history import Trial

__all__ = ["Durations"]

_ENOUGH = 3
_RECENT = 100
_SLOWER = 4.0
"""How much slower a worker may be than others on the same machine, as long as it is not known."""


class Durations:
    """Seconds of finished trials, with what their steps were predicted to take."""

    def __init__(self) -> None:
        self._all: list[tuple[float, float | None, int | None]] = []

    def add(self, trial: Trial) -> None:
        """A trial was finished: neither stopped early nor failed."""
        self._all.append((trial.seconds, _step(trial), trial.worker))

    def expected(self, trial: Trial, alike: bool) -> float | None:
        """Seconds that ``trial`` is expected to take: as predicted (``trial_seconds``), or by the trials of its worker;
        of all workers where these are ``alike``. Scaled by the predicted steps, where there are any. None where too
        little is known."""
        if "trial_seconds" in trial.predicted:
            return trial.predicted["trial_seconds"][0]
        recent = [duration for duration in self._all[-4 * _RECENT :] if duration[2] == trial.worker]
        slower = 1.0
        if len(recent) < _ENOUGH and alike:
            recent, slower = self._all[-_RECENT:], _SLOWER
        if len(recent) < _ENOUGH:
            return None
        step = _step(trial)
        ratios = [seconds / its for seconds, its, _ in recent if its]
        found = step * median(ratios) if step and ratios else median(seconds for seconds, _, _ in recent)
        return slower * found


def _step(trial: Trial) -> float | None:
    predicted = trial.predicted.get("step_seconds")
    return predicted[0] if predicted is not None and predicted[0] > 0 else None
