"""Arguments of an operator's node by the names of its schema, positional or keyword, with defaults filled in."""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import fx

from graphopt.graph.sizes import Expr, expression


def operand(node: fx.Node, name: str) -> Any:
    """The argument that ``node`` has for the schema argument ``name``: a node, a number, a list, or the default.

    Functions without a schema (``getitem``, ``operator.mul`` on sizes) name their arguments by position: ``"0"``.
    Raises KeyError for a name that the operator does not have.
    """
    if not isinstance(node.target, torch._ops.OpOverload):
        return node.args[int(name)]
    position, default = _positions(node.target)[name]
    if name in node.kwargs:
        return node.kwargs[name]
    return node.args[position] if position < len(node.args) else default


def operand_names(node: fx.Node) -> tuple[str, ...]:
    """Names of all arguments of the operator in schema order (positions, for a function without a schema)."""
    if isinstance(node.target, torch._ops.OpOverload):
        return tuple(_positions(node.target))
    return tuple(str(i) for i in range(len(node.args)))


def operand_nodes(node: fx.Node, name: str) -> tuple[fx.Node, ...]:
    """The nodes in the argument ``name``: none for a number, several for a list of tensors."""
    found: list[fx.Node] = []
    fx.node.map_arg(operand(node, name), found.append)
    return tuple(found)


def arguments(node: fx.Node) -> SimpleNamespace:
    """All arguments as attributes, for the conditions of a rule: ``a.output_mask[0]``."""
    return SimpleNamespace(**{name: operand(node, name) for name in operand_names(node)})


def set_operand(node: fx.Node, name: str, value: Any) -> None:
    """Set the argument ``name`` of ``node`` in place."""
    assert isinstance(node.target, torch._ops.OpOverload)
    position, _ = _positions(node.target)[name]
    if name not in node.kwargs and position < len(node.args):
        node.update_arg(position, value)
    else:
        node.update_kwarg(name, value)


def shape(node: fx.Node, name: str) -> tuple[Expr, ...]:
    """Sizes of the tensor operand ``name``, symbolic where the batch is."""
    return tuple(expression(size) for size in operand(node, name).meta["val"].shape)


@cache
def _positions(operator: torch._ops.OpOverload) -> dict[str, tuple[int, Any]]:
    """Position and default of each schema argument by name."""
    schema = operator._schema.arguments
    return {a.name: (i, a.default_value if a.has_default_value() else None) for i, a in enumerate(schema)}
