"""The result types of the axis analysis: `Axis`, `Dim` and where they stand."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
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
    ``frozen``: what gives its indices a meaning (an operator or an input), empty if nothing does.
    """

    name: str
    kind: Kind
    size: Expr
    places: tuple[Place, ...] = ()
    free: bool = False
    reason: str = ""
    shardable: bool = False
    statistics: tuple[str, ...] = ()
    frozen: str = ""

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
    axis: Axis | None = None

    @property
    def size(self) -> Expr:
        """Its number of indices, an expression where it depends on free sizes."""
        return self.size_at({})

    def size_at(self, sizes: Mapping[Axis, int]) -> Expr:
        """Its size when some axes have other sizes; free sizes that are not given stay symbols."""
        if self.axis is not None:
            return sizes.get(self.axis, self.axis.size)
        parts = [p.size_at(sizes) for p in self.parts]
        return sum(parts) if self.form is Form.CONCAT else product(parts)

    def axes(self) -> Iterator[Axis]:
        """The axes in it, from left to right; one may come several times."""
        if self.axis is not None:
            yield self.axis
        for part in self.parts:
            yield from part.axes()

    def count(self, sizes: Mapping[Axis, int]) -> int:
        """`size_at` as an int. Raises KeyError for a free size that is not given."""
        for axis in self.axes():
            if axis not in sizes and not isinstance(axis.size, int):
                raise KeyError(f"axis {axis!r} has the free size {axis.size}: give one")
        return int(self.size_at(sizes))

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
