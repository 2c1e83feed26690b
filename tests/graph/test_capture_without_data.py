"""Models on the meta device and of fake tensors are captured as if their data were there."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

import graphopt
from benchmarks import zoo
from graphopt.errors import BatchError, CaptureError
from graphopt.graph.differentiate import with_backward
from graphopt.graph.forward import capture_forward


def on_meta(case: zoo.Case) -> tuple[nn.Module, Any]:
    with torch.device("meta"):
        model = case.build()
    return model, pytree.tree_map(lambda t: t.to("meta"), case.batch(3))


def faked(case: zoo.Case) -> tuple[nn.Module, Any]:
    with FakeTensorMode():
        return case.build(), case.batch(3)


@pytest.mark.parametrize(
    "name, emptied",
    [("digits_cnn", on_meta), ("lstm_forecaster", faked), ("tied_lm", on_meta), ("tied_lm", faked), ("gpt2", on_meta)],
)
def test_the_graph_is_that_of_the_real_model(name: str, emptied: Callable[..., Any]) -> None:
    """Forward, backward and update, node by node: operators, shapes, devices, modules."""
    case = zoo.case(name)

    def captured(model: nn.Module, batch: Any) -> graphopt.TrainingGraph:
        optimizer = torch.optim.AdamW(model.parameters(), foreach=True)
        return graphopt.capture(model, batch, loss=case.loss or "model", optimizer=optimizer)

    real, empty = captured(case.build(), case.batch(3)), captured(*emptied(case))
    assert empty.text(source=False) == real.text(source=False)
    assert empty.hash() == real.hash()
    devices = [[t.device for t in pytree.tree_leaves(n.meta.get("val")) if isinstance(t, torch.Tensor)]
               for graph in (empty, real) for n in graph.nodes]  # fmt: skip
    assert devices[: len(empty.nodes)] == devices[len(empty.nodes) :]
    assert empty.flops({"batch": 7}) == real.flops({"batch": 7}) > 0


def test_the_model_is_left_as_it_was() -> None:
    with torch.device("meta"):
        model, batch = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8)), torch.empty(5, 4)
    before = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    graphopt.capture(model, batch)
    after = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert all(after[name] is tensor and tensor.is_meta for name, tensor in before.items())


def test_a_model_that_no_machine_holds() -> None:
    """A layer of 4 TB with the state of its optimizer."""
    with torch.device("meta"):
        model, batch = nn.Linear(2**20, 2**20), (torch.empty(4, 2**20), torch.empty(4, 2**20))
    graph = graphopt.capture(model, batch, loss=F.mse_loss, optimizer=torch.optim.Adam(model.parameters()))
    assert graph.flops({"batch": 64}) == 2 * 2 * 64 * 2**40


def test_whole_operators_and_their_backward() -> None:
    with torch.device("meta"):
        model, batch = nn.Sequential(nn.Linear(16, 8), nn.GELU(), nn.LayerNorm(8), nn.Linear(8, 2)), torch.empty(3, 16)
    forward = capture_forward(model, batch)
    assert "aten.linear" in forward.text()
    assert with_backward(forward).flops() == graphopt.capture(model, batch).flops()


def test_what_cannot_be_meant_is_refused() -> None:
    with torch.device("meta"):
        model = nn.Linear(4, 2)
    with pytest.raises(BatchError, match="0 is on cpu, the model on meta"):
        graphopt.capture(model, torch.randn(3, 4))
    with pytest.raises(BatchError, match="the model rejects it"):
        graphopt.capture(model, torch.empty(3, 5, device="meta"))
    with FakeTensorMode(), pytest.raises(CaptureError, match=r"a FakeTensorMode is active.* capture outside"):
        graphopt.capture(nn.Linear(4, 2), torch.randn(3, 4))
