"""What can vary in a model: `Dimension`, of a `Kind`; and what was looked at and cannot: `Refused`."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TypeAlias

Value: TypeAlias = int | tuple[int, ...]
"""What a dimension can be: a size, or how many runs of layers are kept (the first ones), or which ones."""


class Kind(StrEnum):
    """What a dimension changes."""

    WIDTH = "width"  # channels of a coupled group, hidden features of an MLP
    HEADS = "heads"  # of attention; with grouped queries, key/value heads with their queries
    QUERIES = "queries"  # query heads of each key/value head
    HEAD_SIZE = "head size"
    EMBEDDING = "embedding"  # the residual stream, everywhere at once
    KERNEL = "kernel"
    DEPTH = "depth"
    READ = "read"  # how much of what its producer gives a layer reads
    TRANSFORMATION = "transformation"  # which one the weight of a layer goes through


@dataclass(frozen=True)
class Dimension:
    """One elastic dimension of a `Space`.

    ``name``: unique in the space, the same in every process. ``choices``: what it can be, ascending; the last is the
    full one. Sizes are ints. Of `Kind.DEPTH` an int k keeps the first k runs, and any tuple of indices of runs may be
    chosen too. ``where``: paths of the modules that it reaches, in order.
    """

    name: str
    kind: Kind
    choices: tuple[Value, ...]
    where: tuple[str, ...] = ()

    @property
    def full(self) -> Value:
        """What it is in the whole model."""
        return self.choices[-1]

    @property
    def smallest(self) -> Value:
        """The first of its choices."""
        return self.choices[0]

    @property
    def size(self) -> int:
        """How many indices, heads, runs or kernel positions there are in the whole model."""
        return self.full if isinstance(self.full, int) else len(self.full)

    def admits(self, value: object) -> bool:
        """Whether it can be ``value``: one of the choices; of runs, any subset too."""
        if isinstance(value, bool) or not isinstance(value, (int, tuple)):
            return False
        if self.kind is Kind.DEPTH and isinstance(value, tuple):
            return all(type(i) is int and 0 <= i < self.size for i in value) and len(set(value)) == len(value)
        if self.kind is Kind.DEPTH:  # the first k are a subset too
            return isinstance(value, int) and 0 <= value <= self.size
        return value in self.choices

    def normal(self, value: Value) -> Value:
        """The one form of a value: runs in order, the first k of them as k.

        >>> Dimension("layers", Kind.DEPTH, (1, 2, 3)).normal((1, 0))
        2
        """
        if self.kind is Kind.DEPTH and isinstance(value, tuple):
            value = tuple(sorted(value))
            return len(value) if value == tuple(range(len(value))) else value
        return value

    def __str__(self) -> str:
        return f"{self.name}: {self.kind}, one of {', '.join(map(str, self.choices))}"


@dataclass(frozen=True)
class Refused:
    """A group of coupled dimensions, or runs of layers, that keep their size, and ``why``."""

    name: str
    kind: str
    size: str
    why: str
    where: tuple[str, ...] = ()
