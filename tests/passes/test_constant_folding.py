"""ConstantFolding: what is computed once, what is no computation, and what only looks like none."""

import pytest
import torch

from graphopt.passes import ConstantFolding
from tests.helpers import assert_rewrite, traced

aten = torch.ops.aten


def full(step, size, value):
    return step.call(aten.full.default, size, value)


def test_a_chain_becomes_one_constant():
    def chain(step, x):
        return aten.add.Tensor(x, aten.sqrt.default(aten.add.Tensor(step.call(aten.arange.default, 3), 1)))

    expected = "%folded_0 = constant folded_0\n%add_1 = aten.add.Tensor(%x, %folded_0)\nreturn %add_1"
    result = assert_rewrite(ConstantFolding(), traced(chain, (3,)), expected)
    assert torch.equal(result.graph.constants["folded_0"], torch.tensor([1.0, 2.0, 3.0]).sqrt())


def test_literals_of_the_traced_code_fold_and_tensors_of_the_model_do_not():
    def literal(step, x):
        made = aten.neg.default(aten.lift_fresh_copy.default(step.constant(torch.ones(3))))
        return aten.add.Tensor(aten.add.Tensor(x, made), aten.neg.default(step.constant(torch.ones(3))))

    expected = """
    %folded_0 = constant folded_0
    %add = aten.add.Tensor(%x, %folded_0)
    %constant1 = constant constant1
    %neg_1 = aten.neg(%constant1)
    %add_1 = aten.add.Tensor(%add, %neg_1)
    return %add_1
    """
    result = assert_rewrite(ConstantFolding(), traced(literal, (3,)), expected)
    assert set(result.graph.constants) == {"folded_0", "constant1"}


def test_a_large_constant_is_computed_in_each_step():
    graph = traced(lambda step, x: aten.add.Tensor(x, full(step, [3, 3], 2.0)), (3, 3))
    assert_rewrite(ConstantFolding(limit=35), graph)
    assert ConstantFolding(limit=36)(graph).changed


def test_an_output_is_not_a_constant():
    graph = traced(lambda step: aten.view.default(full(step, [4], 2.0), [2, 2]))
    assert_rewrite(ConstantFolding(), graph, refused="an output would be the constant itself")


@pytest.mark.parametrize("operator", [aten.rand.default, aten.empty.memory_format])
def test_random_and_undefined_values_are_not_constant(operator):
    graph = traced(lambda step, x: aten.zeros_like.default(aten.mul.Tensor(step.call(operator, [3]), x)), (3,))
    assert_rewrite(ConstantFolding(), graph)


def test_a_view_that_is_not_contiguous_reads_a_constant():
    graph = traced(lambda step, x: aten.add.Tensor(x, aten.expand.default(full(step, [1], 2.0), [2, 3])), (2, 3))
    expected = """
    %folded_0 = constant folded_0
    %expand = aten.expand(%folded_0, [2, 3])
    %add = aten.add.Tensor(%x, %expand)
    return %add
    """
    assert_rewrite(ConstantFolding(), graph, expected)


@pytest.mark.parametrize(
    "identity",
    [
        lambda step, x: aten.mul.Tensor(x, 1.0),
        lambda step, x: aten.mul.Tensor(x, 1),
        lambda step, x: aten.mul.Tensor(full(step, [], 1.0), x),
        lambda step, x: aten.div.Tensor(x, full(step, [2, 3], 1.0)),
        lambda step, x: aten.div.Scalar(x, 1),
        lambda step, x: aten.pow.Tensor_Scalar(x, 1.0),
        lambda step, x: aten.mul.Tensor(x, aten.expand.default(aten.ones_like.default(x), [2, 3])),
        lambda step, x: aten.mul.Tensor(x, aten.lift_fresh_copy.default(step.constant(torch.ones(2, 3)))),
        lambda step, x: aten.mul.Tensor(aten.mul.Scalar(x, 1), 1),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_identities(identity, dtype):
    graph = traced(lambda step, x: aten.abs.default(identity(step, x)), torch.randn(2, 3).to(dtype))
    result = ConstantFolding()(graph)
    if result.graph.nodes[-2].args[0].op == "placeholder":
        assert_rewrite(ConstantFolding(), graph, "%abs_1 = aten.abs(%x)\nreturn %abs_1")
    else:
        assert dtype != torch.float32  # the one is a float32 tensor of the same shape: the product is promoted
        assert not any("operand is 1" in c.what for c in result.changes)


@pytest.mark.parametrize(
    "other",
    [
        lambda step, x: aten.add.Tensor(x, 0.0),
        lambda step, x: aten.mul.Tensor(x, 0.0),
        lambda step, x: aten.mul.Tensor(x, full(step, [4, 2, 3], 1.0)),
        lambda step, x: aten.div.Tensor(full(step, [], 1.0), x),
        lambda step, x: aten.mul.Tensor(
            x, aten.view.dtype(aten.full_like.default(x, 1, dtype=torch.int32), torch.float32)
        ),
    ],
)
def test_what_only_looks_like_an_identity(other):
    graph = traced(lambda step, x: aten.abs.default(other(step, x)), (2, 3))
    result = ConstantFolding()(graph)
    assert not any("operand is 1" in c.what for c in result.changes)


def test_a_complex_product_with_one_is_no_identity():
    graph = traced(lambda step, x: aten.abs.default(aten.mul.Tensor(x, 1.0)), torch.randn(3, dtype=torch.complex64))
    assert_rewrite(ConstantFolding(), graph, special=False)


def test_an_output_does_not_become_an_input():
    graph = traced(lambda step, x: aten.mul.Tensor(x, 1.0), (3,))
    assert_rewrite(ConstantFolding(), graph, refused="the input %x")
