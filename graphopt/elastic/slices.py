"""`Slice`: the part of a shared tensor that a subnet has, to read with gradients and to write."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch

from graphopt.elastic.handles import Cut
from graphopt.graph.resize import dense_strides


@dataclass(frozen=True, eq=False)
class Slice:
    """Part of a tensor: for each dimension None (all of it), ``(start, stop)``, or int64 indices in order."""

    rows: tuple[Cut | None, ...]

    @staticmethod
    def of(dims: int, cuts: Mapping[int, Cut]) -> Slice:
        """The slice of a tensor of so many dimensions; indices that follow each other become a range."""
        return Slice(tuple(_simple(cuts[d]) if d in cuts else None for d in range(dims)))

    @cached_property
    def whole(self) -> bool:
        """Whether it is all of the tensor."""
        return all(row is None for row in self.rows)

    def shape(self, full: Sequence[int]) -> tuple[int, ...]:
        """The shape of the part of a tensor of the shape ``full``."""
        return tuple(
            size if row is None else len(row) if isinstance(row, torch.Tensor) else row[1] - row[0]
            for size, row in zip(full, self.rows, strict=True)
        )

    def take(self, tensor: torch.Tensor) -> torch.Tensor:
        """The part, dense in the memory order of ``tensor``: the same bits and the same layout as a tensor of that size
        by itself, so that the same kernels run. A view where that is one. Autograd's gradient lands in ``tensor``, zero
        beside the part."""
        if self.whole:
            return tensor
        return _Take.apply(tensor, self)

    def dense(self, tensor: torch.Tensor) -> torch.Tensor:
        """The part of a tensor that needs no gradient, dense in the memory order of ``tensor``; see `take`."""
        found = self._gathered(tensor)
        strides = _dense_strides(found.shape, tensor.stride())
        if found.stride() == strides:
            return found
        return torch.empty_strided(found.shape, strides, dtype=tensor.dtype, device=tensor.device).copy_(found)

    def add(self, target: torch.Tensor, part: torch.Tensor) -> None:
        """``target``'s part is increased by ``part``, in place, without autograd: how gradients are accumulated."""
        with torch.no_grad():
            view, along = self._reached(target)
            if along is None:
                view.add_(part)
            elif len(along) == 1:
                view.index_add_(along[0], self._indices(along[0], target.device), part)
            else:
                self.put(target, self._gathered(target) + part)

    def write(self, target: torch.Tensor, part: torch.Tensor) -> None:
        """``target``'s part becomes ``part``, in place, without autograd: new values of buffers."""
        with torch.no_grad():
            self.put(target, part)

    def _gathered(self, tensor: torch.Tensor) -> torch.Tensor:
        for d, row in enumerate(self.rows):
            if isinstance(row, torch.Tensor):
                tensor = tensor.index_select(d, row.to(tensor.device))
            elif row is not None:
                tensor = tensor.narrow(d, row[0], row[1] - row[0])
        return tensor

    def _reached(self, target: torch.Tensor) -> tuple[torch.Tensor, list[int] | None]:
        """A view of all that ranges leave, and the dimensions of which only some indices remain; None for none."""
        along = []
        for d, row in enumerate(self.rows):
            if isinstance(row, torch.Tensor):
                along.append(d)
            elif row is not None:
                target = target.narrow(d, row[0], row[1] - row[0])
        return target, along or None

    def _indices(self, dim: int, device: torch.device) -> torch.Tensor:
        row = self.rows[dim]
        assert isinstance(row, torch.Tensor)
        return row.to(device)

    def put(self, target: torch.Tensor, part: torch.Tensor) -> None:
        """`write` in the caller's own grad mode."""
        view, along = self._reached(target)
        if along is None:
            view.copy_(part)
            return
        if len(along) == 1:
            view.index_copy_(along[0], self._indices(along[0], target.device), part)
            return
        lines = [_line(size, row, target.device) for size, row in zip(target.shape, self.rows, strict=True)]
        target[torch.meshgrid(*lines, indexing="ij")] = part

    def __repr__(self) -> str:
        return f"Slice[{', '.join(map(_text, self.rows))}]"


class _Take(torch.autograd.Function):
    """The part of a tensor; backward puts the gradient into zeros."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, part: Slice) -> torch.Tensor:
        ctx.part, ctx.like = part, (tensor.shape, tensor.stride())
        return part.dense(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _Put.apply(gradients[0], ctx.part, *ctx.like), None


class _Put(torch.autograd.Function):
    """Zeros of a shape and layout with the part filled in."""

    @staticmethod
    def forward(ctx: Any, gradient: torch.Tensor, part: Slice, shape: Any, strides: Any) -> torch.Tensor:
        ctx.part = part
        dense = _dense_strides(shape, strides)
        whole = torch.empty_strided(shape, dense, dtype=gradient.dtype, device=gradient.device).zero_()
        part.put(whole, gradient)
        return whole

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        return _Take.apply(gradients[0], ctx.part), None, None, None


@lru_cache(maxsize=4096)
def _dense_strides(shape: torch.Size, like: tuple[int, ...]) -> tuple[int, ...]:
    """`dense_strides`, which takes longer than to copy a small part."""
    return tuple(dense_strides(shape, like))


def _simple(cut: Cut) -> Cut:
    """Indices that follow each other as a range."""
    if isinstance(cut, torch.Tensor):
        first, many = int(cut[0]), len(cut)
        if cut.equal(torch.arange(first, first + many, device=cut.device)):
            return first, first + many
    return cut


def _line(size: int, row: Cut | None, device: torch.device) -> torch.Tensor:
    if isinstance(row, torch.Tensor):
        return row.to(device)
    start, stop = (0, size) if row is None else row
    return torch.arange(start, stop, device=device)


def _text(row: Cut | None) -> str:
    if row is None:
        return ":"
    return f"{len(row)} indices" if isinstance(row, torch.Tensor) else f"{row[0]}:{row[1]}"
