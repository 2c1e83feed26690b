"""What an operator does when each processor has a part of an axis: how its results then lie, or why it cannot.

Decided by the table of operator rules and one `AxisFlow` alone. What carries the axis is a part, what does not is whole
or, where sums over the axis are added to it, a part of a sum. `Placements` (one axis for a whole graph) and
`Strategies` (an axis for each operator) both ask here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from operator import getitem
from typing import Any

import torch
from torch import fx

from graphopt.graph.op_rules import linear_sets, operand, operand_names, operand_nodes, reads, reductions, rule
from graphopt.graph.sizes import expression, numel
from graphopt.passes._axis_flow import UNIFORM, AxisFlow
from graphopt.passes._placement import Misplaced

aten = torch.ops.aten

_ADDS_AT_PLACES = {aten.index_put: "self", aten.index_add: "self", aten.scatter_add: "self"}
"""Operators that add values at places to their operand: over a divided axis of the values, a sum."""
_JOINS = {"sum": "sum", "max": "max", "min": "min"}
_ZEROS = {aten.zeros, aten.new_zeros, aten.zeros_like}
_FILLS = {aten.full, aten.new_full, aten.full_like}
_DEPENDS: dict[Any, dict[int, frozenset[str]]] = {
    aten.convolution_backward.default: {
        0: frozenset({"grad_output", "weight"}), 1: frozenset({"grad_output", "input"}), 2: frozenset({"grad_output"}),
    },
}  # fmt: skip
"""Results that depend on some operands only."""


@dataclass(frozen=True)
class Joined:
    """A result without the axis, of operands with it: the whole is what ``how`` (sum, max, min) makes of all parts.

    ``adds``: alternatives of operands without the axis that are added to the sum: all in one of them must be parts of a
    sum themselves (or zero), or they would be added once a processor; ``why`` says so.
    """

    how: str
    adds: tuple[tuple[fx.Node, ...], ...] = ((),)
    why: str = ""


class Parts:
    """Operators of one graph on parts of one axis. ``own``: nodes that may treat each part by itself although that is
    another function. Everything raises Misplaced where parts do not give the whole."""

    def __init__(self, found: AxisFlow, own: Callable[[fx.Node], bool] = lambda node: False):
        self.found, self.own = found, own

    def carries(self, node: fx.Node) -> bool:
        """Whether a processor has a part of the node's value only."""
        value = node.meta.get("val")
        if isinstance(value, (list, tuple)):
            return any(self._in(v) and self.found.where(node, i) for i, v in enumerate(value))
        return self._in(value) and bool(self.found.where(node))

    @staticmethod
    def _in(value: Any) -> bool:
        return isinstance(value, torch.Tensor) and numel(value) != 0

    def check(self, node: fx.Node) -> None:
        """The operator treats all indices of the axis alike."""
        if node in self.found.parts:
            return
        known = reductions(node)
        why = self.found.ordered(node) or ("" if known is not None else self.found.averaged(node))
        if why:
            raise Misplaced(node, why)
        for r in known or ():
            if r.kept and self._over(node, r.places) and not self.own(node):
                raise Misplaced(node, f"each row of its result depends on all rows of the axis ({r.kind})")
        if "scale_grad_by_freq" in operand_names(node) and operand(node, "scale_grad_by_freq"):
            raise Misplaced(node, "it counts indices over the whole axis (scale_grad_by_freq)")

    def dims(self, node: fx.Node, value: Any, index: int | None = None) -> tuple[int, ...]:
        """The dimension of a value (of result ``index``) that carries the axis, if one does."""
        where = self.found.where(node, index)
        if len(where) > 1:
            raise Misplaced(node, "its result has an element for every pair of rows of the axis")
        if self.found.symbol is not None and (odd := set(where) ^ set(self.found.sized(value))):
            raise Misplaced(node, f"dimension {min(odd)} of its result is as large as the batch but in another order")
        if where and not self.found.regular(self.found.dims_of(node, index)[where[0]]):
            raise Misplaced(node, f"dimension {where[0]} of its result holds more than rows of the axis")
        return where

    def check_sources(self, node: fx.Node) -> None:
        """A result that carries the axis comes from operands that do, or is the same along it."""
        if node in self.found.parts or getattr(node.target, "overloadpacket", None) in UNIFORM:
            return
        if not any(map(self.carries, node.all_input_nodes)):
            raise Misplaced(node, "it makes rows of the axis from what has none")

    def joined(self, node: fx.Node, index: int = 0) -> Joined:
        """How a result without the axis comes from operands with it."""
        packet = getattr(node.target, "overloadpacket", None)
        if packet in _ADDS_AT_PLACES:
            why = "it writes rows of the axis into something whole"
            if packet is aten.index_put and not operand(node, "accumulate"):
                raise Misplaced(node, why)
            return Joined("sum", ((operand(node, "self"),),), why)
        known, why = reductions(node), "something whole would be added once a processor"
        if known is None:
            raise Misplaced(node, "what it does over the axis is not known")
        kinds = {r.kind for r in known if r.result == index and self._over(node, r.places)}
        if len(kinds) != 1 or not kinds <= set(_JOINS):
            done = " and ".join(sorted(kinds)) or "a choice"
            raise Misplaced(node, f"the axis leaves its result by {done}, which parts of it do not give")
        kind = kinds.pop()
        sets = tensor_sets(node) if kind == "sum" else []
        if kind == "sum" and linear_sets(node) and not sets:
            raise Misplaced(node, why)
        adds = tuple(
            tuple(s for name in sorted(names) for s in operand_nodes(node, name) if not self.carries(s))
            for names in sets
        )
        return Joined(_JOINS[kind], adds or ((),), why)

    def _over(self, node: fx.Node, places: tuple[tuple[str, int], ...]) -> bool:
        """Whether one of these dimensions of operands carries the axis."""
        for name, d in places:
            name, _, position = name.partition(".")
            sources = operand_nodes(node, name)
            source = sources[int(position or 0)] if sources else None
            if source is not None and d in self.found.where(source):
                return True
        return False


def nodes_read_in_order(node: fx.Node, index: int | None = None) -> list[fx.Node]:
    """The operands whose values the node reads, in order; of an operator with several results those that result
    ``index`` depends on, where less is known to do."""
    if rule(node) is None or not isinstance(node.target, torch._ops.OpOverload):
        return node.all_input_nodes
    named = reads(node)
    if index is not None:
        named = named & _DEPENDS.get(node.target, {}).get(index, named)
    return list(dict.fromkeys(s for name in operand_names(node) if name in named for s in operand_nodes(node, name)))


def tensor_sets(node: fx.Node) -> list[frozenset[str]]:
    """The sets of `linear_sets` that are tensors alone: a number in one (``x + 5``) is whole, no summand."""

    def tensors(name: str) -> bool:
        sources = operand_nodes(node, name)
        return bool(sources) and all(isinstance(s.meta.get("val"), torch.Tensor) for s in sources)

    return [names for names in linear_sets(node) if all(map(tensors, names))]


def linear_alternatives(node: fx.Node) -> Iterator[tuple[list[fx.Node], list[fx.Node]]]:
    """Operands that the operator is linear in together, and the others that it reads: one node may be both."""
    for names in tensor_sets(node):
        read = [name for name in operand_names(node) if name in reads(node)]
        yield tuple(  # type: ignore[misc]
            [s for name in read if (name in names) is inside for s in operand_nodes(node, name)]
            for inside in (True, False)
        )


def makes_zeros(node: fx.Node) -> bool:
    """Whether the operator gives zeros whatever its operands are."""
    packet = getattr(node.target, "overloadpacket", None)
    return packet in _ZEROS or (packet in _FILLS and operand(node, "fill_value") in (0, False))


def keeps_sums_small(value: torch.Tensor, partial: list[fx.Node]) -> bool:
    """Whether a result is no larger than each of the parts of sums that it is made of: to join later costs no more."""
    smallest = min(s.meta["val"].element_size() for s in partial)
    return value.element_size() >= smallest and all(at_most(numel(value), numel(s.meta["val"])) for s in partial)


def at_most(a: Any, b: Any) -> bool:
    """Whether a size is at most another, free sizes being of any value."""
    difference = expression(b - a)
    return difference >= 0 if isinstance(difference, int) else bool(difference.is_nonnegative)


def maker(node: fx.Node) -> tuple[fx.Node, int | None]:
    """The operator (or input) that gives a value, and which of its results it is; None for the only one."""
    if node.target is getitem:
        return node.args[0], node.args[1]  # type: ignore[return-value]
    return node, None
