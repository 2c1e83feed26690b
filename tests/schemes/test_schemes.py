"""Schemes beside flat and eager: Inductor, CUDA graphs; candidates that cannot run."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import graphopt
from graphopt.schemes import Inductor
from tests.schemes.trials import OPTIMIZERS, assert_trains_like_eager, mlp, rows


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.2), nn.Flatten(), nn.LazyLinear(5)
    )


def steps(
    device: str, scheme: str, sizes: tuple[int, ...] = (4, 4, 6)
) -> tuple[list[float], list[float], graphopt.Plan]:
    """Losses of a scheme and of eager, from the same start and random state, with a changing learning rate."""
    model = small().to(device)
    model(torch.randn(2, 3, 8, 8, device=device))
    twin = copy.deepcopy(model)
    losses: list[list[float]] = []
    for one, name in ((model, scheme), (twin, "eager")):
        optimizer = torch.optim.SGD(one.parameters(), lr=0.1, momentum=0.9)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
        step = graphopt.optimize(one, (4, 3, 8, 8), loss=F.cross_entropy, optimizer=optimizer, schemes=[name])
        torch.manual_seed(1)
        losses.append([])
        for size in sizes:
            x, y = torch.randn(size, 3, 8, 8, device=device), torch.randint(5, (size,), device=device)
            losses[-1].append(float(step(x, y)))
            schedule.step()
        if name == scheme:
            plan = step.plan
    return losses[0], losses[1], plan


@pytest.mark.slow
def test_inductor_trains_like_eager() -> None:
    ours, eager, plan = steps("cpu", "inductor")
    assert plan.chosen == "inductor"
    assert ours == pytest.approx(eager, rel=1e-4)


@pytest.mark.cuda
def test_cuda_graphs_train_like_eager() -> None:
    ours, eager, plan = steps("cuda", "cuda_graphs")
    assert plan.chosen == "cuda_graphs"
    assert ours == pytest.approx(eager, rel=1e-4)


def test_cuda_graphs_say_why_not_on_the_cpu() -> None:
    _, _, plan = steps("cpu", "cuda_graphs", sizes=(4,))
    assert "not on a CUDA device" in (plan.candidate("cuda_graphs").why_not or "")
    assert plan.chosen == "eager"


def test_a_compiler_that_refuses_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **keywords: object) -> object:
        def run(*inputs: object) -> object:
            raise torch._dynamo.exc.Unsupported("no kernel for this")

        return run

    monkeypatch.setattr(torch, "compile", refuse)
    model = small()
    model(torch.randn(2, 3, 8, 8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = graphopt.optimize(
        model, (4, 3, 8, 8), loss=F.cross_entropy, optimizer=optimizer, schemes=["inductor", "flat"]
    )
    x, y = torch.randn(4, 3, 8, 8), torch.randint(5, (4,))
    with pytest.warns(graphopt.GraphoptWarning, match="no kernel for this"):
        step(x, y)
    assert step.plan.chosen == "flat"
    assert "cannot compile" in (step.plan.candidate("inductor").why_not or "")


@pytest.mark.slow
def test_inductor_with_options_trains_like_eager() -> None:
    scheme = Inductor(fused=True, threads=1)
    assert_trains_like_eager(scheme, mlp(), OPTIMIZERS["adamw"], [rows() for _ in range(50)])
