"""What formulas of workspace are made of: sizes of operands through one gateway, thresholds, memory layouts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeGuard, cast

import sympy
import torch
from torch import fx

from graphopt.graph.sizes import Expr, expression, product
from graphopt.graph.storages import tensors

Shape: TypeAlias = Sequence[Expr]
ShapesOf: TypeAlias = Callable[[fx.Node], Sequence[Shape]]
Moments: TypeAlias = list[Expr]
"""Bytes beyond the results at moments of one kernel; empty where there are none."""


def shapes(node: fx.Node) -> list[Shape]:
    """The shapes of the tensors in a node's value, in order: ints, or sympy expressions of free sizes."""
    return [[expression(s) for s in t.shape] for t in tensors(node.meta.get("val"))]


@dataclass(frozen=True)
class Sizes:
    """Where formulas get sizes from. ``shapes_of``: shapes of the tensors in a node's value, in order. ``threads``: of
    the kernels; some take a buffer a thread. Dtypes and whether memory is contiguous come from ``meta["val"]``."""

    shapes_of: ShapesOf = shapes
    threads: int = 1

    def shape(self, node: fx.Node, index: int = 0) -> Shape:
        """Shape of one tensor of a node's value."""
        return self.shapes_of(node)[index]

    def numel(self, node: fx.Node, index: int = 0) -> Expr:
        """Elements of one tensor of a node's value."""
        return product(self.shape(node, index))

    def nbytes(self, node: fx.Node, index: int = 0) -> Expr:
        """Bytes of one tensor of a node's value, were it contiguous."""
        return self.numel(node, index) * tensor_of(node, index).element_size()


class at_least(sympy.Function):  # type: ignore[misc]  # lower case as sympy's functions
    """``at_least(n, k)``: 1 where ``n >= k``, else 0. For kernels that are chosen by size.

    >>> at_least(sympy.Symbol("n"), 16).subs("n", 8), at_least(20, 16)
    (0, 1)
    """

    @classmethod
    def eval(cls, n: Any, k: Any) -> sympy.Integer | None:
        """The number, where ``n`` is one."""
        return sympy.Integer(1 if n >= k else 0) if n.is_number else None


def flag(n: Expr, k: int) -> Expr:
    """1 where ``n >= k``, else 0. A free size is at least 2."""
    if isinstance(n, int):
        return int(n >= k)
    return 1 if k <= 2 else at_least(n, k)


def reaches(size: Expr, least: int) -> Expr:
    """1 where a window's size is at least so much, else 0. A free one may be 1."""
    return int(size >= least) if isinstance(size, int) else at_least(size, least)


def at_most(n: Expr, limit: Expr) -> Expr:
    """The smaller of two sizes."""
    if isinstance(n, int) and isinstance(limit, int):
        return min(n, limit)
    return n + at_least(n, limit) * (limit - n)


def is_tensor(value: Any) -> TypeGuard[fx.Node]:
    """Whether an argument is a node whose value is one tensor."""
    return isinstance(value, fx.Node) and isinstance(value.meta.get("val"), torch.Tensor)


def tensor_of(node: fx.Node, index: int = 0) -> torch.Tensor:
    """One (fake) tensor of a node's value."""
    return cast(torch.Tensor, tensors(node.meta["val"])[index])


def contiguous(tensor: torch.Tensor) -> bool:
    """Whether a (fake) tensor is contiguous for every value of its free sizes."""
    return _lies_in_order(tensor, range(tensor.dim()))


def _lies_in_order(tensor: torch.Tensor, order: Iterable[int]) -> bool:
    """Whether its dimensions, in this order, are stored from the outermost to the innermost without gaps."""
    expected: Expr = 1
    for size, stride in reversed([(tensor.shape[dim], tensor.stride(dim)) for dim in order]):
        if expression(size) != 1 and expression(stride) != expected:
            return False
        expected = expected * expression(size)
    return True


def channels_last(tensor: torch.Tensor) -> bool:
    """Whether an image or volume is stored with its channels innermost."""
    return tensor.dim() in (4, 5) and _lies_in_order(tensor, (0, *range(2, tensor.dim()), 1))


def suggests_channels_last(tensor: torch.Tensor) -> bool:
    """Whether kernels choose that layout for it. Images of one place are in both layouts: their strides decide."""
    whole = tensor.dim() > 0 and expression(tensor.stride(0)) == product(tensor.shape[1:])
    return whole and channels_last(tensor) and not (contiguous(tensor) and expression(tensor.stride(-1)) == 1)
