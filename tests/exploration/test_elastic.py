"""The search on a real elastic space: no subnet is tried twice, and workers have the space too."""

import pickle
from functools import cache
from itertools import product

import torch
from torch import nn

import graphopt.elastic
from graphopt.exploration import Training, explore, open_study
from graphopt.exploration.search_space import search_space


class Residual(nn.Module):
    """``x + mlp(x)``."""

    def __init__(self, width, hidden):
        super().__init__()
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))


@cache
def space():
    """Two residual layers, whose hidden widths count where their layer is."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.Sequential(Residual(8, 8), Residual(8, 8)), nn.Linear(8, 2))
    return graphopt.elastic.space(net, torch.randn(5, 4), choices={"depth": (0, 1, 2), "width": (0.5, 1.0)})


def data(rows, seed):
    x = torch.randn(rows, 4, generator=torch.Generator().manual_seed(seed))
    return x, (x.sum(1) > 0).long()


def test_points_have_one_key_exactly_if_they_are_one_subnet():
    found = search_space(space(), None)
    assert "depth" in {d.kind for d in space().dimensions}
    keys = {}
    for point in product(*(range(knob.size) for knob in found.knobs)):
        choice = space().choice(found.sizes(point))
        keys.setdefault(found.key(point), set()).add(choice.key())
    assert all(len(of_one) == 1 for of_one in keys.values())  # points of one key are one subnet
    assert len(set.union(*keys.values())) == len(keys) < found.size  # and one subnet has one key


def test_a_space_is_the_same_where_it_is_unpickled():
    copy = pickle.loads(pickle.dumps(space()))
    assert copy.dimensions == space().dimensions and copy.counts_where() == space().counts_where()
    assert search_space(copy, None).digest == search_space(space(), None).digest
    x = torch.randn(3, 4)
    assert torch.equal(copy.run(copy.smallest, x), space().run(space().smallest, x))


def test_subnets_are_searched_with_workers(tmp_path):
    trial = Training(nn.functional.cross_entropy, torch.optim.SGD, data(32, 0), data(32, 1), epochs=1, batch=16)
    count = len(list(search_space(space(), None).all_points()))
    study = explore(
        space(), trial, trials=count + 3, workers=2, on="local", generation="master", proposer="random",
        store=tmp_path / "s.db", progress=False,
    )  # fmt: skip
    assert study.counts() == {"done": count} and study.stopped == "exhausted"  # each subnet once
    assert study.best().metrics["parameters"] > 0
    assert open_study(tmp_path / "s.db").space.digest == study.space.digest
