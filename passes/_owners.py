"""Which processor owns which parameter: gradients whose updates read each other stay together."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from operator import getitem
from typing import Any

import torch
from torch import fx

from graphopt.errors import PassError
from graphopt.graph.sizes import expression
from graphopt.graph.training_graph import InputKind, OutputKind, Phase, TrainingGraph
from graphopt.passes._prune_lists import is_list_operator

Reads = frozenset[fx.Node]
"""The gradients that a value of the update is made of."""

OWNED = (OutputKind.PARAMETER, OutputKind.STATE, OutputKind.GRADIENT)
"""Kinds of outputs that belong to a parameter."""


@dataclass(frozen=True)
class Owners:
    """The owner of each parameter, by name, and of each gradient."""

    parameters: dict[str, int]
    gradients: dict[fx.Node, int]


def owners(graph: TrainingGraph, sums: Collection[fx.Node], processors: int) -> Owners:
    """The owners of the parameters that the step updates, or whose gradients it gives.

    Whole parameters, the largest first, each to the processor that has the fewest bytes of parameters and state yet.
    Parameters stay together where an update reads gradients of both, or one gradient serves both. ``sums``: the
    gradients to divide, nodes of ``graph``. Raises PassError with the reason where all parameters hang together.
    """
    import networkx as nx  # a tenth of a second, which every import of graphopt would pay

    parameters = graph.input_nodes(InputKind.PARAMETER)
    links, mixed = nx.Graph(), None
    reads = _reads(graph, frozenset(sums))
    for node, read in reads.items():
        for together in _leaves(read):
            if len(together) > 1 and mixed is None and node.meta.get("phase") == Phase.UPDATE:
                mixed = node
            nx.add_path(links, together)
    sizes: dict[str, int] = {}
    for output, result in zip(graph.outputs, graph.results, strict=True):
        if result is None or output.kind not in OWNED or output.name not in parameters:
            continue
        sizes[output.name] = sizes.get(output.name, 0) + _bytes(result)
        links.add_node(output.name)
        for together in _leaves(reads.get(result, frozenset())):
            nx.add_path(links, [output.name, *together])
    order = {name: i for i, name in enumerate(parameters)}
    names = {min(group & order.keys(), key=order.__getitem__): group for group in nx.connected_components(links)
             if group & order.keys()}  # fmt: skip
    if len(names) == 1 < len(sizes):
        where = f"{mixed.name} ({mixed.target}) reads gradients of several" if mixed is not None else "they share one"
        raise PassError(f"the update of all parameters is one: {where}; each must be updated by itself to be divided")
    weights = {first: sum(sizes.get(name, 0) for name in group) for first, group in names.items()}
    loads, found = [0] * processors, Owners({}, {})
    for first in sorted(names, key=lambda first: (-weights[first], order[first])):
        owner = loads.index(min(loads))
        loads[owner] += weights[first]
        found.parameters.update({name: owner for name in names[first] if name in order})
        found.gradients.update({node: owner for node in names[first] if node in sums})
    return found


def _reads(graph: TrainingGraph, sums: Reads) -> dict[fx.Node, Any]:
    """For each operator that depends on ``sums``: those it reads; a list (of lists) of them where its value is one."""
    found: dict[fx.Node, Any] = {node: frozenset([node]) for node in sums}
    for node in graph.nodes:
        if node.op != "call_function" or node in sums:
            continue
        if node.target is getitem and isinstance(found.get(node.args[0]), list):  # type: ignore[arg-type]
            found[node] = found[node.args[0]][node.args[1]]  # type: ignore[index]
        elif any(operand in found for operand in node.all_input_nodes):
            found[node] = _of_lists(node, found) if is_list_operator(node) else _union(node.all_input_nodes, found)
    return found


def _of_lists(node: fx.Node, found: dict[fx.Node, Any]) -> list[Any]:
    """Operators on lists treat element k of every list apart from the others."""
    length = len(node.args[0])  # type: ignore[arg-type]
    given = [*node.args, *node.kwargs.values()]
    lists = [a for a in given if isinstance(a, (list, tuple)) and len(a) == length]
    rest = _union([a for a in given if isinstance(a, fx.Node)], found)
    elements = [rest | _union([a[k] for a in lists if isinstance(a[k], fx.Node)], found) for k in range(length)]
    several = len(node.target._schema.returns)  # type: ignore[union-attr]
    return elements if several == 1 else [elements] * several


def _union(nodes: Sequence[fx.Node], found: dict[fx.Node, Any]) -> Reads:
    return frozenset().union(*(leaf for node in nodes for leaf in _leaves(found.get(node, frozenset()))))


def _leaves(found: Any) -> Iterator[Reads]:
    if isinstance(found, list):
        for each in found:
            yield from _leaves(each)
    elif found:
        yield found


def _bytes(node: fx.Node) -> int:
    value = node.meta["val"]
    if not isinstance(value, torch.Tensor):
        return 0
    size = expression(value.numel())
    return size * value.element_size() if isinstance(size, int) else 0
