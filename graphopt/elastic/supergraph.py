"""`Supergraph`: a model's forward graph in one state, the handles of a space's dimensions in it, and its subnets.

One state is: train or eval mode (of every module), autocast, the form of the batch, and the loss. A space makes one for
each state that it meets.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from graphopt.elastic import axis_sizes, depths, kernel_sizes
from graphopt.elastic.axis_sizes import AxisSize, correspond
from graphopt.elastic.choice import Choice
from graphopt.elastic.dimension import Value
from graphopt.elastic.handles import Cut, Found, Handle, Tied, merged
from graphopt.elastic.kept import Kept
from graphopt.elastic.layers import Layers
from graphopt.elastic.slices import Slice
from graphopt.elastic.subnet import Subnet
from graphopt.errors import ElasticError
from graphopt.graph.axes import Axes, Axis
from graphopt.graph.capture import Captured
from graphopt.graph.draft import Draft
from graphopt.graph.resize import Resizer, cuts_of

FINDERS: tuple[Callable[[Axes, Resizer], Found], ...] = (
    axis_sizes.find,
    depths.find,
    kernel_sizes.find,
)
"""Each kind of dimension finds its handles in a graph."""


class Supergraph:
    """See the module's docstring. ``captured``: graph, layout of the batch, nesting of outputs. ``handles``: by the
    name of the dimension; one that has no counterpart in this graph is missing, and ``missing`` says why."""

    def __init__(self, captured: Captured, model: nn.Module, layers: Layers):
        self.captured, self.graph = captured, captured.graph
        self.axes = self.graph.axes
        self.resizer = Resizer(self.axes)
        self.found = layers.complete(sum((find(self.axes, self.resizer) for find in FINDERS), Found()), self.axes)
        self.handles: dict[str, Handle] = {}
        self.missing: dict[str, str] = {}
        self.tensors: dict[str, torch.Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        self.derived: dict[str, Any] = {}  # what other modules compute of it once
        self._subnets: Kept[Subnet] = Kept()

    # -- handles ----------------------------------------------------------------------------------------------------

    def adopt(self, other: Supergraph) -> None:
        """Give this graph the handles that correspond to those of ``other``."""
        twins = correspond(other.axes, self.axes)
        own = {handle.name: handle for handle in self.found.handles}
        by_axis = {handle.axis: handle for handle in self.found.handles if isinstance(handle, AxisSize)}
        for name, handle in other.handles.items():
            try:
                self.handles[name] = self._counterpart(handle, twins, own, by_axis)
            except ElasticError as error:
                self.missing[name] = str(error)

    def _counterpart(
        self, handle: Handle, twins: Mapping[Axis, Axis], own: Mapping[str, Handle], by_axis: Mapping[Axis, AxisSize]
    ) -> Handle:
        if isinstance(handle, Tied):
            return Tied(handle.name, [self._counterpart(part, twins, own, by_axis) for part in handle.parts])
        if isinstance(handle, AxisSize):
            twin = twins.get(handle.axis)
            if twin is None:
                raise ElasticError(f"{handle.name} is no single axis in this graph")
            if twin not in by_axis:
                why = twin.reason or next((r.why for r in self.found.refused if r.name == twin.name), "it is not free")
                raise ElasticError(f"{handle.name} must keep its size in this graph: {why}")
            return by_axis[twin]
        if why := next((r.why for r in self.found.refused if r.name == handle.name), ""):
            raise ElasticError(f"{handle.name}: {why}")
        return handle.counterpart(own.values())

    def changed(self, choice: Mapping[str, Value]) -> list[tuple[Handle, Value]]:
        """The handles whose value is not the full one, in the order in which they are applied.

        Raises ElasticError for a dimension that this graph does not have.
        """
        found = []
        for name, value in choice.items():
            if name in self.missing:
                raise ElasticError(f"choice: {name} cannot be {value} here: {self.missing[name]}")
            handle = self.handles[name]
            if value != handle.full:
                found.append((handle, value))
        return sorted(found, key=lambda pair: not pair[0].first)

    def inactive(self, choice: Mapping[str, Value]) -> frozenset[str]:
        """Dimensions that nothing depends on in the subnet of ``choice``."""
        dead = frozenset().union(*(self.handles[n].dead(v) for n, v in choice.items() if n in self.handles))
        if not dead:
            return frozenset()
        others = [n for n in choice if n in self.handles and not self.handles[n].first]
        return frozenset(n for n in others if dead.issuperset(self.handles[n].readers()))

    # -- subnets ------------------------------------------------------------------------------------------------------

    def subnet(self, choice: Choice, *, checked: bool = False) -> Subnet:
        """The subnet of a choice; kept.

        ``checked``: its metadata come from running each operator without data, and are compared with what the axes say.
        Otherwise they come from the sizes of axes, where that is safe. Raises AxisError where shapes do not fit.
        """
        key = choice.key()
        if key not in self._subnets or checked:
            self._subnets[key] = self._make(choice, checked)
        return self._subnets[key]

    def _make(self, choice: Choice, checked: bool) -> Subnet:
        applied = self.changed({n: v for n, v in choice.items() if n not in choice.inactive})
        chosen = {axis: kept for handle, value in applied for axis, kept in handle.axes(value).items()}
        own = {name: p for handle, value in applied for name, p in handle.parameters(value).items()}
        draft = Draft(self.graph)
        for handle, value in applied:
            if handle.first:
                handle.rewrite(draft, value)
        self.resizer.resize(draft, chosen, checked=checked)
        for handle, value in applied:
            if not handle.first:
                handle.rewrite(draft, value)
        cuts = merged([cuts_of(self.axes, chosen), *(handle.cuts(value) for handle, value in applied)])
        slices = self.slices(cuts)
        for handle, value in applied:
            slices.update({n: Slice.of(own[n].dim(), dims) for n, dims in handle.own_cuts(value, cuts).items() if dims})
        sized = {n: self.handles[n].full for n in choice if n in self.handles and self.handles[n].axes(choice[n])}
        pattern = Choice({**choice, **sized}, choice.inactive)
        return Subnet(draft.finish(), slices, own, self, chosen, pattern)

    def elastic_axes(self) -> list[Axis]:
        """The axes that choices change."""
        return [axis for handle in self.handles.values() for axis in handle.axes(handle.full)]

    def slices(self, cuts: Mapping[str, Mapping[int, Cut]]) -> dict[str, Slice]:
        """Cuts as slices of the model's tensors."""
        return {name: Slice.of(self.tensors[name].dim(), dims) for name, dims in cuts.items() if name in self.tensors}
