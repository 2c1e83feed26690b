"""Sizes that may be symbolic: how shapes with a free batch size become numbers.

A captured graph holds ``torch.SymInt`` sizes over a few symbols (usually one, ``batch``). Everything that counts
(elements, bytes, FLOPs) is computed once as a sympy expression and evaluated for the sizes asked.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import reduce
from operator import mul
from typing import Any, TypeAlias

import sympy
import torch

Expr: TypeAlias = sympy.Expr | int


def expression(value: Any) -> Expr:
    """The size ``value`` (int, ``torch.SymInt`` or sympy) as an int where it is one, else as a sympy expression."""
    if isinstance(value, torch.SymInt):
        value = value.node.expr
    if isinstance(value, sympy.Integer):
        return int(value)
    return value


def product(sizes: Iterable[Any]) -> Expr:
    """The product of sizes, 1 for none."""
    return reduce(mul, (expression(s) for s in sizes), 1)


def numel(tensor: torch.Tensor | Shaped) -> Expr:
    """Number of elements of a (fake) tensor."""
    return product(tensor.shape)


def nbytes(tensor: torch.Tensor | Shaped) -> Expr:
    """Bytes of the elements of a (fake) tensor; a broadcast dimension (stride 0) is stored once."""
    stored = (s for s, stride in zip(tensor.shape, tensor.stride(), strict=True) if expression(stride) != 0)
    return product(stored) * tensor.element_size()


@dataclass(frozen=True)
class Shaped:
    """Stands in for a fake tensor where one only counts: a shape whose sizes may be any expressions."""

    shape: tuple[Expr, ...]
    strides: tuple[Any, ...]
    dtype: torch.dtype
    device: torch.device

    def stride(self, dim: int | None = None) -> Any:
        """As `torch.Tensor.stride`; strides are those of the capture: only which are 0 or 1 is meant."""
        return self.strides if dim is None else self.strides[dim]

    def dim(self) -> int:
        """The number of dimensions."""
        return len(self.shape)

    def element_size(self) -> int:
        """Bytes of one element."""
        return self.dtype.itemsize


@dataclass(frozen=True)
class Symbols:
    """The free sizes of a graph: their public names, their sympy symbols, and the sizes seen at capture.

    ``guards`` are sympy booleans over the symbols: the graph is valid only where all of them hold. A named size without
    a symbol is fixed: the graph is valid only at its hint (batch size 1 is always captured so).
    """

    symbols: Mapping[str, sympy.Symbol] = field(default_factory=dict)
    hints: Mapping[str, int] = field(default_factory=dict)
    guards: tuple[sympy.Basic, ...] = ()

    def evaluate(self, value: Any, sizes: Mapping[str, int] | None = None) -> int:
        """``value`` as an int at ``sizes`` (by name; sizes that are not given are those of the capture)."""
        value = expression(value)
        if isinstance(value, int):
            return value
        return int(value.xreplace(self.substitution(sizes)))

    def substitution(self, sizes: Mapping[str, int] | None = None) -> dict[sympy.Symbol, sympy.Integer]:
        """The mapping symbol -> integer at ``sizes``. Raises KeyError for a name this graph does not have."""
        chosen = {**self.hints, **(sizes or {})}
        unknown = set(chosen) - set(self.hints)
        if unknown:
            raise KeyError(f"sizes: unknown name {sorted(unknown)}, this graph has {sorted(self.hints)}")
        fixed = {n: s for n, s in chosen.items() if n not in self.symbols and s != self.hints[n]}
        if fixed:
            raise KeyError(f"sizes: this graph was captured for fixed sizes, it cannot be evaluated at {fixed}")
        return {symbol: sympy.Integer(chosen[name]) for name, symbol in self.symbols.items()}

    def admits(self, sizes: Mapping[str, int]) -> bool:
        """Whether the graph is valid at ``sizes`` (every guard of the capture holds, every size at least 2, a part of a
        divided one at least 1)."""
        least = {name: 1 if f"{name}.total" in self.symbols else 2 for name in self.symbols}
        if any(size < least[name] if name in least else size != self.hints[name] for name, size in sizes.items()):
            return False
        substitution = self.substitution(sizes)
        return all(bool(guard.xreplace(substitution)) for guard in self.guards)

    def rename(self, value: Any) -> str:
        """A size as text, with public names in place of symbols: ``2*batch``."""
        value = expression(value)
        if isinstance(value, int):
            return str(value)
        public = {symbol: sympy.Symbol(name) for name, symbol in self.symbols.items()}
        return str(value.xreplace(public)).replace(" ", "")
