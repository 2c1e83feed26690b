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
    """The graph with means over the batch as sums and dropouts as products, and why the batch cannot be divided."""
    why = ""
    while True:
        draft = graph.draft()
        numbers = Numbers(draft)
        done = False
        if "batch" in graph.symbols.symbols and not why:
            try:
                means = WholeSums(draft, AxisFlow.of_batch(graph), numbers)
                means.rewrite()
            except PassError as error:
                why = str(error)
                continue
            done = bool(means.done)
        for node in graph.nodes:
            if node.target is aten.native_dropout.default and is_random(node) and _reads_first(node):
                dropout_apart(draft, numbers, draft.node(node))
                done = True
        if not done:
            return graph, why
        remove_dead(draft)
        return draft.finish(), why


def _reads_first(node: fx.Node) -> bool:
    return any(user.target is getitem and user.args[1] == 0 for user in node.users)
