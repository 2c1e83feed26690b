"""Two trainings of the same supernet from the same weights, one by autograd alone: `assert_same_training`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

import graphopt.elastic
from graphopt.elastic import ElasticStep, Space


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


class Layer(nn.Module):
    """``x + f(norm(x))``."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(4), nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Net(nn.Module):
    """A convolution with batch norm, two residual layers, dropout and a head."""

    def __init__(self, dropout: float):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)
        self.layers, self.dropout, self.head = nn.Sequential(Layer(), Layer()), nn.Dropout(dropout), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.norm(self.conv(x))).mean((2, 3))
        return self.head(self.dropout(self.layers(x)))


@cache
def spaces(dropout: float) -> tuple[Space, Space, torch.Tensor, torch.Tensor]:
    """Two spaces of equal models in float64, inputs of 7 rows, and targets; made once."""
    torch.manual_seed(0)
    x = torch.randn(7, 1, 4, 4).double()
    one = Net(dropout).double()
    first, second = (graphopt.elastic.space(copy.deepcopy(one), x) for _ in range(2))
    return first, second, x, torch.arange(7) % 3


def pair(
    optimizer: Callable[[Any], torch.optim.Optimizer], how: Mapping[str, Any], other: Mapping[str, Any],
    dropout: float = 0.3,
) -> tuple[Side, Side]:  # fmt: skip
    """Steps with the options ``how``, of the second one with those of ``other`` too, from the same weights."""
    first, second, x, y = spaces(dropout)
    second.model.load_state_dict(first.model.state_dict())
    sides = []
    for space, options in ((first, how), (second, {**how, **other})):
        space.model.train()
        step = ElasticStep(space, F.cross_entropy, optimizer(space.model.parameters()), **options)
        sides.append(Side(space, step, (x, y)))
    return sides[0], sides[1]


def everything(batch: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch as it is."""
    return batch


def assert_same_training(plain: Side, shared: Side, seed: int, mine: Callable[..., Any] = everything) -> None:
    """One step of both gives the same losses, parameters, buffers and random numbers behind it. ``mine``: what of a
    batch the second side is given."""
    x, y = plain.batch
    x = x + 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=x.dtype)
    after = []
    for side, batch in ((plain, (x, y)), (shared, mine((x, y)))):
        torch.manual_seed(seed)
        loss = side.step(*batch)
        after.append((loss, torch.stack([one for _, one in side.step.last]), torch.rand(1)))
    assert [c for c, _ in plain.step.last] == [c for c, _ in shared.step.last]
    for a, b in zip(*after, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-10, atol=1e-12)
    theirs = shared.space.model.state_dict()
    for name, value in plain.space.model.state_dict().items():
        torch.testing.assert_close(theirs[name], value, rtol=1e-10, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")
