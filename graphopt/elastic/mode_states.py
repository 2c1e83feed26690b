"""`ModeState`: a subnet in train or in eval mode, with the tensors that its extracted module has there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from graphopt.elastic.choice import Choice
from graphopt.elastic.modes import in_mode
from graphopt.elastic.subnet import Subnet
from graphopt.elastic.transformations import PREPARES
from graphopt.errors import BatchError, CaptureError, ElasticError
from graphopt.graph.batch import BatchLayout
from graphopt.graph.lowering import binding
from graphopt.graph.training_graph import InputKind, OutputKind, TrainingGraph

if TYPE_CHECKING:
    from graphopt.elastic.space import Space


@dataclass(frozen=True)
class ModeState:
    """A subnet in one mode.

    ``tensors``: parameters and buffers by name; ``folded``: nodes that have become parameters, with the names of those,
    and nodes that they were computed from, with an empty one.
    """

    subnet: Subnet
    tensors: Mapping[str, torch.Tensor]
    folded: Mapping[fx.Node, str]

    @staticmethod
    def of(subnet: Subnet) -> ModeState:
        """Raises ElasticError for a subnet that no module computes."""
        with torch.no_grad():
            tensors = {name: t.detach() for name, t in subnet.tensors().items()}
            folded = _fold(subnet.graph, tensors)
        written = {n for n in subnet.graph.output_nodes(OutputKind.BUFFER) if n not in tensors}
        if written:
            raise ElasticError(f"extract: {min(written)} gets a new value that depends on no old one")
        return ModeState(subnet, tensors, folded)

    @property
    def graph(self) -> TrainingGraph:
        """The forward graph."""
        return self.subnet.graph

    @property
    def layout(self) -> BatchLayout:
        """Of the batch."""
        return self.subnet.origin.captured.layout

    def nested(self, tensors: Iterable[Any]) -> Any:
        """The model's output with these in the places of its tensors."""
        captured, leaves = self.subnet.origin.captured, list(tensors)
        if captured.output_spec is None:
            return leaves[0]
        for position, value in captured.output_constants:
            leaves.insert(position, value)
        return pytree.tree_unflatten(leaves, captured.output_spec)


def in_both_modes(space: Space, choice: Choice) -> dict[bool, ModeState]:
    """A subnet by mode (whether it is train mode), as far as the model can be captured there.

    Raises ElasticError where it can be captured in neither.
    """
    found: dict[bool, ModeState] = {}
    reasons = []
    for training in (True, False):
        with in_mode(space.model, training):
            try:
                subnet = space.subnet(choice)
            except (CaptureError, BatchError) as error:
                reasons.append(str(error))
            else:
                found[training] = ModeState.of(subnet)
    if not found:
        raise ElasticError(f"extract: {'; '.join(reasons)}")
    return found


def _fold(graph: TrainingGraph, tensors: dict[str, torch.Tensor]) -> dict[fx.Node, str]:
    """Compute the weights that transformations make, and let them be the parameters: by the node, with its name."""
    values = {
        node: tensors[given.name]
        for given, node in zip(graph.inputs, graph.placeholders, strict=True)
        if given.name in tensors and given.kind is InputKind.PARAMETER
    }
    prepared = [node for node in graph.nodes if PREPARES in node.meta]
    for node in prepared:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
        values[node] = binding(node.target)(*args, **kwargs)
    ends: dict[str, list[fx.Node]] = {}
    for node in prepared:
        if any(PREPARES not in user.meta for user in node.users):
            ends.setdefault(node.meta[PREPARES], []).append(node)
    folded: dict[fx.Node, str] = dict.fromkeys(prepared, "")
    for name, nodes in ends.items():
        weight = graph.input_nodes(InputKind.PARAMETER)[name]
        if len(nodes) > 1 or any(PREPARES not in user.meta for user in weight.users):
            raise ElasticError(f"extract: {name} is read before and behind its transformation")
        folded[nodes[0]] = name
        tensors[name] = values[nodes[0]].clone(memory_format=torch.preserve_format)
    for node in graph.placeholders:  # parameters of the transformations are in the weights now
        name = graph.inputs[graph.placeholders.index(node)].name
        if node.users and all(user in folded for user in node.users) and name not in ends:
            del tensors[name]
    return folded
