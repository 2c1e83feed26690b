"""A space as text: what is elastic and what it governs, and what is not and why."""

from __future__ import annotations

from io import StringIO
from math import prod
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from graphopt.graph.axes import Axis, Dim, Form
from graphopt.graph.op_rules import flops
from graphopt.graph.training_graph import InputKind

if TYPE_CHECKING:
    from graphopt.elastic.space import Space


def table(space: Space) -> str:
    """See `Space`."""
    out = StringIO()
    console = Console(file=out, width=160, no_color=True, force_jupyter=False, force_terminal=False)
    elastic = Table("dimension", "kind", "size", "choices", "where", "parameters", "MFLOPs", title="Elastic", box=None)
    for dimension in space.dimensions:
        parameters, operations = governed(space, dimension.name)
        choices = ", ".join(map(str, dimension.choices))
        elastic.add_row(
            dimension.name, dimension.kind, str(dimension.size), choices, _short(dimension.where), f"{parameters:,}",
            f"{operations / 1e6:,.2f}",
        )  # fmt: skip
    console.print(elastic)
    total = sum(p.numel() for p in space.model.parameters())
    console.print(f"{rigid(space):.1%} of {total:,} parameters are in no dimension that changes sizes")
    if space.refusals:
        refused = Table("group", "kind", "size", "why it keeps its size", title="Not elastic", box=None)
        for refusal in space.refusals:
            refused.add_row(refusal.name, refusal.kind, refusal.size, refusal.why)
        console.print(refused)
    for note in space.notes:
        console.print(note)
    return out.getvalue()


def governed(space: Space, name: str) -> tuple[int, int]:
    """How many parameters a dimension reaches, and floating point operations of one forward pass at the sizes of the
    capture."""
    supergraph = space.primary
    handle, value = supergraph.handles[name], space.dimension(name).smallest
    evaluate = supergraph.graph.symbols.evaluate
    dead = handle.dead(value)
    axes = set(handle.axes(value))
    cuts = handle.cuts(value)
    parameters = 0
    for given, node in supergraph.graph.input_nodes(InputKind.PARAMETER).items():
        dims = supergraph.axes.of(node)
        if given in cuts or (dead and node.users and dead.issuperset(node.users)):
            parameters += prod(node.meta["val"].shape)
        elif any(axis in axes for dim in dims for axis in dim.axes()):
            parameters += _reached(dims, axes)
    readers = handle.readers()
    operations = 0
    for node in supergraph.graph.nodes:
        if node.op != "call_function":
            continue
        if node in dead or (cuts and node in readers) or (axes and not axes.isdisjoint(_around(space, node))):
            operations += evaluate(flops(node))
    return parameters, operations


def rigid(space: Space) -> float:
    """The share of the parameters' elements that no dimension but depth changes the number of. Parameters that nothing
    reads count for nothing: no subnet has them."""
    supergraph = space.primary
    axes = {axis for d in space.dimensions for axis in supergraph.handles[d.name].axes(d.smallest)}
    cut = {n for d in space.dimensions for n in supergraph.handles[d.name].cuts(d.smallest)}
    total = untouched = 0
    for name, node in supergraph.graph.input_nodes(InputKind.PARAMETER).items():
        size = prod(node.meta["val"].shape) if node.users else 0
        total += size
        untouched += 0 if name in cut or not size else size - _reached(supergraph.axes.of(node), axes)
    return untouched / total if total else 1.0


def _reached(dims: tuple[Dim, ...], axes: set[Axis]) -> int:
    """How many elements of a tensor lie on one of the axes."""
    sizes = [dim.count({}) for dim in dims]
    free = [size - _on(dim, axes) for dim, size in zip(dims, sizes, strict=True)]
    return prod(sizes) - prod(free)


def _on(dim: Dim, axes: set[Axis]) -> int:
    if dim.axis is not None:
        return dim.count({}) if dim.axis in axes else 0
    if dim.form is Form.CONCAT:
        return sum(_on(part, axes) for part in dim.parts)
    return dim.count({}) if any(axis in axes for axis in dim.axes()) else 0


def _around(space: Space, node: object) -> set[Axis]:
    """The axes of an operator's result and operands."""
    supergraph = space.primary
    found = set(supergraph.resizer.form(node).axes)  # type: ignore[arg-type]
    for source in node.all_input_nodes:  # type: ignore[attr-defined]
        found |= supergraph.resizer.form(source).axes
    return found


def _short(where: tuple[str, ...]) -> str:
    shown = ", ".join(path or "(top)" for path in where[:2])
    return shown + (f" and {len(where) - 2} more" if len(where) > 2 else "")
