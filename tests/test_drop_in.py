"""The drop-in module: called and differentiated like the model, by flat halves."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import graphopt


class TwoHeads(nn.Module):
    """Two outputs and a constant, batch norm, dropout, an optional argument."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.norm = nn.Linear(8, 16), nn.BatchNorm1d(16)
        self.first, self.second = nn.Linear(16, 4), nn.Linear(16, 5)
        self.label = "two heads"

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> dict[str, Any]:
        h = F.dropout(F.relu(self.norm(self.body(x))), 0.2, self.training)
        return {"first": self.first(h) * scale, "second": self.second(h), "count": 3}


def assert_like_model(model: nn.Module, calls: list[tuple[tuple, dict]], loss: Callable[[Any], torch.Tensor]) -> Any:
    """Outputs, gradients (None where the model's are None) and buffers equal the model's, bit for bit."""
    twin = copy.deepcopy(model)
    module = graphopt.optimize(model, (4, 8))
    for seed, (args, keywords) in enumerate(calls):
        losses = []
        for one in (module, twin):
            torch.manual_seed(seed)
            losses.append(loss(one(*args, **keywords)))
            losses[-1].backward()
        assert torch.equal(*losses)
        assert module.plan.chosen == "flat"
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None)
            assert p.grad is None or torch.equal(p.grad, q.grad)
        assert all(map(torch.equal, model.buffers(), twin.buffers()))
        model.zero_grad()
        twin.zero_grad()
    return module


def both(out: dict[str, Any]) -> torch.Tensor:
    return out["first"].sum() + out["second"].pow(2).sum() * out["count"]


def test_outputs_gradients_and_buffers_are_the_models() -> None:
    x, other = torch.randn(4, 8), torch.randn(6, 8)
    assert_like_model(TwoHeads(), [((x,), {}), ((other,), {}), ((x,), {"scale": 2.0}), ((), {"x": x})], both)


def test_output_that_is_not_differentiated_leaves_no_gradient() -> None:
    x = torch.randn(4, 8)
    module = assert_like_model(TwoHeads(), [((x,), {})] * 2, lambda out: out["first"].pow(2).sum())
    (compiled,) = next(iter(module._compiled.values()))
    products = {missing: lowered.code.count("mm_default") for missing, lowered in compiled._backward.items()}
    assert products[frozenset({"second"})] < compiled.backward(frozenset()).code.count("mm_default")


def test_two_forwards_before_two_backwards() -> None:
    model = TwoHeads()
    twin = copy.deepcopy(model)
    module = graphopt.optimize(model, (4, 8))
    x, y = torch.randn(4, 8), torch.randn(4, 8)
    for one in (module, twin):
        torch.manual_seed(0)
        (both(one(x)) + both(one(y))).backward()
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(model.parameters(), twin.parameters(), strict=True))


def test_names_attributes_and_mode_are_the_models() -> None:
    model = TwoHeads()
    module = graphopt.optimize(model, (4, 8))
    assert list(module.state_dict()) == list(model.state_dict())
    assert module.label == "two heads" and module.body is model.body
    module.eval()
    assert not model.training and not model.norm.training
    x = torch.randn(4, 8)
    assert torch.equal(module(x)["first"], model(x)["first"])
    with torch.no_grad():
        assert torch.equal(module(x)["second"], model(x)["second"])


def test_batch_gradient_and_parameter_hooks() -> None:
    model = TwoHeads().eval()
    twin = copy.deepcopy(model)
    module = graphopt.optimize(model, (4, 8))
    x = torch.randn(4, 8)
    gradients = []
    for one, owner in ((module, model), (twin, twin)):
        seen: list[torch.Tensor] = []
        owner.body.weight.register_hook(seen.append)
        leaf = x.clone().requires_grad_()
        both(one(leaf)).backward()
        gradients.append((leaf.grad, seen[0]))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_unfreezing_is_noticed() -> None:
    model = TwoHeads().eval()
    model.body.requires_grad_(False)
    module = graphopt.optimize(model, (4, 8))
    both(module(torch.randn(4, 8))).backward()
    assert model.body.weight.grad is None
    model.body.requires_grad_(True)
    both(module(torch.randn(4, 8))).backward()
    assert model.body.weight.grad is not None


def test_a_model_that_cannot_be_captured_runs_as_it_is() -> None:
    class Branches(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) if x.sum() > 0 else super().forward(-x)

    module = graphopt.optimize(Branches(3, 2), (4, 3))
    with pytest.warns(graphopt.GraphoptWarning, match="test_drop_in.py"):
        module(torch.ones(4, 3)).sum().backward()
    assert module.plan.chosen == "eager"
    assert module.weight.grad is not None
