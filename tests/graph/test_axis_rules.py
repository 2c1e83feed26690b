"""Axis rules are true for every operator of the table, by running it; `axis_rule_oracle` says how."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graphopt.graph.op_rules import NAMED, RULES
from tests.graph.axis_examples import SUBJECTS, calls
from tests.graph.axis_examples._calls import call, floats
from tests.graph.axis_rule_oracle import Call, assert_true, entry_of, recorded

aten = torch.ops.aten

EXCEPTED = {
    # no axis rule: all that they touch freezes, and is reported
    aten._cudnn_rnn, aten._cudnn_rnn_backward, aten._thnn_fused_lstm_cell, aten._thnn_fused_gru_cell,
    aten._thnn_fused_lstm_cell_backward, aten._thnn_fused_lstm_cell_backward_impl, aten._thnn_fused_gru_cell_backward,
    aten.cudnn_batch_norm_backward, aten.miopen_batch_norm_backward,
    aten._fused_dropout,  # CUDA only
    aten.mkldnn_rnn_layer_backward,  # reads a workspace of bytes, which no permutation reaches
}  # fmt: skip


def is_checked(example: Call) -> bool:
    return entry_of(example.operator) not in EXCEPTED


@pytest.mark.parametrize("subject", SUBJECTS)
def test_rules_are_true(subject: str) -> None:
    for example in filter(is_checked, calls(subject)):
        assert_true(example)


def test_every_entry_has_an_example() -> None:
    seen = {entry_of(example.operator) for subject in SUBJECTS for example in calls(subject)}
    assert not {str(key) for key in RULES if key not in seen and key not in EXCEPTED}
    assert {name.partition("::")[0] for name in NAMED} == {"_c10d_functional", "torch_attn", "transformers"}


# -- drawn sizes and arguments ---------------------------------------------------------------------------------------

sizes = st.integers(1, 5)


def check(example: Call) -> None:
    for one in filter(is_checked, (example, *recorded(example))):
        assert_true(one)


@given(st.data(), st.integers(1, 2), st.booleans())
def test_convolutions(data: st.DataObject, space: int, transposed: bool) -> None:
    each = lambda low, high: [data.draw(st.integers(low, high)) for _ in range(space)]
    groups = data.draw(st.integers(1, 3))
    before, after = (groups * data.draw(st.integers(1, 3)) for _ in range(2))
    kernel = each(1, 3)
    weight = floats(before if transposed else after, (after if transposed else before) // groups, *kernel)
    options = (each(1, 2), [0] * space, [1] * space, transposed, [0] * space, groups)
    check(call("convolution", floats(data.draw(sizes), before, *each(3, 5)), weight, floats(after), *options))


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.data())
def test_views(factors: list[int], data: st.DataObject) -> None:
    """Factors joined in two ways."""

    def joined() -> list[int]:
        result = [1]
        for factor in factors:
            if data.draw(st.booleans()):
                result.append(factor)
            else:
                result[-1] *= factor
        return result

    check(call("view", floats(*joined()), joined()))


@given(st.data(), sizes, st.integers(1, 12))
def test_slices(data: st.DataObject, rows: int, size: int) -> None:
    start, end = (data.draw(st.integers(-size - 1, size + 1)) for _ in range(2))
    step = data.draw(st.integers(1, 4))
    part = floats(rows, size)[:, start:end:step]
    check(call("slice.Tensor", floats(rows, size), 1, start, end, step))
    check(call("slice_backward", floats(*part.shape), [rows, size], 1, start, end, step))
    check(call("slice_scatter", floats(rows, size), floats(*part.shape), 1, start, end, step))


@given(st.data(), sizes, st.integers(1, 3), st.integers(1, 3), sizes, sizes)
def test_attention(data: st.DataObject, batch: int, heads: int, queries: int, rows: int, width: int) -> None:
    keys = rows if (causal := data.draw(st.booleans())) else data.draw(sizes)
    q, k, v = (
        floats(batch, heads * queries, rows, width),
        floats(batch, heads, keys, width),
        floats(batch, heads, keys, 3),
    )
    mask = None if causal else data.draw(st.sampled_from([None, floats(rows, keys), floats(batch, 1, 1, keys)]))
    check(call("scaled_dot_product_attention", q, k, v, mask, 0.0, causal, enable_gqa=True))


@given(st.permutations("abcd"), st.sets(st.sampled_from("abcd")), st.data())
def test_einsum(order: list[str], kept: set[str], data: st.DataObject) -> None:
    size = dict(zip("abcd", (2, 3, 4, 5)))
    left, right = "".join(order[:3]), "".join(order[data.draw(st.integers(0, 3)) :])
    equation = f"{left},{right}->{''.join(sorted(kept))}"
    check(call("einsum", equation, [floats(*(size[x] for x in term)) for term in (left, right)]))


@given(st.lists(st.integers(0, 5), min_size=1, max_size=4), st.integers(0, 1))
def test_cat_and_split(pieces: list[int], dim: int) -> None:
    shape = lambda size: (size, 3) if dim == 0 else (3, size)
    check(call("cat", [floats(*shape(size)) for size in pieces], dim))
    check(call("split_with_sizes", floats(*shape(sum(pieces))), pieces, dim))


@given(st.lists(st.integers(-2, 3), min_size=4, max_size=4))
def test_padding(amounts: list[int]) -> None:
    check(call("constant_pad_nd", floats(2, 5, 6), amounts, 1.0))


@given(
    sizes, st.lists(st.booleans(), min_size=3, max_size=3), sizes, st.lists(st.integers(1, 3), min_size=2, max_size=2)
)
def test_broadcasting(rows: int, ones: list[bool], columns: int, rest: list[int]) -> None:
    shape = (rows, columns, *rest)
    other = [1 if one else size for size, one in zip(shape[1:], ones)]
    check(call("mul.Tensor", floats(*shape), floats(*other)))
    check(call("expand", floats(*other), list(shape)))
