"""`CountedGraph`: a graph of the full model as a function of a space's choices, for prices of many of them at once.

The graph is compiled once (`graphopt.cost_model.work.Work`) with a free symbol for each axis that a dimension of the
space changes. A choice then is a number for each symbol and a set of operators that it leaves out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import sympy

from graphopt.cost_model.machine import Machine
from graphopt.cost_model.many_sizes import ManyPrices, price_many
from graphopt.cost_model.memory import Absent
from graphopt.cost_model.size_table import SizeTable
from graphopt.cost_model.work import Mode, Work
from graphopt.elastic.axis_sizes import correspond
from graphopt.elastic.depths import left_out
from graphopt.elastic.dimension import Dimension, Kind, Value
from graphopt.elastic.left_out import Inseparable, LeftOut
from graphopt.elastic.supergraph import Supergraph
from graphopt.errors import ElasticError
from graphopt.graph.axes import Axes, Axis
from graphopt.graph.depth import Run
from graphopt.graph.sizes import numel
from graphopt.graph.training_graph import InputKind, TrainingGraph
from graphopt.graph.widths import counted

NOTHING = Absent(frozenset())


class CountedGraph:
    """A graph whose sizes follow choices.

    Args:
        graph: the forward graph of ``origin``, or a joint graph that was derived from one of its subnets with all axes
            at their full size.
        origin: of the space's dimensions, with their handles.
        dimensions: of the space.
        without: what becomes of ``graph`` without some of its layers; raises Inseparable where that is not certain.
        mode, threads: how it is run.
    """

    def __init__(
        self,
        graph: TrainingGraph,
        origin: Supergraph,
        dimensions: Sequence[Dimension],
        without: Callable[[Sequence[Run]], LeftOut],
        mode: Mode,
        threads: int | None,
    ):
        self.graph, self.axes, self.handles, self._without = graph, origin.axes, origin.handles, without
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
        inside = self._symbols if graph is origin.graph else _translated(self._symbols, origin.axes, graph.axes)
        self._depths = {d.name: self.handles[d.name] for d in dimensions if d.kind is Kind.DEPTH}
        counting = counted(graph, inside, {})
        self.work = Work(graph, mode, counting, threads)
        self._parameters = {name: node for name, node in graph.input_nodes(InputKind.PARAMETER).items() if node.users}
        self._numels = SizeTable([numel(counting.node[node].meta["val"]) for node in self._parameters.values()])
        self._absent: dict[tuple[tuple[str, Value], ...], Absent | None] = {}

    def prices(
        self, choices: Sequence[Mapping[str, Any]], sizes: Mapping[str, int], *, machine: Machine | None, peak: bool
    ) -> ManyPrices:
        """FLOPs, peak memory and seconds of the graph for each choice. ``sizes``: of the batch.

        Raises ElasticError for a choice with a value whose cost sizes of axes do not tell (`Handle.sizes`)."""
        values = self._values(choices, sizes)
        return price_many(self.work, values, [self._gone(c) for c in choices], machine=machine, peak=peak)

    def parameters(self, choices: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
        """How many numbers each parameter holds in each choice, int64 ``(count,)``; 0 where it is gone."""
        found = self._numels.at_many(self._values(choices, {}))
        gone = [self._gone(choice).nodes for choice in choices]
        there = np.array([[node not in out for out in gone] for node in self._parameters.values()], dtype=bool)
        return dict(zip(self._parameters, np.where(there, found, 0), strict=True))

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

    def absent(self, choice: Mapping[str, Any]) -> Absent | None:
        """The operators that a choice leaves out, and the parameters and buffers that nothing reads then; None where it
        takes a graph of its own to know them (`graphopt.elastic.left_out`)."""
        key = tuple((name, choice[name]) for name in self._depths)
        if key not in self._absent:
            runs = [run for name, value in key for run in left_out(self._depths[name], value)]
            try:
                self._absent[key] = self._without(runs).absent if runs else NOTHING
            except Inseparable:
                self._absent[key] = None
        return self._absent[key]

    def _gone(self, choice: Mapping[str, Any]) -> Absent:
        found = self.absent(choice)
        if found is None:
            raise ElasticError(f"{choice!r}: its layers cannot be told from the others in this graph")
        return found


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
