"""What it costs to run an operator along an axis, to bring a value from one placement into another, and to hand over a
gradient: the prices that regions are chosen by."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

import numpy as np
import sympy
from torch import fx

from graphopt.cost_model import Machine
from graphopt.cost_model.analytical import node_seconds
from graphopt.cost_model.kernels import Family
from graphopt.cost_model.work import compiled
from graphopt.errors import CostModelError
from graphopt.graph.axes import Axis, Kind
from graphopt.graph.op_rules import flops
from graphopt.graph.sizes import Expr, nbytes
from graphopt.graph.storages import tensors
from graphopt.graph.training_graph import TrainingGraph
from graphopt.passes._placement import Partial, Placement, Replicated, Sharded
from graphopt.passes._strategies import BATCH, Strategies, Strategy, is_sums
from graphopt.schemes.divided_price import seconds_of_parts, seconds_of_sums

Synchronise: TypeAlias = Literal["owner", "all-reduce"]
"""Who updates: this process, which brings gradients together through shared memory, or each processor what it keeps of
the parameters, whole ones after an all-reduce of their gradients."""

BUCKET = 25 << 20
"""Bytes of the buckets in which gradients are sent."""

FEATURES = (Kind.CHANNEL, Kind.HIDDEN, Kind.EMBEDDING, Kind.HEADS)
"""Kinds of axes, beside the batch, that are worth dividing: the sizes of attention's heads are not, since each score
sums over all of them, and those of images and sequences need neighbours from other parts."""

SHARE = 0.002
"""Share of a step's FLOPs in which an axis must stand to be worth a thought."""


def axes_that_matter(graph: TrainingGraph, processors: int) -> tuple[str, ...]:
    """The batch, and the axes whose division may pay, those in most FLOPs first: of these `FEATURES`, free, of a size
    that is a multiple of ``processors``, in operands or results of operators with at least `SHARE` of the FLOPs."""
    work: dict[Axis, int] = {}
    total = 0
    for node in graph.nodes:
        if node.op == "call_function" and (count := graph.symbols.evaluate(flops(node))):
            total += count
            touched = {axis for n in (node, *node.all_input_nodes) for axis in _axes_of(graph, n)}
            for axis in touched:
                work[axis] = work.get(axis, 0) + count
    fits = (a for a in work if a.kind in FEATURES and a.free and isinstance(a.size, int) and a.size % processors == 0)
    offered = sorted((a for a in fits if a.name and work[a] >= SHARE * total), key=lambda a: -work[a])
    return tuple(axis.name for axis in (*(a for a in graph.axes.groups() if a.kind is Kind.BATCH), *offered))


def _axes_of(graph: TrainingGraph, node: fx.Node) -> set[Axis]:
    if not tensors(node.meta.get("val")):
        return set()
    dims = graph.axes.of(node)
    flat = [dim for each in dims for dim in (each if isinstance(each, tuple) else (each,))]
    return {axis for dim in flat for axis in dim.axes()}


class RegionPrices:
    """Prices on one machine for a batch of one size.

    Raises CostModelError for a machine without a link, or a size that the graph does not hold for.
    """

    def __init__(self, strategies: Strategies, machine: Machine, size: int, synchronise: Synchronise = "owner"):
        if machine.link is None:
            raise CostModelError(f"machine: {machine.name} has no link to another processor; give Machine.link")
        self.graph, self.processors = strategies.graph, strategies.processors
        self.machine, self.link, self.synchronise = machine, machine.link, synchronise
        symbols = self.graph.symbols.symbols
        if not self.graph.symbols.admits({BATCH: size} if BATCH in self.graph.symbols.hints else {}):
            raise CostModelError(f"size: the graph does not hold for a batch of {size}")
        self._work = compiled(self.graph, "flat", (a for a in strategies.axes if a != BATCH), machine.threads)
        free = {**symbols, **self._work.widths}
        sizes: dict[str, Any] = dict(self.graph.symbols.hints)
        sizes |= {name: self.graph.axes.group(name).size for name in self._work.widths}
        self._values = {symbol: int(sizes[name]) for name, symbol in free.items()}
        self._rows = size
        if BATCH in symbols:
            self._values[symbols[BATCH]] = size
        self._position = {node: i for i, node in enumerate(self._work.nodes)}
        self._whole = self._priced({})
        self._along = {
            axis: self._priced({free[axis]: -(-self._values[free[axis]] // self.processors)})
            for axis in strategies.axes
        }

    def _priced(self, changed: Mapping[sympy.Symbol, int]) -> np.ndarray:
        return node_seconds(self._work, self.machine, {**self._values, **changed})

    def _at(self, expr: Expr) -> float:
        return float(expr if isinstance(expr, int) else expr.xreplace(self._values))

    def seconds(self, node: fx.Node, strategy: Strategy) -> float:
        """Of one operator and the collectives inside it; ``inf`` where a processor would have no row."""
        regime = strategy.regime
        if regime == BATCH and self._rows < self.processors:
            return float("inf")
        of_all = self._whole if regime is None or is_sums(regime) else self._along[regime]
        inner = (self.link.seconds("all_reduce", self._at(size), self.processors) for size in strategy.inner)
        return float(of_all[self._position[node]]) + sum(inner)

    def nbytes(self, node: fx.Node) -> int:
        """Of a value, whole."""
        return int(self._at(sum(nbytes(t) for t in tensors(node.meta["val"]))))

    def conversion(self, node: fx.Node, source: Form, target: Form) -> float:
        """Seconds of bringing a value from one form into another at once; ``inf`` where that goes by way of a third."""
        if source == target:
            return 0.0
        name = collective_between(source, target)
        if name is None:
            return float("inf")
        size = float(self.nbytes(node))
        if name:
            parts = [placement.dim for _, placement in (source, target) if isinstance(placement, Sharded)]
            laid_out = any(parts)  # collectives join rows: what is divided along another dimension is copied
            copies = self._copied(size) + self._copied(size / self.processors) if laid_out else 0.0
            return self.link.seconds(name, size, self.processors) + copies
        return self._copied(size) if isinstance(target[1], Partial) else 0.0

    def _copied(self, size: float) -> float:
        return float(self.machine.curves[Family.COPY].memory_seconds(np.array([2.0 * size]))[0])

    def handing_over(self, node: fx.Node, source: Form) -> float:
        """Seconds of bringing a gradient together where it is updated: in this process, or whole on each."""
        _, placement = source
        if isinstance(placement, Replicated):
            return 0.0
        size = float(self.nbytes(node))
        if self.synchronise == "owner":
            seconds = seconds_of_sums if isinstance(placement, Partial) else seconds_of_parts
            return float(seconds([size], self.processors, self.machine)[0])
        name = "all_reduce" if isinstance(placement, Partial) else "all_gather"
        return size / BUCKET * self.link.seconds(name, BUCKET, self.processors)


Form: TypeAlias = tuple[str | None, Placement]
"""How a value lies: the axis that it is divided along, None where it is not, and its placement."""

WHOLE: Form = (None, Replicated())


def form(axis: str | None, placement: Placement) -> Form:
    """The form of a placement in a region along ``axis``."""
    return (axis if isinstance(placement, Sharded) else None), placement


def collective_between(source: Form, target: Form) -> str | None:
    """The collective (`graphopt.cost_model.communication.COLLECTIVES`) that brings a value from one form into another
    at once (`graphopt.passes._conversions`); empty where none is needed, None where there is no such conversion.

    >>> collective_between((None, Partial()), WHOLE), collective_between(WHOLE, ("batch", Sharded(0)))
    ('all_reduce', '')
    """
    (axis, given), (_, wanted) = source, target
    if isinstance(given, Replicated):
        return ""  # each processor takes its part, or its share of a sum
    if isinstance(wanted, Replicated):
        return "all_reduce" if isinstance(given, Partial) else "all_gather" if axis is not None else None
    scattered = given == Partial() and isinstance(wanted, Sharded) and target[0] != BATCH  # whose parts may be unequal
    return "reduce_scatter" if scattered else None
