"""The axes of a graph as text: which are coupled, which are free, and why a parameter was not touched."""

from __future__ import annotations

from io import StringIO
from math import prod
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from graphopt.graph.axes.axis import Dim, Form
from graphopt.graph.training_graph import InputKind

if TYPE_CHECKING:
    from graphopt.graph.axes.analysis import Axes


def explain(axes: Axes) -> str:
    """See `Axes.explain`."""
    out = StringIO()
    console = Console(file=out, width=160, no_color=True, force_jupyter=False, force_terminal=False)
    groups = Table("axis", "kind", "size", "starts at", "places", "free, or why not", title="Axes", box=None)
    for g in axes.groups():
        first = g.places[0]
        text = "free" if g.free else g.reason
        if g.free and g.statistics:
            text += f" (statistics over it: {g.statistics[0]}{' ...' if len(g.statistics) > 1 else ''})"
        size = axes.graph.symbols.rename(g.size)
        groups.add_row(g.name, g.kind, size, f"{first.name}[{first.dim}]", str(len(g.places)), text)
    console.print(groups)
    parameters = Table("parameter", "shape", "axes", "fixed", "by", title="Parameters", box=None)
    for name, node in axes.graph.input_nodes(InputKind.PARAMETER).items():
        dims: tuple[Dim, ...] = axes.of(node)
        fixed, reasons = frozen(dims)
        shape = "x".join(map(str, node.meta["val"].shape))
        parameters.add_row(name, shape, ", ".join(map(str, dims)), f"{fixed:.0%}", "; ".join(reasons))
    console.print(parameters)
    for unknown in axes.unknown:
        console.print(f"no axis rule: {unknown.operator} ({len(unknown.nodes)} nodes)")
    for reason in axes.contradictions:
        console.print(reason)
    return out.getvalue()


def frozen(dims: tuple[Dim, ...]) -> tuple[float, tuple[str, ...]]:
    """Which share of a tensor's elements no free axis reaches, and the reasons of the axes that are not free."""
    sizes = [d.count({}) for d in dims]
    reached = [_reached(d) for d in dims]
    untouched = prod(s - r for s, r in zip(sizes, reached, strict=True))
    reasons: dict[str, None] = {}
    for axis in (a for d in dims for a in d.axes()):
        if not axis.free:
            reasons[axis.reason] = None
    return (untouched / prod(sizes) if prod(sizes) else 1.0), tuple(reasons)


def _reached(dim: Dim) -> int:
    """How many indices of a dimension lie on a free axis."""
    if dim.axis is not None:
        return dim.count({}) if dim.axis.free else 0
    if dim.form is Form.CONCAT:
        return sum(map(_reached, dim.parts))
    return dim.count({}) if any(axis.free for axis in dim.axes()) else 0
