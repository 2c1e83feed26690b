"""Gradients up a tree of sends: who sends what to whom, and when."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from graphopt.cost_model.kernels import collective
from graphopt.errors import PassError
from graphopt.graph.halves import cut_update
from graphopt.graph.training_graph import OutputKind
from graphopt.passes import SendUpTree
from graphopt.schemes.workers.pool import check_together
from tests.passes.divided_steps import calls, sharded, whole_step


def layers():
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 5))


def climbed(processors, **options):
    graph = sharded(cut_update(whole_step(layers())).first, processors)
    results = [SendUpTree(k, **options)(graph) for k in range(processors)]
    assert not any(result.refusals for result in results)
    return graph, [result.graph for result in results]


@pytest.mark.parametrize("processors", range(2, 10))
def test_everybody_sends_once_to_a_partner_who_expects_it_and_all_arrives_at_processor_0(processors):
    _, graphs = climbed(processors)
    check_together(graphs, processors)
    exchanges = [calls(graph, "all_to_all_single") for graph in graphs]
    assert {len(each) for each in exchanges} == {math.ceil(math.log2(processors))}
    held = [{k} for k in range(processors)]  # whose parts a processor has summed
    sent = []
    for meeting in zip(*exchanges, strict=True):
        gets, gives = ([node.args[k] for node in meeting] for k in (1, 2))
        assert [list(row) for row in zip(*gives, strict=True)] == gets  # what one gives the other gets
        for k, node in enumerate(meeting):
            assert node.args[0].meta["val"].numel() == sum(gives[k]) and node.meta["val"].numel() == sum(gets[k])
            assert collective(node) == "send"
            for partner, size in enumerate(gives[k]):
                if size:
                    assert size == sum(p.numel() for p in layers().parameters())
                    sent.append(k)
                    assert held[partner].isdisjoint(held[k])
                    held[partner] |= held[k]
    assert sorted(sent) == list(range(1, processors)) and held[0] == set(range(processors))


def test_processor_0_alone_gives_the_sums():
    graph, graphs = climbed(3)
    words = graphs[0].signature.tree["placements"]["outputs"]
    for k, each in enumerate(graphs):
        for output, result, word in zip(each.outputs, each.results, words, strict=True):
            if output.kind is OutputKind.SAVED:
                assert word == "at processor 0" and (result is None) == (k > 0)
            else:
                assert word == "replicated" and result is not None
        assert len(calls(each, "all_reduce")) == len(calls(graph, "all_reduce")) - 4


def test_the_first_round_of_a_bucket_runs_beside_backward_and_every_message_is_waited_for():
    _, graphs = climbed(4, nbytes=1)
    for graph in graphs:
        position = {node: i for i, node in enumerate(graph.nodes)}
        sends = calls(graph, "all_to_all_single")
        assert len(sends) == 4 * 2
        products = [position[n] for n in graph.nodes if n.target is torch.ops.aten.mm.default]
        assert position[sends[0]] < products[-1]
        waits = [user for node in sends for user in node.users]
        assert len(waits) == len(sends) and min(position[w] for w in waits) > products[-1]


def test_what_has_no_meaning_is_refused():
    graph = whole_step(layers())
    result = SendUpTree(0)(graph)
    assert result.graph is graph and "ShardAxes" in result.refusals[0].why
    with pytest.raises(PassError, match="processor"):
        SendUpTree(2)(sharded(cut_update(graph).first, 2))
    with pytest.raises(PassError, match="nbytes"):
        SendUpTree(0, nbytes=True)
