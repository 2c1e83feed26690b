"""Spaces of architectures of the zoo that tests share: to make one takes seconds."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

import graphopt.elastic
from benchmarks import zoo
from graphopt.elastic import Space


def inputs(name: str, rows: int) -> Any:
    """A batch of a case, without a target behind its inputs."""
    batch = zoo.case(name).batch(rows)
    return batch if isinstance(batch, dict) else batch[:-1]


@cache
def of_the_zoo(name: str) -> tuple[Space, Any]:
    """The space of a case in train mode, and the batch of three that it was made with. Tests leave the model as it is,
    but for its mode."""
    torch.manual_seed(0)
    batch = inputs(name, 3)
    return graphopt.elastic.space(zoo.case(name).build(), batch), batch
