"""`reads`: an operand that is not read may hold anything. Shown by poisoning it."""

from itertools import product
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from graphopt.graph.op_rules import RULES, operand_names, operand_nodes, output_mask, reads
from tests.graph.operator_nodes import LAYOUTS, node_of, same_bits, with_layout

aten = torch.ops.aten

tested: set[Any] = set()

masks3 = st.lists(st.booleans(), min_size=3, max_size=3).filter(any)
layouts = st.sampled_from(LAYOUTS)
reductions = st.integers(0, 2)
sizes = st.integers(1, 5)


def assert_reads(operator: Any, *args: Any, exactly: bool = True, indices: str = "", **kwargs: Any) -> None:
    """The operator's live results keep their bits and strides while any operand that `reads` leaves out is NaN,
    infinite, or random; with ``exactly``, they change for each floating-point operand that it names. An operand
    of ``indices`` is always read and never poisoned: the kernel computes addresses from it."""
    tested.add(operator.overloadpacket)
    node = node_of(operator, *args, **kwargs)
    claimed, live = reads(node), output_mask(node)

    def run(inputs: dict[Any, torch.Tensor]) -> Any:
        values = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: inputs.get(n, n.meta["val"]))
        result = operator(*values[0], **values[1])
        if live is None:
            return result
        return [r if m else None for r, m in zip(result, live.value)]

    expected = run({})
    assert same_bits(expected, run({})), "the operator is not deterministic"
    for name in operand_names(node):
        for source in operand_nodes(node, name):
            if name == indices or not source.meta["val"].is_floating_point():
                continue
            same = all(same_bits(expected, run({source: poison})) for poison in poisons(source.meta["val"]))
            assert same or name in claimed, f"{operator}: {name} is read with {node.args}"
            assert not same or not exactly or name not in claimed, f"{operator}: {name} is not read ({node.args})"


def poisons(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Tensors of the same size and strides: NaN, infinite, random."""
    made = [torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype) for _ in range(3)]
    made[0].fill_(float("nan"))
    made[1].fill_(float("inf"))
    if not any(stride == 0 < size - 1 for size, stride in zip(tensor.size(), tensor.stride())):
        made[2].normal_(std=1e3)
    else:
        made[2].fill_(-1e3)
    return made


def random(data: st.DataObject, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A random tensor in a layout drawn by hypothesis."""
    return with_layout(torch.randn(shape).to(dtype), data.draw(layouts))


# -- convolution and products ------------------------------------------------------------------------------------


@given(st.data(), masks3, st.booleans(), st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
@settings(max_examples=4 * settings().max_examples)
def test_convolution_backward(data: st.DataObject, mask: list[bool], transposed: bool, dtype: torch.dtype) -> None:
    space = data.draw(st.integers(1, 3))
    each = lambda low, high: [data.draw(st.integers(low, high)) for _ in range(space)]
    groups, n = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    c_in, c_out = (groups * data.draw(st.integers(1, 3)) for _ in range(2))
    kernel, stride, padding, dilation = each(1, 3), each(1, 2), each(0, 2), each(1, 2)
    output_padding = [data.draw(st.integers(0, s - 1)) for s in stride] if transposed else [0] * space
    x = random(data, n, c_in, *each(4, 8), dtype=dtype)
    weight_shape = (c_in, c_out // groups) if transposed else (c_out, c_in // groups)
    weight = random(data, *weight_shape, *kernel, dtype=dtype)
    options = (stride, padding, dilation, transposed, output_padding, groups)
    try:
        out = aten.convolution(x, weight, None, *options)
    except RuntimeError:
        assume(False)  # the kernel does not fit
    gradient = random(data, *out.shape, dtype=dtype)
    # a kernel of 1 with a stride may meet padding only: then no element of an operand counts
    assert_reads(
        aten.convolution_backward.default, gradient, x, weight, [c_out], *options, mask, exactly=max(padding) == 0
    )


@given(st.data(), sizes, sizes, sizes, st.sampled_from([0, 1, 0.5]))
def test_beta_of_zero_ignores_the_summand(data: st.DataObject, m: int, k: int, n: int, beta: float) -> None:
    assert_reads(aten.addmm.default, random(data, m, n), random(data, m, k), random(data, k, n), beta=beta)
    assert_reads(aten.addmm.default, torch.randn(n), random(data, m, k), random(data, k, n), beta=beta)
    assert_reads(aten.addmv.default, torch.randn(m), random(data, m, k), torch.randn(k), beta=beta)
    batched = random(data, 2, m, k), random(data, 2, k, n)
    assert_reads(aten.baddbmm.default, random(data, 2, m, n), *batched, beta=beta)
    assert_reads(aten.addbmm.default, random(data, m, n), *batched, beta=beta)


# -- normalisation -----------------------------------------------------------------------------------------------


@given(st.data(), masks3, st.booleans(), st.booleans())
@settings(max_examples=2 * settings().max_examples)
def test_batch_norm_backward(data: st.DataObject, mask: list[bool], train: bool, affine: bool) -> None:
    n, c = data.draw(st.integers(2, 4)), data.draw(sizes)
    space = [data.draw(sizes) for _ in range(data.draw(st.integers(0, 3)))]
    gradient, x = random(data, n, c, *space), random(data, n, c, *space)
    weight = torch.randn(c) if affine else None
    mask = [mask[0], mask[1] and affine, mask[2] and affine]
    assume(any(mask))
    running, saved = (torch.randn(c), torch.rand(c) + 0.5), (torch.randn(c), torch.rand(c) + 0.5)
    assert_reads(aten.native_batch_norm_backward.default, gradient, x, weight, *running, *saved, train, 1e-5, mask)
    if affine:
        reserve = torch.empty(0, dtype=torch.uint8)
        arguments = (gradient, x, weight, *running, *saved, train, 1e-5, mask, reserve)
        assert_reads(aten.batch_norm_backward.default, *arguments, exactly=False)  # cuDNN reads more


@given(st.data(), masks3, st.booleans(), st.booleans())
def test_layer_norm_backward(data: st.DataObject, mask: list[bool], weighted: bool, biased: bool) -> None:
    rows, features = data.draw(sizes), data.draw(st.integers(2, 40))
    gradient, x = random(data, rows, features), random(data, rows, features)
    weight = torch.randn(features) if weighted else None
    bias = torch.randn(features) if biased else None
    mask = [mask[0], mask[1] and weighted, mask[2] and biased]
    assume(any(mask))
    saved = torch.randn(rows, 1), torch.rand(rows, 1) + 0.5
    assert_reads(aten.native_layer_norm_backward.default, gradient, x, [features], *saved, weight, bias, mask)


@given(st.data(), masks3, st.booleans())
def test_group_norm_backward(data: st.DataObject, mask: list[bool], affine: bool) -> None:
    groups, n, pixels = data.draw(st.integers(1, 3)), data.draw(sizes), data.draw(st.integers(2, 9))
    c = groups * data.draw(st.integers(1, 3))
    # autograd calls the operator with dense operands only
    dense = st.sampled_from(["contiguous", "channels_last"])
    gradient, x = (with_layout(torch.randn(n, c, pixels, 2), data.draw(dense)) for _ in range(2))
    weight = torch.randn(c) if affine else None
    mask = [mask[0], mask[1] and affine, mask[2] and affine]
    assume(any(mask))
    if x.stride(1) == 1:
        mask[0] = True  # else torch crashes, see test_masks_that_a_kernel_cannot_take
    saved = torch.randn(n, groups), torch.rand(n, groups) + 0.5
    sizes_ = (n, c, 2 * pixels, groups)
    assert_reads(aten.native_group_norm_backward.default, gradient, x, *saved, weight, *sizes_, mask)


# -- pooling, resampling, padding --------------------------------------------------------------------------------


@given(st.data(), st.integers(2, 3), st.integers(1, 3), st.integers(1, 2), st.booleans(), st.booleans())
@settings(max_examples=2 * settings().max_examples)
def test_pooling_backward(data: st.DataObject, space: int, kernel: int, stride: int, ceil: bool, batched: bool) -> None:
    shape = [data.draw(st.integers(6, 8)) for _ in range(space)]
    draw = random if batched else lambda data, *shape: torch.randn(shape)  # no layouts without a batch
    x = draw(data, *([2] if batched else []), 3, *shape)
    padding = data.draw(st.integers(0, kernel // 2))
    window = ([kernel] * space, [stride] * space, [padding] * space)

    pool = {2: aten.max_pool2d_with_indices, 3: aten.max_pool3d_with_indices}[space]
    backward = {2: aten.max_pool2d_with_indices_backward, 3: aten.max_pool3d_with_indices_backward}[space]
    dilation = [data.draw(st.integers(1, 2))] * space
    out, indices = pool(x, *window, dilation, ceil)
    assert_reads(backward.default, draw(data, *out.shape), x, *window, dilation, ceil, indices)

    backward = {2: aten.avg_pool2d_backward, 3: aten.avg_pool3d_backward}[space]
    counts = data.draw(st.booleans()), data.draw(st.sampled_from([None, 5]))
    out = {2: aten.avg_pool2d, 3: aten.avg_pool3d}[space](x, *window, ceil, *counts)
    assert_reads(backward.default, draw(data, *out.shape), x, *window, ceil, *counts)

    size = [data.draw(st.integers(1, 3)) for _ in range(space)]
    pool = {2: aten.adaptive_max_pool2d, 3: aten.adaptive_max_pool3d}[space]
    backward = {2: aten.adaptive_max_pool2d_backward, 3: aten.adaptive_max_pool3d_backward}[space]
    out, indices = pool(x, size)
    assert_reads(backward.default, draw(data, *out.shape), x, indices)

    backward = {2: aten._adaptive_avg_pool2d_backward, 3: aten._adaptive_avg_pool3d_backward}[space]
    assert_reads(backward.default, draw(data, *out.shape), x)

    if batched:
        pool = {2: aten.fractional_max_pool2d, 3: aten.fractional_max_pool3d}[space]
        backward = {2: aten.fractional_max_pool2d_backward, 3: aten.fractional_max_pool3d_backward}[space]
        out, indices = pool(x, [2] * space, size, torch.rand(2, 3, space))
        assert_reads(backward.default, draw(data, *out.shape), x, [2] * space, size, indices)


@given(st.data(), st.integers(1, 3), st.sampled_from(["reflection", "replication"]))
def test_padding_backward(data: st.DataObject, space: int, kind: str) -> None:
    x = random(data, 2, 3, *[data.draw(st.integers(3, 6)) for _ in range(space)])
    padding = [data.draw(st.integers(0, 2)) for _ in range(2 * space)]
    out = getattr(aten, f"{kind}_pad{space}d")(x, padding)
    backward = getattr(aten, f"{kind}_pad{space}d_backward")
    assert_reads(backward.default, random(data, *out.shape), x, padding)


@given(st.data(), st.integers(2, 3), reductions, reductions, st.booleans(), st.booleans())
def test_grid_sampler_backward(
    data: st.DataObject, space: int, mode: int, border: int, align: bool, wants_input: bool
) -> None:
    mode = min(mode, 1) if space == 3 else mode
    x = random(data, 2, 3, *[data.draw(st.integers(2, 5)) for _ in range(space)])
    grid = torch.rand(2, *[data.draw(st.integers(2, 4)) for _ in range(space)], space) * 1.8 - 0.9
    gradient = random(data, 2, 3, *grid.shape[1:-1])
    backward = {2: aten.grid_sampler_2d_backward, 3: aten.grid_sampler_3d_backward}[space]
    # the gradient of the grid is 0 in mode nearest, whatever the input
    for mask in ([wants_input, True], [True, False]):
        options = (mode, border, align, mask)
        assert_reads(backward.default, gradient, x, grid, *options, exactly=False, indices="grid")


# -- losses and activations --------------------------------------------------------------------------------------


@given(st.data(), reductions, st.booleans(), st.booleans())
def test_nll_loss_backward(data: st.DataObject, reduction: int, weighted: bool, spatial: bool) -> None:
    n, c = data.draw(sizes), data.draw(st.integers(2, 5))
    space = [3, 2] if spatial else []
    # with space the kernel wants a contiguous gradient, and makes it like `self`
    x, target = torch.randn(n, c, *space) if spatial else random(data, n, c), torch.randint(0, c, (n, *space))
    weight = torch.rand(c) + 0.5 if weighted else None
    forward = aten.nll_loss2d_forward if spatial else aten.nll_loss_forward
    backward = aten.nll_loss2d_backward if spatial else aten.nll_loss_backward
    out, total = forward(x, target, weight, reduction, -100)
    assert_reads(backward.default, torch.randn(out.shape), x, target, weight, reduction, -100, total)


@given(st.data(), sizes, st.booleans(), st.booleans())
def test_rrelu_backward(data: st.DataObject, n: int, training: bool, degenerate: bool) -> None:
    gradient, x, noise = random(data, n, 4), random(data, n, 4), torch.rand(n, 4)
    upper = 0.1 if degenerate else 0.3
    backward = aten.rrelu_with_noise_backward.default
    assert_reads(backward, gradient, x, noise, 0.1, upper, training, False, exactly=False)


# -- values made from shapes -------------------------------------------------------------------------------------


@given(st.data(), sizes)
def test_factories(data: st.DataObject, n: int) -> None:
    x = random(data, n, 3)
    for operator in (aten.zeros_like, aten.ones_like, aten.zero):
        assert_reads(operator.default, x)
    assert_reads(aten.full_like.default, x, 2.0)
    assert_reads(aten.fill.Scalar, x, 2.0)
    assert_reads(aten.fill.Tensor, x, torch.tensor(2.0))
    assert_reads(aten.copy.default, x, torch.randn(n, 3))
    for operator in (aten.new_zeros, aten.new_ones):
        assert_reads(operator.default, x, [4, n])
    assert_reads(aten.new_full.default, x, [4, n], 2.0)


RANDOM = [
    "rand_like", "randn_like", "uniform", "normal_functional", "exponential", "cauchy", "log_normal", "random",
    "bernoulli.p", "geometric",
]  # fmt: skip


def operator_of(name: str) -> tuple[Any, Any]:
    """The key in the table and the overload to call."""
    packet, _, overload = name.partition(".")
    operator = getattr(getattr(aten, packet), overload or "default")
    return (operator if overload else operator.overloadpacket), operator


@pytest.mark.parametrize("name", RANDOM)
def test_random_operators_read_only_the_shape(name: str) -> None:
    operator = operator_of(name)[1]
    arguments = [0.5] if name in ("bernoulli.p", "geometric") else []
    x = torch.randn(3, 4)
    assert reads(node_of(operator, x, *arguments)) == frozenset()
    torch.manual_seed(0)
    expected = operator(x, *arguments)
    for poison in poisons(x):
        torch.manual_seed(0)
        assert same_bits(expected, operator(poison, *arguments))


# -- the table ---------------------------------------------------------------------------------------------------


def test_operators_without_a_condition_read_every_operand() -> None:
    x = torch.randn(3)
    assert reads(node_of(aten.add.Tensor, x, x.clone())) == {"self", "other"}
    assert reads(node_of(aten.add.Tensor, x, 2)) == {"self"}
    assert reads(node_of(aten.cat.default, [x, x.clone()])) == {"tensors"}
    assert reads(node_of(aten.gelu_backward.default, x, x.clone())) == {"grad_output", "self"}


def test_every_condition_was_tested() -> None:
    """Each operator of the table with a condition was poisoned by a test of this file (run here where another
    process ran it)."""
    made_from_shapes = "empty_like new_empty new_empty_strided randint_like sym_size sym_stride sym_numel "
    made_from_shapes += "sym_storage_offset sym_is_contiguous"  # not comparable, or numbers of the host
    exempt = {getattr(aten, name) for name in made_from_shapes.split() if hasattr(aten, name)}
    exempt |= {operator_of(name)[0] for name in RANDOM}  # have a test of their own
    conditional = {operator for operator, rule in RULES.items() if rule.reads} - exempt
    properties = [t for n, t in sorted(globals().items()) if n.startswith("test_") and hasattr(t, "hypothesis")]
    for number, test in product(range(20), properties):
        if conditional - tested:
            hypothesis.seed(number)(test)()  # other examples than the profile's, the same in every run
            del test._hypothesis_internal_use_seed
    assert not conditional - tested
