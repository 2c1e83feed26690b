"""Axis rules broken on purpose: the checks by execution must notice.

One row of `MUTATIONS` a way to break a rule, and an example that the oracle accepts as the library is. Sizes are equal
where a wrong rule would else be noticed by sizes alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from graphopt.graph.axes.factors import Factors
from graphopt.graph.op_rules import RULES, reductions
from graphopt.graph.op_rules.axis_rules import attention, cuts, gather, images, normalisation, views
from graphopt.graph.op_rules.axis_rules import pointwise as pw
from graphopt.graph.op_rules.axis_rules.pattern import Pattern
from graphopt.graph.op_rules.reductions import along
from tests.graph.axis_examples._calls import below, call, floats
from tests.graph.axis_rule_oracle import Call, analysed, assert_true, entry_of
from tests.graph.test_axis_rules_reductions import joins

f = floats
Breaks = Callable[[pytest.MonkeyPatch, Call], None]


@dataclass(frozen=True)
class Mutation:
    """A way to break a rule, and an example that notices."""

    what: str
    breaks: Breaks
    example: Call


def axes(rule: Any) -> Breaks:
    """Another axis rule for the operator of the example: a function, or a pattern."""
    made = Pattern(rule) if isinstance(rule, str) else rule

    def breaks(patch: pytest.MonkeyPatch, example: Call) -> None:
        key = entry_of(example.operator)
        patch.setitem(RULES, key, replace(RULES[key], axes=made))

    return breaks


def put(module: Any, name: str, value: Any) -> Breaks:
    """Another function in a module."""
    return lambda patch, example: patch.setattr(module, name, value)


def inner_first(patch: pytest.MonkeyPatch, example: Call) -> None:
    """Every dimension that a rule splits in two is split the other way round: 12 = 3 x 4 for 12 = 4 x 3."""
    original = Factors.reshape

    def reshape(self: Any, dims: Any, sizes: Any) -> Any:
        return original(self, dims, list(sizes)[::-1])[::-1] if len(dims) == 1 else original(self, dims, sizes)

    patch.setattr(Factors, "reshape", reshape)


def first_dimension(see: Any, node: Any) -> Any:
    """Concatenation along dimension 0, whatever the node says."""
    sources = [see.of(source) for source in node.args[0]]
    see.unify(sources[0][1], sources[1][1])
    return (see.concat([s[0] for s in sources]), sources[0][1])


def same_hidden(see: Any, node: Any, inputs: Any, weights: Any, size: int) -> Any:
    """The gates of a recurrent layer as the inner factor."""
    hidden = None
    for position, weight in enumerate(weights):
        its, gates = see.reshape([weight[0]], [size, weight[0].size // size])
        see.freeze(gates, "gates")
        hidden = its if hidden is None else see.meet(hidden, its)
        if len(weight) > 1:
            see.unify(weight[1], hidden if position else inputs)
    return hidden


SQUARE = f(3, 3)
CONVOLVED = ([1, 1], [0, 0], [1, 1], False, [0, 0])
TURNED = ([1, 1], [0, 0], [1, 1], True, [0, 0])
GROUPED = call("convolution", f(2, 4, 3, 3), f(4, 2, 2, 2), None, *CONVOLVED, 2)
HEADS = call("scaled_dot_product_attention", f(2, 6, 3, 4), f(2, 3, 5, 4), f(2, 3, 5, 4), enable_gqa=True)
IN_GROUPS = call("native_group_norm", f(2, 6, 5), f(6), f(6), 2, 6, 5, 3, 1e-5)
STATES = (f(1, 2, 4), f(1, 2, 4))
MUTATIONS = [
    Mutation("mm contracts the last dimensions", axes("self: mk, mat2: nk -> mn"), call("mm", SQUARE, f(3, 3))),
    Mutation("mm gives its transpose", axes("self: mk, mat2: kn -> nm"), call("mm", SQUARE, f(3, 3))),
    Mutation("addmm adds along rows", axes("self: m, mat1: mk, mat2: kn -> mn"), call("addmm", f(3), SQUARE, f(3, 3))),
    Mutation("a bias is along the input", axes("input: *k, weight: nk, bias: k -> *n"),
             call("linear", SQUARE, f(3, 3), f(3))),
    Mutation("layer norm's weight is along the rows", axes("input: ab, normalized_shape: , weight: a, bias: a -> ab"),
             call("layer_norm", SQUARE, [3], f(3), f(3))),
    Mutation("layer norm's statistics are of columns", axes("input: ab, weight: b, bias: b -> ab; 1b; 1b"),
             call("native_layer_norm", SQUARE, [3], f(3), f(3), 1e-5)),
    Mutation("batch norm is along dimension 0", axes("input: abc, weight: a, bias: a -> abc"),
             call("batch_norm", f(4, 4, 2), f(4), f(4), f(4), f(4), True, 0.1, 1e-5, False)),
    Mutation("group norm has its groups inside", inner_first, IN_GROUPS),
    Mutation("cat is along dimension 0", axes(first_dimension), call("cat", [SQUARE, f(3, 3)], 1)),
    Mutation("stack puts its dimension first", axes(lambda see, node: cuts.stack(see, node)[::-1]),
             call("stack", [f(2), f(2)], 1)),
    Mutation("a convolution has its groups inside", inner_first, GROUPED),
    Mutation("a convolution takes output for input channels", axes("input: nihw, weight: ioxy -> noHW"),
             call("convolution", f(2, 3, 4, 4), f(3, 3, 2, 2), None, *CONVOLVED, 1)),
    Mutation("a transposed convolution is a plain one", axes("input: nihw, weight: oixy -> noHW"),
             call("convolution", f(2, 3, 4, 4), f(3, 3, 2, 2), None, *TURNED, 1)),
    Mutation("positions pass through windows", put(images, "_kernel", lambda weight: "point"),
             call("convolution", f(2, 3, 4, 4), f(3, 3, 3, 3), None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1)),
    Mutation("pooling leaves positions free", put(images, "_moved", lambda see, node, before, sizes, kernel: before),
             call("avg_pool2d", f(2, 3, 4, 4), [3, 3], [1, 1], [1, 1])),
    Mutation("heads are queries x groups", inner_first, HEADS),
    Mutation("values are as wide as keys are many", axes("query: bhle, key: bhse, value: bhes -> bhls"),
             call("scaled_dot_product_attention", f(2, 3, 4, 4), f(2, 3, 4, 4), f(2, 3, 4, 4))),
    Mutation("causal order does not matter", axes("query: bhle, key: bhse, value: bhsv -> bhlv"),
             call("scaled_dot_product_attention", *(f(2, 3, 4, 4) for _ in "qkv"), None, 0.0, True)),
    Mutation("gates are inside of the hidden dimension", put(attention, "_layer", same_hidden),
             call("lstm.input", f(3, 2, 4), list(STATES), [f(16, 4), f(16, 4)], False, 1, 0.0, False, False, False)),
    Mutation("a softmax is of another axis", axes("self: ab -> ba"), call("_softmax", SQUARE, 1, False)),
    Mutation("targets name nothing", axes("self: nc, target: n -> ;"),
             call("nll_loss_forward", f(4, 5), below(5, 4), None, 1, -100)),
    Mutation("data name no rows of an embedding", axes("weight: vc, indices: * -> *c"),
             call("embedding", f(6, 4), below(6, 2, 3))),
    Mutation("data name no rows of an index", put(gather, "_indexed", lambda see, node, dims, indices: (0, [0], see.of(
        indices[0]))), call("index.Tensor", f(4, 5), [below(4, 3)])),
    Mutation("positions do not matter to a running sum", axes(pw.first), call("cumsum", SQUARE, 1)),
    Mutation("flipping leaves positions", axes(pw.first), call("flip", SQUARE, [1])),
    Mutation("a triangle is of any order", axes(pw.first), call("tril", SQUARE)),
    Mutation("copies of each element lie apart", axes(views.repeat), call("repeat_interleave.self_int", f(4, 2), 3, 0)),
    Mutation("every cut is at 0", put(cuts, "_index", lambda see, value, size: 0), call("select.int", f(4, 3), 0, 2)),
    Mutation("every slice is at 0", put(cuts, "_index", lambda see, value, size: 0),
             call("slice.Tensor", f(6, 3), 0, 3, 6)),
    Mutation("a view splits inside out", inner_first, call("view", f(12), [3, 4])),
    Mutation("windows are interleaved", inner_first, call("unfold", f(6), 0, 3, 3)),
    Mutation("pixel_shuffle takes rows for columns", inner_first, call("pixel_unshuffle", f(1, 1, 4, 6), 2)),
    Mutation("halves of a gate are apart", axes(lambda see, node: (*see.of(node.args[0])[:-1], see.cut(
        see.of(node.args[0])[-1], [2])[0])), call("glu", f(3, 4), 1)),
    Mutation("norms forget their weight", put(normalisation, "_vectors", lambda see, node, channel: None),
             call("instance_norm", f(2, 4, 5), f(4), f(4), None, None, True, 0.1, 1e-5, False)),
    Mutation("a reduction drops another dimension", axes("self: ab -> b"), call("sum.dim_IntList", SQUARE, [1])),
    Mutation("operands are aligned at the left", axes("self: ab, other: a -> ab"), call("mul.Tensor", SQUARE, f(3))),
]  # fmt: skip


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.what)
def test_the_oracle_notices(mutation: Mutation, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_true(mutation.example)
    mutation.breaks(monkeypatch, mutation.example)
    with pytest.raises(AssertionError):
        assert_true(mutation.example)


REDUCED = [
    ("a mean is a sum", call("mean.dim", f(3, 4), [1]), along("sum")),
    ("a sum is a mean", call("sum.dim_IntList", f(3, 4), [1]), along("mean")),
    ("a maximum is a sum", call("amax", f(3, 4), [1]), along("sum")),
    ("a product sums over rows", call("mm", f(3, 3), f(3, 3)), Pattern("self: km, mat2: kn -> mn").reductions),
]


@pytest.mark.parametrize("what, example, wrong", REDUCED, ids=[r[0] for r in REDUCED])
def test_joining_parts_notices(what: str, example: Call, wrong: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def joined() -> bool:
        seen = analysed(example)
        try:
            return all(joins(seen, r) for r in reductions(seen.node) or ())
        except RuntimeError:  # parts that do not fit each other
            return False

    assert joined()
    key = entry_of(example.operator)
    rule = RULES.get(key)
    if rule is None:  # follows from torch's tags
        rule = replace(RULES[torch.ops.aten.sum], linear="")
    monkeypatch.setitem(RULES, key, replace(rule, reduces=wrong))
    assert not joined()
