"""Two trainings of the same supernet from the same weights, one by autograd alone: `assert_same_training`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch.nn import functional as F

import graphopt.elastic
from graphopt.elastic import ElasticStep, Space
from tests.elastic import supernets


@dataclass
class Side:
    """A supernet in float64, a step of it, and a batch."""

    space: Space
    step: ElasticStep
    batch: tuple[torch.Tensor, torch.Tensor]


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


def adamw(parameters: Any) -> torch.optim.Optimizer:
    # eps far above rounding errors, which are all that the gradient of a bias before a batch norm is
    return torch.optim.AdamW(parameters, lr=1e-2, eps=1e-4)


@cache
def _spaces(name: str) -> tuple[Space, Space, torch.Tensor, torch.Tensor]:
    """Two spaces of equal models in float64, made once."""
    space, x, y = getattr(supernets, name)()
    x = x.double()
    one, other = (copy.deepcopy(space.model).double().train() for _ in range(2))
    return graphopt.elastic.space(one, x), graphopt.elastic.space(other, x), x, y


def pair(
    name: str, optimizer: Callable[[Any], torch.optim.Optimizer], how: Mapping[str, Any], other: Mapping[str, Any]
) -> tuple[Side, Side]:
    """Steps with the options ``how``, of the second one with those of ``other`` too, from the same weights."""
    first, second, x, y = _spaces(name)
    second.model.load_state_dict(first.model.state_dict())
    sides = []
    for space, options in ((first, how), (second, {**how, **other})):
        space.model.train()
        step = ElasticStep(space, F.cross_entropy, optimizer(space.model.parameters()), **options)
        sides.append(Side(space, step, (x, y)))
    return sides[0], sides[1]


def assert_same_training(plain: Side, shared: Side, seed: int) -> None:
    """One step of both gives the same loss, parameters, buffers and random numbers behind it."""
    x, y = plain.batch
    x = x + 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=x.dtype)
    after = []
    for side in (plain, shared):
        torch.manual_seed(seed)
        after.append((side.step(x, y), torch.rand(1)))
    assert [c for c, _ in plain.step.last] == [c for c, _ in shared.step.last]
    for a, b in zip(*after, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-10, atol=1e-12)
    theirs = shared.space.model.state_dict()
    for name, value in plain.space.model.state_dict().items():
        torch.testing.assert_close(theirs[name], value, rtol=1e-10, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")
