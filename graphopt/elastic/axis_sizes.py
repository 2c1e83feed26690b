"""Dimensions that are axes: width, heads, queries of each head, head size, embedding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import fx

from graphopt.elastic.dimension import Kind, Refused, Value
from graphopt.elastic.handles import Found, Handle, sizes_of
from graphopt.errors import ElasticError
from graphopt.graph.axes import Axes, Axis, Dim, Form
from graphopt.graph.axes import Kind as AxisKind
from graphopt.graph.resize import Resizer
from graphopt.graph.training_graph import InputKind

KINDS = {
    AxisKind.CHANNEL: Kind.WIDTH, AxisKind.HIDDEN: Kind.WIDTH, AxisKind.OTHER: Kind.WIDTH,
    AxisKind.EMBEDDING: Kind.EMBEDDING, AxisKind.HEADS: Kind.HEADS, AxisKind.HEAD_SIZE: Kind.HEAD_SIZE,
}  # fmt: skip
"""What an axis of this kind is to a space. Others are positions, or named by data."""

SHARES: dict[Kind, tuple[float, ...]] = {
    Kind.WIDTH: (0.25, 0.5, 0.75, 1.0),
    Kind.HEADS: (0.25, 0.5, 0.75, 1.0),
    Kind.QUERIES: (0.25, 0.5, 0.75, 1.0),
    Kind.EMBEDDING: (0.5, 0.75, 1.0),
    Kind.HEAD_SIZE: (1.0,),  # the model's own numbers (1 / sqrt(64)) are made for one size
}
"""Choices by default, as shares of the full size."""

_WIDE = 64
"""From this size on shares are rounded to multiples of 8: what vector units and tiles of kernels like."""


class AxisSize(Handle):
    """The size of one axis: the first so many indices remain (`importance` brings the best ones to the front).

    ``alone``: a head size without heads beside it, of an attention with one head or of a product of two activations: it
    is the only width there, and varies by default.
    """

    def __init__(
        self,
        axis: Axis,
        kind: Kind,
        name: str,
        where: tuple[str, ...],
        readers: frozenset[fx.Node],
        alone: bool = False,
    ):
        self.axis, self.kind, self.name, self.where, self._readers = axis, kind, name, where, readers
        self.full = int(axis.size)
        self._shares = SHARES[Kind.WIDTH if kind is Kind.HEAD_SIZE and alone else kind]

    def choices(self, wanted: Sequence[int | float] | None) -> tuple[Value, ...]:
        size = int(self.axis.size)
        given = self._shares if wanted is None else wanted
        wrong = [w for w in given if isinstance(w, bool) or not isinstance(w, (int, float)) or not 0 < w <= size]
        if wrong or any(isinstance(w, float) and w > 1 for w in given):
            raise ElasticError(
                f"choices: {self.name} can have sizes (int) from 1 to {size} or shares of it (float, at most 1.0), got "
                f"{tuple(given)!r}"
            )
        heads = self.kind in (Kind.HEADS, Kind.QUERIES)
        return sizes_of(size, given, unit=8 if size >= _WIDE and not heads else 1)

    def readers(self) -> frozenset[fx.Node]:
        return self._readers

    def axes(self, value: Value) -> Mapping[Axis, torch.Tensor]:
        assert isinstance(value, int)
        return {self.axis: torch.arange(value)}


def find(axes: Axes, resizer: Resizer) -> Found:
    """The axes of parameters that are read and can have other sizes; those that cannot, with the reason."""
    handles: list[Handle] = []
    refused: list[Refused] = []
    carriers = axes.carriers()
    parameters = {n for n, node in axes.graph.input_nodes(InputKind.PARAMETER).items() if node.users}
    grouped, headed = queries(axes), _with_heads(axes)
    used: set[str] = set()
    for axis in axes.groups():
        names = list(dict.fromkeys(p.name for p in axis.places if p.name in parameters))
        if not names:
            continue
        where = tuple(dict.fromkeys(name.rpartition(".")[0] for name in names))
        kind = Kind.QUERIES if axis in grouped else KINDS.get(axis.kind)
        why = axis.reason or ("" if kind else f"{axis.kind} is no dimension of features") or resizer.refusal(axis)
        if why or kind is None or not isinstance(axis.size, int):
            refused.append(Refused(axis.name, axis.kind, axes.graph.symbols.rename(axis.size), why, where))
            continue
        name = axis.name if kind is not Kind.QUERIES else _named_queries(axis.name, used)
        used.add(name)
        places = {p.name for p in axis.places if p.name in carriers}
        readers = frozenset(user for place in places for user in carriers[place].users)
        handles.append(AxisSize(axis, kind, name, where, readers, axis not in headed))
    return Found(tuple(handles), tuple(refused))


def _named_queries(name: str, used: set[str]) -> str:
    stem, _, _ = name.rpartition(".heads")
    plain = f"{stem}.queries" if stem else "queries"
    return plain if plain not in used else f"{name}.queries"


def queries(axes: Axes) -> set[Axis]:
    """Heads that stand beside other heads in every product: the query heads of each key/value head."""
    beside: dict[Axis, list[set[Axis]]] = {}
    for node in axes.graph.input_nodes(InputKind.PARAMETER).values():
        for dim in axes.of(node):
            for product in _products(dim):
                heads = {d.axis for d in product if d.axis is not None and d.axis.kind is AxisKind.HEADS}
                for axis in heads:
                    beside.setdefault(axis, []).append(heads - {axis})
    always = {axis: set.intersection(*others) for axis, others in beside.items()}
    return {axis for axis, others in always.items() if any(axis not in always[other] for other in others)}


def _with_heads(axes: Axes) -> set[Axis]:
    """The axes that stand beside heads in a product."""
    found: set[Axis] = set()
    for node in axes.graph.input_nodes(InputKind.PARAMETER).values():
        for dim in axes.of(node):
            for product in _products(dim):
                inside = [d.axis for d in product if d.axis is not None]
                if any(axis.kind is AxisKind.HEADS for axis in inside):
                    found.update(inside)
    return found


def _products(dim: Dim) -> list[list[Dim]]:
    """The products in a dimension, each as its factors; a factor that is a concatenation gives one for each piece."""
    if dim.form is Form.CONCAT:
        return [found for part in dim.parts for found in _products(part)]
    if dim.form is Form.AXIS:
        return [[dim]]
    flat: list[Dim] = []
    nested: list[list[Dim]] = []
    for part in dim.parts:
        if part.form is Form.CONCAT:
            nested += _products(part)
        else:
            flat += [f for found in _products(part) for f in found]
    return [flat + inner for inner in nested] or [flat]


# -- the same axes in another graph of the model ----------------------------------------------------------------------


def correspond(ours: Axes, theirs: Axes) -> dict[Axis, Axis]:
    """For the axes of one graph those of another graph of the same model: the same places of the same parameters.

    An axis that is cut otherwise there, or that is two axes there, has no counterpart.
    """
    found: dict[Axis, set[Axis | None]] = {}
    kinds = (InputKind.PARAMETER, InputKind.BUFFER)
    others = {name: node for kind in kinds for name, node in theirs.graph.input_nodes(kind).items()}
    for kind in kinds:
        for name, node in ours.graph.input_nodes(kind).items():
            if name in others and node.users and others[name].users:
                for a, b in zip(ours.of(node), theirs.of(others[name])):
                    _match(a, b, found)
    single = {axis: next(iter(many)) for axis, many in found.items() if len(many) == 1}
    return {axis: other for axis, other in single.items() if other is not None}


def _match(a: Dim, b: Dim, found: dict[Axis, set[Axis | None]]) -> None:
    if a.axis is not None and b.axis is not None:
        found.setdefault(a.axis, set()).add(b.axis if a.axis.size == b.axis.size else None)
        return
    ours, theirs = _parts(a), _parts(b)
    if a.form is b.form and len(ours) == len(theirs):
        for x, y in zip(ours, theirs, strict=True):
            _match(x, y, found)
    else:
        for axis in a.axes():
            found.setdefault(axis, set()).add(None)


def _parts(dim: Dim) -> list[Dim]:
    """The parts of a dimension, those of its own form taken apart: 3 x (4 x 8) is 3 x 4 x 8."""
    return [p for part in dim.parts for p in (_parts(part) if part.form is dim.form else [part])]
