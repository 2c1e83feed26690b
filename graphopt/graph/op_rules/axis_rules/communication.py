"""Axis rules of functional collectives: ranks are an outer factor of the first dimension."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import fx

from graphopt.graph.op_rules.arguments import operand

if TYPE_CHECKING:
    from graphopt.graph.axes.propagation import Propagation


def all_gather(see: Propagation, node: fx.Node) -> Any:
    """The shards of all ranks one behind the other."""
    dims = see.of(node.args[0])
    return (see.product([see.new(operand(node, "group_size"), "ranks"), dims[0]]), *dims[1:])


def reduce_scatter(see: Propagation, node: fx.Node) -> Any:
    """The sum over ranks, of which each keeps its part of the first dimension."""
    dims = see.of(node.args[0])
    ranks, part = see.reshape([dims[0]], [operand(node, "group_size"), dims[0].size // operand(node, "group_size")])
    see.freeze(ranks, "ranks")
    return (part, *dims[1:])


def all_to_all(see: Propagation, node: fx.Node) -> Any:
    """Parts of the first dimension change ranks: what comes out is another axis."""
    dims = see.of(node.args[0])
    reason = f"{node.target} ({node.name}) exchanges parts of it"
    see.freeze(dims[0], reason)
    return (see.new(see.sizes(node)[0], reason), *dims[1:])
