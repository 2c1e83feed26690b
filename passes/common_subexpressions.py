"""Common subexpressions: the same operator on the same operands is computed once."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from operator import getitem
from typing import Any, ClassVar

import torch
from torch import fx

from graphopt.graph.op_rules import is_pure
from graphopt.graph.text import operator_text
from graphopt.graph.training_graph import TrainingGraph
from graphopt.passes._base import Pass, PassResult, Tier
from graphopt.passes._rewriting import Rewriting
from graphopt.passes._storage import UNDEFINED, Storages, comes_before


@dataclass(frozen=True)
class CommonSubexpressions(Pass):
    """Merge an operator into an earlier one with the same operands (hash-consing on operator and arguments).

    Legal because a pure operator on the same tensors and numbers gives the same bits. Never merged: random
    operators, operators that are not pure, and those that leave memory undefined (``empty``). Numbers are compared
    with their type and sign, since ``1``, ``1.0`` and ``True``, and ``0.0`` and ``-0.0``, are equal in Python
    but not to an operator. Symbolic sizes are the same number where their expressions are equal: the graph is only
    valid for sizes that keep them so.

    Refused, with the reason:

    - both results are outputs, or live in the storages of outputs: these would become aliases;
    - a backward operator repeats one of forward whose value is not kept: merging them would save the operator and
      keep its result for backward. (Views are free: they share a storage that is kept anyway.)

    ::

        %tanh = aten.tanh(%x)                          %tanh = aten.tanh(%x)
        %tanh_1 = aten.tanh(%x)              becomes
        %add = aten.add.Tensor(%tanh, %tanh_1)         %add = aten.add.Tensor(%tanh, %tanh)

    >>> import torch
    >>> from graphopt.graph.capture import capture
    >>> class Twice(torch.nn.Module):
    ...     def forward(self, x):
    ...         return x.tanh() + x.tanh()
    >>> graph = capture(Twice(), torch.randn(4, 3), backward=False)
    >>> for change in CommonSubexpressions()(graph).changes:
    ...     print(change.what)
    merged aten.tanh into %tanh
    """

    name: ClassVar[str] = "common_subexpressions"
    tier: ClassVar[Tier] = Tier.EXACT

    def rewrite(self, graph: TrainingGraph) -> PassResult:
        """See the class."""
        rewriting, storages = Rewriting(self.name, graph), Storages(graph)
        first: dict[Hashable, fx.Node] = {}
        same: dict[fx.Node, fx.Node] = {}
        for node in graph.nodes:
            if not is_pure(node) or getattr(node.target, "overloadpacket", None) in UNDEFINED:
                continue
            twin = first.setdefault(_key(node, same), node)
            if twin is node:
                continue
            pairs = _results(node, twin)
            why = "" if comes_before(twin, node) else f"%{twin.name} belongs to a later phase"
            why = why or next(filter(None, (storages.why_not(*pair) for pair in pairs)), "")
            if why:
                rewriting.refuse(node, f"{operator_text(node.target)} repeats %{twin.name}", why)
                continue
            rewriting.replace(node, twin, f"merged {operator_text(node.target)} into %{twin.name}")
            for old, new in pairs:
                storages.merge(old, new)
            same[node] = twin
        return rewriting.finish()


def _key(node: fx.Node, same: dict[fx.Node, fx.Node]) -> Hashable:
    """Equal for nodes that compute the same, given which operands are the same by now."""

    def of(value: Any) -> Hashable:
        if isinstance(value, fx.Node):
            return same.get(value, value)
        if isinstance(value, (tuple, list)):
            return tuple(map(of, value))
        if isinstance(value, Mapping):
            return tuple((k, of(v)) for k, v in sorted(value.items()))
        return type(value), value.hex() if isinstance(value, float) else value

    value = node.meta.get("val")
    if isinstance(value, torch.SymInt):
        return torch.SymInt, value.node.expr
    return node.op, node.target, of(node.args), of(node.kwargs)


def _results(node: fx.Node, twin: fx.Node) -> list[tuple[fx.Node, fx.Node]]:
    """The values of two equal operators pair by pair; of an operator with several results only those that are read.

    A result that only the later operator's readers use pairs with the earlier operator itself, so that the rules on
    storages see that it would live longer.
    """
    if not isinstance(node.meta.get("val"), (tuple, list)):
        return [(node, twin)]
    parts = {part.args[1]: part for part in twin.users if part.target is getitem}
    return [(part, parts.get(part.args[1], twin)) for part in node.users if part.target is getitem]
