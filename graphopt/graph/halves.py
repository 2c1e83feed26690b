"""A graph cut in two along the phases of a step: forward | backward, or forward and backward | update."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from torch import fx

from graphopt.errors import PassError
from graphopt.graph.training_graph import Input, InputKind, Output, OutputKind, Phase, TrainingGraph


@dataclass(frozen=True)
class Halves:
    """Two graphs that together are the one they were cut from. The first gives, behind its own outputs, the values that
    the second reads (`OutputKind.SAVED`); the second takes them (`InputKind.SAVED`, the same names) and inputs of the
    step."""

    first: TrainingGraph
    second: TrainingGraph

    def positions(self, inputs: Sequence[Input]) -> tuple[list[int], list[int]]:
        """Where the inputs of the first half, and those of the second that the first did not save, stand in ``inputs``:
        those of the graph that was cut."""
        position = {given: i for i, given in enumerate(inputs)}
        own = (i for i in self.second.inputs if i.kind is not InputKind.SAVED)
        return [position[i] for i in self.first.inputs], [position[i] for i in own]


def cut_backward(joint: TrainingGraph) -> Halves:
    """Forward and backward of a joint graph. Raises PassError for a graph with an update: it runs whole."""
    if any(n.meta.get("phase") == Phase.UPDATE for n in joint.nodes):
        raise PassError("a graph with an update has no backward half: cut it before the update is added")
    return _cut(joint, Phase.BACKWARD, {OutputKind.GRADIENT}, {InputKind.TANGENT})


def cut_update(whole: TrainingGraph) -> Halves:
    """Forward and backward of a whole step, and its update (with clipping)."""
    return _cut(whole, Phase.UPDATE, {OutputKind.PARAMETER, OutputKind.STATE}, {InputKind.STATE, InputKind.HYPER})


def _cut(
    graph: TrainingGraph, later: Phase, late_outputs: Collection[OutputKind], late_inputs: Collection[InputKind]
) -> Halves:
    nodes = [n for n in graph.nodes if n.op in ("call_function", "get_attr")]
    second = {n for n in nodes if _is_late(n, later)}
    results = [(o, r) for o, r in zip(graph.outputs, graph.results, strict=True) if r is not None]
    outputs_of_second = [(o, r) for o, r in results if o.kind in late_outputs or r in second]
    read = dict.fromkeys(o for n in nodes if n in second for o in n.all_input_nodes)
    read |= dict.fromkeys(r for _, r in outputs_of_second)
    saved = [n for n in read if n not in second and n.op != "placeholder"]
    pairs = list(zip(graph.inputs, graph.placeholders, strict=True))
    first_reads = {o for n in nodes if n not in second for o in n.all_input_nodes}
    first_reads |= {r for o, r in results if (o, r) not in outputs_of_second}
    return Halves(
        _part(
            graph,
            [(i, n) for i, n in pairs if n in first_reads or i.kind not in late_inputs],
            [n for n in nodes if n not in second],
            [(o, r) for o, r in results if (o, r) not in outputs_of_second]
            + [(Output(OutputKind.SAVED, n.name), n) for n in saved],
        ),
        _part(
            graph,
            [(Input(InputKind.SAVED, n.name), n) for n in saved]
            + [(i, n) for i, n in pairs if n in read or i.kind is InputKind.TANGENT],
            [n for n in nodes if n in second],
            outputs_of_second,
        ),
    )


def _is_late(node: fx.Node, later: Phase) -> bool:
    if node.op == "get_attr":  # a constant goes where it is read
        return all(user.meta.get("phase") == later for user in node.users)
    return node.meta.get("phase") == later


def _part(
    graph: TrainingGraph,
    inputs: list[tuple[Input, fx.Node]],
    nodes: list[fx.Node],
    outputs: list[tuple[Output, fx.Node]],
) -> TrainingGraph:
    part = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for _, node in inputs:
        copies[node] = part.placeholder(node.name)
        copies[node].meta = {**node.meta, "phase": Phase.INPUT}
    for node in nodes:
        copies[node] = part.node_copy(node, lambda n: copies[n])
    part.output(tuple(copies[r] for _, r in outputs)).meta["phase"] = Phase.OUTPUT
    signature = replace(graph.signature, inputs=tuple(i for i, _ in inputs), outputs=tuple(o for o, _ in outputs))
    used = {str(n.target) for n in nodes if n.op == "get_attr"}
    return TrainingGraph(part, signature, {k: v for k, v in graph.constants.items() if k in used})
