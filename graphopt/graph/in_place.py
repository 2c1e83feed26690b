"""Which operators of a functional graph may write into their operands when it runs.

The graph says ``new = f(old, ...)``; running it so would keep two copies of every parameter and state. Writing ``f_``
in place of ``f`` is legal where nobody reads the old value afterwards and the memory is ours to overwrite: a
temporary, or an input whose new value the graph gives.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from operator import getitem
from typing import Any

import torch
from torch import fx

from graphopt.graph.storages import storage_root
from graphopt.graph.training_graph import OutputKind, Phase, TrainingGraph

_NEW_VALUES = {OutputKind.PARAMETER, OutputKind.STATE, OutputKind.BUFFER}


def overwritten(graph: TrainingGraph) -> list[fx.Node | None]:
    """For each output the input whose new value it is; None for what is returned (also state made by this step)."""
    inputs = {(i.kind.value, i.name, i.field): n for i, n in zip(graph.inputs, graph.placeholders, strict=True)}
    return [
        inputs.get((o.kind.removeprefix("new "), o.name, o.field)) if o.kind in _NEW_VALUES else None
        for o in graph.outputs
    ]


_BATCH_NORM = torch.ops.aten._native_batch_norm_legit_functional.default


@dataclass(frozen=True)
class InPlace:
    """Decisions for one graph. ``calls``: operators replaced by their in-place form. ``same``: values that are, after
    such a call, the very tensor of another value. ``void``: lists of such values, which do not exist when it runs.
    ``homes``: results of such calls and the value whose memory each was written into. ``copies``: (input, new value)
    pairs left to copy at the end."""

    calls: dict[fx.Node, Any] = field(default_factory=dict)
    same: dict[fx.Node, fx.Node] = field(default_factory=dict)
    void: set[fx.Node] = field(default_factory=set)
    homes: dict[fx.Node, fx.Node] = field(default_factory=dict)
    copies: list[tuple[fx.Node, fx.Node]] = field(default_factory=list)

    def resolve(self, node: fx.Node) -> fx.Node:
        """The value whose tensor ``node`` is."""
        while node in self.same:
            node = self.same[node]
        return node


def decide(graph: TrainingGraph) -> InPlace:
    """Decide for every operator of ``graph``; what stays undone is a copy at the end of the step."""
    decisions = InPlace()
    position = {node: i for i, node in enumerate(graph.graph.nodes)}
    destination, returned = _destinations(graph)
    last_read: dict[fx.Node, int] = {}  # by storage root
    for node in graph.graph.nodes:
        if node.op != "output":
            for operand in node.all_input_nodes:
                last_read[storage_root(operand)] = position[node]
    for value in [*returned, *destination.values()]:
        last_read[storage_root(value)] = len(position)  # read when the step ends
    homes = decisions.homes

    def root_of(node: fx.Node) -> fx.Node:
        """The storage root of ``node`` when the graph runs as decided so far."""
        root = storage_root(node)
        while root in homes:
            root = storage_root(homes[root])
        return root

    def writable(operand: fx.Node, results: list[fx.Node], node: fx.Node) -> bool:
        if last_read.get(storage_root(operand), 0) > position[node] or not returned.isdisjoint(results):
            return False
        root = root_of(operand)
        if root.op == "placeholder":
            return root in destination and _whole(operand, root)
        return root.op == "call_function" and node.meta.get("phase") == Phase.UPDATE

    for node in graph.graph.nodes:
        form = _in_place_form(node) if node.op == "call_function" else None
        pairs = list(_pairs(node)) if form is not None else []
        legal = all(writable(o, found, node) and all(_alike(o, r) for r in found) for o, found in pairs)
        if pairs and legal and len({root_of(operand) for operand, _ in pairs}) == len(pairs):
            decisions.calls[node] = form
            parts = [node, *(user for user in node.users if user.target is getitem)]
            decisions.void.update(p for p in parts if isinstance(p.meta["val"], list))
            if node.target is not _BATCH_NORM and isinstance(node.meta["val"], tuple):
                decisions.void.add(node)
            for operand, found in pairs:
                for result in found:
                    homes[result] = operand
                    if result is not node:
                        decisions.same[result] = operand
    for input_, value in destination.items():
        if root_of(value) is not input_ or not _whole(value, input_):
            decisions.copies.append((input_, value))
    return decisions


def _destinations(graph: TrainingGraph) -> tuple[dict[fx.Node, fx.Node], set[fx.Node]]:
    """For each input that the step overwrites its new value; and all values that are returned besides."""
    destination: dict[fx.Node, fx.Node] = {}
    returned: set[fx.Node] = set()
    for input_, value in zip(overwritten(graph), graph.results, strict=True):
        if value is not None and input_ is not None:
            destination[input_] = value
        elif value is not None:
            returned.add(value)
    return destination, returned


def _pairs(node: fx.Node) -> Iterator[tuple[fx.Node, list[fx.Node]]]:
    """(operand, results that are it afterwards) for every operand that the in-place form of ``node`` writes."""
    several = len(node.target._schema.returns) > 1 if isinstance(node.target, torch._ops.OpOverload) else False
    for slot, argument in _written(node):
        operand = node.args[argument]
        parts = _elements([node], slot) if several else [node]
        if isinstance(operand, fx.Node):
            yield operand, parts
        elif isinstance(operand, (list, tuple)):
            for index, element in enumerate(operand):
                yield element, _elements(parts, index)


def _elements(lists: list[fx.Node], index: int) -> list[fx.Node]:
    """The nodes that take element ``index`` of one of ``lists``."""
    return [user for part in lists for user in part.users if user.target is getitem and user.args[1] == index]


def _in_place_form(node: fx.Node) -> Any:
    """The operator that writes what ``node`` computes into its operand, or None."""
    target = node.target
    if target is _BATCH_NORM:
        return torch.ops.aten._native_batch_norm_legit.default
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten":
        return None
    packet = getattr(torch.ops.aten, target._schema.name.removeprefix("aten::") + "_", None)
    return getattr(packet, target._overloadname, None) if packet is not None else None


def _written(node: fx.Node) -> list[tuple[int, int]]:
    """(position in the results, position in the arguments) of what the in-place form writes."""
    if node.target is _BATCH_NORM:
        return [(3, 3), (4, 4)]
    form = _in_place_form(node)
    if form is None:
        return []
    arguments = form._schema.arguments
    written = [i for i, a in enumerate(arguments) if a.alias_info is not None and a.alias_info.is_write]
    slots = list(enumerate(written))
    if "grad_scale" in {a.name for a in arguments} and node.kwargs.get("grad_scale") is None:
        slots = [(slot, i) for slot, i in slots if arguments[i].name != "grads"]  # written only to unscale them
    return [(slot, i) for slot, i in slots if i < len(node.args)]


def _alike(operand: fx.Node, result: fx.Node) -> bool:
    """Whether a result fits into the memory of an operand: same shape, dtype, strides, nothing overlapping."""
    a, r = operand.meta.get("val"), result.meta.get("val")
    if not isinstance(a, torch.Tensor) or not isinstance(r, torch.Tensor):
        return False
    overlapping = any(stride == 0 and size != 1 for size, stride in zip(a.shape, a.stride(), strict=True))
    return a.shape == r.shape and a.dtype == r.dtype and a.stride() == r.stride() and not overlapping


def _whole(value: fx.Node, root: fx.Node) -> bool:
    """Whether ``value`` covers the storage of ``root`` in its layout (it is no slice or transpose of it)."""
    return value.meta["val"].shape == root.meta["val"].shape and value.meta["val"].stride() == root.meta["val"].stride()
