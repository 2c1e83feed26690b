"""Which outputs of a model are hidden states that it returns beside its results."""

from __future__ import annotations

from collections.abc import Set

import torch
from torch import fx

from graphopt.graph.ancestry import ancestors
from graphopt.graph.op_rules.queries import rule
from graphopt.graph.training_graph import OutputKind, Phase, TrainingGraph


def hidden_states(graph: TrainingGraph, activations: Set[fx.Node]) -> dict[str, fx.Node]:
    """The outputs that the model itself works on further, by name: the encoder's states beside the decoder's logits,
    the keys and values of each layer.

    Between a hidden state and another output stand layers with weights and products of two activations (attention).
    What only a layer or a sum makes another output of is a result like that one (the states below a pooler).

    Args:
        graph: forward or joint.
        activations: the nodes that depend on the batch.
    """
    pairs = zip(graph.outputs, graph.results, strict=True)
    outputs = {o.name: node for o, node in pairs if o.kind is OutputKind.OUTPUT and node is not None}
    if len(set(outputs.values())) < 2:
        return {}
    every = set(outputs.values())
    return {name: node for name, node in outputs.items() if _is_hidden(node, every - {node}, activations)}


def _is_hidden(node: fx.Node, others: set[fx.Node], activations: Set[fx.Node]) -> bool:
    while node.target in _COPIES:  # an output that is a view of what the model reads is a copy of it
        node = node.all_input_nodes[0]
    behind: set[fx.Node] = set()
    waiting = [node]
    while waiting:
        for user in waiting.pop().users:
            if user not in behind and user.meta.get("phase") == Phase.FORWARD:
                behind.add(user)
                waiting.append(user)
    on_the_way = ancestors(behind & others, behind.__contains__)
    layers = [n for n in on_the_way if (known := rule(n)) is not None and known.family in _LAYERS]
    products = [n for n in layers if sum(source in activations for source in n.all_input_nodes) > 1]
    return bool(products) and len(products) < len(layers)


_COPIES = (torch.ops.aten.clone.default, torch.ops.aten.detach.default, torch.ops.aten.alias.default)
_LAYERS = {"contraction", "convolution", "attention", "recurrent"}
