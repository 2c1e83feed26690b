"""Calls of gather and scatter."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from tests.graph.axis_examples._calls import below, call, floats
from tests.graph.axis_rule_oracle import Call


def gathers() -> Iterator[Call]:
    table, x, indices = floats(6, 4), floats(4, 5, 6), below(4, 2, 3)
    yield call("embedding", table, below(6, 2, 3))
    yield call("embedding", table, below(6, 2, 3), 0)
    bags = (below(6, 7), torch.tensor([0, 3, 5]))
    for mode in (0, 1, 2):
        yield call("_embedding_bag", table, *bags, False, mode)
        yield call("_embedding_bag_forward_only", table, *bags, False, mode)
        yield call("embedding_bag", table, *bags, False, mode)
    yield call("_embedding_bag", table, *bags, False, 0, False, floats(7))
    places = (torch.tensor([0, 0, 0, 1, 1, 2, 2]), torch.tensor([3, 2, 2]))
    yield call("_embedding_bag_dense_backward", floats(3, 4), bags[0], *places, floats(0).long(), 6, False, 0, None)
    yield call("index_fill.int_Scalar", x, 1, torch.tensor([2, 0]), 1.0)
    yield call("masked_scatter_backward", x, x > 0, [120])
    for given in ([indices], [None, indices], [None, None, indices], [indices, below(5, 3)],
                  [indices, None, below(6, 3)], [None, below(5, 3), below(6, 2, 3)], [x[:, 0, 0] > 0],
                  [None, below(5, 3), None]):  # fmt: skip
        yield call("index.Tensor", x, given)
    yield call("_unsafe_index.Tensor", x, [None, indices])
    for dim in (0, 1, -1):
        yield call("gather", x, dim, below(4, *(3 if d == dim % 3 else s for d, s in enumerate((4, 5, 6)))))
        yield call("gather", x, dim, below(4, 2, 3, 4))
        index = below(4, *(3 if d == dim % 3 else s for d, s in enumerate((4, 5, 6))))
        source = floats(*index.shape)
        unlike = index.argsort(dim).contiguous()  # no place twice
        yield call("scatter.src", x, dim, unlike, source)
        yield call("scatter.value", x, dim, index, 1.0)
        yield call("scatter_add", x, dim, index, source)
        yield call("scatter_add", x, dim, below(4, 2, 3, 4), floats(3, 4, 6))
        yield call("scatter.reduce", x, dim, index, source, reduce="add")
        yield call("scatter.value_reduce", x, dim, index, 2.0, reduce="multiply")
        yield call("scatter_reduce.two", x, dim, index, source, "amax")
        vector = torch.tensor([2, 0, 3])
        yield call("index_select", x, dim, vector)
        part = floats(*(3 if d == dim % 3 else s for d, s in enumerate((4, 5, 6))))
        yield call("index_add", x, dim, vector, part)
        yield call("index_copy", x, dim, vector, part)
    yield call("index_put", x, [indices], floats(2, 3, 5, 6), True)
    yield call("index_put", x, [None, below(5, 3)], floats(4, 3, 6), True)
    yield call("index_put", x, [torch.tensor([0, 2]), None, torch.tensor([1, 3])], floats(2, 5), False)
    yield call("index_put", x, [x[:, 0, 0] > 0], torch.tensor(1.0, dtype=torch.float64))
    yield call("_unsafe_index_put", x, [indices], floats(5, 6), True)
    yield call("index.Tensor", x, [None, floats(5, 6) > 0])
    yield call("index_put", x, [x[:, 0, 0] > -9], floats(4, 5, 6))
    yield call("index_put", x, [x[:, 0, 0] > -9], floats(5, 1), True)
    yield call("index_put", x, [None, x[0, :, 0] > -9], floats(4, 5, 6))
    yield call("masked_scatter", x, x > 0, floats(4, 5, 6))
    yield call("masked_select", x, x > 0)
    yield call("nonzero", x > 0)
    yield call("slice_scatter", x, floats(4, 2, 6), 1, 1, 3)
    yield call("slice_scatter", x, floats(4, 5, 3), 2, 0, 6, 2)
    yield call("slice_scatter", floats(6, 4), floats(2, 4), 0, -7, 6, 3)
    yield call("select_scatter", x, floats(4, 6), 1, -1)
    yield call("as_strided_scatter", x, floats(4, 5, 6), [4, 5, 6], [30, 6, 1])
    yield call("as_strided_scatter", x, floats(4, 2), [4, 2], [30, 1])
    yield call("diagonal_scatter", floats(4, 4), floats(4))
    yield call("slice_backward", floats(4, 2, 6), [4, 5, 6], 1, 1, 3, 1)
    yield call("slice_backward", floats(4, 5, 3), [4, 5, 6], 2, 1, 6, 2)
    yield call("slice_backward", floats(4, 2, 6), [4, 5, 6], 1, 0, 5, 3)
    yield call("select_backward", floats(4, 6), [4, 5, 6], 1, -1)
    yield call("diagonal_backward", floats(4), [4, 4], 0, 0, 1)
    yield call("unfold_backward", floats(4, 2, 3), [4, 6], 1, 3, 3)
