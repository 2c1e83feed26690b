"""The result types of the axis analysis: `Axis`, `Dim` and where they stand."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType
from typing import NamedTuple

import torch

from graphopt.graph.sizes import Expr, product


class Kind(StrEnum):
    """What an axis is, where the graph shows it."""

    BATCH = "batch"
    SEQUENCE = "sequence"
    SPATIAL = "spatial"
    CHANNEL = "channel"
    HIDDEN = "hidden"
    EMBEDDING = "embedding"  # the residual stream
    HEADS = "heads"
    HEAD_SIZE = "head size"
    KERNEL_HEIGHT = "kernel height"
    KERNEL_WIDTH = "kernel width"
    KERNEL_DEPTH = "kernel depth"
    VOCABULARY = "vocabulary"
    INPUT = "input"
    CLASSES = "classes"
    OUTPUT = "output"
    OTHER = "other"


class Place(NamedTuple):
    """A dimension of a parameter, buffer, batch tensor or constant, by the name it has in the graph."""

    name: str
    dim: int


@dataclass(eq=False, repr=False)
class Axis:
    """One identity: everywhere it stands, index i is the same index.

    ``name`` is that of its first carrier, empty where no input of the graph carries it. ``size``: an int, or an
    expression of free sizes. ``places``: the parameters, buffers, batch tensors and constants that carry it, alone or
    as a factor or piece of a dimension. ``free``: its indices may be permuted and left out, in all places at once;
    else ``reason`` says why not. ``shardable``: it may be divided over processors in order. ``statistics``:
    operators that take means or maxima over it: leaving indices out is then another function than zeroing them.
    """

    name: str
    kind: Kind
    size: Expr
    places: tuple[Place, ...] = ()
    free: bool = False
    reason: str = ""
    shardable: bool = False
    statistics: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return self.name or str(self.size)


_NO_SIZES: Mapping[Axis, int] = MappingProxyType({})


class Form(StrEnum):
    """How a dimension is made of its parts."""

    AXIS = "axis"
    PRODUCT = "product"
    CONCAT = "concat"


@dataclass(frozen=True)
class Dim:
    """One dimension of a tensor: an axis, a product of dimensions (the first runs slowest), or a concatenation.

    A dimension of size 1 is the empty product.
    """

    form: Form
    parts: tuple[Dim, ...] = ()
    axis: Axis | None = field(default=None)

    @property
    def size(self) -> Expr:
        """Its number of indices, an expression where it depends on free sizes."""
        if self.axis is not None:
            return self.axis.size
        sizes = [p.size for p in self.parts]
        return sum(sizes) if self.form is Form.CONCAT else product(sizes)

    def axes(self) -> Iterator[Axis]:
        """The axes in it, from left to right; one may come several times."""
        if self.axis is not None:
            yield self.axis
        for part in self.parts:
            yield from part.axes()

    def count(self, sizes: Mapping[Axis, int]) -> int:
        """Its number of indices when some axes have other sizes. Raises KeyError for a free size that is not given."""
        if self.axis is not None:
            return sizes[self.axis] if self.axis in sizes else _number(self.axis)
        counts = [p.count(sizes) for p in self.parts]
        return sum(counts) if self.form is Form.CONCAT else int(product(counts))

    def indices(self, chosen: Mapping[Axis, torch.Tensor], sizes: Mapping[Axis, int] = _NO_SIZES) -> torch.Tensor:
        """Which of its indices remain, int64, when of each axis in ``chosen`` these indices do, in this order.

        For a permutation of 12 heads, the indices of the 768 rows of a projection in their new order. ``sizes`` gives
        those of axes of free size. Raises KeyError where one is missing.
        """
        if self.axis is not None:
            return chosen[self.axis] if self.axis in chosen else torch.arange(self.count(sizes))
        if self.form is Form.CONCAT:
            begins, pieces = 0, []
            for part in self.parts:
                pieces.append(part.indices(chosen, sizes) + begins)
                begins += part.count(sizes)
            return torch.cat(pieces)
        result = torch.zeros(1, dtype=torch.int64)
        for part in self.parts:
            result = (result[:, None] * part.count(sizes) + part.indices(chosen, sizes)[None, :]).flatten()
        return result

    def __str__(self) -> str:
        if self.axis is not None:
            return repr(self.axis)
        if not self.parts:
            return "1"
        text = (" + " if self.form is Form.CONCAT else "*").join(map(str, self.parts))
        return f"({text})" if self.form is Form.CONCAT else text


def _number(axis: Axis) -> int:
    if not isinstance(axis.size, int):
        raise KeyError(f"axis {axis!r} has the free size {axis.size}: give one")
    return axis.size
