"""What a rewrite kept, removed, changed and added, operator by operator, and the reasons."""

from collections import Counter
from itertools import pairwise
from operator import getitem

import pytest
import torch

from graphopt.graph.training_graph import TrainingGraph
from graphopt.passes import CommonSubexpressions, DeadCode, NoOps, PassResult, Pipeline
from graphopt.visualize.comparison import Comparison, Status
from tests.helpers import traced
from tests.visualize.steps import head_only, head_only_of_convolutions

aten = torch.ops.aten


def statuses(compared: Comparison) -> dict[str, str]:
    return {one.node.name: str(one.status) for one in compared.drawn}


def reasons(compared: Comparison) -> dict[str, tuple[str, str]]:
    """Pass and change of each operator that is gone."""
    found = {}
    for one in compared.drawn:
        if one.reason is not None:
            change = "" if one.reason.change is None else compared.changes[one.reason.change].what
            found[one.node.name] = one.reason.pass_name, change
    return found


def test_what_passes_removed_has_its_reason():
    def step(step, x):
        a, b = aten.exp.default(x), aten.exp.default(x)
        aten.sin.default(x)
        return aten.add.Tensor(aten.detach.default(a), b)

    compared = Comparison.of(Pipeline([NoOps(), CommonSubexpressions(), DeadCode()])(traced(step, (3,))))
    assert statuses(compared) == {
        "x": "kept", "exp": "kept", "exp_1": "removed", "sin": "removed", "detach": "removed", "add": "changed"
    }  # fmt: skip
    found = reasons(compared)
    assert {name: pass_name for name, (pass_name, _) in found.items()} == {
        "exp_1": "common_subexpressions", "sin": "dead_code", "detach": "no_ops"
    }  # fmt: skip
    assert "detach" in found["detach"][1] and "exp" in found["exp_1"][1] and "sin" in found["sin"][1]


def test_a_graph_alone_is_kept():
    compared = Comparison(head_only().graph)
    assert set(statuses(compared).values()) == {"kept"}
    assert set(compared.edges.values()) == {(True, True)}


def test_another_operator_of_the_same_name_is_another():
    def before(step, x):
        return aten.exp.default(x)

    def after(step, x):
        return aten.add.Tensor(aten.neg.default(x), x)

    then, now = traced(before, (3,)), traced(after, (3,))
    draft = now.draft()
    next(n for n in draft.graph.nodes if n.target is aten.neg.default).name = "exp"
    now = draft.finish()
    compared = Comparison(now, then)
    assert [(one.node.name, str(one.status)) for one in compared.drawn][1:] == [
        ("exp", "added"), ("add", "added"), ("exp", "removed"),
    ]  # fmt: skip
    alive, gone = (next(n for n in g.nodes if n.name == "exp") for g in (now, then))
    assert compared.index(alive) == 1 and compared.index(gone) == 3


def test_order_of_what_is_gone_is_where_it_was():
    result = head_only()
    compared = Comparison.of(result)
    place = {one.was.name: i for i, one in enumerate(compared.drawn) if one.was is not None}
    before = [n.name for n in result.before.nodes if n.name in place]
    kept = [one.was.name for one in compared.drawn if one.was is not None]
    gone = {one.was.name for one in compared.drawn if one.status is Status.REMOVED}
    order = {name: i for i, name in enumerate(before)}
    for left, right in pairwise(kept):  # only passes that move operators may change their order
        assert order[left] < order[right] or left in gone or right in gone


def test_real_step_is_covered_and_every_loss_has_a_pass():
    result = head_only()
    compared = Comparison.of(result)
    proper = lambda graph: {n.name for n in graph.nodes if n.op != "output" and n.target is not getitem}
    alive = {one.node.name for one in compared.drawn if one.status is not Status.REMOVED}
    assert alive == proper(result.graph)
    then = {one.was.name for one in compared.drawn if one.was is not None}
    assert then == proper(result.before)
    removed = [one for one in compared.drawn if one.status is Status.REMOVED]
    assert removed and all(one.reason is not None for one in removed)
    by_pass = Counter(one.reason.pass_name for one in removed)
    assert by_pass["gradient_liveness"] > 10
    assert sum(one.reason.change is not None for one in removed) >= 0.9 * len(removed)


def test_an_operator_that_gives_less_says_why():
    result = head_only_of_convolutions()
    compared = Comparison.of(result)
    (narrowed,) = [
        one
        for one in compared.drawn
        if one.node.target is aten.convolution_backward.default and one.status is not Status.REMOVED
    ]
    assert narrowed.status is Status.CHANGED
    assert narrowed.reason is not None and narrowed.reason.pass_name == "gradient_liveness"
    change = compared.changes[narrowed.reason.change]
    assert change.what == "removed convolution_backward: input gradient" and change.module == "1"


def test_edges_of_each_side():
    result = head_only()
    compared = Comparison.of(result)
    for side, graph in ((0, result.before), (1, result.graph)):
        expected = set()
        for node in graph.nodes:
            for user in node.users:
                pair = compared.index(node), compared.index(user)
                if None not in pair and pair[0] != pair[1]:
                    expected.add(pair)
        assert {pair for pair, flags in compared.edges.items() if flags[side]} == expected


@pytest.mark.parametrize("graphs", [lambda: (head_only().before, head_only().graph)])
def test_two_graphs_without_a_record_of_passes(graphs):
    before, after = graphs()
    compared = Comparison(after, before)
    assert Status.REMOVED in {one.status for one in compared.drawn}
    assert all(one.reason is None for one in compared.drawn)
    assert isinstance(compared.after, TrainingGraph)


def test_result_of_passes_knows_what_was_before():
    def step(step, x):
        return aten.add.Tensor(aten.detach.default(aten.exp.default(x)), x)

    graph = traced(step, (3,))
    result = DeadCode()(NoOps()(graph))
    assert result.before is graph and result.removed == {"detach": "no_ops"}
    untouched = DeadCode()(result.graph)
    assert untouched.before is result.graph and untouched.removed == {}
    assert PassResult(graph).before is None
