"""`CountedGraph`: a graph of the full model as a function of a space's choices, for prices of many of them at once.

The graph is compiled once (`graphopt.cost_model.work.Work`) with a free symbol for each axis that a dimension of the
space changes. A choice then is a number for each symbol and a set of operators that it leaves out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import getitem
from typing import Any

import numpy as np
import sympy
import torch
from torch import fx

from graphopt.cost_model.machine import Machine
from graphopt.cost_model.many_sizes import ManyPrices, price_many
from graphopt.cost_model.memory import Absent
from graphopt.cost_model.size_table import SizeTable
from graphopt.cost_model.work import Mode, Work
from graphopt.elastic.axis_sizes import correspond
from graphopt.elastic.depths import Depth, find
from graphopt.elastic.dimension import Dimension, Kind, Value
from graphopt.elastic.handles import Handle, Tied
from graphopt.elastic.supergraph import Supergraph
from graphopt.errors import ElasticError
from graphopt.graph.axes import Axes, Axis
from graphopt.graph.depth import Run
from graphopt.graph.sizes import numel
from graphopt.graph.storages import is_view, storage_root
from graphopt.graph.training_graph import InputKind, Phase, TrainingGraph
from graphopt.graph.widths import counted

NOTHING = Absent(frozenset())


class CountedGraph:
    """A graph whose sizes follow choices.

    Args:
        graph: of the whole model: the forward graph of ``origin``, or a joint graph that was derived from it.
        origin: of the space's dimensions, with their handles.
        dimensions: of the space.
        mode, threads: how it is run.

    Raises:
        ElasticError: layers that can be left out of the forward graph are not found in the joint one.
    """

    def __init__(
        self, graph: TrainingGraph, origin: Supergraph, dimensions: Sequence[Dimension], mode: Mode, threads: int | None
    ):
        self.graph, self.axes, self.handles = graph, origin.axes, origin.handles
        self._sizes: dict[tuple[str, Value], dict[Axis, int]] = {}
        self._unpriced: dict[tuple[str, Value], str] = {}  # why
        for name, value in ((d.name, v) for d in dimensions for v in d.choices):
            try:
                self._sizes[name, value] = self.handles[name].sizes(value, self.axes)
            except ElasticError as error:  # it is raised where such a value is asked for
                self._unpriced[name, value] = str(error)
        self._symbols: dict[Axis, sympy.Symbol] = {}
        self._changed: dict[str, list[Axis]] = {}
        for (name, _), sizes in self._sizes.items():
            for axis in sizes:
                if axis not in self._symbols:
                    self._changed.setdefault(name, []).append(axis)
                    self._symbols[axis] = sympy.Symbol(f"{name}#{len(self._symbols)}", positive=True, integer=True)
        inside = self._symbols
        depths = {d.name: _depths(self.handles[d.name]) for d in dimensions if d.kind is Kind.DEPTH}
        if graph is not origin.graph:
            inside = _translated(self._symbols, origin.axes, graph.axes)
            others = find(graph.axes, origin.resizer).handles if depths else ()
            depths = {name: [_counterpart(depth, others) for depth in several] for name, several in depths.items()}
        self._depths: dict[str, list[Depth]] = depths
        counting = counted(graph, inside, {})
        self.work = Work(graph, mode, counting, threads)
        self._parameters = tuple(graph.input_nodes(InputKind.PARAMETER).values())
        self._numels = SizeTable([numel(counting.node[node].meta["val"]) for node in self._parameters])
        self._absent: dict[tuple[tuple[str, Value], ...], Absent] = {}

    def prices(
        self, choices: Sequence[Mapping[str, Any]], sizes: Mapping[str, int], *, machine: Machine | None, peak: bool
    ) -> ManyPrices:
        """FLOPs, peak memory and seconds of the graph for each choice. ``sizes``: of the batch.

        Raises ElasticError for a choice with a value whose cost sizes of axes do not tell (`Handle.sizes`)."""
        values = self._values(choices, sizes)
        return price_many(self.work, values, [self.absent(c) for c in choices], machine=machine, peak=peak)

    def parameters(self, choices: Sequence[Mapping[str, Any]]) -> np.ndarray:
        """How many numbers the parameters of each choice hold, int64 ``(count,)``."""
        found = self._numels.at_many(self._values(choices, {}))
        return np.where(self._there(choices), found, 0).sum(axis=0)

    def parameter_tensors(self, choices: Sequence[Mapping[str, Any]]) -> np.ndarray:
        """How many parameters each choice has, int64 ``(count,)``."""
        return self._there(choices).sum(axis=0)

    def _there(self, choices: Sequence[Mapping[str, Any]]) -> np.ndarray:
        gone = [self.absent(choice).nodes for choice in choices]
        return np.array([[node not in out for out in gone] for node in self._parameters], dtype=bool)

    def _values(self, choices: Sequence[Mapping[str, Any]], sizes: Mapping[str, int]) -> dict[sympy.Symbol, np.ndarray]:
        count = len(choices)
        columns = {}
        for choice in choices if self._unpriced else ():
            inactive = getattr(choice, "inactive", ())
            if why := next(
                (self._unpriced[i] for i in choice.items() if i in self._unpriced and i[0] not in inactive), ""
            ):
                raise ElasticError(why)
        for name, axes in self._changed.items():
            given = [choice[name] for choice in choices]
            for axis in axes:
                of = {value: self._sizes[name, value].get(axis, axis.size) for value in dict.fromkeys(given)}
                columns[self._symbols[axis]] = np.array([of[value] for value in given], dtype=np.int64)
        batch = self.graph.symbols.substitution(sizes)
        return columns | {symbol: np.full(count, int(number)) for symbol, number in batch.items()}

    def absent(self, choice: Mapping[str, Any]) -> Absent:
        """The operators that a choice leaves out, and the parameters and buffers that nothing reads then."""
        key = tuple((name, choice[name]) for name in self._depths)
        if key not in self._absent:
            runs = [run for name, value in key for depth in self._depths[name] for run in depth.left_out(value)]
            self._absent[key] = without(self.graph, runs) if runs else NOTHING
        return self._absent[key]


def _translated(symbols: Mapping[Axis, sympy.Symbol], ours: Axes, theirs: Axes) -> dict[Axis, sympy.Symbol]:
    """The symbols by the axes of another graph of the same model: by the parameters that carry them; where those are
    cut otherwise there, by name, which is the same in every capture."""
    twins, named = correspond(ours, theirs), {axis.name: axis for axis in theirs.groups() if axis.name}
    found = {}
    for axis, symbol in symbols.items():
        twin = twins.get(axis) or named.get(axis.name)
        if twin is None or twin.size != axis.size:
            raise ElasticError(f"training: {axis!r} is no axis of the joint graph; its steps cannot be priced")
        found[twin] = symbol
    return found


def _counterpart(depth: Depth, others: Sequence[Handle]) -> Depth:
    """The same layers in a joint graph, by the modules around them: their operators are others there."""
    theirs: dict[str, list[Run]] = {}
    for run in (run for other in others if isinstance(other, Depth) for run in other.runs):
        theirs.setdefault(run.module, []).append(run)
    found = []
    for run in depth.runs:
        if not theirs.get(run.module):
            raise ElasticError(f"training: {run.module} is not found in the joint graph; its steps cannot be priced")
        found.append(theirs[run.module].pop(0))
    return Depth(depth.name, found)


def _depths(handle: Handle) -> list[Any]:
    return list(handle.parts) if isinstance(handle, Tied) else [handle]


# -- layers that are left out -----------------------------------------------------------------------------------------


def without(graph: TrainingGraph, runs: Sequence[Run]) -> Absent:
    """What is not run where layers are left out of a graph: their operators, those of their backward, and the
    parameters and buffers that only they read."""
    order = {node: i for i, node in enumerate(graph.nodes)}
    runs = sorted(runs, key=lambda run: order[run.exit])
    nodes = {node for run in runs for node in run.nodes}
    instead = [(run.exit, run.entry) for run in runs]
    kinds = (InputKind.PARAMETER, InputKind.BUFFER)
    owned = [n for i, n in zip(graph.inputs, graph.placeholders, strict=True) if i.kind in kinds]
    forward = {n for n in owned if n.users and all(u in nodes or u.meta["phase"] == Phase.BACKWARD for u in n.users)}
    backward = [node for node in graph.nodes if node.meta.get("phase") == Phase.BACKWARD]
    for run in reversed(runs):
        values = {n for n in run.nodes if n is not run.exit}
        values |= {n for n in forward if not n.users.keys().isdisjoint(run.nodes)}
        gone, replaced = _backward_of(run, values, backward)
        nodes |= gone
        instead += replaced
    read = {stands for _, stands in instead}
    for node in reversed(graph.nodes):  # views for the backward alone
        if node.op == "call_function" and node not in read and node.users and nodes.issuperset(node.users):
            nodes.add(node)
    unread = {n for n in owned if n.users and nodes.issuperset(n.users)}
    return Absent(frozenset(nodes | unread), tuple(instead))


def _backward_of(
    run: Run, values: set[fx.Node], backward: Sequence[fx.Node]
) -> tuple[set[fx.Node], list[tuple[fx.Node, fx.Node]]]:
    """The operators of the backward of a run, whose own values these are, and what stands for its gradient.

    Autograd runs the backward of operators in the reverse of their order, so that of a run is one piece, from the first
    to the last that reads its values; the sum with the gradient that passes by belongs to it. What a run ends in
    (``relu(u + f(u))``) is read by its own backward too, which has its place, and by that of the layers behind.
    """
    place, whole = _place(run.exit), storage_root(run.exit)
    reading = []
    for i, node in enumerate(backward):
        read = {storage_root(source) for source in node.all_input_nodes}
        if not values.isdisjoint(read) or (whole in read and _place(node) == place):
            reading.append(i)
    if not reading:
        return set(), []
    end = max(reading) + 1
    piece = backward[min(reading) : end]
    gone = set(piece)
    coming = next(
        (s for n in piece for s in n.all_input_nodes if s not in gone and s.meta["phase"] == Phase.BACKWARD), None
    )
    for node in backward[end:]:
        if node.target is torch.ops.aten.add.Tensor and not gone.isdisjoint(node.all_input_nodes):
            return gone | {node}, [(node, coming)] if coming is not None else []
        if node.target is not getitem and not is_view(node):
            break
        if node.all_input_nodes[0] in gone:
            gone.add(node)
    return gone, []


def _place(node: fx.Node) -> tuple[str, str]:
    return node.meta.get("module", ""), node.meta.get("source", "")
