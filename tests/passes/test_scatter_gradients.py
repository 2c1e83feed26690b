"""Updates divided over the owners of parameters: who gives what, what is sent, what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import graphopt
from graphopt.errors import PassError
from graphopt.graph.training_graph import InputKind, OutputKind
from graphopt.passes import ScatterGradients
from graphopt.schemes.workers.pool import check_together
from tests.passes.divided_steps import calls, sharded, whole_step

UPDATES = {
    "sgd": (torch.optim.SGD, {}),
    "momentum in lists": (torch.optim.SGD, {"momentum": 0.9, "foreach": True}),
    "adam": (torch.optim.Adam, {}),
    "fused adamw": (torch.optim.AdamW, {"fused": True}),
}


def layers():
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 5))


def scattered(graph, processors, **options):
    results = [ScatterGradients(k, **options)(graph) for k in range(processors)]
    assert not any(result.refusals for result in results)
    return [result.graph for result in results]


def given(graph):
    """The parameters that a graph updates."""
    return {name for name, node in graph.output_nodes(OutputKind.PARAMETER).items() if node is not None}


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("processors", [2, 3, 4])
def test_each_parameter_and_its_state_come_from_one_processor(update, processors):
    optimizer, options = UPDATES[update]
    graph = sharded(whole_step(layers(), optimizer, **options), processors)
    graphs = scattered(graph, processors)
    check_together(graphs, processors)
    assert all(each.inputs == graph.inputs and each.outputs == graph.outputs for each in graphs)
    shares = [given(each) for each in graphs]
    assert sum(map(len, shares)) == 6 and len(set().union(*shares)) == 6
    words = graphs[0].signature.tree["placements"]["outputs"]
    for owner, (each, share) in enumerate(zip(graphs, shares, strict=True)):
        for output, result, word in zip(each.outputs, each.results, words, strict=True):
            if output.kind in (OutputKind.PARAMETER, OutputKind.STATE):
                assert (result is not None) == (output.name in share) == (word == f"at processor {owner}")
        reads = {name for name, node in each.input_nodes(InputKind.STATE).items() if node.users}
        assert {name.rpartition(".")[0] for name in reads} == (share if graph.input_nodes(InputKind.STATE) else set())
        assert len(calls(each, "reduce_scatter_tensor")) == 1
        assert len(calls(each, "all_reduce")) == len(calls(graph, "all_reduce")) - 6


@pytest.mark.parametrize("processors", [2, 3])
def test_shares_are_balanced_as_well_as_whole_parameters_allow(processors):
    model = layers()
    graphs = scattered(sharded(whole_step(model), processors), processors)
    sizes = [sum(model.get_parameter(name).numel() for name in given(each)) for each in graphs]
    assert max(sizes) - min(sizes) <= max(p.numel() for p in model.parameters())
    message = calls(graphs[0], "reduce_scatter_tensor")[0].args[0].meta["val"]
    assert message.numel() == processors * max(sizes)  # the others' parts are padded


def test_buckets_have_a_size_in_bytes():
    graph = sharded(whole_step(layers()), 2)
    sizes = [4 * n for n in (80, 5, 256, 16, 96, 16)]  # as they are ready: the last layer first
    for limit in (1, 4 * 90, 1 << 20):
        expected, bucket = [], 0
        for size in sizes:
            if bucket and bucket + size > limit:
                expected.append(bucket)
                bucket = 0
            bucket += size
        one, other = scattered(graph, 2, nbytes=limit)
        assert (
            len(calls(one, "reduce_scatter_tensor"))
            == len(calls(other, "reduce_scatter_tensor"))
            == len([*expected, bucket])
        )


def test_a_reduce_scatter_starts_with_its_last_gradient_and_is_waited_for_by_the_update():
    graph = scattered(sharded(whole_step(layers()), 2), 2, nbytes=1)[0]
    position = {node: i for i, node in enumerate(graph.nodes)}
    starts = [position[node] for node in calls(graph, "reduce_scatter_tensor")]
    waits = [position[user] for node in calls(graph, "reduce_scatter_tensor") for user in node.users]
    products = [position[n] for n in graph.nodes if n.target is torch.ops.aten.mm.default]
    assert starts[0] < products[-1] < min(waits)


def test_a_gradient_that_serves_two_parameters_keeps_them_together():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.one, self.two = nn.Linear(6, 5), nn.Parameter(torch.zeros(5)), nn.Parameter(torch.zeros(5))

        def forward(self, x):
            return self.inner(x) + self.one + self.two

    shares = [given(each) for each in scattered(sharded(whole_step(Twice()), 2), 2)]
    assert sorted(map(sorted, shares)) == [["inner.bias", "one", "two"], ["inner.weight"]]


def test_gradients_that_backward_reads_stay_all_reduced():
    model = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Linear(16, 5))
    graph = sharded(whole_step(model), 2)
    graphs = scattered(graph, 2)
    assert len(calls(graphs[0], "all_reduce")) == len(calls(graph, "all_reduce")) - 4  # weights and biases of layers
    assert {"1.weight", "1.bias"} <= given(graphs[0]) | given(graphs[1])


def test_gradients_that_are_kept_have_memory_of_their_own():
    names = [name for name, _ in layers().named_parameters()]
    graph = sharded(whole_step(layers(), keep=names), 2)
    for each in scattered(graph, 2):  # `check` refuses outputs that share memory
        kept = {n for n, node in each.output_nodes(OutputKind.GRADIENT).items() if node is not None}
        assert kept == given(each)


def test_what_cannot_be_divided_is_refused_with_the_reason():
    def why(graph):
        result = ScatterGradients(0)(graph)
        assert result.graph is graph
        return result.refusals[0].why

    assert "reads gradients of several" in why(sharded(whole_step(layers(), clip=1.0), 2))
    joint = whole_step(nn.Linear(6, 5))
    with pytest.raises(PassError, match="ShardAxes"):
        ScatterGradients(0)(joint)
    with pytest.raises(PassError, match="processor: expected an integer from 0 to 1"):
        ScatterGradients(2)(sharded(joint, 2))
    with pytest.raises(PassError, match="nbytes"):
        ScatterGradients(0, nbytes=0)
    model = nn.Linear(6, 5)
    outside = graphopt.capture(model, (torch.randn(4, 6), torch.randint(5, (4,))), loss=nn.functional.cross_entropy)
    assert "outside of the graph" in why(sharded(outside, 2))
