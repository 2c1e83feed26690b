"""A divided step at work: parts for the processors, sums and new values from them, one commit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from graphopt.graph.lowering import Lowered
from graphopt.graph.sizes import expression
from graphopt.graph.training_graph import Input, InputKind, Output, TrainingGraph
from graphopt.schemes.commit import Commit
from graphopt.schemes.pieces import PARTIAL, owner_of, place_value, rows_of_parts, sharded_dim, whole_of
from graphopt.schemes.workers import Job, Pool


@dataclass(frozen=True)
class Divided:
    """A step divided over processors: what it was (``before``), what each processor runs of it (``graphs``), and what
    this process runs when all have finished (``update``; None where it is divided too)."""

    before: TrainingGraph
    graphs: tuple[TrainingGraph, ...]
    update: TrainingGraph | None = None

    @property
    def words(self) -> list[str]:
        """How the outputs of ``graphs`` lie."""
        return list(self.graphs[0].signature.tree["placements"]["outputs"])

    @property
    def gathered(self) -> list[int]:
        """The outputs that this process gets from others through shared memory."""
        return [k for k, word in enumerate(self.words) if in_parts(word) or owner_of(word) not in (None, 0)]


def in_parts(word: str) -> bool:
    """Whether each processor has a summand or a piece of an output that lies so."""
    return word == PARTIAL or sharded_dim(word) is not None


def lowered(divided: Divided, pool: Pool, whole: TrainingGraph) -> Lowered:
    """The divided step as a function of the inputs of ``whole``, run by ``pool``."""
    same = len(set(map(id, divided.graphs))) == 1
    outputs = divided.graphs[0].outputs
    job = pool.load(divided.graphs[0] if same else divided.graphs, gathered=[outputs[k] for k in divided.gathered])
    step = _DividedStep(divided, job, whole.inputs)
    return Lowered(step, step.outputs, step.code)


class _DividedStep:
    """The divided step as a function of the inputs of the whole one.

    Nothing of the user's is written before all processors have finished; then new buffers and what the processors
    updated are copied into the user's tensors, and the update of this process runs in place.
    """

    def __init__(self, divided: Divided, job: Job, inputs: Sequence[Input]):
        first = divided.graphs[0]
        position = {given: i for i, given in enumerate(inputs)}
        self._job = job
        record = first.signature.tree["placements"]
        self._processors = int(record["processors"])
        self._common = [position[i] for i in job.common]
        lies: dict[str, str] = record["inputs"]
        self._own = [(i, position.get(i), _dim(i, lies)) for i in job.own]
        self._rows = _rows(first, position, lies)
        self._words = divided.words
        self._in_parts = [k for k, word in enumerate(divided.words) if in_parts(word)]
        self._owned = [k for k in divided.gathered if k not in self._in_parts]
        self._commit = Commit(first, job.outputs, divided.update, position)
        self.outputs: tuple[Output, ...] = self._commit.outputs
        self.code = self._commit.code or job.code

    def __call__(self, *inputs: Any) -> tuple[Any, ...]:
        given: list[Any] = []

        def commit(results: tuple[Any, ...]) -> None:
            whole = list(results)
            made: dict[int, torch.Tensor] = {}  # one value may be several outputs
            for k in self._in_parts:
                if id(results[k]) not in made:
                    parts = [results[k], *self._job.gathered(k)]
                    made[id(results[k])] = whole_of(self._words[k], parts)
                whole[k] = made[id(results[k])]
            for k in self._owned:
                (whole[k],) = self._job.gathered(k)
                if k in self._commit.returned:  # the next step overwrites what it lies in
                    whole[k] = whole[k].clone()
            given.extend(self._commit(whole, inputs))

        rows = inputs[self._rows[0]].shape[self._rows[1]] if self._rows is not None else 0
        places = rows_of_parts(rows, self._processors)
        parts = [self._part(inputs, processor, places) for processor in range(self._processors)]
        self._job([inputs[k] for k in self._common], parts, commit)
        return tuple(given)

    def _part(self, inputs: Sequence[Any], processor: int, places: Sequence[tuple[int, int]]) -> list[Any]:
        """The values that one processor has for itself."""
        values: list[Any] = []
        for own, at, dim in self._own:
            if own.kind is InputKind.PLACE:
                values.append(place_value(own, processor, places))
            else:
                assert at is not None
                values.append(inputs[at] if dim is None else inputs[at].narrow(dim, *places[processor]))
        return values


_OF_THE_BATCH = (InputKind.BATCH, InputKind.TANGENT)
"""Kinds of inputs that may lie in pieces: a parameter may have the name of one."""


def _dim(given: Input, lies: dict[str, str]) -> int | None:
    """The dimension along which an input lies in pieces."""
    return sharded_dim(lies.get(given.name, "")) if given.kind in _OF_THE_BATCH else None


def _rows(graph: TrainingGraph, position: dict[Input, int], lies: dict[str, str]) -> tuple[int, int] | None:
    """An input of the whole step, and the dimension of it that is the batch; None where the batch is not divided."""
    total = graph.symbols.symbols.get("batch.total")
    for given, node in zip(graph.inputs, graph.placeholders, strict=True):
        if total is None or given not in position:
            continue
        dim = _dim(given, lies)
        shape = getattr(node.meta.get("val"), "shape", ()) if given.kind in _OF_THE_BATCH else ()
        found = [dim] if dim is not None else [d for d, size in enumerate(shape) if expression(size) == total]
        if found:
            return position[given], found[0]
    return None
