"""Parts of a divided step: what each processor is given, and the whole of what processors give."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch

from graphopt.graph.training_graph import Input
from graphopt.schemes.micro_batches import part_sizes

PARTIAL, OWNED, SHARDED = "partial sum", "at processor ", "sharded "
"""How outputs lie that the main process has to bring together."""


def owner_of(word: str) -> int | None:
    """The processor that alone gives an output, by how it lies; None for one that all have.

    >>> owner_of("at processor 3"), owner_of("replicated")
    (3, None)
    """
    return int(word.removeprefix(OWNED)) if word.startswith(OWNED) else None


def sharded_dim(word: str) -> int | None:
    """The dimension along which a value lies in pieces; None for one that does not.

    >>> sharded_dim("sharded 1 as 3x12"), sharded_dim("replicated")
    (1, None)
    """
    return int(word.split()[1]) if word.startswith(SHARDED) else None


def rows_of_parts(rows: int, processors: int) -> list[tuple[int, int]]:
    """First row and number of rows of each processor, as equal as can be, the larger parts first.

    >>> rows_of_parts(7, 3)
    [(0, 3), (3, 2), (5, 2)]
    """
    counts = part_sizes(rows, processors)
    return list(zip(accumulate(counts, initial=0), counts))


def place_value(place: Input, processor: int, parts: Sequence[tuple[int, int]]) -> int:
    """What an input of kind `place` is at one processor, by the first row and number of rows of each."""
    begin, count = parts[processor]
    found = {
        "index": processor, "begin": begin, "part": count, "total": sum(rows for _, rows in parts), "most": parts[0][1],
    }  # fmt: skip
    return found[place.field]


def whole_of(word: str, parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """The whole of what the processors give for one output that lies in pieces or as summands, in new memory.

    ``word``: how it lies. Of ``sharded 0 as 3x4+1x4`` the dimension is 3 times an axis times 4 indices, and behind that
    the axis times 4; each part has its share of the axis in both.

    >>> whole_of("sharded 0 as 2x1", [torch.tensor([0, 2]), torch.tensor([1, 3])])
    tensor([0, 1, 2, 3])
    """
    if word == PARTIAL:
        first, second, *others = parts
        total = first + second
        for part in others:
            total += part
        return total
    dim = sharded_dim(word)
    assert dim is not None, f"an output that is {word} has no parts"
    _, _, layout = word.partition(" as ")
    if not layout:
        return torch.cat(list(parts), dim)
    pieces = [tuple(map(int, piece.split("x"))) for piece in layout.split("+")]
    count = parts[0].shape[dim] // sum(outer * inner for outer, inner in pieces)  # indices of the axis in a part
    runs = [[count * outer * inner for outer, inner in pieces] for _ in parts]
    split = [part.split(run, dim) for part, run in zip(parts, runs)]
    whole = []
    for at, (outer, inner) in enumerate(pieces):
        apart = [each[at].unflatten(dim, (outer, count * inner)) for each in split]
        whole.append(torch.cat(apart, dim + 1).flatten(dim, dim + 1))
    return torch.cat(whole, dim)
