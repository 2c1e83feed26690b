"""Dividing a graph by regions: each operator along an axis of its own, with conversions where regions meet."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from operator import getitem
from typing import ClassVar

from torch import fx

from graphopt.errors import PassError
from graphopt.graph.training_graph import InputKind, TrainingGraph
from graphopt.passes._base import Change, Pass, PassResult, Refusal, Tier, place
from graphopt.passes._batch_norm_sums import BatchNormSums, trains_batch_norm
from graphopt.passes._parts import maker
from graphopt.passes._placement import Partial, Placement
from graphopt.passes._places import Numbers
from graphopt.passes._regions import DividedGraph
from graphopt.passes._rewriting import remove_dead
from graphopt.passes._strategies import BATCH, Regime, Strategies, is_sums


@dataclass(frozen=True)
class DivideRegions(Pass):
    """Divide the operators of a graph over processors, each in a regime of its own: the same graph for all of them.

    ``processors``: how many there are. ``regimes``: for names of nodes of ``Strategies(graph, processors).graph`` the
    regime that each runs in: the name of an axis, ``sums of ...``, or None for whole, which is what all others are.
    ``getitem`` and arithmetic of sizes follow. ``group``: the name of the process group that collectives run in.

    Legal because each regime of the table is (`graphopt.passes._strategies`), and because a value is converted where a
    reader needs it to lie otherwise: all-reduce, reduce-scatter, all-gather, or a slice, which costs nothing. Means
    over the batch are sums divided by the size of the whole batch in every regime; random numbers are drawn whole by
    every processor, which then keeps its part. Train-mode batch normalisation along the batch is made of sums, along
    channels and whole it stays one operator. What is not in the table is refused, with the reason, and the graph stays
    as it is.

    The result has the inputs ``processor.index`` (where an axis of fixed size is divided), ``batch.total`` and, as they
    are needed, ``batch.begin``, ``batch.part`` and ``batch.most`` (where the batch is divided: the free size ``batch``
    is then that of a part). Parts of the batch must be as equal as can be, the larger ones first. Inputs are whole, but
    a batch tensor of which only rows of the part are read. ``signature.tree["placements"]`` says how inputs and outputs
    lie: gradients may be partial sums, or pieces along the axis that they carry (``sharded 0``, or ``sharded 0 as
    3x12`` where a piece is not one run of indices: `graphopt.passes._conversions.Lies`).

    ::

        %mm = aten.mm(%x, %w1)       regime 'hidden'      %slice = aten.slice(%w1, 1, %begin, %end)
        %relu = aten.relu(%mm)       regime 'hidden'      %mm = aten.mm(%x, %slice)
        %mm_1 = aten.mm(%relu, %w2)  regime 'hidden'      %relu = aten.relu(%mm)
        return %mm_1                 becomes              %slice_1 = aten.slice(%w2, 0, %begin, %end)
                                                          %mm_1 = aten.mm(%relu, %slice_1)
                                                          %all_reduce = _c10d_functional.all_reduce(%mm_1, 'sum', ...)
                                                          %wait_tensor = _c10d_functional.wait_tensor(%all_reduce)
                                                          return %wait_tensor

    >>> import torch
    >>> from graphopt.graph.capture import capture
    >>> net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    >>> batch = (torch.randn(4, 3), torch.randn(4, 2))
    >>> graph = capture(net, batch, loss=torch.nn.functional.mse_loss)
    >>> regimes = along(Strategies(graph, 2), ["0.hidden"])
    >>> result = DivideRegions(2, regimes)(graph)
    >>> for change in result.changes:
    ...     print(change.what)
    all-reduce of 8*batch bytes
    divided 19 of 29 operators over 2 processors: 0.hidden
    """

    processors: int
    regimes: Mapping[str, Regime]
    group: str = "graphopt"

    name: ClassVar[str] = "divide_regions"
    tier: ClassVar[Tier] = Tier.REORDERS
    adds_inputs: ClassVar[frozenset[InputKind]] = frozenset({InputKind.PLACE})
    resizes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Raises PassError for options that mean nothing."""
        if not isinstance(self.processors, int) or self.processors < 2:
            raise PassError(f"processors: expected an int of at least 2, got {self.processors!r}")

    def rewrite(self, graph: TrainingGraph) -> PassResult:
        """See the class."""
        if graph.input_nodes(InputKind.PLACE):
            return self._refused(graph, "the graph is divided already")
        regimes: dict[str, Regime] = {name: regime for name, regime in self.regimes.items() if regime is not None}
        if not regimes:
            return self._refused(graph, "every operator is to stay whole")
        axes = sorted({r for r in regimes.values() if r is not None and not is_sums(r)})
        try:
            table = self._with_sums(Strategies(graph, self.processors, axes, every_sum=True), regimes)
            made = DividedGraph(table, regimes, self.group)
            result = made.run()
        except PassError as error:
            return self._refused(graph, str(error))
        changes = [Change(self.name, what, *place(node)) for what, node in made.conversions.done]
        divided = sum(s.regime is not None for s in made.chosen.values())
        what = f"divided {divided} of {len(table.graph)} operators over {self.processors} processors"
        changes.append(Change(self.name, f"{what}: {', '.join(made.axes)}"))
        return PassResult(result, tuple(changes))

    def _refused(self, graph: TrainingGraph, why: str) -> PassResult:
        return PassResult(graph, refusals=(Refusal(self.name, f"over {self.processors} processors", "", "", why),))

    def _with_sums(self, table: Strategies, regimes: dict[str, Regime]) -> Strategies:
        """The table where batch normalisations along the batch are made of sums, in ``regimes`` too."""
        nodes = {node.name: node for node in table.graph.nodes}
        if unknown := set(regimes) - set(nodes):
            raise PassError(f"regimes: there is no node {', '.join(sorted(unknown))}")
        chosen = {n for name, n in nodes.items() if regimes.get(name) == BATCH and trains_batch_norm(n)}
        if not chosen:
            return table
        for node in chosen:
            table.in_regime(node, BATCH)
        draft = table.graph.draft()
        BatchNormSums(draft, table.flows[BATCH], Numbers(draft), lambda node: node in chosen).rewrite()
        remove_dead(draft)
        after = Strategies(draft.finish(), self.processors, [*table.flows, *table.refused], every_sum=True)
        for name in {node.name for node in chosen}:
            del regimes[name]
        for node in after.graph.nodes:
            if node.name not in nodes and BATCH in _regimes(after, node):
                regimes[node.name] = BATCH
        return after


def _regimes(table: Strategies, node: fx.Node) -> set[Regime]:
    return {strategy.regime for strategy in table.of(node)} if node.op == "call_function" else set()


def along(table: Strategies, axes: Iterable[str]) -> dict[str, Regime]:
    """Regimes that divide as much as can be: each operator along the first of these axes that it can run along, on
    summands where its operands are given as such, else whole. A plain choice, by no price."""
    regimes: dict[str, Regime] = {}
    sums: set[fx.Node] = set()
    for node in table.graph.nodes:
        if node.op != "call_function":
            continue
        if node.target is getitem:
            source, index = maker(node)
            strategy = table.in_regime(source, regimes.get(source.name)) if table.of(source) else None
            if strategy is not None and strategy.result(index) == Partial():
                sums.add(node)
            continue
        found = {strategy.regime: strategy for strategy in table.of(node)}
        ready = (r for r, s in found.items() if is_sums(r) and _are(s.operands, sums))
        regime = next((axis for axis in axes if axis in found), None) or next(ready, None)
        if regime is not None:
            regimes[node.name] = regime
            if found[regime].results == Partial():
                sums.add(node)
    return regimes


def _are(operands: Mapping[fx.Node, Placement], sums: Collection[fx.Node]) -> bool:
    return all((placement == Partial()) == (node in sums) for node, placement in operands.items())
