"""`Pace`: how long the chosen scheme's steps take as they go by, and whether that is still what was decided on."""

from __future__ import annotations

from statistics import median

WINDOW = 16
"""Steps whose median is looked at."""

DRIFT = 1.5
"""Ratio between that median and what was decided on from which the machine is no longer what it was."""

FIRST_PAUSE, LONGEST_PAUSE = 64, 2**16
"""Steps between two measurements for drift: at first, and at most; doubled each time."""


class Pace:
    """Keeps the seconds of the last steps. `add` is on the hot path: a store and a comparison.

    Args:
        expected: seconds of a step as decided; None where nothing was measured.
        parts: calls that make one step (accumulated batches).
        pause: steps that pass at least before `drifted` says so.
        watching: False where the times mean nothing, and only steps are counted.

    Attributes:
        steps: how many were seen, by whole windows.
        seconds: median of the last window, None before the first.
    """

    __slots__ = (
        "_calls",
        "_elapsed",
        "_last",
        "_parts",
        "_window",
        "expected",
        "pause",
        "seconds",
        "steps",
        "watching",
    )

    def __init__(
        self, expected: float | None = None, *, parts: int = 1, pause: int = FIRST_PAUSE, watching: bool = True
    ):
        self.expected, self.pause, self.watching = expected, pause, watching
        self.steps = 0
        self.seconds: float | None = None
        self._parts = parts
        self._window: list[float] = []
        self._last: list[float] = []
        self._elapsed, self._calls = 0.0, 0

    def add(self, seconds: float) -> bool:
        """One call took so long. True when a window is full: then `drifted` has news."""
        if self._parts > 1:
            self._elapsed += seconds
            self._calls += 1
            if self._calls < self._parts:
                return False
            seconds, self._elapsed, self._calls = self._elapsed, 0.0, 0
        self._window.append(seconds)
        if len(self._window) < WINDOW:
            return False
        self._last, self._window = self._window, []
        self.steps += WINDOW
        self.seconds = median(self._last)
        return True

    @property
    def window(self) -> list[float]:
        """Seconds of the steps of the last whole window."""
        return self._last

    def drifted(self) -> float | None:
        """How many times as long as decided a step takes now, where that is far off (either way) and long enough ago.

        Half of a window's steps have to be that slow: single disturbed steps do not count. The first window that is
        near the decision replaces it, since steps take other times in a row than between those of other candidates.
        """
        if self.seconds is None or not self.watching:
            return None
        if self.expected is None:
            self.expected = self.seconds
            return None
        ratio = self.seconds / self.expected
        if 1 / DRIFT <= ratio <= DRIFT:
            if self.steps == WINDOW:
                self.expected = self.seconds
            return None
        return ratio if self.steps >= self.pause else None
