"""How long a search goes on, and how."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Limits"]


@dataclass(frozen=True)
class Limits:
    """How long a search goes on, and how.

    Attributes:
        trials: models to generate, None for any number. seconds: of this run, None for ever.
        queue: models that one request asks for. ahead: models that wait for a trainer at least.
        window: None, or: model k is proposed from results up to k - window (a reproducible search).
        hang_after: a trial is stopped after so many times the seconds it is expected to take.
        first_seconds: and after these as long as nothing is known. least_seconds: never before these.
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
