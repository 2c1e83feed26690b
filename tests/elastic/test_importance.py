"""Importance order: the whole model stays the same function, and slices keep what matters."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from graphopt.elastic import Kind, space
from graphopt.elastic.importance import sort_by_importance
from graphopt.errors import ElasticError
from tests.elastic.test_space import Grouped
from tests.elastic.test_subnets import Residual
from tests.structures import rescaled


@pytest.mark.parametrize(("model", "shape"), [(Grouped(), (2, 4, 5)), (Residual(), (2, 3, 6, 6))])
@pytest.mark.parametrize("by", ["norm", "gradient"])
def test_the_full_model_stays(model, shape, by):
    model = rescaled(model, 1).double().eval()
    x = torch.randn(shape).double()
    found = space(model, x)
    before, right = copy.deepcopy(model), model(x)
    target = torch.randn_like(right)
    options = {"batches": [(x, target)], "loss": F.mse_loss} if by == "gradient" else {}
    orders = sort_by_importance(found, by, **options)
    assert torch.allclose(model(x), right, 1e-9, 1e-9)
    assert orders.keys() == {d.name for d in found.dimensions if d.kind not in (Kind.DEPTH, Kind.KERNEL)}
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters()))
    assert all(sorted(o.tolist()) == list(range(len(o))) for o in orders.values())


def test_the_best_come_first():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    strong = torch.tensor([2, 5, 7])
    with torch.no_grad():
        net[0].weight[strong] = 100 * torch.randn(3, 4).sign()
        net[2].weight.copy_(net[2].weight.sign())
    found = space(net, torch.randn(3, 4), choices={"0.hidden": (3,)})
    x = torch.randn(64, 4)
    right = net(x).detach()
    worse = (found.run(found.smallest, x) - right).norm()
    order = sort_by_importance(found)["0.hidden"]
    assert set(order[:3].tolist()) == set(strong.tolist())
    assert (found.run(found.smallest, x) - right).norm() < 0.1 * worse


def test_gradients_know_what_is_not_used():
    """Hidden features whose way out is zero have no gradient through it, however large their weights are."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    with torch.no_grad():
        net[2].weight[:, :4] = 0
        net[0].weight[:4] *= 100
    found = space(net, torch.randn(3, 4))
    batches = [(torch.randn(16, 4), torch.randint(2, (16,))) for _ in range(2)]
    order = sort_by_importance(found, "gradient", batches=batches, loss=F.cross_entropy)["0.hidden"]
    assert set(order[:4].tolist()) == {4, 5, 6, 7}
    assert all(p.grad is None for p in net.parameters())


def test_buffers_that_were_converted_are_sorted():
    """`double` puts other tensors in the place of buffers."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
    nn.init.normal_(net[1].running_mean)
    found = space(net.eval(), torch.randn(3, 4))
    net.double()
    x = torch.randn(3, 4).double()
    right, mean = net(x), net[1].running_mean.clone()
    sort_by_importance(found)
    assert not torch.equal(net[1].running_mean, mean)
    assert torch.allclose(net(x), right, 1e-9, 1e-9)


def test_errors():
    found = space(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)), torch.randn(3, 4))
    with pytest.raises(ElasticError, match="expected 'norm'"):
        sort_by_importance(found, "size")
    with pytest.raises(ElasticError, match="at least one batch"):
        sort_by_importance(found, "gradient", loss=F.mse_loss)
