"""One full capture against fresh captures of freeze patterns."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from graphopt import capture
from graphopt.passes import specialise


def frozen_but(model: nn.Module, *trained: str) -> nn.Module:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    return model


def test_equal_graphs_give_the_specialised_one() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.LazyLinear(2))
    batch = (torch.randn(4, 3, 6, 6), torch.randint(2, (4,)))
    model(batch[0])
    full = capture(model, batch, loss=F.cross_entropy, gradients="all")
    frozen_but(model, "1.weight", "4.bias")
    result = specialise(full, ["1.weight", "4.bias"], lambda: capture(model, batch, loss=F.cross_entropy))
    assert result.changes and not result.refusals
    assert result.graph.flops() < full.flops()


class Folded(nn.Module):
    """A 3-D matmul with a parameter: torch folds it into one mm or expands it to bmm by the parameter's flag."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.weight = nn.Linear(4, 4), nn.Parameter(torch.randn(4, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.matmul(self.first(x).transpose(1, 2).contiguous().transpose(1, 2), self.weight)


def test_where_torch_chooses_another_kernel_the_fresh_capture_is_the_answer() -> None:
    model, batch = Folded(), (torch.randn(3, 2, 4), torch.randn(3, 2, 5))
    full = capture(model, batch, loss=F.mse_loss, gradients="all")
    trained = ["first.weight"]
    fresh = capture(frozen_but(model, *trained), batch, loss=F.mse_loss)
    result = specialise(full, trained, fresh)
    assert result.graph is fresh
    assert "other kernels" in result.refusals[-1].why
