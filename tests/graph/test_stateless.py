"""Calls of modules with other tensors, where modules and parameters are shared."""

import pytest
import torch
from torch import nn

from graphopt.graph.stateless import functional_call


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.weight = nn.Parameter(torch.tensor(2.0))

    def forward(self, x):
        self.calls = self.calls + 1  # replaced, not written into
        return self.weight * x


class Shared(nn.Module):
    """One module at two paths, and a parameter that two modules share."""

    def __init__(self):
        super().__init__()
        self.first = Counting()
        self.second = self.first
        self.other = Counting()
        self.other.weight = self.first.weight

    def forward(self, x, plus=0.0):
        return self.other(self.second(self.first(x))) + plus


@pytest.mark.parametrize("name", ["first.weight", "second.weight", "other.weight"])
def test_shared_tensors_are_replaced_everywhere_and_put_back(name):
    model = Shared()
    own = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    given = torch.tensor(3.0, requires_grad=True)
    result = functional_call(model, {name: given}, (torch.tensor(1.0),), {"plus": 1.0})
    assert result == 28 and torch.autograd.grad(result, given)[0] == 27
    after = dict(model.named_parameters(remove_duplicate=False))
    assert all(after[n] is own[n] for n in after)


def test_buffers_that_are_replaced_are_told():
    model = Shared()
    tensors = {"first.calls": torch.tensor(10.0), "other.calls": torch.tensor(20.0)}
    functional_call(model, tensors, (torch.tensor(1.0),))
    assert tensors == {"first.calls": 12, "other.calls": 21}
    assert model.first.calls == model.other.calls == 0


def test_tensors_are_put_back_after_an_error():
    model = Shared()
    own = dict(model.named_parameters(remove_duplicate=False))
    with pytest.raises(TypeError):
        functional_call(model, {"first.weight": torch.tensor(3.0)}, ())
    assert all(tensor is own[name] for name, tensor in model.named_parameters(remove_duplicate=False))
