"""What axis rules say, as text: a letter for an axis, a capital for one that keeps its order (see `text_of`)."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from graphopt.graph.axes import analyse
from graphopt.graph.training_graph import Input, InputKind, Phase, Signature, TrainingGraph
from tests.graph.axis_examples._calls import below, call, floats
from tests.graph.axis_rule_oracle import Call, analysed, text_of

f = floats
CONVOLVED = ([1, 1], [0, 0], [1, 1], False, [0, 0])
TURNED = ([1, 1], [0, 0], [1, 1], True, [0, 0])

TEXTS = [
    (call("mm", f(2, 3), f(3, 4)), "a b, b c -> a c"),
    (call("bmm", f(2, 3, 4), f(2, 4, 5)), "a b c, a c d -> a b d"),
    (call("addmm", f(5), f(3, 4), f(4, 5)), "a, b c, c a -> b a"),
    (call("mv", f(3, 4), f(4)), "a b, b -> a"),
    (call("matmul", f(6, 1, 3, 4), f(2, 4, 5)), "a 1 b c, d c e -> a d b e"),
    (call("linear", f(2, 3, 4), f(5, 4), f(5)), "a b c, d c, d -> a b d"),
    (call("einsum", "bhid,bhjd->bhij", [f(2, 3, 4, 5), f(2, 3, 6, 5)]), "a b c d, a b e d -> a b c e"),
    (call("convolution", f(2, 4, 5, 6), f(6, 4, 3, 3), f(6), *CONVOLVED, 1), "a b C D, e b F G, e -> a e H I"),
    (call("convolution", f(2, 4, 5, 6), f(6, 4, 1, 1), None, *CONVOLVED, 1), "a b c d, e b 1 1 -> a e c d"),
    (call("convolution", f(2, 4, 5, 6), f(6, 2, 3, 3), None, *CONVOLVED, 2), "a b*c D E, b*f c G H -> a b*f I J"),
    (call("convolution", f(2, 4, 5, 6), f(8, 1, 3, 3), None, *CONVOLVED, 4), "a b C D, b*e 1 F G -> a b*e H I"),
    (call("convolution", f(2, 4, 5, 6), f(4, 3, 3, 3), None, *TURNED, 2), "a b*c D E, b*c f G H -> a b*f I J"),
    (call("avg_pool2d", f(2, 3, 6, 4), [2, 2]), "a b C D -> a b E F"),
    (call("adaptive_avg_pool2d", f(2, 3, 6, 4), [1, 1]), "a b c d -> a b 1 1"),
    (call("upsample_nearest2d", f(2, 3, 6, 4), [12, 8]), "a b C D -> a b E F"),
    (call("scaled_dot_product_attention", f(2, 4, 5, 6), f(2, 4, 7, 6), f(2, 4, 7, 3)),
     "a b c d, a b e d, a b e f -> a b c f"),
    (call("scaled_dot_product_attention", f(2, 4, 5, 6), f(2, 2, 7, 6), f(2, 2, 7, 3), enable_gqa=True),
     "a b*c d e, a b f e, a b f g -> a b*c d g"),
    (call("scaled_dot_product_attention", f(2, 4, 5, 6), f(2, 4, 5, 6), f(2, 4, 5, 3), None, 0.0, True),
     "a b C d, a b E d, a b E f -> a b C f"),
    (call("native_layer_norm", f(3, 4, 5), [5], f(5), f(5), 1e-5), "a b c, c, c -> a b c, a b 1, a b 1"),
    (call("native_batch_norm", f(3, 4, 5), f(4), f(4), f(4), f(4), True, 0.1, 1e-5),
     "a b c, b, b, b, b -> a b c, b, b"),
    (call("native_group_norm", f(3, 4, 5), f(4), f(4), 3, 4, 5, 2, 1e-5), "a b*c d, b*c, b*c -> a b*c d, a b, a b"),
    (call("_softmax", f(3, 4), 1, False), "a b -> a b"),
    (call("nll_loss_forward", f(3, 5), below(5, 3), None, 1, -100), "a B, a -> , "),
    (call("cross_entropy_loss", f(3, 5, 2), below(5, 3, 2), f(5), 0), "a B c, a c, B -> a c"),
    (call("embedding", f(6, 4), below(6, 2, 3)), "A b, c d -> c d b"),
    (call("index.Tensor", f(4, 5, 6), [None, below(5, 3)]), "a B c, d -> a d c"),
    (call("index.Tensor", f(4, 5, 6), [below(4, 3), None, below(6, 3)]), "A b C, d, d -> d b"),
    (call("index.Tensor", f(4, 5, 6), [f(4) > -9]), "A b c, D -> E b c"),
    (call("gather", f(4, 5), 1, below(5, 4, 3)), "a B, a c -> a c"),
    (call("scatter_add", f(4, 5), 1, below(5, 4, 3), f(4, 3)), "a B, a c, a c -> a B"),
    (call("index_select", f(4, 5), 0, below(4, 3)), "A b, c -> c b"),
    (call("index_put", f(4, 5), [below(4, 3)], f(3, 5), True), "A b, c, c b -> A b"),
    (call("view", f(6, 4), [2, 3, 4]), "a*b c -> a b c"),
    (call("view", f(6, 4), [2, 12]), "a*b c -> a b*c"),
    (call("view", f(2, 3), [3, 2]), "A B -> C D"),
    (call("permute", f(2, 3, 4), [2, 0, 1]), "a b c -> c a b"),
    (call("expand", f(1, 3), [2, 3]), "1 a -> b a"),
    (call("select.int", f(4, 5), 0, 1), "(1 + 1 + a) b -> b"),
    (call("slice.Tensor", f(4, 6), 1, 2, 5), "a (b + c + 1) -> a c"),
    (call("slice.Tensor", f(6, 4), 0, 1, 6, 2), "a*(1 + 1) b -> a b"),
    (call("slice.Tensor", f(5, 4), 0, 0, 5, 3), "A b -> C b"),
    (call("slice_backward", f(2, 4), [5, 4], 0, 1, 3, 1), "a b -> (1 + a + c) b"),
    (call("slice_scatter", f(5, 4), f(2, 4), 0, 1, 3), "(1 + a + b) c, a c -> (1 + a + b) c"),
    (call("select_scatter", f(3, 4), f(4), 0, -1), "(a + 1) b, b -> (a + 1) b"),
    (call("split.Tensor", f(6, 4), 2), "(a + b + c) d -> a d, b d, c d"),
    (call("unbind.int", f(3, 4), 0), "(1 + 1 + 1) a -> a, a, a"),
    (call("cat", [f(2, 4), f(3, 4)]), "a b, c b -> (a + c) b"),
    (call("stack", [f(4), f(4)], 1), "a, a -> a (1 + 1)"),
    (call("constant_pad_nd", f(4, 5), [2, 3]), "a b -> a (C + b + D)"),
    (call("repeat", f(3, 4), [2, 1]), "a b -> c*a b"),
    (call("repeat_interleave.self_int", f(3, 4), 2, 0), "a b -> a*c b"),
    (call("sum.dim_IntList", f(3, 4, 5), [1], True), "a b c -> a 1 c"),
    (call("argmax", f(3, 4), 1), "a B -> a"),
    (call("cumsum", f(3, 4), 1), "a B -> a B"),
    (call("sort", f(3, 4), 1), "a B -> a B, a B"),
    (call("topk", f(3, 4), 2, 1), "a B -> a C, a C"),
    (call("glu", f(3, 4), 1), "a (b + b) -> a b"),
    (call("mul.Tensor", f(3, 4), f(3, 1)), "a b, a 1 -> a b"),
    (call("pixel_shuffle", f(2, 12, 3, 5), 2), "a b*c*d e f -> a b e*c f*d"),
    (call("channel_shuffle", f(2, 6, 4), 2), "a b*c d -> a c*b d"),
    (call("im2col", f(2, 3, 6, 4), [2, 2], [1, 1], [0, 0], [1, 1]), "a b C D -> a b*E*F G"),
    (call("unfold", f(4, 6), 1, 3, 3), "a b*c -> a b c"),
    (call("unfold_backward", f(4, 2, 3), [4, 6], 1, 3, 3), "a b c -> a b*c"),
    (call("tril", f(3, 4)), "A B -> A B"),
    (call("roll", f(3, 4), [1], [1]), "a B -> a C"),
    (call("diagonal", f(3, 3, 2)), "A B c -> c D"),
    (call("lstm.input", f(4, 2, 3), [f(1, 2, 5), f(1, 2, 5)], [f(20, 3), f(20, 5)], False, 1, 0.0, False, False, False),
     "A b c, 1 b d, 1 b d, (1 + 1 + 1 + 1)*d c, (1 + 1 + 1 + 1)*d d -> A b d, 1 b d, 1 b d"),
]  # fmt: skip


@pytest.mark.parametrize("example, text", TEXTS, ids=[str(t[0].operator) for t in TEXTS])
def test_text(example: Call, text: str) -> None:
    assert text_of(analysed(example)) == text


# -- operators of other namespaces -------------------------------------------------------------------------------------

collectives = torch.ops._c10d_functional
X, Y = f(6, 4), f(2, 3)


def gathered(ranks: int, value: torch.Tensor) -> torch.Tensor:
    return torch.cat([value] * ranks)


COLLECTIVES = [
    (Call(collectives.all_reduce.default, (X, "sum", "0"), {}, lambda x, *a: x), "a b -> a b"),
    (Call(collectives.broadcast.default, (X, 0, "0"), {}, lambda x, *a: x), "a b -> a b"),
    (Call(collectives.wait_tensor.default, (X,), {}, lambda x: x), "a b -> a b"),
    (Call(collectives.all_reduce_coalesced.default, ([X, Y], "sum", "0"), {}, lambda x, *a: x), "a b, c d -> a b, c d"),
    (Call(collectives.all_gather_into_tensor.default, (X, 2, "0"), {}, lambda x, *a: gathered(2, x)), "a b -> C*a b"),
    (Call(collectives.all_gather_into_tensor_coalesced.default, ([X, Y], 2, "0"), {},
          lambda x, *a: [gathered(2, t) for t in x]), "a b, c d -> E*a b, F*c d"),
    (Call(collectives.reduce_scatter_tensor.default, (X, "sum", 2, "0"), {}, lambda x, *a: x[:3]), "A*b c -> b c"),
    (Call(collectives.reduce_scatter_tensor_coalesced.default, ([X, Y], "sum", 2, "0"), {},
          lambda x, *a: [x[0][:3], x[1][:1]]), "A*b c, D e -> b c, 1 e"),
    (Call(collectives.all_to_all_single.default, (X, [4, 4], [3, 3], "0"), {}, lambda x, *a: f(8, 4)), "A b -> C b"),
]  # fmt: skip


@pytest.mark.parametrize("example, text", COLLECTIVES, ids=[str(c[0].operator) for c in COLLECTIVES])
def test_collectives(example: Call, text: str) -> None:
    seen = analysed(example)
    assert not seen.axes.unknown
    assert text_of(seen) == text


def test_an_operator_that_is_registered_later() -> None:
    """transformers registers the product of its experts when it is imported."""
    pytest.importorskip("transformers.integrations.moe")
    product = torch.ops.transformers.grouped_mm_fallback.default
    backward = torch.ops.transformers.grouped_mm_fallback_backward.default
    rows, experts, offsets = f(6, 4), f(3, 4, 5), torch.tensor([1, 3, 6])
    assert text_of(analysed(Call(product, (rows, experts, offsets)))) == "A b, C b d, C -> A d"
    text = text_of(analysed(Call(backward, (rows, experts, offsets, f(6, 5)))))
    assert text == "A b, C b d, C, A d -> A b, C b d"


def test_an_operator_without_a_rule_freezes_what_it_touches() -> None:
    seen = analysed(call("linalg_inv_ex", f(3, 3)))
    assert [u.operator for u in seen.axes.unknown] == ["aten.linalg_inv_ex.default"]
    assert text_of(seen).startswith("A B -> ")


def test_views_with_a_free_size() -> None:
    """``[n, 12] -> [n, 3, 4] -> [3 n, 4] -> [n, 12]``: what the sizes are made of decides, not the sizes seen."""

    def views(x: torch.Tensor) -> torch.Tensor:
        split = x.view(x.shape[0], 3, 4)
        return split.view(3 * x.shape[0], 4).view(x.shape[0], 12)

    traced = make_fx(views, tracing_mode="symbolic")(f(3, 12)).graph
    for node in traced.nodes:
        node.meta["phase"] = Phase.FORWARD
    next(iter(reversed(traced.nodes))).args = ((),)
    graph = TrainingGraph(traced, Signature((Input(InputKind.PARAMETER, "x"),), ()))
    axes = analyse(graph)
    shapes = [axes.of(n) for n in graph.nodes[:-1] if isinstance(n.meta["val"], torch.Tensor)]
    (rows, whole), (n, three, four), (product, inner), again = shapes
    assert rows == n and whole.parts == (three, four) and product.parts == (n, three) and inner == four
    assert again == (rows, whole)
    assert not axes.contradictions and not any(a.reason for d in again for a in d.axes())
