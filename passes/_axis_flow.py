"""Where an axis stands in a joint graph, and which operators do not treat its indices alike.

`graphopt.graph.axes` asks what may be permuted and left out, and lets backward freeze nothing. To divide an axis over
processors asks more: *every* operator, of backward too, must do with a part of the axis what it does with that part
of the whole. So the same axis rules run once more, all of them binding, and each operator that singles out positions
of a dimension is remembered (`BindingFlow`). What that says of one axis, the batch or any other, is its `AxisFlow`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection
from typing import Any

import sympy
import torch
from torch import fx

from graphopt.graph.axes.factors import ONE, Factor, find
from graphopt.graph.axes.propagation import Propagation
from graphopt.graph.op_rules.arguments import operand, operand_names
from graphopt.graph.sizes import Expr, expression
from graphopt.graph.training_graph import InputKind, TrainingGraph

aten = torch.ops.aten

UNIFORM = {
    aten.zeros, aten.ones, aten.full, aten.empty, aten.empty_strided, aten.new_zeros, aten.new_ones, aten.new_full,
    aten.new_empty, aten.new_empty_strided, aten.zeros_like, aten.ones_like, aten.full_like, aten.empty_like,
    aten.expand, aten.repeat, aten.expand_as, aten.broadcast_to,
}  # fmt: skip
"""Operators that make a new dimension along which all is the same: a part of it is like any other."""

ARANGES = {aten.arange.default, aten.arange.start, aten.arange.start_step}
_LOOKUPS = {aten.index, aten._unsafe_index, aten.index_put, aten._unsafe_index_put}
_RESHAPES = {aten.view, aten._unsafe_view, aten.unsqueeze, aten.expand, aten.slice, aten.clone, aten.detach, aten.alias}


class BindingFlow(Propagation):
    """The walk over a joint graph in which all rules bind, for all axes at a time.

    ``batch`` is the factor of the batch, `ONE` where its size is fixed.
    """

    def __init__(self, graph: TrainingGraph, parts: Collection[fx.Node] = (), rows: Collection[fx.Node] = ()):
        """``parts``: nodes that cut the processor's part out of something whole. ``rows``: operands of lookups that
        count the rows of the part (those that count the rows of the graph are found)."""
        super().__init__(graph)
        self.parts, self._rows = frozenset(parts), frozenset(rows)
        self.symbol: sympy.Symbol | None = graph.symbols.symbols.get("batch")
        self.batch: Factor = ONE
        self._ordered: dict[fx.Node, list[tuple[Factor, str]]] = defaultdict(list)
        self._averaged: dict[fx.Node, list[tuple[Factor, str]]] = defaultdict(list)
        self.run()
        self.batch = find(self.batch)
        self._clashes = {node: (find(a), find(b), why) for a, b, node, why in self.contradictions}
        self._no_rule = set(self.unknown_nodes)

    # -- the walk: as `Propagation`, with a record ------------------------------------------------------------------

    def _inputs(self) -> None:
        super()._inputs()
        for node in self.graph.input_nodes(InputKind.BATCH).values():
            dims = self.of(node)
            if self.symbol is not None and dims and dims[0].size == self.size(self.symbol):
                self.batch = dims[0]

    def _results(self) -> None:
        """As `Propagation._results`. That the user sees a dimension in order says nothing of the operator behind."""
        recorded, self._ordered = self._ordered, defaultdict(list)
        super()._results()
        self._ordered = recorded

    def _apply(self, node: fx.Node) -> Any:
        self.binding = True
        if node in self.parts and node.target is aten.slice.Tensor:  # else the whole would seem to hold the part
            dims = list(self.of(node.args[0]))
            dims[node.args[1]] = self.new(self.sizes(node)[node.args[1]])  # type: ignore[call-overload, index]
            return tuple(dims)
        for index in self.row_indices(node):  # row i is looked up for row i
            self.unify(next(f for f in self.of(index) if f is not ONE), self.batch)
        result = super()._apply(node)
        uniform = getattr(node.target, "overloadpacket", None) in UNIFORM and not isinstance(result, list)
        if uniform and self.symbol is not None:
            size = self.size(self.symbol)
            for factor in result:
                if find(factor).size == size:
                    self.unify(factor, self.batch)
        return result

    def freeze(self, factor: Factor, reason: str) -> None:
        """As `Factors.freeze`; the operator is remembered whatever was known before."""
        if isinstance(self.at, fx.Node) and find(factor) is find(self.batch) and self.row_indices(self.at):
            return
        self._ordered[self.at].append((factor, reason))
        super().freeze(factor, reason)

    def statistics(self, factor: Factor, what: str, node: fx.Node) -> None:
        """As `Propagation.statistics`, remembered too."""
        self._averaged[node].append((factor, f"{node.target} ({node.name}) takes a {what} over it"))
        super().statistics(factor, what, node)

    def row_indices(self, node: fx.Node) -> list[fx.Node]:
        """Of a lookup, the index that names each row by its own number: ``x[torch.arange(len(x)), y]``."""
        if getattr(node.target, "overloadpacket", None) not in _LOOKUPS or self.symbol is None:
            return []
        indices: Any = node.args[1]
        source = node.args[0]
        size = self.size(self.symbol)
        return [
            index
            for d, index in enumerate(indices)
            if isinstance(index, fx.Node)
            and all(
                isinstance(i, fx.Node) for i in indices[:d]
            )  # position d is dimension d, where no mask is before it
            and not any(i.meta["val"].dtype is torch.bool for i in indices[: d + 1])
            and self.sizes(source)[d] == size  # type: ignore[arg-type]
            and (index in self._rows or self._counts_rows(index))
        ]

    def _counts_rows(self, node: fx.Node) -> bool:
        while getattr(node.target, "overloadpacket", None) in _RESHAPES:
            node = node.args[0]  # type: ignore[assignment]
        value = node.meta["val"]
        if node.target not in ARANGES or self.size(value.shape[0]) != self.size(self.symbol):
            return False
        names = operand_names(node)
        return all(operand(node, name) == first for name, first in (("start", 0), ("step", 1)) if name in names)

    # -- what was found ---------------------------------------------------------------------------------------------

    def ordered_at(self, node: fx.Node) -> list[tuple[Factor, str]]:
        """The dimensions whose indices the operator does not treat alike, and why."""
        found = list(self._ordered.get(node, ()))
        a, b, reason = self._clashes.get(node, (ONE, ONE, ""))
        return [*found, (a, reason), (b, reason)] if reason else found

    def averaged_at(self, node: fx.Node) -> list[tuple[Factor, str]]:
        """The dimensions that the operator takes a statistic over, and which."""
        return self._averaged.get(node, [])

    def has_rule(self, node: fx.Node) -> bool:
        """Whether there is an axis rule for the operator."""
        return node not in self._no_rule


class AxisFlow:
    """One axis of a joint graph: which dimensions carry it, and where it is not treated index by index.

    ``axis`` is its factor, ``symbol`` its size where that is free (the batch). `where`, `ordered` and `averaged` are
    what placements are decided by.
    """

    def __init__(self, walk: BindingFlow, axis: Factor, symbol: sympy.Symbol | None = None):
        self.walk, self.graph, self.parts = walk, walk.graph, walk.parts
        self.axis, self.symbol = find(axis), symbol

    @classmethod
    def of_batch(
        cls, graph: TrainingGraph, parts: Collection[fx.Node] = (), rows: Collection[fx.Node] = ()
    ) -> AxisFlow:
        """The batch, whose size must be free. ``parts``, ``rows``: see `BindingFlow`."""
        walk = BindingFlow(graph, parts, rows)
        return cls(walk, walk.batch, walk.symbol)

    @property
    def size(self) -> Expr:
        """Its number of indices."""
        return self.walk.expression_of(self.axis.size)

    def row_indices(self, node: fx.Node) -> list[fx.Node]:
        """See `BindingFlow.row_indices`; none for an axis that is not the batch."""
        return self.walk.row_indices(node) if self.symbol is not None else []

    def carries(self, factor: Factor) -> bool:
        """Whether the axis is the dimension, a factor or a piece of it."""
        factor = find(factor)
        return factor is self.axis or any(map(self.carries, factor.parts))

    def regular(self, factor: Factor) -> bool:
        """Whether the dimension of a part is a part of the dimension: the axis in every piece, and once in each."""
        factor = find(factor)
        if factor is self.axis:
            return True
        carrying = [part for part in factor.parts if self.carries(part)]
        alone = len(carrying) == (len(factor.parts) if factor.is_sum else 1)
        return alone and all(map(self.regular, carrying))

    def pieces(self, factor: Factor) -> tuple[tuple[Expr, Expr], ...] | None:
        """How the axis lies in a dimension: the number of indices outside and inside of it in each piece, one behind
        the other; None where it is not `regular`. ``((1, 1),)`` for the axis itself."""
        if not self.regular(factor):
            return None
        found = [self.around(piece) for piece in self.walk.segments(factor)]
        return None if None in found else tuple(found)  # type: ignore[arg-type]

    def around(self, factor: Factor) -> tuple[Expr, Expr] | None:
        """Number of indices outside and inside of the axis in a dimension that is a product; None for any other."""
        parts = self.walk.factors(factor)
        at = [i for i, part in enumerate(parts) if find(part) is self.axis]
        if len(at) != 1 or any(self.carries(part) for i, part in enumerate(parts) if i != at[0]):
            return None
        return self._count(parts[: at[0]]), self._count(parts[at[0] + 1 :])

    def _count(self, parts: list[Factor]) -> Expr:
        result: Expr = 1
        for part in parts:
            result = result * self.walk.expression_of(find(part).size)
        return result

    def dims_of(self, node: fx.Node, index: int | None = None) -> tuple[Factor, ...]:
        """The dimensions of the node's tensor, of one of its results where it has several."""
        found = self.walk.dims.get(node, ())
        if index is not None:
            found = found[index] if isinstance(found, list) and index < len(found) else ()
        return () if isinstance(found, list) else found

    def where(self, node: fx.Node, index: int | None = None) -> tuple[int, ...]:
        """The dimensions of a node's tensor that carry the axis."""
        return tuple(d for d, factor in enumerate(self.dims_of(node, index)) if self.carries(factor))

    def where_inputs(self) -> tuple[fx.Node, ...]:
        """The inputs that carry the axis."""
        return tuple(n for n in self.graph.placeholders if self.where(n)) if self.axis is not ONE else ()

    def touches(self, node: fx.Node) -> bool:
        """Whether a dimension of the node's tensor, or of one of its results, carries the axis."""
        dims = self.walk.dims.get(node, ())
        return any(self.carries(f) for each in (dims if isinstance(dims, list) else [dims]) for f in each or ())

    def sized(self, value: Any) -> tuple[int, ...]:
        """The dimensions of a fake tensor whose size follows that of the axis; none where that is fixed."""
        if not isinstance(value, torch.Tensor):
            return ()
        return tuple(d for d, size in enumerate(value.shape) if self.follows(size))

    def follows(self, value: Any) -> bool:
        """Whether a number depends on the size of the axis."""
        found = expression(value) if isinstance(value, torch.SymInt) else _expression(value)
        return isinstance(found, sympy.Basic) and self.symbol in found.free_symbols

    def ordered(self, node: fx.Node) -> str:
        """Why the operator does not treat the indices of the axis alike; empty if it does."""
        if not self.walk.has_rule(node) and any(map(self.touches, node.all_input_nodes)):
            return f"there is no axis rule for {node.target}"
        return next((why for factor, why in self.walk.ordered_at(node) if self.carries(factor)), "")

    def averaged(self, node: fx.Node) -> str:
        """What statistic the operator takes over the axis; empty if it takes none."""
        return next((why for factor, why in self.walk.averaged_at(node) if self.carries(factor)), "")


def _expression(value: Any) -> Any:
    return value.node.expr if isinstance(value, (torch.SymFloat, torch.SymBool)) else None
