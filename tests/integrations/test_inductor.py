"""The backend with Inductor behind the passes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from graphopt.integrations import recording
from tests.integrations.twins import bytes_saved, compiled, total
from tests.training import Net


def frozen_body() -> nn.Module:
    """A convolution that trains before frozen ones, batch norm in eval mode, dropout."""
    body = [nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4).eval(), nn.ReLU()) for _ in range(3)]
    model = nn.Sequential(nn.Conv2d(4, 4, 1), *(part.requires_grad_(False) for part in body), nn.Dropout(0.2))
    for part in body:
        part.eval()
    return model


@pytest.mark.slow
@pytest.mark.parametrize("make", [frozen_body, lambda: Net(0.2)], ids=["frozen", "batch norm"])
def test_trains_like_eager_up_to_rounding(make: object) -> None:
    torch._dynamo.reset()
    model = make()
    twin = copy.deepcopy(model)
    ours = compiled(model, options={"lower": "inductor"})
    x = torch.randn(4, 4 if isinstance(model, nn.Sequential) else 2, 6, 6)
    with recording() as pieces:
        for seed in range(2):
            for call in (ours, twin):
                torch.manual_seed(seed)
                total(call(x)).backward()
    (piece,) = pieces
    assert piece.result.changed and not piece.dropped
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        if theirs.grad is not None:
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-5)
    for mine, theirs in zip(model.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs)
