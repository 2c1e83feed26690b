"""Collectives: their laws, and how much of them computation hides."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from graphopt import capture
from graphopt.cost_model import estimate
from graphopt.cost_model.communication import COLLECTIVES, Link, Transfer, exposed_seconds
from graphopt.errors import CostModelError
from graphopt.graph.training_graph import OutputKind
from tests.cost_model.machines import simple

LINK = Link(latency=1e-5, bandwidth=1e9)


@given(st.sampled_from(COLLECTIVES), st.floats(0, 1e10), st.floats(1, 4), st.integers(1, 64))
def test_one_processor_talks_to_nobody_and_more_bytes_are_never_cheaper(kind, nbytes, times, processors):
    assert LINK.seconds(kind, nbytes, 1) == 0
    assert LINK.seconds(kind, nbytes * times, processors) >= LINK.seconds(kind, nbytes, processors)


@given(st.floats(0, 1e10), st.integers(2, 64))
def test_an_all_reduce_is_a_reduce_scatter_and_an_all_gather(nbytes, processors):
    halves = LINK.seconds("reduce_scatter", nbytes, processors) + LINK.seconds("all_gather", nbytes, processors)
    assert LINK.seconds("all_reduce", nbytes, processors) == pytest.approx(halves)


def test_the_ring_of_the_textbook():
    assert LINK.seconds("all_reduce", 4e9, 4) == pytest.approx(6e-5 + 1.5 * 4)
    assert LINK.seconds("broadcast", 1e9, 5) == pytest.approx(3e-5 + 3)


def test_measured_points_count_and_continue_in_proportion():
    link = Link(1.0, 1.0, points={"all_reduce 2": ((1e3, 1e-4), (1e6, 1e-3))})
    assert link.seconds("all_reduce", 1e3, 2) == 1e-4 and link.seconds("all_reduce", 1.0, 2) == 1e-4
    assert link.seconds("all_reduce", (1e3 + 1e6) / 2, 2) == pytest.approx(5.5e-4)
    assert link.seconds("all_reduce", 3e6, 2) == pytest.approx(3e-3)
    assert link.seconds("all_reduce", 1e3, 3) > 1  # not measured for three


def test_an_unknown_collective_is_refused():
    with pytest.raises(CostModelError, match="all_reduce"):
        LINK.seconds("gossip", 1.0, 2)


def test_a_collective_hides_behind_the_kernels_between_its_start_and_its_wait():
    kernels = np.array([1.0, 0.0, 2.0, 3.0, 0.0, 1.0])  # collective at 1, its wait at 4: five seconds between them
    one = [Transfer("all_reduce", 1, 4)]
    assert exposed_seconds(one, [4.0], kernels) == 0
    assert exposed_seconds(one, [7.0], kernels) == pytest.approx(2.0)
    assert exposed_seconds(one, [4.0], kernels, busy=0.25) == pytest.approx(1.0)
    assert exposed_seconds([Transfer("all_reduce", 1, 1)], [4.0], kernels) == pytest.approx(4.0)


def test_the_second_collective_waits_for_the_first():
    kernels = np.array([0.0, 1.0, 0.0, 1.0, 0.0])
    both = [Transfer("all_reduce", 0, 4), Transfer("all_reduce", 2, 4)]
    assert exposed_seconds(both, [3.0, 2.0], kernels) == pytest.approx(3.0)  # ends at 5, computation at 2


@given(
    st.lists(st.floats(0, 10), min_size=4, max_size=12),
    st.lists(st.tuples(st.floats(0, 10), st.integers(0, 11), st.integers(0, 11)), max_size=5),
    st.floats(0, 1),
)
def test_exposed_seconds_lie_between_nothing_and_all_and_never_fall_when_a_wait_comes_earlier(kernels, given_, busy):
    n = len(kernels)
    transfers = [Transfer("all_reduce", *sorted((a % n, b % n))) for _, a, b in given_]
    seconds = [s for s, _, _ in given_]
    found = exposed_seconds(transfers, seconds, np.array(kernels), busy)
    at_once = [Transfer(t.collective, t.start, t.start) for t in transfers]
    assert -1e-9 <= found <= sum(seconds) + 1e-9
    assert exposed_seconds(at_once, seconds, np.array(kernels), busy) >= found - 1e-9


def sharded(model, batch):
    """A joint graph whose gradients are all-reduced, each waited for at once or at the end."""
    graph = capture(model, batch, loss=F.mse_loss)
    draft = graph.draft()
    c10d, results = torch.ops._c10d_functional, []
    for output, node in zip(graph.outputs, draft.results, strict=True):
        if output.kind is OutputKind.GRADIENT and node is not None:
            reduced = draft.graph.create_node("call_function", c10d.all_reduce.default, (node, "sum", "0"))
            node.append(reduced)
            with draft.graph.inserting_before(draft.output):
                node = draft.graph.call_function(c10d.wait_tensor.default, (reduced,))
            for made in (reduced, node):
                made.meta = {**reduced.args[0].meta}
        results.append(node)
    draft.output.args = (tuple(results),)
    return draft.finish()


def test_a_graph_with_collectives_costs_communication_on_several_processors_only():
    net = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 8))
    graph = sharded(net, (torch.randn(16, 32), torch.randn(16, 8)))
    slow, fast = (simple(link=Link(1e-4, bandwidth)) for bandwidth in (1e5, 1e12))
    assert estimate(graph, slow).terms["communication"] == 0
    parameters = 4 * sum(p.numel() for p in net.parameters())
    price = estimate(graph, slow, processors=2)
    whole = 4 * 2e-4 + parameters / 1e5  # four gradients, 2(n-1) hops and 2(n-1)/n of the bytes each
    assert whole * 0.9 < price.terms["communication"] <= whole  # a little is hidden by the rest of backward
    assert estimate(graph, fast, processors=2).terms["communication"] < 1e-2 * price.terms["communication"]
    assert price.seconds == pytest.approx(sum(price.terms.values()))
    with pytest.raises(CostModelError, match="no link"):
        estimate(graph, simple(), processors=2)
    with pytest.raises(CostModelError, match="processors"):
        estimate(graph, slow, processors=0)
