"""How long a search goes on, and how."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["WINDOW", "Limits"]

WINDOW = 48
"""Of a reproducible search that names none. It must hold all trials that other workers end while the slowest one is at
its longest trial: see docs/exploration.md for how it was chosen, and what it costs."""


@dataclass(frozen=True)
class Limits:
    """How long a search goes on, and how.

    Attributes:
        trials: models to generate, None for any number. seconds: of this run, None for ever.
        queue: models that one request asks for. ahead: models that wait for a trainer at least.
        window: None, or: model k is proposed from results up to k - window (a reproducible search).
        hang_after: a trial is stopped after so many times the seconds it is expected to take.
        first_seconds: and after these as long as nothing is known. least_seconds: never before these; by the engine.
        retrain: models that are trained again at the end; effort: how much longer.
    """

    trials: int | None = None
    seconds: float | None = None
    queue: int = 2
    ahead: int = 2
    window: int | None = None
    hang_after: float = 5.0
    first_seconds: float = 3600.0
    least_seconds: float = 2.0
    retrain: int = 0
    effort: float = 4.0

    def usable(self, models: int) -> int | None:
        """Of how many models, the first ones, a request for number ``models`` uses results. It must be a function of
        the number alone, and never decrease. None: of all that have ended.

        >>> Limits(window=16).usable(40), Limits(window=16).usable(7), Limits().usable(40)
        (24, 0, None)
        """
        return None if self.window is None else max(0, models - self.window)
