"""Low precision: forward and loss under autocast, what stays in float32, and only where it was asked for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

import graphopt
from graphopt import GraphoptError
from graphopt.schemes import Eager, Flat, Scheme
from tests.schemes.trials import OPTIMIZERS, Images, assert_trains_like_eager, images, mlp, rows

BOTH = [Flat(precision="bf16"), Eager(precision="bf16")]
by_name = lambda scheme: scheme.name


@pytest.mark.parametrize("scheme", BOTH, ids=by_name)
@pytest.mark.parametrize("make, draw", [(Images, images), (mlp, rows)], ids=["images", "mlp"])
def test_fifty_steps_are_those_of_autocast(scheme: Scheme, make: Any, draw: Any) -> None:
    assert_trains_like_eager(scheme, make(), OPTIMIZERS["adamw"], [draw() for _ in range(50)], low=True)


@pytest.mark.parametrize("scheme", BOTH, ids=by_name)
def test_bits_are_those_of_autocast(scheme: Scheme) -> None:
    assert_trains_like_eager(scheme, mlp(), OPTIMIZERS["adam"], [rows() for _ in range(5)], low=True, bits=True)


@pytest.mark.parametrize("scheme", BOTH, ids=by_name)
def test_what_stays_is_in_float32_and_autocast_ends(scheme: Scheme) -> None:
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters())
    step = graphopt.optimize(model, rows(), loss=F.cross_entropy, optimizer=optimizer, schemes=[scheme])
    step(*rows())
    assert step.plan.chosen == scheme.name
    assert not torch.is_autocast_enabled("cpu")
    values = [*model.parameters(), *(v for s in optimizer.state.values() for v in s.values())]
    assert {v.dtype for v in values} == {torch.float32}


def test_the_graph_multiplies_in_bf16() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = graphopt.optimize(model, rows(), loss=F.cross_entropy, optimizer=optimizer, schemes=[Flat(precision="bf16")])
    step(*rows())
    ((captured,),) = (s.steps for s in step._situations.values())
    (variant,) = captured.variants.values()
    products = (torch.ops.aten.addmm.default, torch.ops.aten.mm.default)
    dtypes = [{n.meta["val"].dtype for n in g.nodes if n.target in products} for g in (captured.graph, variant.graph)]
    assert dtypes == [{torch.float32}, {torch.bfloat16}]


@pytest.mark.parametrize("scheme", BOTH, ids=by_name)
def test_autocast_of_the_users_own_comes_first(scheme: Scheme) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = graphopt.optimize(model, rows(), loss=F.cross_entropy, optimizer=optimizer, schemes=[scheme, Eager()])
    with torch.autocast("cpu", dtype=torch.float16):
        step(*rows())
    assert "autocast to float16 is active" in (step.plan.candidate(scheme.name).why_not or "")


def test_other_names_are_refused() -> None:
    with pytest.raises(GraphoptError, match="precision: expected None or one of bf16, got 'fp8'"):
        Flat(precision="fp8")
