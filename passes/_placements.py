"""The placement of every node of a graph of which one axis is divided, and where placements must change.

Placements flow forward by what the table of operator rules says (`_parts.py`). A sum over the divided axis gives a
partial value; operators that are linear in a partial value keep it so; any other reader needs the whole, so it is
summed right behind the node that gives it. An operator of which the table does not say that it works on parts is a
`Misplaced` error: the scheme is refused, never guessed at.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection
from operator import getitem
from typing import Any

import torch
from torch import fx

from graphopt.graph.op_rules import reductions, zero_if
from graphopt.graph.sizes import numel
from graphopt.graph.storages import is_view
from graphopt.graph.training_graph import OutputKind
from graphopt.passes._axis_flow import AxisFlow
from graphopt.passes._parts import (
    Parts,
    at_most,
    keeps_sums_small,
    linear_alternatives,
    makes_zeros,
    nodes_read_in_order,
)
from graphopt.passes._placement import Misplaced, Own, Partial, Placement, Replicated, Sharded

_WHOLE = Replicated()


class Placements:
    """The placement of every node of a graph whose inputs that carry the axis are sharded.

    ``of`` gives a node's placement (a tuple where it has several results), ``reduced`` the nodes behind which their
    partial value is joined, with how. ``own``:
    nodes whose results beside the first are each processor's own. Raises Misplaced.
    """

    def __init__(self, found: AxisFlow, own: Callable[[fx.Node], bool] = lambda node: False):
        self.found, self.parts, self.own = found, Parts(found, own), own
        self.reduced: dict[fx.Node, str] = {}
        self.of: dict[fx.Node, Any] = {}
        while marked := self._walk():
            self.reduced.update(marked)

    # -- the walk ---------------------------------------------------------------------------------------------------

    def _walk(self) -> dict[fx.Node, str]:
        """Place every node; the nodes that turn out to be needed whole, each as early as it can be."""
        self.of, self._zero, self._from = {}, set(), {}  # type: ignore[var-annotated]
        self._marked: dict[fx.Node, str] = {}
        for node in self.found.graph.nodes:
            if node.op == "output":
                self._results()
            elif node.op == "call_function":
                self.of[node] = self._place(node)
                if node in self.reduced:
                    self.of[node] = _WHOLE
            else:
                self.of[node] = self._given(node)
        for node in self._shared_sources():
            self._marked[node] = "sum"
        return {node: how for node, how in self._marked.items() if not self._stems_from_marked(node)}

    def _shared_sources(self) -> list[fx.Node]:
        """Partial values of which several things are made that are all needed whole: one collective instead of many."""
        made: dict[fx.Node, list[fx.Node]] = defaultdict(list)
        for node in self._marked:
            source = node
            while len(before := self._from.get(source, ())) == 1:
                source = before[0]
                made[source].append(node)
        size = lambda node: node.meta["val"].element_size() * numel(node.meta["val"])
        return [s for s, nodes in made.items() if len(nodes) > 1 and at_most(size(s), sum(map(size, nodes)))]

    def _given(self, node: fx.Node) -> Placement:
        dims = self.parts.dims(node, node.meta.get("val"))
        return Sharded(dims[0]) if dims else _WHOLE

    def _results(self) -> None:
        for output, node in zip(self.found.graph.outputs, self.found.graph.results, strict=True):
            if node is None:
                continue
            self._whole(node)
            if output.kind in (OutputKind.LOSS, OutputKind.PARAMETER, OutputKind.STATE):
                if not isinstance(self.of[node], (Replicated, Partial)):
                    raise Misplaced(node, f"the {output} would be {self.of[node]}")

    def _whole(self, node: fx.Node) -> None:
        """Somebody needs the whole of this value: mark where its parts are to be joined."""
        placement = self.of[node]
        if not isinstance(placement, Partial):
            return
        while is_view(node) and node.target is not getitem and isinstance(self.of[node.args[0]], Partial):  # type: ignore[index]
            source = node.args[0]
            assert isinstance(source, fx.Node)
            if numel(source.meta["val"]) != numel(node.meta["val"]):
                break
            node = source
        self._marked[node] = placement.how

    def _stems_from_marked(self, node: fx.Node) -> bool:
        """Whether a value that this one is computed from is joined already."""
        todo, seen = list(self._from.get(node, ())), set()
        while todo:
            source = todo.pop()
            if source in self._marked:
                return True
            if source not in seen:
                seen.add(source)
                todo.extend(self._from.get(source, ()))
        return False

    # -- one node ---------------------------------------------------------------------------------------------------

    def _place(self, node: fx.Node) -> Any:
        if node.target is getitem:
            several, index = self.of[node.args[0]], node.args[1]  # type: ignore[index]
            return several[index] if isinstance(several, tuple) else several  # type: ignore[index]
        value = node.meta["val"]
        if zero_if(node, self._zero) or makes_zeros(node):
            self._zero.add(node)
        if "c10d" in str(node.target):
            raise Misplaced(node, "the graph is divided over processors already")
        self.parts.check(node)
        if isinstance(value, torch.Tensor):
            return self._result(node, value, None)
        if isinstance(value, (list, tuple)):
            return tuple(self._result(node, each, i) for i, each in enumerate(value))
        return self._number(node)

    def _number(self, node: fx.Node) -> Placement:
        for source in nodes_read_in_order(node):
            self._whole(source)
            if isinstance(self.of[source], (Sharded, Own)):
                raise Misplaced(node, "a number is read from rows that other processors do not have")
        return _WHOLE

    def _result(self, node: fx.Node, value: Any, index: int | None) -> Placement:
        if isinstance(value, (list, tuple)):
            return self._replicated_list(node)
        if not isinstance(value, torch.Tensor) or numel(value) == 0:
            return _WHOLE
        dims = self.parts.dims(node, value, index)
        read = nodes_read_in_order(node, index)
        if dims:
            self.parts.check_sources(node)
            for source in read:
                self._whole(source)
            return Sharded(dims[0])
        if self.own(node):
            sums = any(r.kind == "sum" and r.result == index for r in reductions(node) or ())
            return self._reduction(node, index or 0) if sums else Own()
        if any(isinstance(self.of[s], Own) for s in read):
            return Own()
        if any(map(self.parts.carries, read)):
            return self._reduction(node, index or 0)
        if any(isinstance(self.of[s], Partial) for s in read):
            return self._linear(node, value)
        return _WHOLE

    def _replicated_list(self, node: fx.Node) -> Placement:
        for source in nodes_read_in_order(node):
            self._whole(source)
            if not isinstance(self.of[source], (Replicated, Partial)):
                raise Misplaced(node, f"its operand {source.name} is {self.of[source]}")
        return _WHOLE

    # -- joining ----------------------------------------------------------------------------------------------------

    def _reduction(self, node: fx.Node, index: int) -> Placement:
        """The placement of a result without the axis, of operands with it: a part of a sum, or of a maximum."""
        joined = self.parts.joined(node, index)
        adds = next((sources for sources in joined.adds if all(map(self._sums, sources))), None)
        if adds is None:
            raise Misplaced(node, joined.why)
        return self._summed(node, joined.how, adds)

    def _summed(self, node: fx.Node, how: str, but: Collection[Any]) -> Placement:
        for source in nodes_read_in_order(node):
            if source not in but:
                self._whole(source)
        self._from[node] = [s for s in but if isinstance(self.of.get(s), Partial)]
        if how != "sum" and node not in self.reduced:
            self._marked[node] = how
        return Partial(how)

    def _linear(self, node: fx.Node, value: torch.Tensor) -> Placement:
        """The placement of an operator on partial values: partial if it is linear in them, else they are joined."""
        read = nodes_read_in_order(node)
        partial = [s for s in read if isinstance(self.of[s], Partial)]
        for sources, others in linear_alternatives(node):
            if (
                all(map(self._sums, sources))
                and not any(isinstance(self.of[s], Partial) for s in others)
                and keeps_sums_small(value, partial)
            ):
                self._from[node] = partial
                return Partial()
        for source in partial:
            self._whole(source)
        return _WHOLE

    def _sums(self, source: fx.Node) -> bool:
        """Whether a value is a part of a sum, or zero, which is one too."""
        return source in self._zero or self.of[source] == Partial()
