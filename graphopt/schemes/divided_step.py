"""A divided step at work: parts for the processors, sums and new values from them, one commit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch

from graphopt.graph.in_place import overwritten
from graphopt.graph.lowering import Lowered, lower
from graphopt.graph.sizes import expression
from graphopt.graph.training_graph import Input, InputKind, Output, OutputKind, TrainingGraph
from graphopt.schemes.micro_batches import part_sizes
from graphopt.schemes.workers import Job, Pool

PARTIAL, OWNED, PART = "partial sum", "at processor ", "sharded "
"""How outputs lie that this process has to bring together."""


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
        found = [k for k, word in enumerate(self.words) if word == PARTIAL or owner_of(word) not in (None, 0)]
        return sorted(found + self.in_parts)

    @property
    def in_parts(self) -> list[int]:
        """The outputs of which each processor has a part that this process wants whole."""
        kinds = [output.kind for output in self.graphs[0].outputs]
        return [k for k, w in enumerate(self.words) if w.startswith(PART) and kinds[k] is not OutputKind.OUTPUT]


def owner_of(word: str) -> int | None:
    """The processor that alone gives an output, by how it lies; None for one that all have.

    >>> owner_of("at processor 3"), owner_of("replicated")
    (3, None)
    """
    return int(word.removeprefix(OWNED)) if word.startswith(OWNED) else None


def of_parts(parts: Sequence[torch.Tensor], word: str) -> torch.Tensor:
    """The whole of equal parts that lie so: ``sharded 0``, or ``sharded 1 as 3x8+2x4`` where dimension 1 is made of
    pieces that hold the indices of the axis 3 and 2 times, each 8 and 4 elements long.

    >>> a, b = torch.tensor([0, 1, 4, 5]), torch.tensor([2, 3, 6, 7])
    >>> of_parts([a, b], "sharded 0"), of_parts([a, b], "sharded 0 as 2x1")
    (tensor([0, 1, 4, 5, 2, 3, 6, 7]), tensor([0, 1, 2, 3, 4, 5, 6, 7]))
    """
    where, _, made = word.removeprefix(PART).partition(" as ")
    dim = int(where)
    pieces = [tuple(map(int, piece.split("x"))) for piece in (made or "1x1").split("+")]
    indices = parts[0].shape[dim] // sum(outer * inner for outer, inner in pieces)
    if pieces == [(1, 1)]:
        return torch.cat(list(parts), dim)
    lengths = [outer * indices * inner for outer, inner in pieces]
    whole = []
    for (outer, inner), of_each in zip(pieces, zip(*(part.split(lengths, dim) for part in parts)), strict=True):
        apart = [part.unflatten(dim, (outer, indices, inner)) for part in of_each]
        whole.append(torch.cat(apart, dim + 1).flatten(dim, dim + 2))
    return whole[0] if len(whole) == 1 else torch.cat(whole, dim)


def lowered(divided: Divided, pool: Pool, whole: TrainingGraph) -> Lowered:
    """The divided step as a function of the inputs of ``whole``, run by ``pool``."""
    same = len(set(map(id, divided.graphs))) == 1
    outputs = divided.graphs[0].outputs
    job = pool.load(divided.graphs[0] if same else divided.graphs, gathered=[outputs[k] for k in divided.gathered])
    step = _DividedStep(divided, job, whole.inputs)
    return Lowered(step, step.outputs, step.code)


def rows_of_parts(rows: int, processors: int) -> list[tuple[int, int]]:
    """First row and number of rows of each processor, as equal as can be, the larger parts first.

    >>> rows_of_parts(7, 3)
    [(0, 3), (3, 2), (5, 2)]
    """
    counts = part_sizes(rows, processors)
    return list(zip(accumulate(counts, initial=0), counts))


class _DividedStep:
    """The divided step as a function of the inputs of the whole one.

    Nothing of the user's is written before all processors have finished; then new buffers and what the processors
    updated are copied into the user's tensors, and the update of this process runs in place.
    """

    def __init__(self, divided: Divided, job: Job, inputs: Sequence[Input]):
        first, update = divided.graphs[0], divided.update
        position = {given: i for i, given in enumerate(inputs)}
        self._job = job
        self._update = lower(update) if update is not None else None
        record = first.signature.tree["placements"]
        self._processors = int(record["processors"])
        self._common = [position[i] for i in job.common]
        sharded: dict[str, int] = {name: int(word.split()[1]) for name, word in record["inputs"].items()}
        self._own = [(i, position.get(i), sharded.get(i.name)) for i in job.own]
        self._rows = _rows(divided.before, position)
        self._partial = [k for k, word in enumerate(divided.words) if word == PARTIAL]
        self._in_parts = {k: divided.words[k] for k in divided.in_parts}
        self._owned = [k for k in divided.gathered if k not in (*self._partial, *self._in_parts)]
        targets = overwritten(first)
        at = {node: i for i, node in enumerate(first.placeholders)}
        own = {i: position[given] for i, given in enumerate(first.inputs) if given in position}
        self._written = [(k, own[at[node]]) for k, node in enumerate(targets) if node is not None]
        saved = {o.name: k for k, o in enumerate(job.outputs) if o.kind is OutputKind.SAVED}
        self._arguments = [
            (True, saved[i.name]) if i.kind is InputKind.SAVED else (False, position[i])
            for i in (update.inputs if update is not None else ())
        ]
        kept = {k for k, _ in self._written} | set(saved.values())
        self._returned = [k for k in range(len(job.outputs)) if k not in kept]
        updated = self._update.outputs if self._update is not None else ()
        self.outputs: tuple[Output, ...] = (*(job.outputs[k] for k in self._returned), *updated)
        self.code = self._update.code if self._update is not None else job.code

    def __call__(self, *inputs: Any) -> tuple[Any, ...]:
        given: list[Any] = []

        def commit(results: tuple[Any, ...]) -> None:
            whole = list(results)
            sums: dict[int, torch.Tensor] = {}  # one value may be several outputs
            for k in self._partial:
                known = sums.get(id(results[k]))
                whole[k] = sums[id(results[k])] = self._sum(k, results[k]) if known is None else known
            for k, word in self._in_parts.items():
                whole[k] = of_parts([results[k], *self._job.gathered(k)], word)
            for k in self._owned:
                (whole[k],) = self._job.gathered(k)
            with torch.no_grad():
                for k, position in self._written:
                    inputs[position].copy_(whole[k])
                for k in self._returned:
                    if k in self._owned:  # the next step overwrites what it lies in
                        whole[k] = whole[k].clone()
                arguments = (whole[k] if kept else inputs[k] for kept, k in self._arguments)
                updated = self._update.run(*arguments) if self._update is not None else ()
            given.extend((*(whole[k] for k in self._returned), *updated))

        rows = 0
        if self._rows is not None:
            position, dim = self._rows
            rows = inputs[position].shape[dim]
        parts = rows_of_parts(rows, self._processors)
        self._job(
            [inputs[k] for k in self._common],
            [self._part(inputs, k, rows, *part) for k, part in enumerate(parts)],
            commit,
        )
        return tuple(given)

    def _sum(self, position: int, own: torch.Tensor) -> torch.Tensor:
        """The sum of an output over processors, in their order."""
        first, *others = self._job.gathered(position)
        total = own + first
        for part in others:
            total += part
        return total

    def _part(self, inputs: Sequence[Any], processor: int, rows: int, begin: int, count: int) -> list[Any]:
        """The values that one processor has for itself: its rows, and its place in the whole."""
        places = {
            ("batch", "total"): rows,
            ("batch", "begin"): begin,
            ("batch", "part"): count,
            ("batch", "most"): -(-rows // self._processors),
            ("processor", "index"): processor,
        }
        values: list[Any] = []
        for own, at, sharded in self._own:
            if own.kind is InputKind.PLACE:
                values.append(places[own.name, own.field])
            else:
                assert at is not None
                values.append(inputs[at] if sharded is None else inputs[at].narrow(sharded, begin, count))
        return values


def _rows(before: TrainingGraph, position: dict[Input, int]) -> tuple[int, int] | None:
    """The input of the whole step, and its dimension, whose size is that of the batch; None where that is fixed."""
    symbol = before.symbols.symbols.get("batch")
    for given, node in zip(before.inputs, before.placeholders, strict=True):
        if symbol is not None and given.kind is InputKind.BATCH:
            for dim, size in enumerate(node.meta["val"].shape):
                if expression(size) == symbol:
                    return position[given], dim
    return None
