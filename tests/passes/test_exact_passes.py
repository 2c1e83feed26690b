"""Random small graphs through every exact pass and through all of them: the same bits, draws, types and aliases."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graphopt.graph.training_graph import Phase
from graphopt.passes import CommonSubexpressions, ConstantFolding, DeadCode, NoOps, Pipeline
from tests.helpers import assert_keeps_meaning, traced

aten = torch.ops.aten
END = 9223372036854775807

# Every value has the shape [3, 3] and one dtype, so that any operator takes any value.
FROM_NOTHING = [
    lambda step, dtype: step.call(aten.full.default, [3, 3], 1.0, dtype=dtype),
    lambda step, dtype: step.call(aten.full.default, [3, 3], -0.0, dtype=dtype),
    lambda step, dtype: step.call(aten.rand.default, [3, 3], dtype=dtype),
    lambda step, dtype: aten.lift_fresh_copy.default(step.constant(torch.ones(3, 3, dtype=dtype))),
    lambda step, dtype: aten.clone.default(step.constant(torch.eye(3, dtype=dtype))),
    lambda step, dtype: aten.expand.default(step.call(aten.ones.default, [3, 1], dtype=dtype), [3, 3]),
]
FROM_ONE = [
    lambda step, x: aten.exp.default(x),
    lambda step, x: aten.neg.default(x),
    lambda step, x: aten.detach.default(x),
    lambda step, x: aten.clone.default(x),
    lambda step, x: aten.clone.default(x, memory_format=torch.contiguous_format),
    lambda step, x: aten._to_copy.default(x),
    lambda step, x: aten._to_copy.default(aten._to_copy.default(x, dtype=torch.float16), dtype=torch.float32),
    lambda step, x: aten.t.default(x),
    lambda step, x: aten.transpose.int(x, 0, 1),
    lambda step, x: aten.permute.default(x, [1, 0]),
    lambda step, x: aten.expand.default(x, [3, 3]),
    lambda step, x: aten.squeeze.dim(aten.unsqueeze.default(x, 0), 0),
    lambda step, x: aten.view.default(aten.view.default(aten.exp.default(x), [3, 3, 1]), [3, 3]),
    lambda step, x: aten.reshape.default(aten.reshape.default(x, [9]), [3, 3]),
    lambda step, x: aten.slice.Tensor(x, 0, 0, END),
    lambda step, x: aten.slice_backward.default(aten.slice.Tensor(x, 0, 0, END), [3, 3], 0, 0, END, 1),
    lambda step, x: aten.slice_backward.default(aten.slice.Tensor(x, 1, 1, END), [3, 3], 1, 1, END, 1),
    lambda step, x: aten.mul.Tensor(x, 1.0),
    lambda step, x: aten.mul.Tensor(x, 1),
    lambda step, x: aten.mul.Tensor(x, -0.0),
    lambda step, x: aten.mul.Tensor(x, 0.0),
    lambda step, x: aten.add.Tensor(x, 0.0),
    lambda step, x: aten.div.Scalar(x, 1),
    lambda step, x: aten.pow.Tensor_Scalar(x, 1.0),
    lambda step, x: aten.rand_like.default(x, dtype=torch.float32),
    lambda step, x: aten.bernoulli.p(x, 0.5),
    lambda step, x: step.item(aten.sort.default(x, 1), 0),
    lambda step, x: step.item(aten.sort.default(x, 1), 1),
    lambda step, x: step.item(aten.split.Tensor(x, 3, 1), 0),
]
FROM_TWO = [
    lambda step, x, y: aten.add.Tensor(x, y),
    lambda step, x, y: aten.mul.Tensor(x, y),
    lambda step, x, y: aten.div.Tensor(x, y),
    lambda step, x, y: aten.mm.default(x, x),
    lambda step, x, y: aten.copy.default(x, y),
]


@st.composite
def graphs(draw):
    """A graph of up to twelve operators; the later ones may be of backward; outputs may repeat or be views."""
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    length = draw(st.integers(1, 12))
    border = draw(st.integers(0, length))

    def operator(step, pool):
        count = draw(st.sampled_from([0, 1, 1, 1, 1, 2, 2]))
        make = draw(st.sampled_from([FROM_NOTHING, FROM_ONE, FROM_TWO][count]))
        operands = [draw(st.sampled_from(pool)) for _ in range(count)] or [dtype]
        pool.append(make(step, *operands))

    def function(step, x, y):
        pool = [x, y]
        for _ in range(border):
            operator(step, pool)
        with step.phase(Phase.BACKWARD):
            for _ in range(length - border):
                operator(step, pool)
        return tuple(draw(st.lists(st.sampled_from(pool), min_size=1, max_size=4)))

    inputs = torch.randn(3, 3, dtype=dtype), torch.randn(3, 3, dtype=dtype).t()
    return traced(function, *inputs)


EXACT = [DeadCode(), CommonSubexpressions(), ConstantFolding(), NoOps()]


@pytest.mark.parametrize("rewriter", EXACT, ids=lambda p: p.name)
@given(graphs())
def test_each_pass(rewriter, graph):
    assert_keeps_meaning(rewriter, graph)


@given(graphs(), st.permutations(EXACT))
def test_passes_in_any_order(graph, passes):
    assert_keeps_meaning(Pipeline(passes * 4), graph)
