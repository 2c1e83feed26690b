"""`CountedGraph`: a graph of the full model as a function of a space's choices, for prices of many of them at once.

The graph is compiled once (`graphopt.cost_model.work.Work`) with a free symbol for each axis that a dimension of the
space changes. A choice then is a number for each symbol and a set of operators that it leaves out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import sympy
import torch
from torch import fx

from graphopt.cost_model.many_sizes import ManyPrices, price_many
from graphopt.cost_model.machine import Machine
from graphopt.cost_model.memory import Absent
from graphopt.cost_model.work import Mode, Work
from graphopt.elastic.depths import Depth
from graphopt.elastic.dimension import Value
from graphopt.elastic.handles import Handle, Tied
from graphopt.graph.axes import Axes, Axis
from graphopt.graph.depth import Run
from graphopt.graph.sizes import expression, numel
from graphopt.graph.training_graph import InputKind, TrainingGraph
from graphopt.cost_model.size_table import SizeTable
from graphopt.graph.widths import counted

NOTHING = Absent(frozenset())


class CountedGraph:
    """A graph whose sizes follow choices.

    Args:
        graph: of the whole model, forward or joint.
        handles: of the space's dimensions, by name.
        axes: of the graph that the handles are of; ``graph``'s own, or those of the forward graph that it was derived
            from.
        mode, threads: how it is run.
    """

    def __init__(
        self, graph: TrainingGraph, handles: Mapping[str, Handle], axes: Axes, mode: Mode, threads: int | None
    ):
        self.graph, self.handles, self.axes = graph, dict(handles), axes
        self._of: dict[tuple[str, Value], Mapping[Axis, int]] = {}
        self._symbols: dict[Axis, sympy.Symbol] = {}
        for name, handle in self.handles.items():
            for axis in self._sizes(name, handle.full):
                symbol = sympy.Symbol(f"{name}#{len(self._symbols)}", positive=True, integer=True)
                self._symbols.setdefault(axis, symbol)
        twins = {axis: axis for axis in self._symbols} if axes.graph is graph else correspond(axes, graph.axes)
        self._joint = axes.graph is not graph
        inside = {twins[axis]: symbol for axis, symbol in self._symbols.items() if axis in twins}
        counting = counted(graph, inside, {})
        self.work = Work(graph, mode, counting, threads)
        self._parameters = tuple(graph.input_nodes(InputKind.PARAMETER).values())
        self._numels = SizeTable([numel(counting.node[node].meta["val"]) for node in self._parameters])
        self._absent: dict[tuple[tuple[str, Value], ...], Absent] = {}
        self._runs = runs_of(graph) if self._joint else {}

    def prices(
        self, choices: Sequence[Mapping[str, Any]], sizes: Mapping[str, int], *, machine: Machine | None, peak: bool
    ) -> ManyPrices:
        """FLOPs, peak memory and seconds of the graph for each choice. ``sizes``: of the batch."""
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
        columns = {symbol: np.full(count, int(expression(axis.size))) for axis, symbol in self._symbols.items()}
        for name in self.handles:
            given = [choice[name] for choice in choices]
            each = {value: self._sizes(name, value) for value in dict.fromkeys(given)}
            for axis in next(iter(each.values()), {}):
                columns[self._symbols[axis]] = np.array([each[value][axis] for value in given], dtype=np.int64)
        batch = self.graph.symbols.substitution(sizes)
        return columns | {symbol: np.full(count, int(number)) for symbol, number in batch.items()}

    def _sizes(self, name: str, value: Value) -> Mapping[Axis, int]:
        """The sizes of a dimension's axes at a value: those that it says, and those of the weights that it cuts
        (kernels, whose places mean something and are no axes to shrink)."""
        if (name, value) not in self._of:
            self._of[name, value] = _sizes_at(self.handles[name], value, self.axes)
        return self._of[name, value]

    def absent(self, choice: Mapping[str, Any]) -> Absent:
        """The operators that a choice leaves out, and the parameters and buffers that nothing reads then."""
        key = tuple((name, choice[name]) for name, h in self.handles.items() if isinstance(_first(h), Depth))
        if key not in self._absent:
            runs = [run for name, value in key for run in _left_out(self.handles[name], value)]
            self._absent[key] = self._without(runs) if runs else NOTHING
        return self._absent[key]

    def _without(self, runs: Sequence[Run]) -> Absent:
        order = {node: i for i, node in enumerate(self.graph.nodes)}
        runs = sorted(runs, key=lambda run: order[run.exit])
        nodes = {node for run in runs for node in run.nodes}
        owned = (InputKind.PARAMETER, InputKind.BUFFER)
        inputs = [n for i, n in zip(self.graph.inputs, self.graph.placeholders, strict=True) if i.kind in owned]
        unread = {node for node in inputs if node.users and nodes.issuperset(node.users)}
        return Absent(frozenset(nodes | unread), tuple((run.exit, run.entry) for run in runs))


def _first(handle: Handle) -> Handle:
    return handle.parts[0] if isinstance(handle, Tied) else handle


def _left_out(handle: Handle, value: Value) -> list[Run]:
    if isinstance(handle, Tied):
        return [run for part in handle.parts for run in _left_out(part, value)]
    return handle.left_out(value) if isinstance(handle, Depth) else []


def _sizes_at(handle: Handle, value: Value, axes: Axes) -> dict[Axis, int]:
    """The size of each axis of a dimension at ``value``: those that it says, and those of the weights that it cuts
    (kernels, whose places mean something and are no axes to shrink)."""
    found = {axis: len(indices) for axis, indices in handle.axes(value).items()}
    carriers = axes.carriers()
    for name, dims in handle.cuts(value).items():
        for dim, cut in dims.items():
            axis = axes.of(carriers[name])[dim].axis
            if axis is not None:
                found[axis] = len(cut) if isinstance(cut, torch.Tensor) else cut[1] - cut[0]
    return found
