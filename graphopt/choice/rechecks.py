"""`Rechecks`: how often a choice is looked at again after the machine has changed."""

from __future__ import annotations

from graphopt.choice.pace import FIRST_PAUSE, LONGEST_PAUSE

RECHECK = 4
"""After how many times the pause, in steps, the scheme that a drift made us leave is tried again."""


class Rechecks:
    """Steps to wait between measurements for drift, doubled each time, and the scheme that was left for one.

    A scheme left under load is tried again: with another scheme running, nothing would show that the load is gone.
    """

    def __init__(self) -> None:
        self.pause = FIRST_PAUSE
        self._former: str | None = None
        self._at: int | None = None

    def drifted(self, chosen: str) -> None:
        """Candidates are measured again, because the steps of ``chosen`` take another time than they did."""
        self._back_off()
        self._former = self._former or chosen

    def decided(self, chosen: str) -> None:
        """So it was decided."""
        if chosen == self._former:
            self._former = None
        self._at = None if self._former is None else RECHECK * self.pause

    def due(self, steps: int) -> str | None:
        """The scheme to try again, so many steps after the decision; None if it is not time."""
        if self._at is None or steps < self._at:
            return None
        self._back_off()
        self._at = None
        return self._former

    def _back_off(self) -> None:
        self.pause = min(2 * self.pause, LONGEST_PAUSE)
