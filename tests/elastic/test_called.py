"""Whether a model runs the same code for another batch size is told by what it calls, without a capture."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from graphopt.elastic.called import same_calls
from graphopt.graph.batch import flatten


class Calls(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function, self.up, self.norm = function, nn.Linear(4, 8), nn.BatchNorm1d(8)

    def forward(self, x):
        return self.function(self.norm(self.up(x)))


CASES = {
    "nothing of sizes": (lambda y: y.relu().sum(1), True, True),
    "sizes that follow": (lambda y: y.view(y.size(0) * 2, -1).sum(1) / len(y) + torch.arange(2 * len(y)), True, True),
    "a message": (lambda y: (torch._assert(y.dim() == 2, f"{y.shape}"), y)[1], True, True),
    "a branch": (lambda y: y.exp() if len(y) == 1 else y, True, False),
    "a number by the size": (lambda y: y * (2 if len(y) > 1 else 1), True, False),
    "a dimension of 1": (lambda y: y[:, :3].squeeze(), True, False),
    "a limit": (lambda y: y[:9] if len(y) > 9 else y, False, True),
    "values": (lambda y: y.exp() if y.sum() > 1e9 else y, True, True),
}


@pytest.mark.parametrize("name", CASES)
def test_calls_for_other_sizes(name):
    function, of_twelve, of_one = CASES[name]
    model = Calls(function).eval()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    _, layout, _ = flatten(torch.randn(3, 4))
    state = torch.random.get_rng_state()
    assert same_calls(model, layout, 7, 12) is of_twelve
    assert same_calls(model, layout, 7, 1) is of_one
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert torch.equal(state, torch.random.get_rng_state())


def test_a_model_that_rejects_a_size_is_not_told():
    model = Calls(lambda y: y).train()  # a batch norm in training needs two rows
    assert not same_calls(model, flatten(torch.randn(3, 4))[1], 7, 1)
    assert int(model.norm.num_batches_tracked) == 0
