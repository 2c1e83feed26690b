"""Axis rules of functional collectives: ranks are an outer factor of the first dimension."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import fx

from graphopt.graph.op_rules.arguments import operand

if TYPE_CHECKING:
    from graphopt.graph.axes.factors import Factor
    from graphopt.graph.axes.propagation import Propagation
    from graphopt.graph.op_rules.axis_rules.pattern import AxisRule

Exchange = Callable[["Propagation", fx.Node, "tuple[Factor, ...]", "tuple[int, ...]"], "tuple[Factor, ...]"]
"""What a collective does to one tensor: from its dimensions and the sizes of the result, those of the result."""


def one(exchange: Exchange) -> AxisRule:
    """A collective on one tensor."""
    return lambda see, node: exchange(see, node, see.of(node.args[0]), see.sizes(node))


def each(exchange: Exchange) -> AxisRule:
    """A collective on each tensor of a list."""

    def rule(see: Propagation, node: fx.Node) -> Any:
        sources: Any = node.args[0]
        return [exchange(see, node, see.of(source), see.sizes(node, i)) for i, source in enumerate(sources)]

    return rule


def same(see: Propagation, node: fx.Node, dims: tuple[Factor, ...], sizes: tuple[int, ...]) -> tuple[Factor, ...]:
    """Values change, dimensions do not."""
    return dims


def all_gather(see: Propagation, node: fx.Node, dims: tuple[Factor, ...], sizes: tuple[int, ...]) -> tuple[Factor, ...]:
    """The shards of all ranks one behind the other."""
    return (see.product([see.new(operand(node, "group_size"), "ranks"), dims[0]]), *dims[1:])


def reduce_scatter(
    see: Propagation, node: fx.Node, dims: tuple[Factor, ...], sizes: tuple[int, ...]
) -> tuple[Factor, ...]:
    """The sum over ranks, of which each keeps its part of the first dimension."""
    ranks, part = see.reshape([dims[0]], [operand(node, "group_size"), sizes[0]])
    see.freeze(ranks, "ranks")
    return (part, *dims[1:])


def all_to_all(see: Propagation, node: fx.Node, dims: tuple[Factor, ...], sizes: tuple[int, ...]) -> tuple[Factor, ...]:
    """Parts of the first dimension change ranks: what comes out is another axis."""
    reason = f"{node.target} ({node.name}) exchanges parts of it"
    see.freeze(dims[0], reason)
    return (see.new(sizes[0], reason), *dims[1:])
