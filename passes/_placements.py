"""The placement of every node of a graph of which one axis is divided, and where placements must change.

Placements flow forward by what the table of operator rules says. A sum over the divided axis gives a partial value;
operators that are linear in a partial value keep it so; any other reader needs the whole, so it is summed right behind
the node that gives it. An operator of which the table does not say that it works on parts is a `Misplaced` error: the
scheme is refused, never guessed at.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection
from operator import getitem
from typing import Any

import torch
from torch import fx

from graphopt.graph.op_rules import linear_sets, operand, operand_names, operand_nodes, reads, reductions, rule, zero_if
from graphopt.graph.sizes import expression, numel
from graphopt.graph.storages import is_view
from graphopt.graph.training_graph import OutputKind
from graphopt.passes._axis_flow import UNIFORM, AxisFlow
from graphopt.passes._placement import Misplaced, Own, Partial, Placement, Replicated, Sharded

aten = torch.ops.aten


_WHOLE = Replicated()
_ADDS_AT_PLACES = {aten.index_put: "self", aten.index_add: "self", aten.scatter_add: "self"}
"""Operators that add values at places to their operand: over a divided axis of the values, a sum."""
_JOINS = {"sum": "sum", "max": "max", "min": "min"}
_ZEROS = {aten.zeros, aten.new_zeros, aten.zeros_like}
_FILLS = {aten.full, aten.new_full, aten.full_like}


class Placements:
    """The placement of every node of a graph whose inputs that carry the axis are sharded.

    ``of`` gives a node's placement (a tuple where it has several results), ``reduced`` the nodes behind which their
    partial value is joined, with how. ``own``:
    nodes whose results beside the first are each processor's own. Raises Misplaced.
    """

    def __init__(self, found: AxisFlow, own: Callable[[fx.Node], bool] = lambda node: False):
        self.found, self.parts, self.own = found, found.parts, own
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
        return [s for s, nodes in made.items() if len(nodes) > 1 and _at_most(size(s), sum(map(size, nodes)))]

    def _given(self, node: fx.Node) -> Placement:
        dims = self._sharded_dims(node, node.meta.get("val"), None)
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
        if zero_if(node, self._zero) or self._makes_zeros(node):
            self._zero.add(node)
        if "c10d" in str(node.target):
            raise Misplaced(node, "the graph is divided over processors already")
        self._check(node)
        if isinstance(value, torch.Tensor):
            return self._result(node, value, None)
        if isinstance(value, (list, tuple)):
            return tuple(self._result(node, each, i) for i, each in enumerate(value))
        return self._number(node)

    def _number(self, node: fx.Node) -> Placement:
        for source in self._read(node):
            self._whole(source)
            if isinstance(self.of[source], (Sharded, Own)):
                raise Misplaced(node, "a number is read from rows that other processors do not have")
        return _WHOLE

    def _check(self, node: fx.Node) -> None:
        """The operator treats all indices of the axis alike."""
        if node in self.parts:
            return
        known = reductions(node)
        why = self.found.ordered(node) or ("" if known is not None else self.found.averaged(node))
        if why:
            raise Misplaced(node, why)
        for r in known or ():
            if r.kept and self._over(node, r.places) and not self.own(node):
                raise Misplaced(node, f"each row of its result depends on all rows of the batch ({r.kind})")
        if "scale_grad_by_freq" in operand_names(node) and operand(node, "scale_grad_by_freq"):
            raise Misplaced(node, "it counts indices over the whole batch (scale_grad_by_freq)")

    def _result(self, node: fx.Node, value: Any, index: int | None) -> Placement:
        if isinstance(value, (list, tuple)):
            return self._replicated_list(node)
        if not isinstance(value, torch.Tensor) or numel(value) == 0:
            return _WHOLE
        dims = self._sharded_dims(node, value, index)
        if dims:
            self._check_sources(node)
            for source in self._read(node):
                self._whole(source)
            return Sharded(dims[0])
        read = self._read(node)
        if self.own(node):
            sums = any(r.kind == "sum" and r.result == index for r in reductions(node) or ())
            return self._reduction(node, index or 0) if sums else Own()
        if any(isinstance(self.of[s], Own) for s in read):
            return Own()
        if any(self._is_sharded(s) for s in read):
            return self._reduction(node, index or 0)
        if any(isinstance(self.of[s], Partial) for s in read):
            return self._linear(node, value)
        return _WHOLE

    def _replicated_list(self, node: fx.Node) -> Placement:
        for source in self._read(node):
            self._whole(source)
            if not isinstance(self.of[source], (Replicated, Partial)):
                raise Misplaced(node, f"its operand {source.name} is {self.of[source]}")
        return _WHOLE

    def _sharded_dims(self, node: fx.Node, value: Any, index: int | None) -> tuple[int, ...]:
        """The dimension that carries the axis, if one does. Raises Misplaced where its parts are no part of it."""
        where, sized = self.found.where(node, index), self.found.sized(value)
        if len(where) > 1:
            raise Misplaced(node, "its result has an element for every pair of rows of the batch")
        if odd := set(where) ^ set(sized):
            raise Misplaced(node, f"dimension {min(odd)} of its result is as large as the batch but in another order")
        if where and not self.found.regular(self.found.dims_of(node, index)[where[0]]):
            raise Misplaced(node, f"dimension {where[0]} of its result holds more than rows of the batch")
        return where

    def _check_sources(self, node: fx.Node) -> None:
        """A result that carries the axis comes from operands that do, or is the same along it."""
        if node in self.parts or getattr(node.target, "overloadpacket", None) in UNIFORM:
            return
        if not any(self._is_sharded(source) for source in node.all_input_nodes):
            raise Misplaced(node, "it makes rows of the batch from what has none")

    # -- joining ----------------------------------------------------------------------------------------------------

    def _reduction(self, node: fx.Node, index: int) -> Placement:
        """The placement of a result without the axis, of operands with it: a part of a sum, or nothing known."""
        packet = getattr(node.target, "overloadpacket", None)
        if packet in _ADDS_AT_PLACES:
            adds = packet is not aten.index_put or operand(node, "accumulate")
            if adds and self._sums(operand(node, "self")):
                return self._summed(node, "sum", {operand(node, "self")})
            raise Misplaced(node, "it writes rows of the batch into something whole")
        known = reductions(node)
        if known is None:
            raise Misplaced(node, "what it does over the batch is not known")
        over = [r for r in known if r.result == index and self._over(node, r.places)]
        kinds = {r.kind for r in over}
        if len(kinds) != 1 or not kinds <= set(_JOINS):
            done = " and ".join(sorted(kinds)) or "a choice"
            raise Misplaced(node, f"the batch leaves its result by {done}, which parts of it do not give")
        kind = kinds.pop()
        added = linear_sets(node)
        if kind == "sum" and added and not any(self._all_sums(node, names) for names in added):
            raise Misplaced(node, "something whole would be added once a processor")
        return self._summed(node, _JOINS[kind], set())

    def _summed(self, node: fx.Node, how: str, but: Collection[Any]) -> Placement:
        for source in self._read(node):
            if source not in but:
                self._whole(source)
        self._from[node] = [s for s in but if isinstance(self.of.get(s), Partial)]
        if how != "sum" and node not in self.reduced:
            self._marked[node] = how
        return Partial(how)

    def _linear(self, node: fx.Node, value: torch.Tensor) -> Placement:
        """The placement of an operator on partial values: partial if it is linear in them, else they are joined."""
        partial = [s for s in self._read(node) if isinstance(self.of[s], Partial)]
        for names in linear_sets(node):
            sources = [s for name in names for s in operand_nodes(node, name)]
            others = [s for s in self._read(node) if s not in sources]
            smallest = min((s.meta["val"] for s in partial), key=lambda t: t.element_size())
            if (
                all(map(self._sums, sources))
                and not any(isinstance(self.of[s], Partial) for s in others)
                and all(_at_most(numel(value), numel(s.meta["val"])) for s in partial)
                and value.element_size() >= smallest.element_size()
            ):
                self._from[node] = partial
                return Partial()
        for source in partial:
            self._whole(source)
        return _WHOLE

    def _sums(self, source: fx.Node) -> bool:
        """Whether a value is a part of a sum, or zero, which is one too."""
        return source in self._zero or self.of[source] == Partial()

    def _all_sums(self, node: fx.Node, names: Collection[str]) -> bool:
        return all(self._is_sharded(s) or self._sums(s) for name in names for s in operand_nodes(node, name))

    def _makes_zeros(self, node: fx.Node) -> bool:
        packet = getattr(node.target, "overloadpacket", None)
        return packet in _ZEROS or (packet in _FILLS and operand(node, "fill_value") in (0, False))

    # -- reading ----------------------------------------------------------------------------------------------------

    def _read(self, node: fx.Node) -> list[fx.Node]:
        """The operands whose values the node reads, in order."""
        if rule(node) is None or not isinstance(node.target, torch._ops.OpOverload):
            return node.all_input_nodes
        named = reads(node)
        return list(
            dict.fromkeys(s for name in operand_names(node) if name in named for s in operand_nodes(node, name))
        )

    def _is_sharded(self, source: fx.Node) -> bool:
        placement = self.of[source]
        return any(isinstance(p, Sharded) for p in (placement if isinstance(placement, tuple) else [placement]))

    def _over(self, node: fx.Node, places: tuple[tuple[str, int], ...]) -> bool:
        """Whether one of these dimensions of operands carries the axis."""
        for name, d in places:
            name, _, position = name.partition(".")
            sources = operand_nodes(node, name)
            source = sources[int(position or 0)] if sources else None
            if source is not None and d in self.found.where(source):
                return True
        return False


def _at_most(a: Any, b: Any) -> bool:
    """Whether a size is at most another, free sizes being of any value."""
    difference = expression(b - a)
    return difference >= 0 if isinstance(difference, int) else bool(difference.is_nonnegative)
