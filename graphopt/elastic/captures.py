"""`Captures`: the graphs of a model for a space, with what a model may need before it can be captured."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from graphopt.elastic.choice import Choice
from graphopt.elastic.layers import Layers
from graphopt.elastic.own_backward import same_buffers, same_gradients
from graphopt.elastic.supergraph import Supergraph
from graphopt.errors import ElasticError
from graphopt.graph.batch import call_model, normalise
from graphopt.graph.capture import Captured
from graphopt.graph.forward import capture_forward_call
from graphopt.graph.step_module import UnsettledBuffer
from graphopt.graph.tracing import FreeSizes
from graphopt.graph.training_graph import TrainingGraph


class Captures:
    """Captures a model, in the state that it is in.

    Args:
        model: is left as it is, but for buffers that its first forward pass makes.
        layers: the choices of single layers.
        free: further sizes to keep free.
    """

    def __init__(self, model: nn.Module, layers: Layers, free: FreeSizes | None):
        self.model, self.layers, self.free = model, layers, free
        self._derivatives: set[str] = set()  # functions with a backward of their own that is the derivative

    def supergraph(self, batch: Any, loss: Any) -> Supergraph:
        """The supergraph for this batch.

        Raises CaptureError and BatchError as `graphopt.capture`, and ElasticError for a backward of the model's own
        that is not known to be the derivative."""
        captured = self._captured(batch, loss)
        own = captured.graph.signature.tree.get("own_backward") or ()
        if not self._derivatives.issuperset(own):
            whole = Supergraph(captured, self.model, self.layers).subnet(Choice({}))
            data = not any(p.is_meta for p in self.model.parameters())
            if loss is not None or not data or not same_gradients(whole, self.model, batch):
                raise ElasticError(
                    f"model: it runs through {', '.join(own)}, whose own backward is not known to be the derivative of "
                    "its forward; subnets would get other gradients"
                )
            self._derivatives.update(own)
        return Supergraph(_without_own(captured) if own else captured, self.model, self.layers)

    def _captured(self, batch: Any, loss: Any) -> Captured:
        try:
            return capture_forward_call(self.model, batch, loss=loss, free=self.free)
        except UnsettledBuffer:
            if loss is not None:
                raise
        with same_buffers(self.model), torch.no_grad(), torch.random.fork_rng():
            call_model(self.model, normalise(batch))  # its first forward pass makes buffers in the shape of the batch
        return capture_forward_call(self.model, batch, free=self.free)


def _without_own(captured: Captured) -> Captured:
    graph = captured.graph
    signature = replace(graph.signature, tree={**graph.signature.tree, "own_backward": []})
    return replace(captured, graph=TrainingGraph(graph.graph, signature, graph.constants))


def notes(supergraph: Supergraph) -> list[str]:
    """What there is to say about outputs: those that subnets do not have, and those that vary with them."""
    varying = set(supergraph.elastic_axes())
    return [
        f"the output {name} is a {kind}, which no graph holds: subnets give None in its place"
        for name, kind in supergraph.captured.left_out.items()
    ] + [
        f"the output {name}, which the model itself works on further, has the sizes that it has in the subnet"
        for name, node in supergraph.axes.hidden_states.items()
        if not varying.isdisjoint(axis for dim in supergraph.axes.of(node) for axis in dim.axes())
    ]
