"""CommonSubexpressions: which twins merge, and which only look alike."""

import pytest
import torch

from graphopt.graph.capture import capture
from graphopt.graph.training_graph import Phase
from graphopt.passes import CommonSubexpressions
from tests.helpers import assert_rewrite, traced

aten = torch.ops.aten


def test_twins_merge_with_all_that_follows():
    def twins(step, x):
        a, b = (aten.sin.default(aten.exp.default(x)) for _ in range(2))
        return aten.add.Tensor(a, b)

    expected = """
    %exp = aten.exp(%x)
    %sin = aten.sin(%exp)
    %add = aten.add.Tensor(%sin, %sin)
    return %add
    """
    assert_rewrite(CommonSubexpressions(), traced(twins, (3,)), expected)


def test_operators_with_several_results_merge():
    def twins(step, x):
        a, b = (aten.max.dim(x, 1) for _ in range(2))
        return aten.add.Tensor(step.item(a, 0), step.item(b, 0)), step.item(b, 1)

    expected = """
    %max_1 = aten.max.dim(%x, 1)
    %getitem = getitem(%max_1, 0)
    %add = aten.add.Tensor(%getitem, %getitem)
    %getitem_2 = getitem(%max_1, 1)
    return %add, %getitem_2
    """
    result = assert_rewrite(CommonSubexpressions(), traced(twins, (3, 4)), expected)
    assert len(result.changes) == 2


@pytest.mark.parametrize("one, other", [(1, 1.0), (1, True), (0.0, -0.0), (2, 3)])
def test_numbers_differ_by_type_and_sign(one, other):
    def numbers(step, x):
        return aten.sub.Tensor(aten.mul.Tensor(x, one), aten.mul.Tensor(x, other))

    assert_rewrite(CommonSubexpressions(), traced(numbers, (3,)))


@pytest.mark.parametrize("operator", [aten.rand_like.default, aten.bernoulli.default, aten.empty_like.default])
def test_random_and_undefined_values_are_never_the_same(operator):
    def draws(step, x):
        return aten.zeros_like.default(operator(aten.sigmoid.default(x))), aten.ones_like.default(
            operator(aten.sigmoid.default(x))
        )

    graph = traced(draws, (3,))
    result = CommonSubexpressions()(graph)
    assert sum(n.target is operator for n in result.graph.nodes) == 2
    assert len(result.changes) == 1  # the sigmoid


def test_two_outputs_do_not_become_one():
    graph = traced(lambda step, x: (aten.exp.default(x), aten.exp.default(x)), (3,))
    assert_rewrite(CommonSubexpressions(), graph, refused="output 1 would become the same tensor as output 0")


def test_two_outputs_do_not_share_memory():
    graph = traced(lambda step, x: (aten.t.default(aten.exp.default(x)), aten.exp.default(x)), (3, 2))
    assert_rewrite(CommonSubexpressions(), graph, refused="output 1 would share memory with output 0")


def test_results_of_one_operator_do_not_become_one_output():
    def twins(step, x):
        return tuple(step.item(aten.max.dim(x, 1), 0) for _ in range(2))

    assert_rewrite(CommonSubexpressions(), traced(twins, (3, 4)), refused="output 1 would become the same tensor")


def test_a_recomputed_value_is_not_kept_instead():
    def recomputed(step, x):
        y = aten.sum.default(aten.exp.default(x))
        with step.phase(Phase.BACKWARD):
            return y, aten.neg.default(aten.exp.default(x))

    assert_rewrite(CommonSubexpressions(), traced(recomputed, (8,)), refused="%exp would have to be kept for backward")


def test_a_recomputed_result_of_several_is_not_kept_instead():
    def recomputed(step, x):
        y = step.item(aten.max.dim(x, 1), 0)
        with step.phase(Phase.BACKWARD):
            return y, aten.neg.default(step.item(aten.max.dim(x, 1), 1))

    assert_rewrite(CommonSubexpressions(), traced(recomputed, (8, 2)), refused="would have to be kept for backward")


def test_what_is_kept_anyway_is_not_computed_again():
    def kept(step, x):
        y = aten.exp.default(x)
        with step.phase(Phase.BACKWARD):
            return aten.mul.Tensor(aten.neg.default(y), aten.exp.default(x))

    expected = """
    %exp = aten.exp(%x)
    %neg = aten.neg(%exp)
    %mul = aten.mul.Tensor(%neg, %exp)
    return %mul
    """
    assert_rewrite(CommonSubexpressions(), traced(kept, (8,)), expected)


def test_views_are_free_across_the_border():
    def views(step, x, w):
        y = aten.mm.default(x, aten.t.default(w))
        with step.phase(Phase.BACKWARD):
            return aten.mm.default(y, aten.t.default(aten.t.default(w)))

    expected = """
    %t = aten.t(%w)
    %mm = aten.mm(%x, %t)
    %t_2 = aten.t(%t)
    %mm_1 = aten.mm(%mm, %t_2)
    return %mm_1
    """
    assert_rewrite(CommonSubexpressions(), traced(views, (8, 3), (4, 3)), expected)


def test_the_same_constant_is_one():
    def constants(step, x):
        one = step.constant(torch.ones(3))
        again = step.tracer.create_proxy("get_attr", one.node.target, (), {})
        return aten.add.Tensor(aten.add.Tensor(x, one), again)

    expected = """
    %constant0 = constant constant0
    %add = aten.add.Tensor(%x, %constant0)
    %add_1 = aten.add.Tensor(%add, %constant0)
    return %add_1
    """
    assert_rewrite(CommonSubexpressions(), traced(constants, (3,)), expected)


def test_sizes_are_equal_where_their_expressions_are():
    class Pooled(torch.nn.Module):
        def forward(self, x):
            return x.view(x.shape[0], -1), x.sum(1).view(-1), x.view(x.shape[0] * 4)

    graph = capture(Pooled(), torch.randn(6, 2, 2).requires_grad_(True))
    result = CommonSubexpressions()(graph)
    sizes = [n.meta["val"].node.expr for n in result.graph.nodes if isinstance(n.meta.get("val"), torch.SymInt)]
    assert len(sizes) == len(set(sizes)) and not result.refusals


def test_equal_operators_merge_though_each_gives_another_result():
    def parts(step, x):
        values, indices = (step.item(aten.max.dim(x, 1), i) for i in range(2))
        with step.phase(Phase.BACKWARD):
            return aten.neg.default(values), aten.neg.default(indices)

    expected = """
    %max_1 = aten.max.dim(%x, 1)
    %getitem = getitem(%max_1, 0)
    %getitem_1 = getitem(%max_1, 1)
    %neg = aten.neg(%getitem)
    %neg_1 = aten.neg(%getitem_1)
    return %neg, %neg_1
    """
    assert_rewrite(CommonSubexpressions(), traced(parts, (3, 4)), expected)
