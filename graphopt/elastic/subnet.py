"""`Subnet`: the forward graph of one choice, on slices of the shared tensors, and how it runs."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Mapping, Sequence
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

Shared = Mapping[str, torch.Tensor]
"""Parameters and buffers by name."""


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

    def tensors(self, shared: Shared | None = None) -> dict[str, torch.Tensor]:
        """Its parameters and buffers, taken from the shared ones so that gradients land there. Those that nothing in
        it reads are not among them."""
        shared = self.shared if shared is None else shared
        found = {}
        for given, node in zip(self.graph.inputs, self.graph.placeholders, strict=True):
            if given.kind is InputKind.BATCH or not node.users:
                continue
            part = self.slices.get(given.name)
            found[given.name] = part.take(shared[given.name]) if part is not None else shared[given.name]
        return found

    @property
    def shared(self) -> Shared:
        """The tensors that it takes its own from: of the model, and of transformations."""
        own: dict[str, torch.Tensor] = {**self.own}
        return ChainMap(own, self.origin.tensors)

    def __call__(
        self, batch: Sequence[torch.Tensor], shared: Shared | None = None, *, norm: BatchNorm | None = None
    ) -> Any:
        """The output on the tensors of a batch, nested as the model's own output. Autograd differentiates it into the
        shared parameters; new values of buffers are written into their slices of the shared buffers.

        Args:
            batch: the tensors of a batch, in the order of its layout.
            shared: other tensors in the place of those of `shared`, by the same names: what stands for them while a
                step is captured.
            norm: see `for_autograd`.
        """
        tensors, rest, lowered = self.tensors(shared), iter(batch), self._lowered(norm or batch_norm)
        given = [next(rest) if i.kind is InputKind.BATCH else tensors.get(i.name) for i in self.graph.inputs]
        return self.nested(lowered, lowered.run(*given), self.slices.get, shared)

    def nested(
        self,
        lowered: Lowered,
        results: Sequence[Any],
        part_of: Callable[[str], Slice | None],
        shared: Shared | None = None,
    ) -> Any:
        """Results of lowered code as the model's output; new values of buffers are written into their parts of the
        shared ones, which ``part_of`` tells."""
        leaves: list[Any] = []
        buffers = self.origin.tensors if shared is None else shared
        with torch.no_grad():
            for output, value in zip(lowered.outputs, results, strict=True):
                if output.kind is not OutputKind.BUFFER:
                    leaves.append(value)
                elif (part := part_of(output.name)) is not None:
                    part.put(buffers[output.name], value)
                else:
                    buffers[output.name].copy_(value)
        captured = self.origin.captured
        if captured.output_spec is None:
            return leaves[0]
        for position, constant in captured.output_constants:
            leaves.insert(position, constant)
        return pytree.tree_unflatten(leaves, captured.output_spec)

    def _lowered(self, norm: BatchNorm) -> Lowered:
        key = f"lowered with {norm.__name__}"
        if key not in self.derived:
            self.derived[key] = lower(for_autograd(self.graph, norm), in_place=False)
        found: Lowered = self.derived[key]
        return found


_BATCH_NORM = torch.ops.aten._native_batch_norm_legit_functional.default


BatchNorm = Callable[..., tuple[torch.Tensor, ...]]
"""A function with the arguments and results of `batch_norm`."""


def batch_norm(
    x: torch.Tensor, weight: Any, bias: Any, mean: Any, variance: Any, training: bool, momentum: float, eps: float
) -> tuple[torch.Tensor, ...]:
    """Batch norm that leaves the running statistics it is given as they are, and gives new ones behind its results."""
    mean, variance = mean.detach().clone(), variance.detach().clone()
    norm: Any = torch._native_batch_norm_legit  # type: ignore[attr-defined]
    return (*norm(x, weight, bias, mean, variance, training, momentum, eps), mean, variance)


def for_autograd(graph: TrainingGraph, norm: BatchNorm = batch_norm) -> TrainingGraph:
    """The graph with operators that autograd knows in place of those it does not: ``norm`` for batch norms."""
    norms = graph.graph.find_nodes(op="call_function", target=_BATCH_NORM)
    if not norms:
        return graph
    draft = Draft(graph)
    for node in norms:
        draft.node(node).target = norm
    return draft.finish()
