"""`BatchSizeSchedule`: a batch size that grows as the measured accuracy rises."""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite
from typing import Any

from graphopt.errors import GraphoptError


class BatchSizeSchedule:
    """Gives the batch size for the next epoch from the accuracy measured so far.

    While a model learns fast, small batches give many noisy steps for the same data; near the end the noise is what
    keeps the loss up, and large batches, which run at a higher rate, take it away. So the size goes from ``smallest``
    to ``largest`` in powers of ``growth``, spread evenly over the way from ``start_accuracy`` to ``target_accuracy``.
    It never shrinks: an accuracy that falls back for a while changes nothing.

    Source of the idea: Smith, Kindermans, Ying and Le, "Don't Decay the Learning Rate, Increase the Batch Size", ICLR
    2018; here the measured accuracy decides when, in place of a fixed list of epochs.

    Args:
        smallest: the first batch size.
        largest: no batch size is above it.
        start_accuracy: up to here the size is ``smallest``. Any measure that rises will do, in any unit.
        target_accuracy: from here on the size is the largest one.
        growth: each size is this many times the one before.

    Raises:
        GraphoptError: a size below 1, ``largest`` below ``smallest``, a growth below 2, or accuracies not in order.

    >>> schedule = BatchSizeSchedule(16, 128, start_accuracy=0.5, target_accuracy=0.95)
    >>> schedule.sizes
    (16, 32, 64, 128)
    >>> [schedule.update(accuracy) for accuracy in (0.1, 0.6, 0.7, 0.65, 0.9, 0.96)]
    [16, 16, 32, 32, 64, 128]
    >>> schedule.size
    128
    """

    def __init__(
        self, smallest: int, largest: int, *, start_accuracy: float, target_accuracy: float, growth: int = 2
    ) -> None:
        if smallest < 1 or largest < smallest or growth < 2:
            raise GraphoptError(
                "BatchSizeSchedule: expected 1 <= smallest <= largest and growth >= 2, got "
                f"smallest={smallest}, largest={largest}, growth={growth}"
            )
        if not (isfinite(start_accuracy) and isfinite(target_accuracy) and start_accuracy < target_accuracy):
            raise GraphoptError(
                "BatchSizeSchedule: expected start_accuracy < target_accuracy, got "
                f"{start_accuracy} and {target_accuracy}"
            )
        self.start_accuracy, self.target_accuracy = start_accuracy, target_accuracy
        sizes = [smallest]
        while sizes[-1] * growth <= largest:
            sizes.append(sizes[-1] * growth)
        self.sizes = tuple(sizes)
        self._stage = 0

    @property
    def size(self) -> int:
        """The batch size now."""
        return self.sizes[self._stage]

    def update(self, accuracy: float) -> int:
        """The batch size from now on, after ``accuracy`` was measured. Raises GraphoptError if that is not finite."""
        if not isfinite(accuracy):
            raise GraphoptError(f"BatchSizeSchedule.update: expected a finite accuracy, got {accuracy}")
        last = len(self.sizes) - 1
        if accuracy >= self.target_accuracy:
            stage = last
        else:
            way = (accuracy - self.start_accuracy) / (self.target_accuracy - self.start_accuracy)
            stage = int(max(way, 0.0) * last)
        self._stage = max(self._stage, stage)
        return self.size

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs: the size reached."""
        return {"size": self.size}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint. Raises GraphoptError if its size is none of this schedule's."""
        size = state.get("size")
        if size not in self.sizes:
            raise GraphoptError(f"BatchSizeSchedule: the checkpoint's size {size!r} is none of {self.sizes}")
        self._stage = self.sizes.index(size)

    def __repr__(self) -> str:
        way = f"from {self.start_accuracy:g} to {self.target_accuracy:g}"
        return f"BatchSizeSchedule(sizes={self.sizes}, {way}, now {self.size})"
