"""Prices at many sizes at once are those at each of them."""

import numpy as np
import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import graphopt
from graphopt.cost_model import Machine, estimate
from graphopt.cost_model.many_sizes import price_many
from graphopt.cost_model.memory import Absent
from graphopt.cost_model.size_table import SizeTable
from graphopt.cost_model.work import compiled
from graphopt.errors import CostModelError, GraphoptError
from tests.cost_model.machines import simple

N, M = sympy.symbols("n m", positive=True, integer=True)
NOTHING = Absent(frozenset())


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 10**4), st.integers(1, 10**4)), min_size=1, max_size=20))
def test_table_at_many_sizes(sizes):
    table = SizeTable([7, 3 * N, N * M**2 - M, (N + M) // 2, N * (M // 3)])
    found = table.at_many({N: np.array([n for n, _ in sizes]), M: np.array([m for _, m in sizes])})
    assert found.T.tolist() == [table.at({N: n, M: m}).tolist() for n, m in sizes]


def test_table_refuses_what_it_refuses_at_one_size():
    table = SizeTable([N**5])
    with pytest.raises(GraphoptError, match="62 bits"):
        table.at_many({N: np.array([2, 10**5])})
    with pytest.raises(GraphoptError, match="no size"):
        table.at_many({M: np.array([2])})


@pytest.fixture(scope="module")
def graph():
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.BatchNorm2d(8), torch.nn.GELU(), torch.nn.Flatten(),
        torch.nn.Linear(8 * 36, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4),
    )  # fmt: skip
    return graphopt.capture(
        net, (torch.randn(4, 3, 6, 6), torch.randint(4, (4,))), loss=torch.nn.functional.cross_entropy
    )


@pytest.mark.parametrize("machine", [simple(), Machine.named("H100")], ids=["cpu", "gpu"])
@pytest.mark.parametrize("mode", ["flat", "eager"])
def test_prices_are_those_of_estimate(graph, machine, mode):
    names = [axis.name for axis in graph.axes.groups() if axis.free]
    assert len(names) >= 2
    rng = np.random.default_rng(0)
    sizes = [
        {name: int(rng.integers(1, 200)) for name in names} | {"batch": int(rng.integers(2, 16))} for _ in range(40)
    ]
    work = compiled(graph, mode, names, machine.threads)
    columns = [work.values(each) for each in sizes]
    values = {symbol: np.array([column[symbol] for column in columns]) for symbol in columns[0]}
    found = price_many(work, values, [NOTHING] * len(sizes), machine=machine, peak=True)
    for i, each in enumerate(sizes):
        price = estimate(graph, machine, each, mode=mode)
        assert found.flops[i] == price.flops
        assert found.peak_bytes[i] == price.peak_bytes
        assert found.seconds[i] == pytest.approx(price.seconds, rel=1e-9)


def test_what_is_absent_counts_for_nothing(graph):
    work = compiled(graph, "flat", (), 1)
    values = {symbol: np.array([4, 4]) for symbol in work.values({})}
    half = Absent(frozenset(work.nodes[::2]))
    found = price_many(work, values, [NOTHING, half], machine=simple(), peak=True)
    counts = work.at(work.values({"batch": 4}))
    assert found.flops.tolist() == [counts.flops.sum(), counts.flops[1::2].sum()]
    assert found.seconds[1] < found.seconds[0] and found.peak_bytes[1] < found.peak_bytes[0]


def test_a_graph_with_an_update_is_refused():
    net = torch.nn.Linear(4, 3)
    graph = graphopt.capture(
        net, (torch.randn(5, 4), torch.randint(3, (5,))), loss=torch.nn.functional.cross_entropy,
        optimizer=torch.optim.SGD(net.parameters(), lr=0.1),
    )  # fmt: skip
    with pytest.raises(CostModelError, match="update"):
        price_many(compiled(graph, "flat", (), 1), {}, [NOTHING])
