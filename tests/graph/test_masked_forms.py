"""`masked_form`: a backward operator computed from a boolean mask has the same bits and strides."""

from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx

from graphopt.graph.op_rules import RULES, masked_form, operand, output_mask
from tests.graph.operator_nodes import LAYOUTS, node_of, same_bits, with_layout

aten = torch.ops.aten

BACKWARDS: list[tuple[Any, tuple[Any, ...]]] = [
    (aten.threshold_backward.default, (0,)),
    (aten.threshold_backward.default, (0.5,)),
    (aten.threshold_backward.default, (-1,)),
    (aten.hardtanh_backward.default, (0.0, 6.0)),
    (aten.hardtanh_backward.default, (-1, 1)),
    (aten.leaky_relu_backward.default, (0.01, False)),
    (aten.leaky_relu_backward.default, (0.2, True)),
    (aten.leaky_relu_backward.default, (-0.3, False)),
    (aten.hardsigmoid_backward.default, ()),
    (aten.softshrink_backward.default, (0.5,)),
    (aten.hardshrink_backward.default, (0.5,)),
]

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SPECIAL = [0.0, -0.0, float("inf"), -float("inf"), 1e-40, -1e-40, 0.5, -0.5, 1.0, -1.0, 3.0, -3.0, 6.0]
NAN = float("nan")

backwards = st.sampled_from(BACKWARDS)
dtypes = st.sampled_from(DTYPES)


def values(count: int, special: list[float], dtype: torch.dtype) -> torch.Tensor:
    """Random numbers, every other one from ``special``."""
    drawn = torch.tensor(special)[torch.randint(0, len(special), (count,))]
    return torch.where(torch.rand(count) < 0.5, drawn, 3 * torch.randn(count)).to(dtype)


def through_mask(node: fx.Node) -> torch.Tensor:
    """The node's value by its masked form; the mask is boolean and all the result needs of the operand."""
    form = masked_form(node)
    assert form is not None
    add = partial(append, node.graph)
    mask = form.mask(add, node)
    assert mask.meta["val"].dtype == torch.bool
    assert operand(node, form.operand).meta["val"].shape == mask.meta["val"].shape
    before = set(node.graph.nodes)
    result = form.apply(add, node, mask)
    replaced = operand(node, form.operand)
    assert not any(replaced in new.all_input_nodes for new in node.graph.nodes if new not in before)
    return result.meta["val"]


def append(graph: fx.Graph, operator: Any, *args: Any) -> fx.Node:
    """Add a node at the graph's end and run it."""
    node = graph.call_function(operator, args)
    node.meta["val"] = operator(*fx.node.map_arg(args, lambda n: n.meta["val"]))
    return node


@given(backwards, dtypes, st.integers(1, 200))
@settings(max_examples=6 * settings().max_examples)
def test_bits_are_equal(backward: tuple[Any, tuple[Any, ...]], dtype: torch.dtype, count: int) -> None:
    operator, options = backward
    gradient, x = values(count, [*SPECIAL, NAN], dtype), values(count, SPECIAL, dtype)
    node = node_of(operator, gradient, x, *options)
    assert same_bits(node.meta["val"], through_mask(node))


@given(backwards, dtypes, st.integers(1, 200))
@settings(max_examples=6 * settings().max_examples)
def test_nan_in_the_operand(backward: tuple[Any, tuple[Any, ...]], dtype: torch.dtype, count: int) -> None:
    operator, options = backward
    gradient, x = values(count, [*SPECIAL, NAN], dtype), values(count, [NAN, 0.0, 1.0], dtype)
    node = node_of(operator, gradient, x, *options)
    form, result = masked_form(node), through_mask(node)
    assert form is not None
    if form.exact_for_nan:
        assert same_bits(node.meta["val"], result)
    else:
        assert same_bits(node.meta["val"][~x.isnan()], result[~x.isnan()])
        assert torch.all(result[x.isnan()] == 0)


STORED = [layout for layout in LAYOUTS if layout != "expanded"]


@given(backwards, st.sampled_from(LAYOUTS), st.sampled_from(STORED), st.integers(1, 3), st.integers(1, 3))
@settings(max_examples=4 * settings().max_examples)
def test_strides_are_equal(backward: tuple[Any, tuple[Any, ...]], left: str, right: str, n: int, c: int) -> None:
    operator, options = backward
    gradient, x = with_layout(torch.randn(n, c, 4, 5), left), with_layout(torch.randn(n, c, 4, 5), right)
    node = node_of(operator, gradient, x, *options)
    if operator is aten.hardsigmoid_backward.default and 0 in gradient.stride():  # a product comes before its mask
        assert masked_form(node) is None
    else:
        assert same_bits(node.meta["val"], through_mask(node))


def test_a_bound_that_16_bits_do_not_hold_is_refused() -> None:
    x = torch.randn(4)
    assert masked_form(node_of(aten.threshold_backward.default, x, x.clone(), 0.1)) is not None
    low = x.bfloat16()
    assert masked_form(node_of(aten.threshold_backward.default, low, low.clone(), 0.1)) is None
    assert masked_form(node_of(aten.threshold_backward.default, low, low.clone(), 0.5)) is not None


def test_a_broadcast_operand_is_refused() -> None:
    x = torch.randn(4, 1).expand(4, 3)
    assert masked_form(node_of(aten.threshold_backward.default, torch.randn(4, 3), x, 0)) is None


def test_other_operators_have_no_form() -> None:
    x = torch.randn(4)
    assert masked_form(node_of(aten.gelu_backward.default, x, x.clone())) is None
    assert masked_form(node_of(aten.relu.default, x)) is None
    assert output_mask(node_of(aten.relu.default, x)) is None


def test_every_form_of_the_table_is_tested() -> None:
    assert {packet for packet, rule in RULES.items() if rule.masked} == {o.overloadpacket for o, _ in BACKWARDS}


@pytest.mark.parametrize("operator, options", BACKWARDS)
def test_fake_tensors_agree(operator: Any, options: tuple[Any, ...]) -> None:
    """The forms rest on type promotion of a boolean operand: shape inference must know it too."""
    gradient, x = torch.empty(2, 3, device="meta", dtype=torch.bfloat16), torch.empty(2, 3, device="meta")
    node = node_of(operator, gradient, x.bfloat16(), *options)
    assert through_mask(node).dtype == torch.bfloat16
