"""ASHA: a trial that is not among the best at a rung ends there (Li et al., MLSys 2020).

The decision falls at once, when the trial reaches the rung, among those that reached it before: nobody waits.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from graphopt.errors import ExplorationError

__all__ = ["ASHA"]


@dataclass(frozen=True)
class ASHA:
    """Asynchronous successive halving.

    Args:
        first: the step of the first rung, in the unit of ``context.report(step, value)``; the others are ``eta`` times
            as far each.
        eta: of that many trials at a rung, the best one goes on.
        last: steps of a whole trial; there is no rung at or after it.
    """

    first: int = 1
    eta: int = 3
    last: int | None = None

    def __post_init__(self) -> None:
        if not (isinstance(self.first, int) and self.first >= 1 and isinstance(self.eta, int) and self.eta >= 2):
            raise ExplorationError(f"ASHA: expected first >= 1 and eta >= 2, got {self.first!r} and {self.eta!r}")

    def rung(self, before: int, step: int) -> int | None:
        """The last rung after ``before`` that a report at ``step`` reaches, None if it reaches none."""
        found, rung = None, self.first
        while rung <= step and (self.last is None or rung < self.last):
            if rung > before:
                found = rung
            rung *= self.eta
        return found

    def goes_on(self, value: float, others: Iterable[float]) -> bool:
        """Whether a trial with ``value`` (the larger the better) is among the best ``1 / eta`` of those at its rung.
        As long as there are fewer than ``eta``, all go on."""
        values = list(others)
        if len(values) + 1 < self.eta:
            return True
        better = sum(other > value for other in values)
        return better < max(1, (len(values) + 1) // self.eta)
