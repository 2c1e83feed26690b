"""A joint graph cut into a forward half and a backward half."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from graphopt.errors import PassError
from graphopt.graph.training_graph import Input, InputKind, Output, OutputKind, Phase, TrainingGraph


@dataclass(frozen=True)
class Halves:
    """Two graphs that together are the joint one. The forward half gives, behind outputs and new buffers, the values
    that backward reads (`OutputKind.SAVED`); the backward half takes them (`InputKind.SAVED`, same names), inputs of
    the step and the tangents, and gives the gradients."""

    forward: TrainingGraph
    backward: TrainingGraph


def cut(graph: TrainingGraph) -> Halves:
    """Cut a joint graph at its border. Raises PassError for a graph with an update: it runs whole."""
    if any(n.meta.get("phase") == Phase.UPDATE for n in graph.nodes):
        raise PassError("a graph with an update has no halves: cut it before the update is added")
    in_backward = [n for n in graph.nodes if n.op in ("call_function", "get_attr") and _is_backward(n, graph)]
    read = list(dict.fromkeys(o for n in in_backward for o in n.all_input_nodes))
    results = dict(zip(graph.outputs, graph.results, strict=True))
    gradients = {o: r for o, r in results.items() if o.kind is OutputKind.GRADIENT and r is not None}
    read += [r for r in gradients.values() if r not in read]
    saved = [n for n in read if n.op == "call_function" and n.meta.get("phase") == Phase.FORWARD]
    return Halves(_forward(graph, saved), _backward(graph, in_backward, read, saved, gradients))


def _is_backward(node: fx.Node, graph: TrainingGraph) -> bool:
    if node.op == "get_attr":
        return any(user.meta.get("phase") == Phase.BACKWARD for user in node.users)
    return node.meta.get("phase") == Phase.BACKWARD


def _forward(graph: TrainingGraph, saved: list[fx.Node]) -> TrainingGraph:
    half = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    inputs = []
    for input_, node in zip(graph.inputs, graph.placeholders, strict=True):
        if input_.kind is not InputKind.TANGENT:
            copies[node] = half.node_copy(node)
            inputs.append(input_)
    for node in graph.nodes:
        if node.op == "get_attr" or (node.op == "call_function" and node.meta.get("phase") == Phase.FORWARD):
            copies[node] = half.node_copy(node, lambda n: copies[n])
    kept = [(o, r) for o, r in zip(graph.outputs, graph.results, strict=True) if o.kind is not OutputKind.GRADIENT]
    outputs = [o for o, _ in kept] + [Output(OutputKind.SAVED, n.name) for n in saved]
    results: list[Any] = [copies[r] if r is not None else None for _, r in kept] + [copies[n] for n in saved]
    half.output(tuple(results)).meta["phase"] = Phase.OUTPUT
    signature = replace(graph.signature, inputs=tuple(inputs), outputs=tuple(outputs))
    return TrainingGraph(half, signature, graph.constants)


def _backward(
    graph: TrainingGraph,
    nodes: list[fx.Node],
    read: list[fx.Node],
    saved: list[fx.Node],
    gradients: dict[Output, fx.Node],
) -> TrainingGraph:
    half = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    inputs = []
    for node in saved:
        copies[node] = half.placeholder(node.name)
        copies[node].meta = {**node.meta, "phase": Phase.INPUT}
        inputs.append(Input(InputKind.SAVED, node.name))
    for input_, node in zip(graph.inputs, graph.placeholders, strict=True):
        if node in read or input_.kind is InputKind.TANGENT:
            copies[node] = half.node_copy(node)
            inputs.append(input_)
    for node in nodes:
        copies[node] = half.node_copy(node, lambda n: copies[n])
    half.output(tuple(copies[r] for r in gradients.values())).meta["phase"] = Phase.OUTPUT
    signature = replace(graph.signature, inputs=tuple(inputs), outputs=tuple(gradients))
    return TrainingGraph(half, signature, graph.constants)
