"""How long a trial may take, by what others took: one that takes many times as long hangs."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterable
from statistics import median

from graphopt.exploration.history import Trial
from graphopt.exploration.limits import Limits

__all__ = ["Durations"]

_ENOUGH = 3
_RECENT = 100
_SLOWER = 4.0
"""How much slower a worker may be than others on the same machine, as long as it is not known."""


class Durations:
    """Seconds of finished trials of this run, with what their steps were predicted to take.

    Args:
        alike: whether all workers are about as fast, so that what a trial took in one says what it takes in another.
    """

    def __init__(self, limits: Limits, alike: bool) -> None:
        self._limits, self._alike = limits, alike
        self._all: list[tuple[float, float | None, int | None]] = []
        self._by_worker: defaultdict[int, deque[float]] = defaultdict(lambda: deque(maxlen=8))

    def add(self, trial: Trial) -> None:
        """A trial was finished: neither stopped early, which would say nothing of those that survive, nor failed."""
        self._all.append((trial.seconds, _step(trial), trial.worker))
        if trial.worker is not None:
            self._by_worker[trial.worker].append(trial.seconds)

    def slow(self, workers: Iterable[int], window: int, share: float) -> set[int]:
        """Workers so slow that all together end more than ``window`` trials while one of them is at its longest, taken
        to be half as long again as its median: others would have to wait for it. The slowest ones, as many as do a
        ``share`` of all trials."""
        typical = {worker: max(median(self._by_worker[worker]), 1e-9) for worker in workers if self._by_worker[worker]}
        rate = sum(1.0 / seconds for seconds in typical.values())
        found, left = set(), share * rate
        for worker, seconds in sorted(typical.items(), key=lambda pair: -pair[1]):
            left -= 1.0 / seconds
            if 1.5 * seconds * rate <= window or left < 0:
                break
            found.add(worker)
        return found

    def allowed(self, trial: Trial, final: bool = False) -> tuple[float, float | None]:
        """Seconds that ``trial`` may take, and those it is expected to take, None if that is not known. ``final``: in
        the final retraining."""
        effort = self._limits.effort if final else 1.0
        expected = self.expected(trial)
        if expected is None:
            return self._limits.first_seconds * effort, None
        return max(self._limits.hang_after * expected * effort, self._limits.least_seconds), expected * effort

    def expected(self, trial: Trial) -> float | None:
        """Seconds that ``trial`` is expected to take: as predicted (``trial_seconds``), or by the trials of its worker;
        of all workers where these are alike. Scaled by the predicted steps, where there are any. None where too little
        is known."""
        if "trial_seconds" in trial.predicted:
            return trial.predicted["trial_seconds"][0]
        recent = [duration for duration in self._all[-4 * _RECENT :] if duration[2] == trial.worker]
        slower = 1.0
        if len(recent) < _ENOUGH and self._alike:
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
