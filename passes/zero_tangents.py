"""Zero tangents: backward without the part that comes from outputs whose gradient is known to be zero."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from graphopt.errors import PassError
from graphopt.graph.op_rules import bytes_moved, flops, is_pure, zero_if
from graphopt.graph.training_graph import InputKind, OutputKind, TrainingGraph
from graphopt.passes._base import Change, Pass, PassResult, Saving, Tier, place
from graphopt.passes._storage import geometry


@dataclass(frozen=True)
class ZeroTangents(Pass):
    """Remove what only differentiable outputs that nobody differentiates contribute to gradients.

    ``outputs``: names of the outputs whose tangent is zero. A value is zero if its operator is linear in operands that
    are (the table of operator rules says which); ``a + zero`` is ``a``; a gradient that is zero is no output any more,
    as autograd leaves ``.grad`` alone there. What an operator without a rule reads stays and is given zeros.

    Legal because autograd, which does not run these operators either, is the meaning: the bits are eager's (exact).
    """

    name: ClassVar[str] = "zero_tangents"
    tier: ClassVar[Tier] = Tier.EXACT
    drops_outputs: ClassVar[bool] = True

    outputs: Collection[str] = ()

    def rewrite(self, graph: TrainingGraph) -> PassResult:
        """See the class."""
        tangents = graph.input_nodes(InputKind.TANGENT)
        if unknown := sorted(set(self.outputs) - set(tangents)):
            raise PassError(f"{unknown} are no outputs with a tangent; expected some of {sorted(tangents)}")
        if not self.outputs:
            return PassResult(graph)
        draft = graph.draft()
        zero: set[fx.Node] = {draft.node(tangents[name]) for name in self.outputs}
        for node in list(draft.graph.nodes):
            if node.op != "call_function":
                continue
            if zero_if(node, zero):
                zero.add(node)
            elif (other := _other_term(node, zero)) is not None:
                draft.replace(node, other)
        keep = [
            o.kind is not OutputKind.GRADIENT or r not in zero
            for o, r in zip(draft.signature.outputs, draft.results, strict=True)
        ]
        draft.keep_outputs(keep)
        changes = []
        for node in reversed(draft.graph.nodes):
            if node.op == "call_function" and not node.users and is_pure(node):
                what = f"removed {str(node.target).removeprefix('aten.').removesuffix('.default')}"
                changes.append(Change(self.name, what, *place(node), saving=self._saving(graph, node)))
                draft.graph.erase_node(node)
        return PassResult(draft.finish(), tuple(reversed(changes))) if changes or not all(keep) else PassResult(graph)

    @staticmethod
    def _saving(graph: TrainingGraph, node: fx.Node) -> Saving:
        evaluate = graph.symbols.evaluate
        return Saving(flops=evaluate(flops(node)), bytes_moved=evaluate(bytes_moved(node)))


def _other_term(node: fx.Node, zero: set[fx.Node]) -> fx.Node | None:
    """``a`` of ``a + zero``, where the sum has the shape and layout of ``a``."""
    if node.target is not torch.ops.aten.add.Tensor or node.kwargs.get("alpha", 1) != 1:
        return None
    first, second = node.args[:2]
    if not isinstance(first, fx.Node) or not isinstance(second, fx.Node):
        return None
    other = second if first in zero else first if second in zero else None
    return other if other is not None and geometry(other) == geometry(node) else None
