"""Shapes of a graph as expressions over axes: what counting at other widths needs, without a capture at each.

`counting_graph` copies the nodes of a graph and gives each `Shaped` stand-ins in place of fake tensors. The sizes of
the named axes are free symbols there, so that FLOPs and bytes of the copy are expressions over them. Such a copy is
for counting only: numbers in arguments (``view`` sizes) stay those of the capture (`resize` rewrites them).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx

from graphopt.graph.axes import Axis, Dim
from graphopt.graph.sizes import Expr, Shaped
from graphopt.graph.training_graph import TrainingGraph


@dataclass(frozen=True)
class CountingGraph:
    """Nodes of a graph with free widths. ``node``: original node -> its copy; ``symbols``: axis name -> symbol."""

    node: dict[fx.Node, fx.Node]
    symbols: dict[str, sympy.Symbol]


def counting_graph(graph: TrainingGraph, names: Iterable[str]) -> CountingGraph:
    """The nodes of ``graph`` with the named axes (`Axes.group`) as free sizes.

    Raises AxisError for a name that is no axis of the graph or an axis that must keep its size, with the reason.
    """
    axes = {name: graph.axes.free_group(name) for name in names}
    symbols = {name: sympy.Symbol(name, positive=True, integer=True) for name in axes}
    return counted(graph, {axis: symbols[name] for name, axis in axes.items()}, symbols)


def counted(graph: TrainingGraph, sizes: dict[Axis, sympy.Symbol], symbols: dict[str, sympy.Symbol]) -> CountingGraph:
    """The nodes of ``graph`` with a symbol for the size of each of these axes, free or not; ``symbols``: by name."""
    copy = fx.Graph()
    nodes: dict[fx.Node, fx.Node] = {}
    copy.graph_copy(graph.graph, nodes)
    for original, copied in nodes.items():
        copied.meta = dict(original.meta)
        value = original.meta.get("val")
        if sizes and isinstance(value, (torch.Tensor, list, tuple)):
            copied.meta["val"] = _shaped(value, graph.axes.of(original), sizes)
    return CountingGraph(nodes, symbols)


def _shaped(value: Any, dims: tuple[Any, ...], sizes: dict[Axis, sympy.Symbol]) -> Any:
    """Stand-ins for the tensors of a value, whose dimensions are ``dims``; what no named axis touches stays."""
    if isinstance(value, (list, tuple)):
        return type(value)(_shaped(v, d, sizes) for v, d in zip(value, dims, strict=True))
    if not isinstance(value, torch.Tensor) or all(sizes.keys().isdisjoint(dim.axes()) for dim in dims):
        return value
    shape = tuple(_size(dim, size, sizes) for dim, size in zip(dims, value.shape, strict=True))
    return Shaped(shape, value.stride(), value.dtype, value.device)


def _size(dim: Dim, size: Any, sizes: dict[Axis, sympy.Symbol]) -> Expr:
    return size if sizes.keys().isdisjoint(dim.axes()) else dim.size_at(sizes)
