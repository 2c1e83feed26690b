"""Graphs divided along the batch, run by processes on parts of it, against the graphs as they were."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import graphopt
from graphopt.graph.training_graph import TrainingGraph
from tests.passes.shards import Team, assert_equals_whole, team

EVEN_AND_ODD = [(4, 3), (4, 2, 1)]


@pytest.fixture(scope="module")
def three() -> Iterator[Team]:
    with team(3) as started:
        yield started


def captured(model: nn.Module, batch: tuple[torch.Tensor, ...], loss: Any = F.cross_entropy, **options: Any) -> Any:
    """The graph of a step in float64, and the values of its inputs."""
    model = model.double()
    graph = graphopt.capture(model, batch, loss=loss, **options)
    return graph, values_of(graph, model, batch)


def values_of(graph: TrainingGraph, model: nn.Module, batch: tuple[torch.Tensor, ...]) -> list[Any]:
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    given = {str(i): tensor for i, tensor in enumerate(batch)}
    return [(given if i.kind == "batch" else state)[i.name].detach().clone() for i in graph.inputs]


def rows(*sizes: int) -> torch.Tensor:
    return torch.randn(*sizes, dtype=torch.float64)


@pytest.mark.parametrize("sizes", EVEN_AND_ODD)
@pytest.mark.parametrize("ignored", [(), (0, 5), (4, 5, 6)])
def test_mlp_with_batch_norm_dropout_and_ignored_targets(three: Team, sizes: Any, ignored: Any) -> None:
    model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.4), nn.Linear(8, 3))
    target = torch.randint(3, (7,))
    target[list(ignored)] = -100
    graph, values = captured(model, (rows(7, 5), target))
    assert_equals_whole(three, graph, values, sizes)
