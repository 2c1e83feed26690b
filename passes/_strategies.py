"""The table of strategies: every way in which each operator of a graph can run on several processors.

An operator runs in a *regime*: ``None``, every processor computes it whole; the name of an axis, each computes its part
along that axis; or *sums*, each computes it on its summand of values that are sums over processors, which is legal
where the operator is linear in them. A regime decides how operands must lie and how results then lie (`Strategy`);
between two regimes values are converted (`graphopt.passes.divide_regions`). A `Partial` value is a sum over all
processors whatever axis it came from, so that sums of several regimes meet without a conversion.

What is not known to be divisible has no strategy: `Strategies.why_not` says why.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from operator import getitem
from typing import Any

import torch
from torch import fx

from graphopt.errors import PassError
from graphopt.graph.axes import Axes, Axis, Kind
from graphopt.graph.axes.factors import ONE, Factor, find
from graphopt.graph.literals import Literal, Role
from graphopt.graph.literals.reading import of_node
from graphopt.graph.op_rules import is_random, operand, operand_names, operand_nodes, zero_if
from graphopt.graph.sizes import Expr, nbytes, numel
from graphopt.graph.training_graph import Output, OutputKind, TrainingGraph
from graphopt.passes._axis_flow import ARANGES, AxisFlow, BindingFlow
from graphopt.passes._batch_norm_sums import can_be_sums, trains_batch_norm
from graphopt.passes._in_sums import in_sums
from graphopt.passes._parts import Parts, keeps_sums_small, linear_alternatives, makes_zeros, nodes_read_in_order
from graphopt.passes._placement import Misplaced, Partial, Placement, Replicated, Sharded
from graphopt.passes._shared_draws import POSITIONS
from graphopt.passes._strategy import BATCH, SUMS, Regime, Strategy, is_sums

__all__ = ["BATCH", "Regime", "Strategies", "Strategy", "is_sums"]

_WHOLE = Replicated()
_KINDS = {
    Kind.CHANNEL, Kind.HIDDEN, Kind.EMBEDDING, Kind.HEADS, Kind.HEAD_SIZE, Kind.VOCABULARY, Kind.CLASSES, Kind.INPUT,
    Kind.OUTPUT,
}  # fmt: skip
"""What can be divided beside the batch: features of some sort, of which operators may read a part."""


class Strategies:
    """The table for one graph: a joint graph without its update, of which nothing is divided yet.

    ``graph``: the graph that the table is of. It is the given one with means over the batch written as sums and
    dropouts as products with their masks, so that parts add up. ``axes``: those that something can be divided along;
    ``refused`` says why others cannot. Inputs and constants are whole, and a part of them costs nothing.

    A value is named by the node that makes it and, for ``getitem``, by what it takes: `getitem` nodes and numbers have
    no strategies of their own (see `graphopt.passes._parts.maker`).
    """

    def __init__(
        self, graph: TrainingGraph, processors: int, axes: Iterable[str] | None = None, *, every_sum: bool = False
    ):
        """``axes``: names of those to look at, all by default. ``every_sum``: list regimes on summands also where no
        strategy of these axes gives a summand. Raises PassError for a name that no axis has."""
        self.processors, self._every_sum = processors, every_sum
        self.graph, no_batch = in_sums(graph)
        self._walk = walk = BindingFlow(self.graph)
        self._named = Axes(self.graph, walk)
        self.refused: dict[str, str] = {}
        self.flows: dict[str, AxisFlow] = {}
        groups = {group.name: group for group in self._named.groups()}
        for name in dict.fromkeys(groups if axes is None else axes):
            if name not in groups:
                raise PassError(f"axes: no axis {name!r}; there are {', '.join(groups)}")
            why = self._refusal(groups[name], no_batch)
            if why:
                self.refused[name] = why
            else:
                symbol = walk.symbol if name == BATCH else None
                self.flows[name] = AxisFlow(walk, self._named.factor(name), symbol)
        self._axis = {name: groups[name] for name in self.flows}
        self._parts = {name: Parts(flow) for name, flow in self.flows.items()}
        self._leaf = {flow.axis: name for name, flow in self.flows.items()}
        self._leaves: dict[Factor, frozenset[str]] = {}
        self._found: dict[fx.Node, tuple[Strategy, ...]] = {}
        self._why: dict[tuple[fx.Node, str], str] = {}
        self._zero: set[fx.Node] = set()
        self._summable: set[fx.Node] = set()
        for node in self.graph.nodes:
            self._look_at(node)
        used = {s.regime for found in self._found.values() for s in found}
        for name in self.flows:
            if name not in used:
                reasons = (why for (_, axis), why in self._why.items() if axis == name)
                self.refused[name] = next(reasons, "no operator works along it")
        self.axes: tuple[str, ...] = tuple(name for name in self.flows if name in used)

    # -- questions --------------------------------------------------------------------------------------------------

    def of(self, node: fx.Node) -> tuple[Strategy, ...]:
        """The strategies of a node of `graph`, no two of one regime, the whole one first; none for `getitem`."""
        return self._found[node]

    def in_regime(self, node: fx.Node, regime: Regime) -> Strategy:
        """The strategy of this regime. Raises PassError with the reason where there is none."""
        found = next((s for s in self._found[node] if s.regime == regime), None)
        if found is None:
            why = self.why_not(node, regime) if regime is not None else "it has none"
            raise PassError(f"{node.name} ({node.target}) cannot run along {regime!r}: {why}")
        return found

    def why_not(self, node: fx.Node, regime: str) -> str:
        """Why an operator has no strategy of a regime."""
        if is_sums(regime):
            return "it is not linear in these operands, or none of them can be a part of a sum"
        return self._why.get((node, regime)) or self.refused.get(regime) or "it has nothing to do with this axis"

    def allowed(self, output: Output, placement: Placement) -> bool:
        """Whether an output may be given so: the main process adds parts of gradients up and puts pieces together."""
        if isinstance(placement, Sharded):
            return output.kind in (OutputKind.OUTPUT, OutputKind.GRADIENT, OutputKind.SAVED, OutputKind.BUFFER)
        if isinstance(placement, Partial):
            return placement == Partial() and output.kind in (OutputKind.GRADIENT, OutputKind.SAVED)
        return True

    def literals(self, node: fx.Node, axis: str) -> list[Literal]:
        """The integers among the arguments of a node that are sizes of this axis."""
        return [found for found in of_node(self._named, node) if self._axis[axis] in found.axes]

    def part_of(self, literal: Literal, axis: str) -> Expr:
        """What the literal is where each processor has its part of an axis of fixed size."""
        return literal.at({self._axis[axis]: self.part_size(axis)})

    def part_size(self, axis: str) -> int:
        """The indices that a processor has of an axis of fixed size."""
        size = self.flows[axis].size
        assert isinstance(size, int), f"{axis} has no fixed size"
        return size // self.processors

    # -- the table --------------------------------------------------------------------------------------------------

    def _refusal(self, axis: Axis, no_batch: str) -> str:
        if axis.kind is Kind.BATCH:
            if "batch" not in self.graph.symbols.symbols:
                return "its size is fixed"
            split = self._walk.batch is not self._named.factor(axis.name)  # the axis is a piece of the batch then
            return f"the batch is split at {self._walk.batch.place}" if split else no_batch
        if axis.kind not in _KINDS:
            return f"it is of kind {axis.kind}"
        if not isinstance(axis.size, int) or axis.size % self.processors:
            return f"{self.processors} processors do not divide its size {self.graph.symbols.rename(axis.size)}"
        return ""

    def _look_at(self, node: fx.Node) -> None:
        if node.op == "output":
            return
        value = node.meta.get("val")
        if node.op != "call_function":
            self._found[node] = (Strategy(None, {}, _WHOLE),)
        elif node.target is getitem:
            self._found[node] = ()
            if node.args[0] in self._zero:
                self._zero.add(node)
            if node.args[0] in self._summable:
                self._summable.add(node)
        else:
            if zero_if(node, self._zero) or makes_zeros(node):
                self._zero.add(node)
            self._found[node] = tuple(self._strategies(node, value))

    def _strategies(self, node: fx.Node, value: Any) -> Iterable[Strategy]:
        read = [s for s in nodes_read_in_order(node) if isinstance(s.meta.get("val"), torch.Tensor)]
        found = [Strategy(None, dict.fromkeys(read, _WHOLE), _same(value, _WHOLE))]
        if "c10d" in str(node.target) or not isinstance(node.target, torch._ops.OpOverload) or not _results(value):
            return found
        if not read and node.users and all(map(is_random, node.users)):
            return found  # what lends its shape to a draw
        if is_random(node) or node.target in ARANGES or getattr(node.target, "overloadpacket", None) in POSITIONS:
            for name in self._touched(node):
                self._why[node, name] = "its values depend on positions in the whole, of which parts are taken"
            return found
        for name in self._touched(node):
            try:
                strategy = self._along(name, node)
            except Misplaced as error:
                self._why[node, name] = error.why
            else:
                if strategy is not None:
                    found.append(strategy)
        found += self._sums(node, value)
        if any(p == Partial() for s in found for p in _each(s.results)):
            self._summable.add(node)
        return found

    def _touched(self, node: fx.Node) -> list[str]:
        """The axes that operands or results carry, in the order of the graph's groups."""
        names: set[str] = set()
        for each in (node, *node.all_input_nodes):
            dims = self._walk.dims.get(each, ())
            for one in dims if isinstance(dims, list) else [dims]:
                for factor in one or ():
                    if isinstance(factor, Factor):
                        names |= self._names(find(factor))
        return [name for name in self.flows if name in names]

    def _names(self, factor: Factor) -> frozenset[str]:
        if factor not in self._leaves:
            below = [self._names(find(part)) for part in factor.parts if part is not ONE]
            own = {self._leaf[factor]} if factor in self._leaf else set()
            self._leaves[factor] = frozenset(own).union(*below)
        return self._leaves[factor]

    def _along(self, name: str, node: fx.Node) -> Strategy | None:
        """Every processor runs the operator on its part of an axis. None where it reads and gives no part of it."""
        parts, value = self._parts[name], node.meta["val"]
        if name == BATCH and trains_batch_norm(node) and 0 in parts.found.where(node.args[0]):  # type: ignore[arg-type]
            return self._batch_norm(node)
        parts.check(node)
        if name != BATCH:
            for literal in self.literals(node, name):
                if literal.refusal and literal.role is not Role.VALUE:
                    raise Misplaced(node, f"its argument {literal}")
        if any(isinstance(v, (list, tuple)) for _, v in _results(value)):
            raise Misplaced(node, "it gives lists of tensors")
        operands: dict[fx.Node, Placement] = {}
        read = set(nodes_read_in_order(node))
        for source in node.all_input_nodes:
            lies = self._lies(name, source, node)
            if lies is not None and source in read:
                operands[source] = lies
        results = [self._result(name, node, v, i, operands) for i, v in _results(value)]
        if all(p == _WHOLE for p in (*operands.values(), *_each(results))):
            return None
        return Strategy(name, operands, tuple(results) if isinstance(value, (list, tuple)) else results[0])

    def _lies(self, name: str, source: fx.Node, node: fx.Node) -> Placement | None:
        """How an operand lies where the operator runs along the axis; None for a number."""
        value, flow = source.meta.get("val"), self.flows[name]
        if isinstance(value, (list, tuple)):
            raise Misplaced(node, f"it reads several values ({source.name}) at once")
        if not isinstance(value, torch.Tensor):
            return None
        dims = self._parts[name].dims(source, value)
        if dims and flow.pieces(flow.dims_of(source)[dims[0]]) is None:
            raise Misplaced(node, f"which elements of {source.name} belong to a part is not known")
        return Sharded(dims[0]) if dims else _WHOLE

    def _result(
        self, name: str, node: fx.Node, value: Any, index: int | None, operands: dict[fx.Node, Placement]
    ) -> Placement:
        """How one result lies; what must be a part of a sum for it is written into ``operands``."""
        if not isinstance(value, torch.Tensor) or numel(value) == 0:
            return _WHOLE
        parts = self._parts[name]
        dims = parts.dims(node, value, index)
        if dims:
            parts.check_sources(node)
            if parts.found.pieces(parts.found.dims_of(node, index)[dims[0]]) is None:
                raise Misplaced(node, "which elements of its result belong to a part is not known")
            return Sharded(dims[0])
        if not any(isinstance(operands.get(s), Sharded) for s in nodes_read_in_order(node, index)):
            return _WHOLE
        joined = parts.joined(node, index or 0)
        adds = min(([s for s in each if s not in self._zero] for each in joined.adds), key=len)
        for source in adds:
            if not source.meta["val"].is_floating_point():
                raise Misplaced(node, joined.why)
            operands[source] = Partial()
        return Partial(joined.how)

    def _batch_norm(self, node: fx.Node) -> Strategy:
        """Train-mode batch normalisation along the batch, by sums that are joined inside."""
        if not can_be_sums(node):
            raise Misplaced(node, "its statistics over the batch cannot be taken apart")
        value, flow = node.meta["val"], self.flows[BATCH]
        operands: dict[fx.Node, Placement] = {}
        for source in nodes_read_in_order(node):
            lies = self._lies(BATCH, source, node)
            if lies is not None:
                operands[source] = lies
        backward = "output_mask" in operand_names(node)
        alone = backward and not operand(node, "output_mask")[0]  # the gradients of weight and bias are sums
        results = [
            Sharded(flow.where(node, i)[0]) if flow.where(node, i) else Partial() if alone else _WHOLE
            for i, v in _results(value)
        ]
        statistics = operand(node, "save_mean").meta["val"] if backward else value[1]
        return Strategy(BATCH, operands, tuple(results), () if alone else (nbytes(statistics),) * 2)

    def _sums(self, node: fx.Node, value: Any) -> list[Strategy]:
        """The operator on summands, for each set of operands that it is linear in together."""
        results = [v for _, v in _results(value)]
        tensors = [v for v in results if isinstance(v, torch.Tensor) and numel(v) != 0]
        if not tensors or any(isinstance(v, (list, tuple)) for v in results):
            return []
        found: dict[str, Strategy] = {}
        for sources, others in linear_alternatives(node):
            partial = [s for s in sources if s not in self._zero]
            if not self._may_be_sums(partial, others) or not all(keeps_sums_small(v, partial) for v in tensors):
                continue
            names = [n for n in operand_names(node) if any(s in partial for s in operand_nodes(node, n))]
            whole = [s for s in (*sources, *others) if isinstance(s.meta.get("val"), torch.Tensor)]
            operands = dict.fromkeys(whole, _WHOLE) | dict.fromkeys(partial, Partial())
            regime = SUMS + "+".join(names)
            found.setdefault(regime, Strategy(regime, operands, _same(value, Partial())))
        return list(found.values())

    def _may_be_sums(self, partial: list[fx.Node], others: list[fx.Node]) -> bool:
        """Whether summands can stand in these operands, and one of them may be one."""
        if not partial or not set(partial).isdisjoint(others):
            return False
        likely = self._every_sum or not self._summable.isdisjoint(partial)
        return likely and all(s.meta["val"].is_floating_point() for s in partial)


def _results(value: Any) -> list[tuple[int | None, Any]]:
    """The results of an operator by index; none for a number."""
    if isinstance(value, (list, tuple)):
        return list(enumerate(value))
    return [(None, value)] if isinstance(value, torch.Tensor) else []


def _same(value: Any, placement: Placement) -> Placement | tuple[Placement, ...]:
    """One placement for every result; what has no elements is whole."""
    if isinstance(value, (list, tuple)):
        return tuple(placement if isinstance(v, torch.Tensor) and numel(v) != 0 else _WHOLE for v in value)
    return placement


def _each(results: Placement | Sequence[Placement]) -> Sequence[Placement]:
    return results if isinstance(results, (list, tuple)) else (results,)  # type: ignore[return-value]
