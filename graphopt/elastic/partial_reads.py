"""Partial reads: a layer reads only the first part of what its producer gives, and passes on a part of its own output.

``ReadInput(0.5)`` leaves the producer as wide as it is, for whoever else reads it: the layer reads the first half of
its channels, by the first half of its own weight's columns. ``PassOutput(0.75)`` makes the layer's output narrower,
and the axis behind follows: norms, gates and the next layer's columns. That is a width of one layer, so it is allowed
where this layer alone makes that axis; a residual stream has many producers, and is a dimension of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx

from graphopt.elastic.dimension import Kind, Value
from graphopt.elastic.handles import Handle, sizes_of
from graphopt.elastic.kernel_sizes import is_convolution, origin, refresh, uses
from graphopt.elastic.transformations import PREPARES
from graphopt.errors import ElasticError
from graphopt.graph.axes import Axes, Axis, Dim, Form
from graphopt.graph.draft import Draft
from graphopt.graph.op_rules.arguments import operand
from graphopt.graph.training_graph import InputKind, TrainingGraph


@dataclass(frozen=True)
class _Part:
    """The part of an axis, from 0 to 1."""

    ratio: float

    def __post_init__(self) -> None:
        if isinstance(self.ratio, bool) or not isinstance(self.ratio, (int, float)) or not 0 < self.ratio <= 1:
            raise ElasticError(f"{type(self).__name__}: expected a ratio above 0 and up to 1, got {self.ratio!r}")

    def of(self, size: int) -> int:
        """How many of ``size`` indices that is: rounded, at least one."""
        return max(1, round(self.ratio * size))


class ReadInput(_Part):
    """A layer reads the first ``ratio`` of what its producer gives."""


class PassOutput(_Part):
    """A layer passes on the first ``ratio`` of its output; the axis behind follows."""


class ReadPart(Handle):
    """How many columns of its weight a layer reads, counted in those of the full layer.

    Where the axis that it reads is narrower in a subnet, the layer reads the same share of it. Where it is a product
    (the channels of an image that was flattened), the outer factors are cut.
    """

    kind = Kind.READ
    full: int

    def __init__(self, axes: Axes, parameter: str, parts: Sequence[ReadInput]):
        self.parameter, self.parts = parameter, tuple(parts)
        self.weight = axes.graph.input_nodes(InputKind.PARAMETER)[parameter]
        self.layers = _layers(self.weight, parameter)
        self.dim = _columns(self.layers[0])
        path = parameter.rpartition(".")[0]
        self.name, self.where = (f"{path}.read" if path else "read"), (path,)
        columns = axes.of(self.weight)[self.dim]
        self.full = columns.count({})
        self.unit = _rigid(columns)

    def choices(self, wanted: Sequence[int | float] | None) -> tuple[Value, ...]:
        given = [float(part.ratio) for part in self.parts] if wanted is None else wanted
        for one in given:
            share = isinstance(one, float) and 0 < one <= 1
            if not share and not (type(one) is int and self.unit <= one <= self.full and one % self.unit == 0):
                raise ElasticError(
                    f"choices: {self.name} can have multiples of {self.unit} up to {self.full} (int) or shares of them "
                    f"(float, at most 1.0), got {one!r}"
                )
        sizes = sizes_of(self.full // self.unit, [s if isinstance(s, float) else s // self.unit for s in given])
        return tuple(self.unit * size for size in sizes)

    def readers(self) -> frozenset[fx.Node]:
        return frozenset(self.layers)

    def sizes(self, value: Value, axes: Axes) -> dict[Axis, int]:
        if value == self.full:
            return {}
        raise ElasticError(
            f"prices: {self.name} at {value} is not priced: a layer that reads a part of an axis has no size of its "
            f"own in the graph of the full net; leave it at {self.full} (among=..., or fixed=... in the space)"
        )

    def rewrite(self, draft: Draft, value: Value) -> None:
        assert isinstance(value, int)
        layers = [copy for copy in map(draft.node, self.layers) if copy.users]  # others were left out
        if not layers:
            return
        weight = _transformed(draft, self.weight, self.parameter)
        many = int(weight.meta["val"].shape[self.dim]) // self.unit
        count = max(1, round(value / self.full * many)) * self.unit
        if count == many * self.unit:
            return
        users = list(weight.users)
        first = next(n for n in draft.graph.nodes if n in weight.users)
        view = draft.add(SLICE, weight, self.dim, 0, count, like=layers[0], before=first)
        part = draft.add(torch.ops.aten.clone.default, view, like=layers[0], before=first)  # dense, as by itself
        view.meta[PREPARES] = part.meta[PREPARES] = self.parameter
        for user in users:
            user.replace_input_with(weight, part)
        refresh(list(part.users))
        for layer in layers:
            source = operand(layer, "input")
            given = draft.add(SLICE, source, _channels(layer), 0, count, like=layer)
            layer.replace_input_with(source, given)


def _transformed(draft: Draft, weight: fx.Node, parameter: str) -> fx.Node:
    """What layers read as this weight in a draft: the end of its transformation, if there is one."""
    made = [n for n in draft.graph.nodes if n.meta.get(PREPARES) == parameter]
    return made[-1] if made else draft.node(weight)


def _rigid(dim: Dim) -> int:
    """How many columns belong together: the sizes of what runs fastest in a product and never changes."""
    unit = 1
    for part in dim.parts[:0:-1] if dim.form is Form.PRODUCT else ():
        if any(axis.free for axis in part.axes()):
            break
        unit *= part.count({})
    return unit


def _parameter(graph: TrainingGraph, name: str) -> fx.Node:
    found = graph.input_nodes(InputKind.PARAMETER).get(name)
    if found is None:
        raise ElasticError(f"layers: the forward pass reads no parameter {name!r}")
    return found


def _layers(weight: fx.Node, name: str) -> list[fx.Node]:
    """The layers that contract their input with ``weight``."""
    layers = uses(weight)
    for node in layers:
        if node.target is not _LINEAR and not is_convolution(node):
            raise ElasticError(f"ReadInput: {name} is read by {node.target}, which is no linear layer or convolution")
        if is_convolution(node) and operand(node, "groups") != 1:
            raise ElasticError(f"ReadInput: {name} is the weight of a convolution in groups, which reads its own group")
    if not layers:
        raise ElasticError(f"ReadInput: nothing reads {name}")
    return layers


def _columns(layer: fx.Node) -> int:
    """Which dimension of the weight is contracted with the input."""
    return 0 if "transpose" in str(layer.target) else 1


def _channels(layer: fx.Node) -> int:
    """Which dimension of the input and output has the channels: negative, as an image may come without a batch."""
    return 1 - layer.meta["val"].dim() if is_convolution(layer) else -1


# -- what a layer passes on -----------------------------------------------------------------------------------------


def passed_axis(axes: Axes, weight: str) -> Axis:
    """The axis that the layer of this weight makes, if it alone does: its size is what the layer passes on.

    Raises ElasticError with the reason where the output is no free axis, or other layers make it too.
    """
    layers = _layers(_parameter(axes.graph, weight), weight)
    dim = axes.of(layers[0])[_channels(layers[0])]
    outer = dim
    while outer.form is Form.PRODUCT and outer.parts:
        outer = outer.parts[0]
    if outer.axis is None or not outer.axis.free:
        why = outer.axis.reason if outer.axis is not None else f"it consists of parts, {dim}"
        raise ElasticError(f"PassOutput: the output of {weight} cannot be cut: {why}")
    makers = _makers(axes, outer.axis)
    if others := [name for name in makers if name != weight]:
        raise ElasticError(
            f"PassOutput: {outer.axis!r} is made by {', '.join(others[:3])} too: choose its width for all of them"
        )
    return outer.axis


def _makers(axes: Axes, axis: Axis) -> list[str]:
    """The weights of layers that compute ``axis`` anew. A convolution in groups hands the axis of its groups on."""
    found = []
    carriers = axes.graph.input_nodes(InputKind.PARAMETER)
    for name in dict.fromkeys(place.name for place in axis.places if place.name in carriers):
        for node in uses(carriers[name]):
            layer = node.target is _EMBEDDING or node.target is _LINEAR or is_convolution(node)
            if not layer or origin(operand(node, "weight")) is not carriers[name]:
                continue
            handed_on: set[Axis] = set()
            if is_convolution(node) and operand(node, "groups") != 1:
                handed_on.update(axes.of(operand(node, "input"))[_channels(node)].axes())
            if axis in axes.of(node)[_channels(node)].axes() and axis not in handed_on:
                found.append(name)
                break
    return found


_LINEAR = torch.ops.aten.linear.default
_EMBEDDING = torch.ops.aten.embedding.default
SLICE = torch.ops.aten.slice.Tensor
