"""Gradients scattered over owners, and up a tree: what all hold afterwards, what is kept, refused, and priced."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

import graphopt
from graphopt.cost_model import Link
from graphopt.errors import GraphoptError
from graphopt.graph.halves import cut_update
from graphopt.graph.torch_internals import unwaited_collectives
from graphopt.graph.training_graph import InputKind, Output, OutputKind, Phase
from graphopt.passes import DeadCode, ScatterGradients, SendUpTree
from graphopt.schemes import DataParallel
from graphopt.schemes.workers import Pool
from tests.cost_model.machines import simple
from tests.passes.divided_steps import sharded, whole_step
from tests.schemes.pairs import pair


def reader(model, data):
    """A graph that gives the parameters it reads."""
    draft = graphopt.capture(model, data, loss=F.cross_entropy).draft()
    names = {name: node for name, node in draft.origin.input_nodes(InputKind.PARAMETER).items()}
    results = [
        draft.add(torch.ops.aten.clone.default, node, like=node, before=draft.output, phase=Phase.FORWARD)
        for node in map(draft.node, names.values())
    ]
    draft.output.args = (tuple(results),)
    draft.signature = replace(draft.signature, outputs=tuple(Output(OutputKind.SAVED, name) for name in names))
    return DeadCode()(draft.finish()).graph


@pytest.mark.parametrize("synchronise", ["scatter", "tree"])
@pytest.mark.filterwarnings("ignore:.*take turns on")
def test_all_processors_read_the_same_bits_after_fifty_steps(synchronise):
    _, step, _, model, batch = pair("tokens", schemes=[DataParallel(3, synchronise)])
    for _ in range(50):
        step(*batch(5))
    assert step.plan.chosen.endswith(synchronise)
    graph = reader(model, batch(4))
    job = step.task.pools.of(3, 1).load(graph, gathered=graph.outputs)
    job([model.get_parameter(i.name) for i in job.common], [batch(2)] * 3)
    assert unwaited_collectives() == 0
    for k, output in enumerate(job.outputs):
        held = job.gathered(k)
        assert len(held) == 2 and all(torch.equal(one, model.get_parameter(output.name)) for one in held)
    step.close()


def test_gradients_of_other_owners_are_kept_too():
    _, shared, a, b, batch = pair("perceptron", schemes=[DataParallel(2, "scatter")], keep_grads=True)
    for i in range(3):
        data = batch(5)
        torch.manual_seed(i)
        expected = torch.autograd.grad(F.cross_entropy(a.train()(data[0]), data[1]), list(a.parameters()))
        a.load_state_dict(b.state_dict())
        torch.manual_seed(i)
        shared(*data)
        for parameter, gradient in zip(b.parameters(), expected, strict=True):
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-9, atol=1e-12)
        a.load_state_dict(b.state_dict())
    assert shared.plan.chosen == "data parallel on 2, scatter"
    shared.close()


def test_an_update_that_reads_all_gradients_cannot_be_scattered():
    _, step, *_, batch = pair("tokens", schemes=["flat", DataParallel(2, "scatter")], clip=1.0)
    step(*batch(4))
    assert "reads gradients of several" in step.plan.candidate("data parallel on 2, scatter").why_not
    step.close()


@pytest.mark.parametrize("processors", [2, 3, 5])
def test_prices_of_trees_and_of_scattered_updates(processors):
    _, step, _, model, batch = pair("tokens", optimizer=torch.optim.AdamW, schemes=["flat"])
    step(*batch(8))
    prepared = step.situation._prepare(0)
    names, latency, bandwidth = ("owner", "tree", "scatter"), 1e-9, 1e5
    owner, tree, scatter = (DataParallel(processors, name).estimate(
        prepared, 8, lambda n: simple(link=Link(latency, bandwidth, busy=1.0))) for name in names)  # fmt: skip
    gradients = 8 * sum(p.numel() for p in model.parameters()) / bandwidth
    rounds = (processors - 1).bit_length()
    assert tree.terms["communication"] == pytest.approx(rounds * gradients, rel=0.2)
    assert scatter.terms["communication"] >= (processors - 1) / processors * gradients
    assert scatter.terms["optimizer"] < owner.terms["optimizer"] == pytest.approx(tree.terms["optimizer"])
    for price in (tree, scatter):
        assert price.seconds == pytest.approx(sum(price.terms.values()))
    step.close()


def test_workers_are_sent_what_their_graph_reads():
    whole = whole_step(torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Linear(8, 5)), momentum=0.9)
    graph = sharded(whole, 2)
    graphs = [ScatterGradients(k)(graph).graph for k in range(2)]
    with Pool(2) as pool:
        job = pool.load(graphs)
        names = [str(job.graph.inputs[k]) for k in job.description(0, "")["common"]]
    state = {name for name in names if name.startswith("state")}
    own = {n for n, node in graphs[1].output_nodes(OutputKind.STATE).items() if node is not None}
    assert own and state == {f"state {name}" for name in own}
    assert len(own) < len(graph.input_nodes(InputKind.STATE))


@pytest.mark.filterwarnings("ignore:.*take turns on")
def test_graphs_that_do_not_belong_together_are_refused():
    graph = sharded(cut_update(whole_step(torch.nn.Linear(6, 5))).first, 3)
    one, two, three = (SendUpTree(k)(graph).graph for k in range(3))
    with Pool(3) as pool:
        with pytest.raises(GraphoptError, match="2 graphs, expected one for each of 3"):
            pool.load([one, two])
        with pytest.raises(GraphoptError, match=r"collective \d of processor 2 is .*all_reduce.*all_to_all"):
            pool.load([one, two, graph])
        less = three.draft()
        less.keep_outputs([output.kind is OutputKind.LOSS for output in three.outputs])
        with pytest.raises(GraphoptError, match="processor 2 has other inputs or outputs"):
            pool.load([one, two, less.finish()])
        assert pool.load([one, two, three]).outputs == one.outputs
