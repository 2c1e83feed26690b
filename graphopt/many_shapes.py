"""Batches of many shapes: the graph of a step holds for one of them, so that a capture for each may never pay back."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from statistics import median

from graphopt.graph.batch import BatchLayout
from graphopt.plan import duration
from graphopt.situation import Situation

__all__ = ["AT_ONCE", "Shapes"]

AT_ONCE = 3
"""Shapes that are captured as they come: image sizes of a curriculum, or two or three lengths of sentences. Sentences
padded to the longest of their batch come in dozens, and each has few steps to pay for seconds of capture."""


@dataclass(frozen=True)
class Shapes:
    """The shapes in which batches of one kind came, apart from the batch size.

    Attributes:
        layouts: one for each shape, in the order in which they came.
        seconds: what a capture took, the median; 0 where none could be made.
    """

    layouts: tuple[BatchLayout, ...]
    seconds: float

    @classmethod
    def of(cls, situation: Situation, others: Iterable[Situation]) -> Shapes:
        """Those of ``others``, with the same model in the same state, that were captured (or could not be), and that of
        ``situation``, which comes last."""
        kind = _kind(situation.layout)
        tried = [s for s in others if s is not situation and (s.steps or s.failed) and _kind(s.layout) == kind]
        seconds = [step.seconds for other in tried for step in other.steps]
        return cls((*(s.layout for s in tried), situation.layout), median(seconds) if seconds else 0.0)

    @property
    def many(self) -> bool:
        """Whether the last one is beyond those that are captured as they come."""
        return len(self.layouts) > AT_ONCE

    def where(self) -> str:
        """The first size that varies, with its values: ``dimension 1 of input_ids was 23, 21, 24, 17``."""
        for i, name in enumerate(self.layouts[0].names):
            for dimension, sizes in enumerate(zip(*(layout.shapes[i] for layout in self.layouts), strict=True)):
                if len(set(sizes)) > 1:
                    found = dict.fromkeys("the batch size" if size is None else str(size) for size in sizes)
                    return f"dimension {dimension} of {name or 'the batch'} was {', '.join(found)}"
        return "memory layouts differ"  # shapes are alike, so strides are not

    def warning(self, waits: bool) -> str:
        """What a user should know. ``waits``: whether the capture of new ones waits until it pays back."""
        each = f" ({duration(self.seconds)} each)" if self.seconds else ""
        then = "; eager runs further ones until their steps pay that back" if waits else ""
        return (
            f"batches come in many shapes ({self.where()}): the step is captured anew for each{each}{then}. Pad to one "
            "size, or to few (pad_to_multiple_of= of Hugging Face's collators); only the batch size is free"
        )


def _kind(layout: BatchLayout) -> tuple[BatchLayout, list[int]]:
    """What two batches have in common that differ in sizes only."""
    return replace(layout, shapes=(), strides=()), [len(shape) for shape in layout.shapes]
