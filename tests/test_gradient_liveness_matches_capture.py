"""One capture specialised to a freeze pattern is the capture of that pattern; where it is not, the hash shows it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import graphopt
from graphopt.errors import LossError
from graphopt.graph.training_graph import TrainingGraph
from graphopt.passes import GradientLiveness, PassResult, specialise
from graphopt.verify import run_graph
from tests.helpers import assert_same_bits
from tests.random_models import Case, cases, eager_step, freeze_patterns

EXAMPLES = settings.default.max_examples


def frozen_except(model: nn.Module, trainable: list[str]) -> nn.Module:
    """A copy of the model in which only these parameters require grad."""
    model = copy.deepcopy(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trainable)
    return model


def fresh_capture(model: nn.Module, batch: Any, loss: Any, trainable: list[str]) -> TrainingGraph:
    """The step of a model with the flags of this pattern."""
    return graphopt.capture(frozen_except(model, trainable), batch, loss=loss)


def products(graph: TrainingGraph) -> list[str]:
    """The matrix products, by which torch may choose: folded into one ``mm`` or spread to ``bmm``."""
    return sorted(str(n.target) for n in graph.nodes if str(n.target).startswith(("aten.mm", "aten.bmm", "aten.addmm")))


def assert_same_step(ours: TrainingGraph, fresh: TrainingGraph, model: nn.Module, batch: Any) -> None:
    """The same operators, the same cost, the same bits."""
    assert ours.hash() == fresh.hash(), f"{ours}\n\nis not\n\n{fresh}"
    assert len(ours) == len(fresh) and ours.flops() == fresh.flops() and ours.bytes_kept() == fresh.bytes_kept()
    results = [run_graph(graph, model, batch).values for graph in (ours, fresh)]
    assert results[0].keys() == results[1].keys()
    assert_same_bits([results[0][name] for name in results[1]], list(results[1].values()))


@settings(max_examples=EXAMPLES)
@given(st.data(), cases(dtypes=[torch.float32]), st.sampled_from([1, 1, 3]))
def test_random_models_and_patterns(data: st.DataObject, case: Case, size: int) -> None:
    model, optimizer = case.instance()
    batch = case.batch(size)
    eager_step(case, model.requires_grad_(True), optimizer, batch)  # rejects what eager cannot run
    model, _ = case.instance()
    full = graphopt.capture(model, batch, loss=case.loss, gradients="all")
    names = [name for name, _ in model.named_parameters()]
    for _ in range(2):
        frozen = data.draw(freeze_patterns(names))
        trainable = [name for name in names if name not in frozen]
        try:
            fresh = fresh_capture(model, batch, case.loss, trainable)
        except LossError:  # the pattern trains only what the loss does not use
            continue
        ours = GradientLiveness(trainable=trainable)(full).graph
        if ours.hash() == fresh.hash() or products(ours) == products(fresh):
            assert_same_step(ours, fresh, model, batch)


# -- where torch chooses kernels by requires_grad while it traces ----------------------------------------------------


class Folded(nn.Module):
    """A 3-D matmul with a parameter: folded into one product or not by whether the parameter requires grad."""

    def __init__(self):
        super().__init__()
        self.first, self.weight = nn.Linear(4, 4), nn.Parameter(torch.randn(4, 5))

    def forward(self, x):
        return torch.matmul(self.first(x).transpose(1, 2).contiguous().transpose(1, 2), self.weight)


class Recurrent(nn.Module):
    """A recurrent layer behind a linear one."""

    def __init__(self, kind):
        super().__init__()
        self.first, self.layer = nn.Linear(4, 4), kind(4, 5, batch_first=True)

    def forward(self, x):
        return self.layer(self.first(x))[0]


class Biased(nn.Module):
    """Attention with a learnable bias, which the fused kernel gives no gradient for."""

    def __init__(self):
        super().__init__()
        self.first, self.bias = nn.Linear(4, 5), nn.Parameter(torch.randn(2, 2))

    def forward(self, x):
        y = self.first(x).unsqueeze(1)
        return F.scaled_dot_product_attention(y, y, y, attn_mask=self.bias).squeeze(1)


CHOOSING = {"matmul": Folded, "GRU": lambda: Recurrent(nn.GRU), "attention": Biased}


def specialised(make: Callable[[], nn.Module], trainable: list[str]) -> tuple[PassResult, TrainingGraph]:
    model, batch = make(), (torch.randn(3, 2, 4), torch.randn(3, 2, 5))
    full = graphopt.capture(model, batch, loss=F.mse_loss, gradients="all")
    fresh = fresh_capture(model, batch, F.mse_loss, trainable)
    return specialise(full, trainable, fresh), fresh


@pytest.mark.parametrize("make", CHOOSING.values(), ids=CHOOSING)
def test_the_comparison_notices_other_kernels(make: Callable[[], nn.Module]) -> None:
    result, fresh = specialised(make, ["first.weight"])
    assert result.graph is fresh and "other kernels" in result.refusals[-1].why


def test_a_frozen_lstm_is_the_same_kernel() -> None:
    result, fresh = specialised(lambda: Recurrent(nn.LSTM), ["first.weight"])
    assert result.graph is not fresh and result.graph.hash() == fresh.hash()
