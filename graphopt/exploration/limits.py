"""How long a search goes on, and how."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count

__all__ = ["Limits"]

_EVERY = 4
_LONGER = 4
"""Of a reproducible search: every fourth model may take so many times as long as others until its result is used."""


@dataclass(frozen=True)
class Limits:
    """How long a search goes on, and how.

    Attributes:
        trials: models to generate, None for any number. seconds: of this run, None for ever.
        queue: models that one request asks for. ahead: models that wait for a trainer at least.
        window: None, or (a reproducible search): model k is proposed from results of models before k - window, and of
            every fourth model, those that are `patient`, before k - 4 windows.
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

    # Which results a model is proposed from must be a function of numbers alone. A slow worker would hold up all others
    # if each result were needed soon; and if none were, all models would be proposed from old results. So some models
    # are those that a slow worker may take: their results are needed later.

    patient_share = 1.0 / _EVERY

    @staticmethod
    def patient(number: int) -> bool:
        """Whether the result of this model is used late, so that a slow worker may take it."""
        return number % _EVERY == _EVERY - 1

    @property
    def patience(self) -> list[int] | None:
        """How often models are `patient`, and how much: a study goes on by the rule that it was begun with."""
        return None if self.window is None else [_EVERY, _LONGER]

    def uses(self, models: int, number: int) -> bool:
        """Whether model ``models`` is proposed from the result of model ``number``. Only with a window."""
        return self._used_from(number) < models

    def usable(self, models: int) -> int | None:
        """How many results model ``models`` is proposed from, in the order of `order`; None: all that are there.

        >>> Limits(window=16).usable(20), Limits(window=16).usable(68), Limits().usable(20)
        (3, 40, None)
        """
        if self.window is None:
            return None
        soon, late = max(0, models - self.window), max(0, models - _LONGER * self.window)
        return soon - soon // _EVERY + late // _EVERY

    def order(self) -> Iterator[int]:
        """Numbers of models in the order in which their results come into use. Without end; only with a window."""
        soon = ((self._used_from(number), number) for number in count() if not self.patient(number))
        late = ((self._used_from(number), number) for number in count(_EVERY - 1, _EVERY))
        return (number for _, number in heapq.merge(soon, late))

    def _used_from(self, number: int) -> int:
        assert self.window is not None
        return number + self.window * (_LONGER if self.patient(number) else 1)
