"""The end of a divided step: what becomes of what the processors have computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from graphopt.graph.in_place import overwritten
from graphopt.graph.lowering import lower
from graphopt.graph.training_graph import Input, InputKind, Output, OutputKind, TrainingGraph


class Commit:
    """Writes new buffers into the user's tensors, then runs the update in place.

    Args:
        first: what was divided; its outputs are what ``__call__`` is given.
        outputs: those of ``first``, as they are named on this process.
        update: what runs when all processors have finished; None where they have made the update too.
        position: where the inputs of ``first`` and ``update`` stand among those of the whole step.
    """

    def __init__(
        self, first: TrainingGraph, outputs: Sequence[Output], update: TrainingGraph | None,
        position: Mapping[Input, int],
    ):  # fmt: skip
        self._update = lower(update) if update is not None else None
        at = dict(zip(first.placeholders, first.inputs, strict=True))
        self._written = [(k, position[at[node]]) for k, node in enumerate(overwritten(first)) if node is not None]
        saved = {o.name: k for k, o in enumerate(outputs) if o.kind is OutputKind.SAVED}
        self._arguments = [
            (True, saved[i.name]) if i.kind is InputKind.SAVED else (False, position[i])
            for i in (update.inputs if update is not None else ())
        ]
        kept = {k for k, _ in self._written} | set(saved.values())
        self.returned: list[int] = [k for k in range(len(outputs)) if k not in kept]
        updated = self._update.outputs if self._update is not None else ()
        self.outputs: tuple[Output, ...] = (*(outputs[k] for k in self.returned), *updated)
        self.code: str = self._update.code if self._update is not None else ""

    def __call__(self, results: Sequence[Any], inputs: Sequence[Any]) -> tuple[Any, ...]:
        """The outputs of the whole step. ``results``: of ``first``; ``inputs``: of the whole step, some are changed."""
        with torch.no_grad():
            for k, position in self._written:
                inputs[position].copy_(results[k])
            arguments = (results[k] if saved else inputs[k] for saved, k in self._arguments)
            updated = self._update.run(*arguments) if self._update is not None else ()
        return (*(results[k] for k in self.returned), *updated)
