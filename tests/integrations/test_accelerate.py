"""Accelerate: backends are members of an enumeration, to which `register` adds ours; compiled models are left alone."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from graphopt.integrations import recording, register

accelerate = pytest.importorskip("accelerate")

from accelerate.state import AcceleratorState  # noqa: E402
from accelerate.utils import DynamoBackend, TorchDynamoPlugin  # noqa: E402


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    """Accelerate keeps the state of the first accelerator of a process."""
    register()
    torch._dynamo.reset()
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 3))


def trained(accelerator: accelerate.Accelerator, net: nn.Module) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses of six steps in two epochs with accumulation of two batches, and the parameters after them."""
    torch.manual_seed(1)
    data = torch.utils.data.TensorDataset(torch.randn(12, 4), torch.randint(3, (12,)))
    loader = torch.utils.data.DataLoader(data, batch_size=4)
    net, optimizer, loader = accelerator.prepare(net, torch.optim.AdamW(net.parameters(), 0.05), loader)
    losses = []
    for _ in range(2):
        for x, y in loader:
            with accelerator.accumulate(net):
                loss = F.cross_entropy(net(x).float(), y)
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.item())
    return losses, copy.deepcopy(accelerator.unwrap_model(net, keep_torch_compile=False).state_dict())


WAYS = {
    "by name": lambda options: ({"dynamo_backend": "graphopt"}, lambda net: net),
    "by plugin": lambda options: (
        {"dynamo_plugin": TorchDynamoPlugin(backend="graphopt", options={"lower": "eager"})}, lambda net: net,
    ),
    "compiled before": lambda options: ({}, lambda net: torch.compile(net, backend="graphopt")),
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_trains_as_eager_does(way: Callable, precision: str) -> None:
    common = {"cpu": True, "gradient_accumulation_steps": 2, "mixed_precision": precision}
    eager, parameters = trained(accelerate.Accelerator(**common), model())
    AcceleratorState._reset_state(reset_partial_state=True)
    arguments, wrap = way(None)
    with recording() as pieces:
        ours, compiled = trained(accelerate.Accelerator(**common, **arguments), wrap(model()))
    assert pieces and all(piece.result.changed for piece in pieces)
    assert ours == eager
    assert compiled.keys() == parameters.keys()
    assert all(torch.equal(compiled[name], value) for name, value in parameters.items())


def test_the_name_is_a_member_once() -> None:
    member = DynamoBackend("GRAPHOPT")
    register()
    assert DynamoBackend("GRAPHOPT") is member is copy.deepcopy(member)
    assert "GRAPHOPT" in DynamoBackend and member.value == str(member) == "GRAPHOPT"
    assert member != DynamoBackend.NO
    with pytest.raises(ValueError):
        DynamoBackend("NOTHING")
