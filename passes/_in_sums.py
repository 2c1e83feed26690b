"""A joint graph written so that parts of it add up: means over the batch as sums, dropouts as products with masks."""

from __future__ import annotations

from operator import getitem

import torch
from torch import fx

from graphopt.errors import PassError
from graphopt.graph.op_rules import is_random
from graphopt.graph.training_graph import TrainingGraph
from graphopt.passes._axis_flow import AxisFlow
from graphopt.passes._places import Numbers
from graphopt.passes._rewriting import remove_dead
from graphopt.passes._shared_draws import dropout_apart
from graphopt.passes._whole_sums import WholeSums

aten = torch.ops.aten


def in_sums(graph: TrainingGraph) -> tuple[TrainingGraph, str]:
    """The graph written so, and why its batch cannot be divided: its means are left as they are then."""
    if "batch" not in graph.symbols.symbols:
        return _written(graph, means=False), ""
    try:
        return _written(graph, means=True), ""
    except PassError as error:
        return _written(graph, means=False), str(error)


def _written(graph: TrainingGraph, *, means: bool) -> TrainingGraph:
    draft = graph.draft()
    numbers = Numbers(draft)
    changed = False
    if means:
        sums = WholeSums(draft, AxisFlow.of_batch(graph), numbers)
        sums.rewrite()
        changed = bool(sums.done)
    for node in graph.nodes:
        if node.target is aten.native_dropout.default and is_random(node) and _reads_first(node):
            dropout_apart(draft, numbers, draft.node(node))
            changed = True
    if not changed:
        return graph
    remove_dead(draft)
    return draft.finish()


def _reads_first(node: fx.Node) -> bool:
    """Whether more is read of a dropout than its mask: else it is written apart already."""
    return any(user.target is getitem and user.args[1] == 0 for user in node.users)
