"""Capture follows eager's choice of kernels, and leaves alone what a model does at its first call."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import graphopt
from graphopt import capture
from graphopt.verify import run_graph


def weighted(out: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return (out * weights).sum()


class Upsampled(nn.Module):
    def __init__(self, mode: str, dimensions: int) -> None:
        super().__init__()
        self.mode, self.conv = mode, (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dimensions - 1](2, 3, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = F.interpolate(self.conv(x), scale_factor=2.0, mode=self.mode)
        return F.interpolate(h, size=[5] * (x.dim() - 2), mode=self.mode)


@pytest.mark.parametrize(
    ("mode", "dimensions"),
    [("nearest", 1), ("linear", 1), ("nearest", 2), ("nearest-exact", 2), ("bilinear", 2), ("bicubic", 2)]
    + [("nearest", 3), ("trilinear", 3)],
)
@pytest.mark.parametrize("channels_last", [False, True])
def test_upsampling_takes_eagers_backward(mode: str, dimensions: int, channels_last: bool) -> None:
    model, x = Upsampled(mode, dimensions), torch.randn(3, 2, *[4] * dimensions)
    if channels_last and dimensions == 2:
        x = x.to(memory_format=torch.channels_last)
    target = torch.randn_like(model(x))
    graph = capture(model, (x, target), loss=weighted)
    assert graph.symbols.symbols, "the batch size should stay free"
    assert any("upsample" in str(n.target) and "backward" in str(n.target) for n in graph.nodes)
    ours = run_graph(graph, model, (x, target)).values
    weighted(model(x), target).backward()
    assert torch.equal(ours["gradient conv.weight"], model.conv.weight.grad)


class Resizes(nn.Module):
    """Replaces a buffer by one of the batch's width at its first call."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("ramp", torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.ramp.shape[0] != x.shape[1]:
            self.ramp = torch.arange(x.shape[1], dtype=x.dtype)
        return self.linear(x) * self.ramp


def test_a_buffer_of_another_shape_is_made_by_eager_and_then_captured() -> None:
    model = Resizes()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = graphopt.optimize(model, (3, 4), loss=F.mse_loss, optimizer=optimizer, schemes="flat")
    batch = (torch.randn(3, 4), torch.randn(3, 4))
    with pytest.warns(graphopt.GraphoptWarning, match="replaces its buffer 'ramp'"):
        step(*batch)
    assert step.plan.chosen == "eager"
    step(*batch)
    assert step.plan.chosen == "flat"


class HooksLate(nn.Module):
    """Adds a forward hook at its first call, as models of transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> Any:
        if not hasattr(self, "seen"):
            self.seen: list[torch.Tensor] = []
            self.linear.register_forward_hook(lambda module, args, output: self.seen.append(output))
        out = self.linear(x)
        assert len(self.seen) == 1
        return out + self.seen.pop()


def test_hooks_that_a_trace_adds_are_taken_back() -> None:
    model = HooksLate()
    batch = (torch.randn(3, 4), torch.randn(3, 4))
    twin = copy.deepcopy(model)
    graph = capture(model, batch, loss=F.mse_loss)
    assert not model.linear._forward_hooks and not hasattr(model, "seen")
    F.mse_loss(twin(batch[0]), batch[1]).backward()
    assert torch.equal(run_graph(graph, model, batch).values["gradient linear.weight"], twin.linear.weight.grad)
