"""`Subnet`: the forward graph of one choice, on slices of the shared tensors, and how it runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from graphopt.elastic.choice import Choice
from graphopt.elastic.slices import Slice
from graphopt.graph.axes import Axis
from graphopt.graph.draft import Draft
from graphopt.graph.lowering import Lowered, lower
from graphopt.graph.training_graph import InputKind, OutputKind, TrainingGraph

if TYPE_CHECKING:
    from graphopt.elastic.supergraph import Supergraph


class Subnet:
    """One choice in one state of the model.

    ``graph``: its forward graph. Its inputs are those of the supergraph; parameters and buffers have the shapes of
    their ``slices``, which name those that got smaller. ``own``: parameters of transformations, by the names of the
    inputs behind the others. ``chosen``: the axes that are smaller, and their indices that remain; ``pattern``: the
    choice with all axes at their full size.
    """

    def __init__(
        self, graph: TrainingGraph, slices: Mapping[str, Slice], own: Mapping[str, nn.Parameter], origin: Supergraph,
        chosen: Mapping[Axis, torch.Tensor], pattern: Choice,
    ):  # fmt: skip
        self.graph, self.slices, self.own, self.origin = graph, slices, own, origin
        self.chosen, self.pattern = chosen, pattern
        self.derived: dict[str, Any] = {}  # what other modules compute of it once: the joint graph, prices ...

    def tensors(self) -> dict[str, torch.Tensor]:
        """Its parameters and buffers, taken from the shared ones so that gradients land there. Those that nothing in
        it reads are not among them."""
        found = {}
        for given, node in zip(self.graph.inputs, self.graph.placeholders, strict=True):
            if given.kind is InputKind.BATCH or not node.users:
                continue
            shared = self.own[given.name] if given.name in self.own else self.origin.tensors[given.name]
            part = self.slices.get(given.name)
            found[given.name] = part.take(shared) if part is not None else shared
        return found

    def __call__(self, batch: Sequence[torch.Tensor]) -> Any:
        """The output on the tensors of a batch, nested as the model's own output. Autograd differentiates it into the
        shared parameters; new values of buffers are written into their slices of the shared buffers."""
        tensors, rest = self.tensors(), iter(batch)
        given = [next(rest) if i.kind is InputKind.BATCH else tensors.get(i.name) for i in self.graph.inputs]
        return self.nested(self._lowered, self._lowered.run(*given), self.slices.get)

    def nested(self, lowered: Lowered, results: Sequence[Any], part_of: Callable[[str], Slice | None]) -> Any:
        """Results of lowered code as the model's output; new values of buffers are written into their parts of the
        shared ones, which ``part_of`` tells."""
        leaves: list[Any] = []
        for output, value in zip(lowered.outputs, results, strict=True):
            if output.kind is OutputKind.BUFFER:
                self.write(output.name, value, part_of(output.name))
            else:
                leaves.append(value)
        captured = self.origin.captured
        if captured.output_spec is None:
            return leaves[0]
        for position, constant in captured.output_constants:
            leaves.insert(position, constant)
        return pytree.tree_unflatten(leaves, captured.output_spec)

    def write(self, name: str, value: torch.Tensor, part: Slice | None) -> None:
        """A new value of a buffer, into its part of the shared one."""
        shared = self.origin.tensors[name]
        value = value.detach()
        if part is not None:
            part.write(shared, value)
        else:
            with torch.no_grad():
                shared.copy_(value)

    @cached_property
    def _lowered(self) -> Lowered:
        return lower(for_autograd(self.graph), in_place=False)


_BATCH_NORM = torch.ops.aten._native_batch_norm_legit_functional.default


def for_autograd(graph: TrainingGraph) -> TrainingGraph:
    """The graph with operators that autograd knows in place of those it does not."""
    norms = graph.graph.find_nodes(op="call_function", target=_BATCH_NORM)
    if not norms:
        return graph
    draft = Draft(graph)
    for node in norms:
        draft.node(node).target = batch_norm
    return draft.finish()


def batch_norm(
    x: torch.Tensor, weight: Any, bias: Any, mean: Any, variance: Any, training: bool, momentum: float, eps: float
) -> tuple[torch.Tensor, ...]:
    """Batch norm that leaves the running statistics it is given as they are, and gives new ones behind its results."""
    mean, variance = mean.detach().clone(), variance.detach().clone()
    norm: Any = torch._native_batch_norm_legit  # type: ignore[attr-defined]
    return (*norm(x, weight, bias, mean, variance, training, momentum, eps), mean, variance)
