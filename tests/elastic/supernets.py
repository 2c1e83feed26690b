"""Small supernets that tests share; made once a process, and given back with the weights they had."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import nn
from torch.nn import functional as F

import graphopt.elastic
from graphopt.elastic import Space


class Block(nn.Module):
    """``relu(x + norm(f(x)))`` on images."""

    def __init__(self, channels: int, hidden: int):
        super().__init__()
        self.first, self.middle = nn.Conv2d(channels, hidden, 3, padding=1, bias=False), nn.BatchNorm2d(hidden)
        self.second, self.last = nn.Conv2d(hidden, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(x + self.last(self.second(F.relu(self.middle(self.first(x))))))


class Attention(nn.Module):
    """A transformer layer with fused queries, keys and values."""

    def __init__(self, width: int, heads: int, hidden: int):
        super().__init__()
        self.heads, self.size = heads, width // heads
        self.norm1, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm2, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, self.size)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


@cache
def convolutional() -> tuple[Space, torch.Tensor, torch.Tensor]:
    """Three residual blocks with batch norm, on images of 6 x 6; and a batch of 8 with 5 classes."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Sequential(*(Block(8, 8) for _ in range(3))),
        nn.Dropout(0.3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5),
    )  # fmt: skip
    x, y = torch.randn(8, 1, 6, 6), torch.randint(5, (8,))
    return graphopt.elastic.space(net, x), x, y


@cache
def attentive() -> tuple[Space, torch.Tensor, torch.Tensor]:
    """Two transformer layers of width 16 with 4 heads, on sequences of 5; and a batch of 6 with 3 classes."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(4, 16), nn.Sequential(Attention(16, 4, 24), Attention(16, 4, 24)), nn.Flatten(), nn.Linear(80, 3)
    )
    x, y = torch.randn(6, 5, 4), torch.randint(3, (6,))
    return graphopt.elastic.space(net, x), x, y


BOTH = (convolutional, attentive)


@contextmanager
def untouched(space: Space) -> Iterator[None]:
    """The space's model gets back its weights, gradients and mode at the end."""
    state = {name: value.clone() for name, value in space.model.state_dict().items()}
    training = space.model.training
    try:
        yield
    finally:
        space.model.load_state_dict(state)
        space.model.train(training)
        space.model.zero_grad(set_to_none=True)
