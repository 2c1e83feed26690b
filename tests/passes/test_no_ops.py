"""NoOps: which views and copies go, and which stay because someone could see it."""

import pytest
import torch

from graphopt.graph.training_graph import Phase
from graphopt.passes import NoOps
from tests.helpers import assert_rewrite, traced

aten = torch.ops.aten
EXP_OF_X = "%exp = aten.exp(%x)\nreturn %exp"


@pytest.mark.parametrize(
    "nothing",
    [
        lambda x: aten.alias.default(aten.detach.default(x)),
        lambda x: aten.view.default(x, [2, 3]),
        lambda x: aten.view.default(x, [-1, 3]),
        lambda x: aten.view.default(aten.view.default(x, [6]), [2, 3]),
        lambda x: aten.expand.default(x, [2, 3]),
        lambda x: aten.slice.Tensor(x, 1, 0, 9223372036854775807),
        lambda x: aten.t.default(aten.t.default(x)),
        lambda x: aten.transpose.int(aten.permute.default(x, [1, 0]), 0, 1),
        lambda x: aten.squeeze.dim(aten.unsqueeze.default(x, 1), 1),
        lambda x: aten.clone.default(x),
        lambda x: aten._to_copy.default(x, dtype=torch.float32),
        lambda x: aten.slice_backward.default(x, [2, 3], 0, 0, 9223372036854775807, 1),
        lambda x: aten.clone.default(aten.t.default(aten.clone.default(aten.t.default(x)))),
    ],
)
def test_nothing_changes(nothing):
    graph = traced(lambda step, x: aten.exp.default(nothing(x)), (2, 3))
    assert_rewrite(NoOps(), graph, EXP_OF_X)


@pytest.mark.parametrize(
    "something",
    [
        lambda x: aten.view.default(x, [3, 2]),
        lambda x: aten.t.default(x),
        lambda x: aten.slice.Tensor(x, 0, 1, 9223372036854775807),
        lambda x: aten._to_copy.default(x, dtype=torch.float64),
        lambda x: aten.clone.default(aten.t.default(x), memory_format=torch.contiguous_format),
        lambda x: aten.clone.default(aten.expand.default(x, [4, 2, 3])),
        lambda x: aten.slice_backward.default(x, [3, 3], 0, 0, 2, 1),
        lambda x: aten.view.default(aten.t.default(aten.view.default(x, [1, 6])), [6]),
        # a reshape that copies must not be taken for a view of what it copied
        lambda x: aten.view.default(aten.reshape.default(aten.t.default(aten.reshape.default(x, [3, 2])), [6]), [3, 2]),
    ],
)
def test_something_changes(something):
    graph = traced(lambda step, x: aten.exp.default(something(x)), (2, 3))
    assert_rewrite(NoOps(), graph)


def test_the_earliest_of_equal_views_stays():
    graph = traced(lambda step, x: aten.add.Tensor(aten.t.default(x), aten.permute.default(x, [1, 0])), (2, 3))
    assert_rewrite(NoOps(), graph, "%t = aten.t(%x)\n%add = aten.add.Tensor(%t, %t)\nreturn %add")


def test_views_of_views_read_through():
    graph = traced(lambda step, x: aten.exp.default(aten.view.default(aten.view.default(x, [6]), [3, 2])), (2, 3))
    expected = "%view_1 = aten.view(%x, [3, 2])\n%exp = aten.exp(%view_1)\nreturn %exp"
    assert_rewrite(NoOps(), graph, expected)


def test_results_of_splits_are_views_of_one_storage():
    def halves(step, x):
        parts = aten.split.Tensor(x, 2, 1)
        first, second = step.item(parts, 0), step.item(parts, 1)
        return aten.sub.Tensor(aten.t.default(aten.t.default(second)), first)

    expected = """
    %split = aten.split.Tensor(%x, 2, 1)
    %getitem = getitem(%split, 0)
    %getitem_1 = getitem(%split, 1)
    %sub = aten.sub.Tensor(%getitem_1, %getitem)
    return %sub
    """
    assert_rewrite(NoOps(), traced(halves, (3, 4)), expected)


def test_a_constant_is_read_where_it_lies():
    graph = traced(lambda step, x: aten.add.Tensor(x, aten.lift_fresh_copy.default(step.constant(torch.ones(3)))), (3,))
    expected = "%constant0 = constant constant0\n%add = aten.add.Tensor(%x, %constant0)\nreturn %add"
    assert_rewrite(NoOps(), graph, expected)


def test_an_output_does_not_become_an_input():
    graph = traced(lambda step, x: aten.clone.default(x), (2, 3))
    assert_rewrite(NoOps(), graph, refused="the input %x")


def test_an_output_does_not_become_a_constant():
    graph = traced(lambda step: aten.lift_fresh_copy.default(step.constant(torch.ones(3))))
    assert_rewrite(NoOps(), graph, refused="output 0 would become the same tensor as the constant")


def test_views_of_a_copy_count_as_the_copy():
    graph = traced(lambda step, x: aten.t.default(aten.clone.default(x)), (2, 3))
    assert_rewrite(NoOps(), graph, refused="the input %x")


def test_two_outputs_do_not_become_one():
    def twins(step, x):
        y = aten.exp.default(x)
        return y, aten.clone.default(y), aten.detach.default(y)

    result = assert_rewrite(NoOps(), traced(twins, (2, 3)), refused="output 1 would become the same tensor as output 0")
    assert "output 2 would become the same tensor as output 0" in [r.why for r in result.refusals]


def test_one_output_may_be_the_value_itself():
    graph = traced(lambda step, x: aten.clone.default(aten.exp.default(x)), (2, 3))
    assert_rewrite(NoOps(), graph, EXP_OF_X)


def test_a_copy_of_a_part_is_kept_rather_than_the_whole():
    def part(step, x):
        small = aten.clone.default(aten.slice.Tensor(aten.exp.default(x), 0, 0, 1))
        with step.phase(Phase.BACKWARD):
            return aten.neg.default(small)

    assert_rewrite(NoOps(), traced(part, (100, 3)), refused="%exp would have to be kept for backward")


def test_a_value_kept_instead_of_its_copy_saves_nothing_and_costs_nothing():
    def copied(step, x):
        y = aten.clone.default(aten.exp.default(x))
        with step.phase(Phase.BACKWARD):
            return aten.neg.default(y)

    result = assert_rewrite(NoOps(), traced(copied, (4, 4)), "%exp = aten.exp(%x)\n%neg = aten.neg(%exp)\nreturn %neg")
    assert result.saving.bytes_kept == 0
    assert result.saving.bytes_moved == 2 * 4 * 16
