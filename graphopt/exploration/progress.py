"""A line about a search that runs: how many trials, what they gave, what the gate refused, how long it goes on."""

from __future__ import annotations

import sys
import time
from collections import Counter
from statistics import median
from typing import TextIO

from graphopt.exploration.history import History, Trial
from graphopt.exploration.master import Master

__all__ = ["Progress", "line"]


def line(history: History, running: int, budget: dict[str, float], left: float | None = None) -> str:
    """The state of a search in one line."""
    counts = Counter(trial.state for trial in history.trials)
    parts = [f"{counts['done']} done, {running} running"]
    if counts["pruned"]:
        parts.append(f"{counts['pruned']} stopped early")
    if history.refused:
        parts.append(f"{history.refused} gated")
    if bad := counts["failed"] + counts["invalid"]:
        causes = Counter(_headline(t.cause) for t in history.trials if t.state in ("failed", "invalid"))
        parts.append(f"{bad} failed (mostly: {causes.most_common(1)[0][0]})")
    main, sign = history.objectives.main, history.objectives.signs[history.objectives.main]
    if done := history.done(budget):
        best = max(done, key=lambda trial: sign * trial.metrics[main])
        parts.append(f"best {main} {best.metrics[main]:.4g} (trial {best.number})")
    if left is not None:
        parts.append(f"{_duration(left)} left")
    return "; ".join(parts)


class Progress:
    """A `Watcher` that shows `line` on a terminal once a second, else as a line of its own every half minute."""

    def __init__(self, shown: bool = True, stream: TextIO | None = None):
        self._stream = stream or sys.stderr
        self._shown = shown
        self._terminal = self._stream.isatty()
        self._next = time.monotonic() + (0.0 if self._terminal else 30.0)

    def turned(self, master: Master) -> None:
        """Show it if it is time to."""
        if not self._shown or time.monotonic() < self._next:
            return
        self._next = time.monotonic() + (1.0 if self._terminal else 30.0)
        text = line(master.history, len(master.running), master.budget, _left(master))
        self._stream.write(f"\r\x1b[2K{text[:200]}" if self._terminal else f"graphopt explore: {text}\n")
        self._stream.flush()

    def reported(self, trial: Trial, step: int, value: float, final: bool) -> None:
        """Intermediate values are not shown."""

    def end(self) -> None:
        """Leave the line."""
        if self._shown and self._terminal:
            self._stream.write("\n")


def _left(master: Master) -> float | None:
    """Seconds until a limit is reached, as far as can be told."""
    found = []
    elapsed = master.engine.now() - master.started
    if master.limits.seconds is not None:
        found.append(max(0.0, master.limits.seconds - elapsed))
    ended = len(master.history.ended)
    if master.limits.trials is not None and ended >= 3:
        took = median(trial.seconds for trial in master.history.trials if trial.seconds or trial.state == "done")
        found.append((master.limits.trials - ended) * took / max(1, len(master.running)))
    return min(found) if found else None


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _headline(cause: str) -> str:
    return (cause.splitlines() or ["?"])[0][:60]
