"""Axis rules as einsum-like patterns: ``"self: mk, mat2: kn -> mn"``.

One letter is one dimension; the same letter is the same dimension wherever it stands. ``*`` stands for any number of
dimensions (at most once an operand), ``1`` for a dimension of size 1. ``a?``: the operand may be broadcast to
what it says. An operand that is None or a number is left out. Results are separated by ``;``. A letter that no operand
has is a new dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import fx

from graphopt.graph.op_rules.arguments import operand

if TYPE_CHECKING:
    from graphopt.graph.axes.factors import Factor
    from graphopt.graph.axes.propagation import Propagation

AxisRule = Callable[["Propagation", fx.Node], Any]


def parse(text: str) -> tuple[list[tuple[str, str, bool]], list[str]]:
    """The operands ``(name, letters, broadcast)`` and the letters of each result of a pattern."""
    left, _, right = text.partition("->")
    operands = []
    for term in left.split(","):
        name, _, letters = (part.strip() for part in term.partition(":"))
        operands.append((name.removesuffix("?"), letters, name.endswith("?")))
    return operands, [r.strip() for r in right.split(";")]


def pattern(text: str) -> AxisRule:
    """The rule that ``text`` describes; see the module."""
    operands, results = parse(text)

    def rule(see: Propagation, node: fx.Node) -> Any:
        bound: dict[str, Any] = {}
        for name, letters, broadcast in operands:
            given = operand(node, name)
            if isinstance(given, fx.Node):
                _bind(see, bound, letters, see.of(given), broadcast)
        dims = [_result(see, bound, letters, node, i, len(results)) for i, letters in enumerate(results)]
        return dims[0] if len(dims) == 1 else dims

    return rule


def _bind(see: Propagation, bound: dict[str, Any], letters: str, dims: tuple[Factor, ...], broadcast: bool) -> None:
    before, star, behind = letters.partition("*")
    if star:
        count = len(dims) - len(before) - len(behind)
        middle = dims[len(before) : len(before) + count]
        bound["*"] = see.broadcast(bound["*"], middle) if "*" in bound else middle
        dims = dims[: len(before)] + dims[len(before) + count :]
    elif broadcast:
        before = before[len(before) - len(dims) :]
    for letter, dim in zip(before + behind, dims, strict=True):
        if letter == "1":
            continue
        if letter not in bound:
            bound[letter] = dim
        else:
            bound[letter] = see.meet(bound[letter], dim)


def _result(
    see: Propagation, bound: dict[str, Any], letters: str, node: fx.Node, index: int, count: int
) -> tuple[Factor, ...]:
    dims: list[Factor] = []
    for letter in letters:
        if letter == "*":
            dims.extend(bound.get("*", ()))
        elif letter == "1":
            dims.append(see.one)
        elif letter in bound:
            dims.append(bound[letter])
        else:
            sizes = see.sizes(node) if count == 1 else see.sizes(node, index)
            bound[letter] = see.new(sizes[len(dims)])
            dims.append(bound[letter])
    return tuple(dims)
