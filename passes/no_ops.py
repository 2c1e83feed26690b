"""No-ops: operators that give back a tensor that the graph holds already."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import torch
from torch import fx

from graphopt.graph.op_rules import operand
from graphopt.graph.text import operator_text
from graphopt.graph.training_graph import TrainingGraph
from graphopt.passes._base import Pass, PassResult, Tier
from graphopt.passes._rewriting import Rewriting
from graphopt.passes._storage import Storages, geometry, is_contiguous

aten = torch.ops.aten

COPYING = {
    aten.clone.default: "self",
    aten._to_copy.default: "self",
    aten.lift_fresh_copy.default: "self",
    aten.copy.default: "src",
    aten.slice_backward.default: "grad_output",
    torch.ops.prims.convert_element_type.default: "a",
}
"""Operators that make a new tensor with the elements of one operand, where that has their shape and dtype."""

RESHAPES = {aten.view.default, aten._unsafe_view.default}
"""Views that only need a contiguous operand with the right number of elements."""


@dataclass(frozen=True)
class NoOps(Pass):
    """Remove views and copies that change nothing.

    Three rules:

    1. *Views.* A view whose result lies in its storage exactly as an earlier value of that storage (same dtype,
       sizes, strides and offset, symbolic sizes included) is that value. This one rule covers `detach`, `alias`,
       views, reshapes and expands to the same shape, full-range slices, and chains that compose to the identity,
       such as ``t(t(x))`` or ``squeeze(unsqueeze(x))``.
    2. *Copies.* A copy (`clone`, `_to_copy` to the same dtype and device, `lift_fresh_copy`, `slice_backward` of
       the whole range) that lies in its storage as its operand does in its own is its operand.
    3. *Views of views.* ``view(view(x))`` reads a contiguous ``x`` directly.

    Legal because nothing in the graph is written in place, so that sharing a storage cannot be seen inside it. It
    could be seen outside: so no output becomes the same tensor as an input or another output, or shares memory
    with one anew. A copy also stays where its operand is larger and would be kept for backward in its place.

    Not touched: copies that change the layout (they decide which kernels run), and operators whose result may or
    may not be a view.

    ::

        %mm = aten.mm(%t_1, %x)                        %mm = aten.mm(%t_1, %x)
        %t_2 = aten.t(%mm)                   becomes
        %t_3 = aten.t(%t_2)
        return %t_3                                    return %mm

    >>> import torch
    >>> from graphopt.graph.capture import capture
    >>> result = NoOps()(capture(torch.nn.Linear(3, 2), torch.randn(4, 3)))
    >>> for change in result.changes:
    ...     print(change.what)
    removed aten.t: a view that changes nothing
    >>> print(result.graph.results)
    (addmm, mm, view)
    """

    name: ClassVar[str] = "no_ops"
    tier: ClassVar[Tier] = Tier.EXACT

    def rewrite(self, graph: TrainingGraph) -> PassResult:
        """See the class."""
        rewriting, storages = Rewriting(self.name, graph), Storages(graph)
        values: dict[fx.Node, list[fx.Node]] = defaultdict(list)  # of each storage, in order
        same: dict[fx.Node, fx.Node] = {}  # values that another one stands for now
        through: dict[fx.Node, fx.Node] = {}  # contiguous value that a chain of views starts from
        lies = cache(geometry)
        for node in graph.nodes:
            if not isinstance(node.meta.get("val"), torch.Tensor):
                continue
            kind = "a copy that changes nothing" if node.target in COPYING else "a view that changes nothing"
            memory = storages.memory(node)
            if node.target in COPYING:
                source = operand(node, COPYING[node.target])
                candidates = [same.get(source, source)] if isinstance(source, fx.Node) else []
            else:
                candidates = values[memory] if memory is not node else []
            twin = next((c for c in candidates if lies(c) == lies(node) is not None), None)
            why = storages.why_not(node, twin) if twin is not None else ""
            if twin is not None and not why:
                rewriting.replace(node, twin, f"removed {operator_text(node.target)}: {kind}")
                storages.merge(node, twin)
                same[node] = twin
                continue
            if why:
                rewriting.refuse(node, f"{operator_text(node.target)}, {kind}", why)
            values[memory].append(node)
            if node.target in RESHAPES:
                source = node.all_input_nodes[0]
                source = same.get(source, source)
                start = through.get(source, source)
                if is_contiguous(start):
                    through[node] = start
                    if start is not source:
                        rewriting.read_through(node, start, f"{operator_text(node.target)} reads through a view")
        return rewriting.finish()
