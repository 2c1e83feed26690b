"""The operator table: FLOPs, bytes, output masks, purity, linearity, and which operators it knows."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import fx, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from benchmarks import zoo
from graphopt.graph.capture import capture
from graphopt.graph.op_rules import (
    RULES,
    bytes_moved,
    flops,
    is_pointwise,
    is_pure,
    is_random,
    linear_in,
    linear_sets,
    operand,
    operand_nodes,
    output_mask,
    rule,
    with_output_mask,
    zero_if,
)
from tests.graph.operator_nodes import node_of

aten = torch.ops.aten

sizes = st.integers(1, 6)
masks = st.lists(st.booleans(), min_size=3, max_size=3)


def counted(operator: Callable[..., Any], *args: Any, **kwargs: Any) -> int:
    """FLOPs of a real run by torch's counter."""
    with FlopCounterMode(display=False) as counter:
        operator(*args, **kwargs)
    return counter.get_total_flops()


def meta(*shape: int) -> torch.Tensor:
    return torch.empty(shape, device="meta")


# -- FLOPs -------------------------------------------------------------------------------------------------------


@given(sizes, sizes, sizes, sizes)
def test_flops_of_products(b: int, m: int, k: int, n: int) -> None:
    one, other, batched = torch.randn(m, k), torch.randn(k, n), (torch.randn(b, m, k), torch.randn(b, k, n))
    for operator, args in [
        (aten.mm.default, (one, other)),
        (aten.addmm.default, (torch.randn(n), one, other)),
        (aten.bmm.default, batched),
        (aten.baddbmm.default, (torch.randn(b, m, n), *batched)),
    ]:
        assert flops(node_of(operator, *args)) == counted(operator, *args) > 0
    assert flops(node_of(aten.mv.default, one, other[:, 0])) == 2 * m * k
    assert flops(node_of(aten.linear.default, torch.randn(b, m, k), torch.randn(n, k))) == 2 * b * m * k * n


@pytest.mark.parametrize(
    "equation, shapes",
    [
        ("ij,jk->ik", [(2, 3), (3, 4)]), ("bhid,bhjd->bhij", [(2, 3, 5, 4), (2, 3, 6, 4)]), ("ij,jk", [(2, 3), (3, 4)]),
        ("i,j->ij", [(2,), (3,)]), ("ij,ij->ij", [(2, 3), (2, 3)]), ("ijk,jl->il", [(2, 3, 5), (3, 4)]),
        ("...ij,...jk->...ik", [(7, 2, 3), (7, 3, 4)]), ("...ij,jk->...ik", [(7, 5, 2, 3), (3, 4)]),
        ("ij,jk,kl->il", [(2, 3), (3, 4), (4, 5)]), ("bn,anm,bm->ba", [(2, 3), (5, 3, 4), (2, 4)]),
        ("ab,bc,cd,de->ae", [(2, 3), (3, 4), (4, 5), (5, 6)]), ("ij,jk->ik", [(2, 3), (1, 4)]), ("ii->i", [(3, 3)]),
    ],
)  # fmt: skip
def test_flops_of_einsum(equation: str, shapes: list[tuple[int, ...]]) -> None:
    tensors = [torch.randn(s) for s in shapes]
    assert flops(node_of(aten.einsum.default, equation, tensors)) == counted(aten.einsum, equation, tensors)


@given(sizes, sizes, sizes, sizes)
def test_flops_of_bilinear(b: int, m: int, k: int, n: int) -> None:
    """torch's counter does not see into the kernel; the larger of its two products is that of all sizes."""
    one, other, weight = torch.randn(b, m), torch.randn(b, k), torch.randn(n, m, k)
    whole, kernel = aten.bilinear.default, aten._trilinear.default
    assert flops(node_of(whole, one, other, weight, None)) == 2 * b * m * k * n
    assert flops(node_of(kernel, one, weight, other, [1, 3], [0], [1, 2], [2, 3])) == 2 * b * m * k * n


def test_flops_of_grouped_products() -> None:
    """The same as if each group had its own product, which torch's counter would count."""
    offsets, packet = torch.tensor([2, 5, 9], dtype=torch.int32, device="meta"), aten._grouped_mm.default
    rows, weights = meta(9, 4), meta(3, 4, 6)
    assert flops(node_of(packet, rows, weights, offsets, result=meta(9, 6))) == 2 * 9 * 4 * 6
    assert flops(node_of(packet, meta(4, 9), meta(9, 6), offsets, result=meta(3, 4, 6))) == 2 * 9 * 4 * 6
    assert flops(node_of(packet, meta(3, 6, 4), meta(4, 9), offsets, result=meta(6, 9))) == 2 * 9 * 4 * 6
    assert flops(node_of(packet, meta(3, 5, 4), weights, None, result=meta(3, 5, 6))) == 2 * 3 * 5 * 4 * 6


@given(st.data(), st.integers(1, 3), st.booleans(), masks)
def test_flops_of_convolution(data: st.DataObject, space: int, transposed: bool, mask: list[bool]) -> None:
    each = lambda low, high: [data.draw(st.integers(low, high)) for _ in range(space)]
    n, groups = data.draw(sizes), data.draw(st.integers(1, 3))
    c_in, c_out = (groups * data.draw(st.integers(1, 3)) for _ in range(2))
    kernel, stride, padding, dilation = each(1, 3), each(1, 2), each(0, 2), each(1, 2)
    weight_shape = (c_in, c_out // groups) if transposed else (c_out, c_in // groups)
    x, weight = torch.randn(n, c_in, *each(3, 7)), torch.randn(*weight_shape, *kernel)
    options = (stride, padding, dilation, transposed, [0] * space, groups)
    try:
        out = aten.convolution(x, weight, None, *options)
    except RuntimeError:
        assume(False)  # the kernel does not fit
    assert flops(node_of(aten.convolution.default, x, weight, None, *options)) == counted(
        aten.convolution, x, weight, None, *options
    )
    backward = (torch.randn(out.shape), x, weight, [c_out], *options, mask)
    assert flops(node_of(aten.convolution_backward.default, *backward)) == counted(aten.convolution_backward, *backward)


Q, K, V, OUT = meta(2, 6, 5, 8), meta(2, 3, 7, 8), meta(2, 3, 7, 4), meta(2, 6, 5, 4)
LSE, SEED = meta(2, 6, 5), torch.zeros((), dtype=torch.int64)
JAGGED = torch.zeros(4, dtype=torch.int64, device="meta")
CONV = (meta(2, 4, 8, 8), meta(6, 4, 3, 3))
CONV_OUT = meta(2, 6, 6, 6)

# One call of every operator of torch's counter, with the result where it has no kernel to run here.
COUNTED: list[tuple[Any, tuple[Any, ...], Any]] = [
    (aten.mm, (meta(2, 3), meta(3, 4)), meta(2, 4)),
    (aten.addmm, (meta(4), meta(2, 3), meta(3, 4)), meta(2, 4)),
    (aten.bmm, (meta(5, 2, 3), meta(5, 3, 4)), meta(5, 2, 4)),
    (aten.baddbmm, (meta(5, 2, 4), meta(5, 2, 3), meta(5, 3, 4)), meta(5, 2, 4)),
    (aten._scaled_mm, (meta(2, 3), meta(3, 4), meta(1), meta(1)), meta(2, 4)),
    (aten.convolution, (*CONV, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1), CONV_OUT),
    (aten._convolution, (*CONV, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1, False, False, False, True), CONV_OUT),
    (aten.convolution_overrideable, (*CONV, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1), CONV_OUT),
    (aten.convolution_backward,
     (CONV_OUT, *CONV, [6], [1, 1], [0, 0], [1, 1], False, [0, 0], 1, [True] * 3), (*CONV, meta(6))),
    (aten._scaled_dot_product_flash_attention, (Q, K, V), OUT),
    (aten._scaled_dot_product_efficient_attention, (Q, K, V, None, True), OUT),
    (aten._scaled_dot_product_cudnn_attention, (Q, K, V, None, True), OUT),
    (aten._flash_attention_forward, (Q, K, V, None, None, 5, 7, 0.0, False, False), OUT),
    (aten._flash_attention_forward, (meta(9, 6, 8), meta(11, 3, 8), meta(11, 3, 4), JAGGED, JAGGED, 5, 7, 0.0, False,
                                     False), OUT),
    (aten._efficient_attention_forward, (Q, K, V, None, None, None, 5, 7, 0.0, 0), OUT),
    (aten._efficient_attention_forward, (meta(1, 9, 6, 8), meta(1, 11, 3, 8), meta(1, 11, 3, 4), None, JAGGED, JAGGED,
                                         5, 7, 0.0, 0), OUT),
    (aten._scaled_dot_product_flash_attention_backward,
     (OUT, Q, K, V, OUT, LSE, None, None, 5, 7, 0.0, False, SEED, SEED), (Q, K, V)),
    (aten._scaled_dot_product_efficient_attention_backward,
     (OUT, Q, K, V, None, OUT, LSE, SEED, SEED, 0.0, [True] * 4), (Q, K, V, None)),
    (aten._scaled_dot_product_cudnn_attention_backward,
     (OUT, Q, K, V, OUT, LSE, SEED, SEED, None, None, None, 5, 7, 0.0, False), (Q, K, V)),
    (aten._flash_attention_backward,
     (OUT, Q, K, V, OUT, LSE, None, None, 5, 7, 0.0, False, SEED, SEED), (Q, K, V)),
    (aten._efficient_attention_backward,
     (OUT, Q, K, V, None, OUT, None, None, 5, 7, LSE, 0.0, SEED, SEED, 0, False), (Q, K, V, None)),
]  # fmt: skip


@pytest.mark.parametrize("packet, args, result", COUNTED, ids=[str(c[0]) for c in COUNTED])
def test_flops_are_those_of_the_counter(packet: Any, args: tuple[Any, ...], result: Any) -> None:
    node = node_of(packet.default, *args, result=result)
    assert flops(node) == flop_registry[packet](*args, out_val=result) > 0


def test_flops_of_convolutions_that_name_the_input_self() -> None:
    """The counter reads cudnn_convolution's `benchmark` as `transposed`, and lacks an argument of the other."""
    cudnn = node_of(
        aten.cudnn_convolution.default, *CONV, [0, 0], [1, 1], [1, 1], 1, False, False, True, result=CONV_OUT
    )
    slow = node_of(
        aten._slow_conv2d_forward.default,
        torch.randn(2, 4, 8, 8),
        torch.randn(6, 4, 3, 3),
        [3, 3],
        None,
        [1, 1],
        [0, 0],
    )
    plain = node_of(aten.convolution.default, *CONV, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1, result=CONV_OUT)
    assert flops(cudnn) == flops(slow) == flops(plain)


def test_every_counted_operator_has_a_formula() -> None:
    known = {packet for packet in flop_registry if str(packet).startswith("aten.")}
    named_self = {aten.cudnn_convolution, aten._slow_conv2d_forward}
    assert known - named_self <= {packet for packet, _, _ in COUNTED}
    assert not [packet for packet in known if RULES[packet].flops is None]


def test_flops_of_flash_attention_on_cpu() -> None:
    """torch's counter leaves it out; the same kernel on CUDA is the reference."""
    q, k, v = (torch.randn(2, 3, s, 8) for s in (5, 7, 7))
    forward = node_of(aten._scaled_dot_product_flash_attention_for_cpu.default, q, k, v)
    assert flops(forward) == flop_registry[aten._scaled_dot_product_flash_attention](q, k, v) > 0
    out, lse = forward.meta["val"]
    backward = aten._scaled_dot_product_flash_attention_for_cpu_backward
    arguments = (torch.randn_like(out), q, k, v, out, lse, 0.0, False)
    expected = flop_registry[aten._scaled_dot_product_flash_attention_backward](*arguments)
    assert flops(node_of(backward.default, *arguments)) == expected > 0


def test_flops_of_recurrent_layers() -> None:
    t, b, i, h = 5, 3, 4, 6
    weights = torch.randn(4 * h, i), torch.randn(4 * h, h), torch.randn(4 * h), torch.randn(4 * h)
    state = torch.randn(b, h), torch.randn(b, h)
    options = (False, [], 2, h, 1, True, False, False, True)
    node = node_of(aten.mkldnn_rnn_layer.default, torch.randn(t, b, i), *weights, *state, *options)
    assert flops(node) == 2 * t * b * 4 * h * (i + h)


def test_pointwise_normalisation_and_reductions_count_nothing() -> None:
    x = torch.randn(3, 4)
    assert flops(node_of(aten.gelu.default, x)) == flops(node_of(aten.sum.default, x)) == 0
    assert flops(node_of(aten.native_layer_norm.default, x, [4], None, None, 1e-5)) == 0


def test_symbolic_sizes() -> None:
    def step(x: torch.Tensor, w: torch.Tensor, v: torch.Tensor, g: torch.Tensor) -> Any:
        h = aten.convolution(x, w, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1)
        h = torch.relu(h).sum((2, 3)) @ v
        return h, aten.convolution_backward(
            g, x, w, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [True, True, False]
        )

    def example(n: int) -> tuple[torch.Tensor, ...]:
        return torch.randn(n, 3, 5, 6), torch.randn(4, 3, 3, 3), torch.randn(4, 2), torch.randn(n, 4, 5, 6)

    graph = make_fx(step, tracing_mode="symbolic")(*example(7)).graph
    total = sum(flops(n) for n in graph.nodes)
    moved = sum(bytes_moved(n) for n in graph.nodes)
    shapes = [s for n in graph.nodes if n.op == "placeholder" for s in n.meta["val"].shape]
    values = [s for tensor in example(11) for s in tensor.shape]
    at_eleven = {s.node.expr: v for s, v in zip(shapes, values) if isinstance(s, torch.SymInt)}
    assert total.subs(at_eleven) == counted(step, *example(11))
    fixed = make_fx(step)(*example(11)).graph
    assert moved.subs(at_eleven) == sum(bytes_moved(n) for n in fixed.nodes)


# -- bytes -------------------------------------------------------------------------------------------------------


def test_bytes_are_those_of_distinct_operands_and_results() -> None:
    x, y = torch.randn(4, 5), torch.randn(4, 5, dtype=torch.float64)
    assert bytes_moved(node_of(aten.mul.Tensor, x, y)) == 20 * (4 + 8 + 8)
    square = node_of(aten.mul.Tensor, x, y)
    square.args = (square.args[0], square.args[0])
    square.meta["val"] = x
    assert bytes_moved(square) == 20 * (4 + 4)
    assert bytes_moved(node_of(aten.cat.default, [x, x.clone()])) == 20 * 4 * 4


def test_views_and_numbers_move_nothing() -> None:
    x = torch.randn(4, 6)
    for view in (node_of(aten.view.default, x, [24]), node_of(aten.t.default, x), node_of(aten.split.Tensor, x, 3, 1)):
        assert bytes_moved(view) == 0
    assert bytes_moved(node_of(aten.sym_size.int, x, 0)) == 0


def test_operands_that_are_not_read_do_not_count() -> None:
    x = torch.randn(2, 3, 4, 4)
    assert bytes_moved(node_of(aten.zeros_like.default, x)) == 96 * 4
    gradient = torch.randn(2, 3, 2, 2)
    pooled = node_of(aten._adaptive_avg_pool2d_backward.default, gradient, x)
    assert bytes_moved(pooled) == (24 + 96) * 4


def test_a_gather_reads_as_much_as_it_gives() -> None:
    lookup = node_of(aten.embedding.default, torch.randn(1000, 8), torch.randint(0, 1000, (5,)))
    assert bytes_moved(lookup) == 5 * 8 * 4 * 2 + 5 * 8


def test_broadcast_operands_are_read_once() -> None:
    assert bytes_moved(node_of(aten.neg.default, torch.randn(1, 5).expand(4, 5))) == (5 + 20) * 4


# -- output masks ------------------------------------------------------------------------------------------------


def convolution_backward_node() -> Any:
    x, w = torch.randn(2, 3, 5, 5), torch.randn(4, 3, 3, 3)
    options = ([1, 1], [0, 0], [1, 1], False, [0, 0], 1)
    return node_of(aten.convolution_backward.default, torch.randn(2, 4, 3, 3), x, w, [4], *options, [True, True, False])


def test_output_masks_are_found_by_schema() -> None:
    mask = output_mask(convolution_backward_node())
    assert mask is not None
    assert (mask.name, mask.value) == ("output_mask", (True, True, False))
    backward = aten._scaled_dot_product_efficient_attention_backward.default
    arguments = (OUT, Q, K, V, None, OUT, LSE, SEED, SEED, 0.0, [True, True, True, False])
    mask = output_mask(node_of(backward, *arguments, result=(Q, K, V, None)))
    assert mask is not None
    assert (mask.name, mask.value) == ("grad_input_mask", (True, True, True, False))
    products = node_of(
        aten.matmul_backward.default, meta(2, 4), meta(2, 3), meta(3, 4), [True, False], result=(Q, None)
    )
    mask = output_mask(products)
    assert mask is not None
    assert (mask.name, mask.value) == ("mask", (True, False))
    assert output_mask(node_of(aten.masked_fill.Scalar, torch.ones(2), torch.ones(2) > 0, 0.0)) is None


def test_a_mask_is_narrowed_in_place() -> None:
    node = convolution_backward_node()
    before = flops(node)
    assert with_output_mask(node, [True, False, False]) == (True, False, False)
    assert operand(node, "output_mask") == [True, False, False]
    assert [v is None for v in node.meta["val"]] == [False, True, True]
    assert 0 < flops(node) < before
    with pytest.raises(ValueError, match="turns on"):
        with_output_mask(node, [True, True, False])
    with pytest.raises(ValueError, match="no output mask of 2"):
        with_output_mask(node, [True, False])


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_result_that_the_kernel_cannot_leave_out_stays(memory_format: torch.memory_format) -> None:
    """native_group_norm_backward on channels-last CPU memory crashes the process without an input gradient."""
    x = torch.randn(2, 6, 4, 4).to(memory_format=memory_format)
    arguments = (x.clone(), x, torch.randn(2, 3), torch.rand(2, 3), torch.randn(6), 2, 6, 16, 3, [True] * 3)
    node = node_of(aten.native_group_norm_backward.default, *arguments)
    stays = memory_format is torch.channels_last
    assert with_output_mask(node, [False, True, False]) == (stays, True, False)
    aten.native_group_norm_backward(*pytree.tree_map_only(fx.Node, lambda n: n.meta["val"], node.args))


# -- random, pure, pointwise -------------------------------------------------------------------------------------

X = torch.rand(1, 2, 4, 8)
_STATES = [torch.rand(2, 4, 4), torch.rand(2, 4, 4)]
LSTM = (X[0], _STATES, [torch.rand(16, size) for size in (8, 4, 4, 4)], False, 2)
DRAWS: list[tuple[Any, tuple[Any, ...], bool]] = [
    (aten.native_dropout.default, (X, 0.5, True), True),
    (aten.native_dropout.default, (X, 0.5, None), True),
    (aten.native_dropout.default, (X, 0.0, True), True),
    (aten.native_dropout.default, (X, 0.5, False), False),
    (aten._scaled_dot_product_attention_math.default, (X, X, X, None, 0.0), False),
    (aten._scaled_dot_product_attention_math.default, (X, X, X, None, 0.5), True),
    (aten._scaled_dot_product_flash_attention_for_cpu.default, (X, X, X, 0.0), False),
    (aten.bernoulli.default, (X,), True),
    (aten.bernoulli.p, (X, 0.5), True),
    (aten.rand.default, ([3],), True),
    (aten.randn_like.default, (X,), True),
    (aten.randperm.default, (5,), True),
    (aten.rrelu_with_noise_functional.default, (-X, X, 0.1, 0.3, True), True),
    (aten.rrelu_with_noise_functional.default, (-X, X, 0.1, 0.3, False), False),
    (aten.lstm.input, (*LSTM, 0.0, True, False, False), False),
    (aten.lstm.input, (*LSTM, 0.5, False, False, False), False),
    (aten.lstm.input, (*LSTM, 0.5, True, False, False), True),
    (aten.relu.default, (X,), False),
    (aten.empty_like.default, (X,), False),
]


@pytest.mark.parametrize("operator, args, draws", DRAWS, ids=lambda v: str(v) if not isinstance(v, tuple) else "")
def test_random_operators_are_those_that_move_the_generator(operator: Any, args: tuple[Any, ...], draws: bool) -> None:
    before = torch.get_rng_state()
    node = node_of(operator, *args)
    assert is_random(node) == (not torch.equal(before, torch.get_rng_state())) == draws
    assert is_pure(node) != draws


def test_attention_draws_with_dropout_only() -> None:
    def forward(dropout: float) -> Any:
        return node_of(aten._scaled_dot_product_flash_attention.default, Q, K, V, dropout, result=OUT)

    assert is_random(forward(0.1)) and not is_pure(forward(0.1))
    assert not is_random(forward(0.0)) and is_pure(forward(0.0))
    backward = aten._scaled_dot_product_efficient_attention_backward.default
    arguments = (OUT, Q, K, V, None, OUT, LSE, SEED, SEED, 0.5, [True] * 4)
    assert not is_random(node_of(backward, *arguments, result=(Q, K, V, None)))


def test_purity() -> None:
    x = torch.randn(3)
    assert is_pure(node_of(aten.add.Tensor, x, x.clone()))
    assert is_pure(node_of(aten._local_scalar_dense.default, torch.tensor(2.0)))
    assert is_pure(node_of(lambda a, b: a * b, 2, 3))
    assert not is_pure(node_of(aten.add_.Tensor, x, x.clone()))
    assert not is_pure(node_of(aten._assert_async.default, torch.tensor(True), result=()))
    node = node_of(aten.neg.default, x)
    assert not is_pure(node.all_input_nodes[0])
    assert is_pure(node.graph.get_attr("constant"))


def test_pointwise() -> None:
    x = torch.randn(3, 3)
    for operator in (aten.relu, aten.gelu, aten.exp, aten.clone, aten.hardswish):
        assert is_pointwise(node_of(operator.default, x))
    assert is_pointwise(node_of(aten.hardtanh_backward.default, x, x.clone(), 0, 6))
    for operator in (aten.sum, aten.t, aten.zeros_like, aten.glu):
        assert not is_pointwise(node_of(operator.default, torch.randn(4, 4)))


# -- linearity ---------------------------------------------------------------------------------------------------

D = torch.float64
A, B, C = (torch.randn(4, 4, dtype=D) for _ in range(3))
IMAGE, KERNEL = torch.randn(2, 3, 6, 6, dtype=D), torch.randn(4, 3, 3, 3, dtype=D)
INDICES = torch.tensor([1, 0, 2])
CONV_OPTIONS = ([1, 1], [1, 1], [1, 1], False, [0, 0], 1)

LINEAR: list[tuple[Any, tuple[Any, ...], set[str]]] = [
    (aten.mm.default, (A, B), {"self", "mat2"}),
    (aten.bmm.default, (A[None], B[None]), {"self", "mat2"}),
    (aten.addmm.default, (A, B, C), set()),
    (aten.mv.default, (A, B[0]), {"self", "vec"}),
    (aten.mul.Tensor, (A, B), {"self", "other"}),
    (aten.div.Tensor, (A, B), {"self"}),
    (aten.add.Tensor, (A, B), set()),
    (aten.sub.Tensor, (A, B), set()),
    (aten.neg.default, (A,), {"self"}),
    (aten.pow.Tensor_Scalar, (A, 2), set()),
    (aten.exp.default, (A,), set()),
    (aten.sum.dim_IntList, (A, [0]), {"self"}),
    (aten.mean.dim, (A, [0]), {"self"}),
    (aten.cumsum.default, (A, 0), {"self"}),
    (aten.amax.default, (A, [0]), set()),
    (aten.cat.default, ([A, B],), {"tensors"}),
    (aten.view.default, (A, [16]), {"self"}),
    (aten.permute.default, (A, [1, 0]), {"self"}),
    (aten.expand.default, (A[None], [3, 4, 4]), {"self"}),
    (aten.where.self, (A > 0, A, B), set()),
    (aten.masked_fill.Scalar, (A, A > 0, 0.0), {"self"}),
    (aten.masked_fill.Scalar, (A, A > 0, 1.0), set()),
    (aten.constant_pad_nd.default, (A, [1, 1]), {"self"}),
    (aten.constant_pad_nd.default, (A, [1, 1], 2.0), set()),
    (aten.addcmul.default, (A, B, C), set()),
    (aten.lerp.Scalar, (A, B, 0.3), set()),
    (aten._to_copy.default, (A,), {"self"}),
    (aten.index.Tensor, (A, [INDICES]), {"self"}),
    (aten.index_select.default, (A, 0, INDICES), {"self"}),
    (aten.index_put.default, (A, [INDICES], B[:3], True), set()),
    (aten.slice_scatter.default, (A, B[:2], 0, 1, 3), set()),
    (aten.slice_backward.default, (A[:2], [4, 4], 0, 1, 3, 1), {"grad_output"}),
    (aten.select_backward.default, (A[0], [4, 4], 0, 1), {"grad_output"}),
    (aten.embedding.default, (A, INDICES), {"weight"}),
    (aten.embedding_dense_backward.default, (A[:3], INDICES, 5, -1, False), {"grad_output"}),
    (aten.convolution.default, (IMAGE, KERNEL, None, *CONV_OPTIONS), {"input", "weight"}),
    (aten.convolution.default, (IMAGE, KERNEL, A[0], *CONV_OPTIONS), set()),
    (aten.avg_pool2d.default, (IMAGE, [2, 2]), {"self"}),
    (aten.upsample_bilinear2d.default, (IMAGE, [8, 8], False), {"self"}),
    (aten.threshold_backward.default, (A, B, 0), {"grad_output"}),
    (aten.gelu_backward.default, (A, B), {"grad_output"}),
    (aten.elu_backward.default, (A, 1, 1, 1, False, B), {"grad_output"}),
    (aten.hardshrink_backward.default, (A, B, 0.5), {"grad_out"}),
    (aten.native_dropout_backward.default, (A, B > 0, 2.0), {"grad_output"}),
    (aten._softmax_backward_data.default, (A, B, 1, D), {"grad_output"}),
    (aten._log_softmax_backward_data.default, (A, B, 1, D), {"grad_output"}),
    (aten.mse_loss_backward.default, (A, B, C, 1), {"grad_output"}),
    (aten.native_layer_norm_backward.default,
     (A, B, [4], A[:, :1], B[:, :1].abs(), C[0], C[1], [True] * 3), {"grad_out"}),
    (aten._fft_r2c.default, (A, [1], 0, True), {"self"}),
]  # fmt: skip


@pytest.mark.parametrize("operator, args, alone", LINEAR, ids=[str(c[0]) for c in LINEAR])
def test_operators_are_linear_where_the_table_says(operator: Any, args: tuple[Any, ...], alone: set[str]) -> None:
    """f(2 x - 3 y) = 2 f(x) - 3 f(y) in each set of operands, the others fixed."""
    node = node_of(operator, *args)
    assert linear_in(node) == alone
    for together in linear_sets(node):
        moved = [n for name in together for n in operand_nodes(node, name)]
        if all(operand_nodes(node, name) for name in together):  # numbers are fixed
            assert_linear(node, moved)


def assert_linear(node: fx.Node, moved: list[fx.Node]) -> None:
    def run(values: list[torch.Tensor]) -> list[torch.Tensor]:
        inputs = dict(zip(moved, values))
        return pytree.tree_leaves(node.target(*fx.node.map_arg(node.args, lambda n: inputs.get(n, n.meta["val"]))))

    x = [n.meta["val"] for n in moved]
    y = [torch.randn_like(v) for v in x]
    for got, of_x, of_y in zip(run([2 * a - 3 * b for a, b in zip(x, y)]), run(x), run(y)):
        torch.testing.assert_close(got, 2 * of_x - 3 * of_y)


def test_rounded_division_and_reinterpreted_bits_are_not_linear() -> None:
    assert not linear_in(node_of(aten.div.Tensor_mode, A, B, rounding_mode="floor"))
    assert not linear_in(node_of(aten.view.dtype, A, torch.float32))
    assert not linear_in(node_of(aten._to_copy.default, A, dtype=torch.int64))


def test_known_zeros_pass_through() -> None:
    product, total = node_of(aten.mul.Tensor, A, B), node_of(aten.add.Tensor, A, B)
    first, second = product.args
    assert zero_if(product, {first}) and zero_if(product, {second})
    first, second = total.args
    assert not zero_if(total, {first}) and zero_if(total, {first, second})
    affine = node_of(aten.add.Scalar, A, 1)
    assert not zero_if(affine, set(affine.all_input_nodes))
    joined = node_of(aten.cat.default, [A, B])
    assert not zero_if(joined, set(joined.all_input_nodes[:1])) and zero_if(joined, set(joined.all_input_nodes))


# -- coverage ----------------------------------------------------------------------------------------------------

QUICK = ["digits_cnn", "gpt2", "embedding_mlp", "fnet"]
LONG = ["mobilenet_v3_small", "efficientformer", "hf_swin", "wav2vec2", "lstm_classifier", "transformer_encoder"]


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in LONG)])
def test_every_operator_of_real_models_has_a_rule(name: str) -> None:
    case = zoo.case(name)
    graph = capture(case.build(), case.batch(3), loss=case.loss or "model")
    unknown = {str(n.target) for n in graph.nodes if n.op == "call_function" and rule(n) is None}
    assert not unknown


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_every_operator_of_an_update_has_a_rule(optimizer: Any) -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 2))
    loss = nn.CrossEntropyLoss()
    for options in ({"foreach": True}, {"fused": True}, {"foreach": False}):
        made = optimizer(model.parameters(), lr=0.1, **options)
        batch = torch.randn(5, 4), torch.randint(0, 2, (5,))
        graph = capture(model, batch, loss=loss, optimizer=made, clip=1.0)
        assert not {str(n.target) for n in graph.nodes if n.op == "call_function" and rule(n) is None}


def test_flops_of_a_captured_step_are_those_of_eager() -> None:
    case = zoo.case("resnet18")
    model = case.build()
    graph = capture(model, case.batch(3), loss=case.loss)
    batch = case.batch(5)
    assert graph.flops({"batch": 5}) == counted(lambda: case.compute_loss(model, batch).backward())


def test_an_unknown_operator_reads_everything_and_is_linear_in_nothing() -> None:
    x = torch.randn(2, 2) @ torch.randn(2, 2)
    node = node_of(aten.linalg_inv_ex.default, x)
    assert rule(node) is None
    assert flops(node) == 0 and linear_in(node) == frozenset() and is_pure(node)
    assert bytes_moved(node) == 16 + 16 + 4
