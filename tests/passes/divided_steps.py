"""Whole steps divided over processors, for tests of the passes that synchronise them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

import graphopt
from graphopt.graph.assemble import with_update
from graphopt.graph.training_graph import TrainingGraph
from graphopt.passes import CommonSubexpressions, GradientLiveness, Pipeline, ShardAxes


def whole_step(
    model: nn.Module, optimizer: Callable[..., Any] = torch.optim.SGD, *, keep: Iterable[str] = (), **options: Any
) -> TrainingGraph:
    """A step of ``model`` (rows of 6 to 5 classes) with its update; ``keep``: gradients that it gives too."""
    clip = options.pop("clip", None)
    joint = graphopt.capture(model, (torch.randn(4, 6), torch.randint(5, (4,))), loss=F.cross_entropy)
    whole = with_update(joint, model, [optimizer(model.parameters(), lr=0.1, **options)], clip=clip).graph
    return Pipeline([GradientLiveness(keep=list(keep)), CommonSubexpressions()])(whole).graph


def sharded(graph: TrainingGraph, processors: int, **options: Any) -> TrainingGraph:
    """``graph`` divided; it must not be refused."""
    result = ShardAxes(processors, **options)(graph)
    assert not result.refusals, result.refusals
    return result.graph


def calls(graph: TrainingGraph, name: str) -> list[fx.Node]:
    """The collectives ``name`` of a graph, in order."""
    target = getattr(torch.ops._c10d_functional, name).default
    return [node for node in graph.nodes if node.target is target]
