"""Workspace: memory that an operator's CPU kernel takes beyond its results and gives back before it returns.

A table from operator to formula, as torch's kernels allocate it (the profiler shows each block). Each formula says how
much more than the results is there at certain *moments* of the kernel; the workspace is the largest of them. All sizes
come through one gateway, `Sizes`, so that a graph can be priced for other shapes than those in its metadata.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, TypeAlias

import sympy
import torch
from torch import fx

from graphopt.graph.op_rules import is_pointwise, output_mask
from graphopt.graph.op_rules.arguments import operand
from graphopt.graph.sizes import Expr, expression, product
from graphopt.graph.storages import tensors

Shape: TypeAlias = Sequence[Expr]
ShapesOf: TypeAlias = Callable[[fx.Node], Sequence[Shape]]
Moments: TypeAlias = list[Expr]
"""Bytes beyond the results at moments of one kernel; empty where there are none."""

aten = torch.ops.aten


def shapes(node: fx.Node) -> list[Shape]:
    """The shapes of the tensors in a node's value, in order: ints, or sympy expressions of free sizes."""
    return [[expression(s) for s in t.shape] for t in tensors(node.meta.get("val"))]


@dataclass(frozen=True)
class Sizes:
    """Where formulas get sizes from. ``shapes_of``: shapes of the tensors in a node's value, in order. ``threads``: of
    the kernels; some take a buffer a thread. Dtypes and whether memory is contiguous come from ``meta["val"]``."""

    shapes_of: ShapesOf = shapes
    threads: int = 1

    def shape(self, node: fx.Node, index: int = 0) -> Shape:
        """Shape of one tensor of a node's value."""
        return self.shapes_of(node)[index]

    def numel(self, node: fx.Node, index: int = 0) -> Expr:
        """Elements of one tensor of a node's value."""
        return product(self.shape(node, index))

    def nbytes(self, node: fx.Node, index: int = 0) -> Expr:
        """Bytes of one tensor of a node's value, were it contiguous."""
        return self.numel(node, index) * _tensor(node, index).element_size()


class at_least(sympy.Function):  # type: ignore[misc]  # noqa: N801  # sympy's functions are lower case
    """``at_least(n, k)``: 1 where ``n >= k``, else 0. For kernels that are chosen by size."""

    @classmethod
    def eval(cls, n: Any, k: Any) -> sympy.Integer | None:
        """The number, where ``n`` is one."""
        return sympy.Integer(1 if n >= k else 0) if n.is_number else None


def workspace(node: fx.Node, sizes: Sizes, native_dropout: bool = True) -> Moments:
    """Bytes beyond its results that the kernel of ``node`` holds, at moments of it; the largest counts.

    ``native_dropout``: whether dropout is that operator; eager on the CPU multiplies by a mask of numbers instead.
    """
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return []
    if not native_dropout and node.target.overloadpacket in (aten.native_dropout, aten.native_dropout_backward):
        return []
    formula = FORMULAS.get(node.target.overloadpacket)
    if formula is None and is_pointwise(node):
        formula = _promoted_operands
    return formula(node, sizes) if formula else []


def _tensor(node: fx.Node, index: int = 0) -> torch.Tensor:
    return tensors(node.meta["val"])[index]


def _is_tensor(value: Any) -> bool:
    return isinstance(value, fx.Node) and isinstance(value.meta.get("val"), torch.Tensor)


# -- copies ---------------------------------------------------------------------------------------------------------


def _promoted_operands(node: fx.Node, sizes: Sizes) -> Moments:
    """Kernels over several dtypes (``mul(float, bool)``) first copy operands to the common one."""
    operands = [a for a in node.args if _is_tensor(a) and _tensor(a).dim() > 0]
    dtypes = [_tensor(a).dtype for a in operands]
    result = _tensor(node).dtype if tensors(node.meta["val"]) else None
    if not operands or result is None:
        return []
    common = reduce(torch.promote_types, dtypes) if result is torch.bool else result
    return [sum(sizes.numel(a) * common.itemsize for a, d in zip(operands, dtypes, strict=True) if d != common)]


def _contiguous_operands(*positions: int) -> Callable[[fx.Node, Sizes], Moments]:
    """Kernels that make these arguments contiguous."""

    def formula(node: fx.Node, sizes: Sizes) -> Moments:
        given = [node.args[i] for i in positions if i < len(node.args)]
        return [sum(sizes.nbytes(a) for a in given if _is_tensor(a) and not _contiguous(_tensor(a)))]

    return formula


def _contiguous(tensor: torch.Tensor) -> bool:
    expected: Expr = 1
    for size, stride in zip(reversed(tensor.shape), reversed(tensor.stride()), strict=True):
        if expression(size) != 1 and expression(stride) != expected:
            return False
        expected = expected * expression(size)
    return True


def _cast_input(node: fx.Node, sizes: Sizes) -> Moments:
    """Sums of another dtype copy their input to it: ``cumsum`` of a mask."""
    source, result = node.args[0], _tensor(node)
    if not _is_tensor(source) or _tensor(source).dtype == result.dtype:
        return []
    return [sizes.numel(source) * result.element_size()]


def _matrices(node: fx.Node, sizes: Sizes) -> Moments:
    """BLAS takes matrices whose rows or columns are contiguous; others are copied."""

    def odd(tensor: torch.Tensor) -> bool:
        (m, n), (row, column) = tensor.shape[-2:], tensor.stride()[-2:]
        row, column, m, n = (expression(v) for v in (row, column, m, n))
        return not (m == 1 or n == 1 or row == 1 or column == 1)

    return [sum(sizes.nbytes(a) for a in node.args if _is_tensor(a) and _tensor(a).dim() == 2 and odd(_tensor(a)))]


# -- dropout, normalisation, attention, losses ----------------------------------------------------------------------


def _as_much_as_result(node: fx.Node, sizes: Sizes) -> Moments:
    """One temporary like the first result: batch norm's backward allocates it twice; dropout's mask as floats."""
    mask = output_mask(node)
    return [sizes.nbytes(node)] if mask is None or mask.value[0] else []


def _safe_softmax(node: fx.Node, sizes: Sizes) -> Moments:
    """Looks for rows that are masked out: a bool an element."""
    return [sizes.numel(node)]


def _attention_blocks(q_length: Expr, kv_length: Expr) -> tuple[Expr, Expr]:
    """Rows and columns of the blocks of attention on the CPU (FlashAttentionKernel.cpp); symbolic lengths as if long."""
    rows = 256 if not isinstance(q_length, int) or q_length >= 768 else 64 if q_length >= 192 else 32
    return (
        min(rows, q_length) if isinstance(q_length, int) else rows,
        min(512, kv_length) if isinstance(kv_length, int) else 512,
    )


def _flash_attention(node: fx.Node, sizes: Sizes) -> Moments:
    """A block of scores, of results and two rows of statistics a thread."""
    *_, q_length, depth = sizes.shape(node.args[0])  # type: ignore[arg-type]
    rows, columns = _attention_blocks(q_length, sizes.shape(node.args[1])[-2])  # type: ignore[arg-type]
    return [sizes.threads * 4 * (rows * columns + 2 * rows + rows * depth)]


def _flash_attention_backward(node: fx.Node, sizes: Sizes) -> Moments:
    """Two blocks of scores a thread, and the gradient or the result in the other's layout."""
    q, kv = node.args[1], node.args[2]
    rows, columns = _attention_blocks(sizes.shape(q)[-2], sizes.shape(kv)[-2])  # type: ignore[arg-type]
    return [sizes.threads * 4 * (2 * rows * columns + rows) + sizes.nbytes(q)]  # type: ignore[arg-type]


def _loss(node: fx.Node, sizes: Sizes) -> Moments:
    """A reduced elementwise loss: the losses, and the place they are computed in."""
    source = node.args[0]
    return [] if _tensor(node).dim() else [2 * sizes.nbytes(source)]  # type: ignore[arg-type]


# -- recurrent layers -----------------------------------------------------------------------------------------------


_PAGE = 4096
"""oneDNN aligns the parts of a recurrent layer's buffers to pages."""


def _recurrent_sizes(node: fx.Node, sizes: Sizes) -> tuple[Expr, Expr, Expr, Expr]:
    """Steps, batch, hidden size, and bytes of both weights, in pages."""
    x, weight, recurrent = node.args[:3]
    steps, batch, _ = sizes.shape(x)  # type: ignore[arg-type]
    weights = sizes.nbytes(weight) + sizes.nbytes(recurrent)  # type: ignore[arg-type]
    return steps, batch, sizes.shape(recurrent)[1], weights + 2 * _PAGE  # type: ignore[arg-type]


def _recurrent(node: fx.Node, sizes: Sizes) -> Moments:
    """oneDNN reorders both weights and computes the gates of all steps in a scratchpad."""
    steps, batch, hidden, weights = _recurrent_sizes(node, sizes)
    return [weights + 4 * batch * (steps + 1) * 4 * hidden + 4 * _PAGE]


def _recurrent_backward(node: fx.Node, sizes: Sizes) -> Moments:
    """The same, with the gradient made contiguous and those of the states."""
    steps, batch, hidden, _ = _recurrent_sizes(node, sizes)
    return [_recurrent(node, sizes)[0] + 4 * batch * hidden * (steps + 3)]


def unseen_results(node: fx.Node, sizes: Sizes) -> dict[tuple[int, ...], Expr]:
    """Bytes of results whose size only the kernel knows, by their place: what oneDNN's recurrent layer keeps for its
    backward (gates, states, cell states and the gradients of states of all steps)."""
    if node.target is not aten.mkldnn_rnn_layer.default:
        return {}
    steps, batch, hidden, _ = _recurrent_sizes(node, sizes)
    return {(3,): 4 * batch * hidden * (4 * steps + 10 * (steps + 1) + steps) + 5 * _PAGE}


# -- convolution ----------------------------------------------------------------------------------------------------

_LANES = 16 if "AVX512" in torch.backends.cpu.get_cpu_capability() else 8
"""Channels in a block of oneDNN's memory layout."""


@dataclass(frozen=True)
class _Convolution:
    """Sizes of one convolution in bytes: input, weight and output; with ``_blocked``, in oneDNN's layout."""

    x: Expr
    w: Expr
    y: Expr
    x_blocked: Expr
    w_blocked: Expr
    y_blocked: Expr
    columns: Expr  # of im2col, which the kernels without oneDNN use
    one_column: Expr  # the same of one image
    onednn: Expr  # 1 where oneDNN is used, else 0
    few_channels: bool  # the first layer: its input is read as it is
    strided: bool
    gemm: bool  # the gradient of the weight has no direct kernel: the window is dilated, too large, or out of the image

    def moments(self, onednn: Sequence[Expr], plain: Sequence[Expr]) -> Moments:
        """Those of the kernel that is used."""
        if self.onednn == 1:
            return list(onednn)
        return [self.onednn * m for m in onednn] + [(1 - self.onednn) * m for m in plain]

    def forward(self) -> Moments:
        """oneDNN reorders input and weight, computes, and copies the result back."""
        x = 0 if self.few_channels else self.x_blocked
        return [x + self.w_blocked + self.y_blocked - self.y, self.y_blocked]

    def transposed_forward(self) -> Moments:
        """The same with a copy of the result in its place."""
        return [self.x_blocked + self.w_blocked + self.y_blocked - self.y, self.y_blocked + self.y]

    def backward(self, data: bool, weight: bool) -> Moments:
        """First the gradient of the input, then that of the weight; each is copied out of oneDNN's layout."""
        results = (self.x if data else 0) + (self.w if weight else 0)
        moments: Moments = []
        if data:
            moments += [
                self.x_blocked + self.w_blocked + self.y_blocked - results,
                self.x_blocked + self.x * (2 if self.strided else 1) - results,
            ]
        if weight:
            x = 0 if self.few_channels else self.x_blocked
            held = self.x if data else 0
            work = 4 * self.w + self.one_column if self.gemm else x + self.y_blocked
            moments += [held + work + self.w_blocked - results, held + self.w_blocked + self.w - results]
        return moments


def _convolution_of(node: fx.Node, sizes: Sizes, x: fx.Node, w: fx.Node, y: Shape) -> _Convolution:
    image, kernel = sizes.shape(x), sizes.shape(w)
    itemsize = _tensor(x).element_size()
    groups, transposed = operand(node, "groups"), operand(node, "transposed")
    strided = any(s != 1 for s in operand(node, "stride"))
    dilated = any(d != 1 for d in operand(node, "dilation"))
    padded = any(p != 0 for p in operand(node, "padding"))
    window = list(kernel[2:])
    n = image[0]
    pointwise = all(k == 1 for k in window)
    # aten/src/ATen/native/Convolution.cpp, use_mkldnn
    always = strided or dilated or not pointwise or sizes.threads > 1
    large = groups > 1 or (len(window) > 1 and all(isinstance(k, int) and k > 3 for k in window[-2:]))
    onednn: Expr = int(_tensor(x).dtype is torch.float32)
    if not always:
        onednn = onednn * _flag(n, 16)
    if not large:
        onednn = onednn * (_flag(n, 2) if n != 1 else _flag(product(image), 20481))
    unfolded, places = (y[1], image[2:]) if transposed else (image[1], y[2:])
    one_column = product([unfolded, *window, *places]) * itemsize
    columns = 0 if pointwise and not strided and not padded else one_column * (1 if transposed else n)
    in_channels, out_channels = (kernel[0], kernel[1] * groups) if transposed else (kernel[1] * groups, kernel[0])
    depthwise = groups > 1 and groups == in_channels
    nhwc = _channels_last(_tensor(x)) or _channels_last(_tensor(w))

    def blocked(shape: Shape, *dims: int) -> Expr:
        return product(_padded(s) if i in dims else s for i, s in enumerate(shape)) * itemsize

    small = isinstance(in_channels, int) and in_channels < 4 and not depthwise
    return _Convolution(
        x=product(image) * itemsize, w=product(kernel) * itemsize, y=product(y) * itemsize,
        x_blocked=0 if nhwc else blocked(image) if small else blocked(image, 1),
        w_blocked=blocked(kernel, 0) if groups > 1 or small else blocked(kernel, 0, 1),
        y_blocked=0 if nhwc else blocked(y, 1),
        columns=columns, one_column=one_column, onednn=onednn, few_channels=small, strided=strided,
        gemm=dilated or any(
            isinstance(k, int) and (k >= 14 or (isinstance(s, int) and s < k))
            for s, k in zip(image[2:], window, strict=True)
        ),
    )  # fmt: skip


def _flag(n: Expr, k: int) -> Expr:
    """1 where ``n >= k``. A free size is at least 2."""
    if isinstance(n, int):
        return int(n >= k)
    return 1 if k <= 2 else at_least(n, k)


def _padded(channels: Expr) -> Expr:
    return -(-channels // _LANES) * _LANES if isinstance(channels, int) else channels


def _channels_last(tensor: torch.Tensor) -> bool:
    if tensor.dim() not in (4, 5) or _contiguous(tensor):
        return False
    return _contiguous(tensor.movedim(1, -1))


def _convolution(node: fx.Node, sizes: Sizes) -> Moments:
    x, w = node.args[0], node.args[1]
    found = _convolution_of(node, sizes, x, w, sizes.shape(node))  # type: ignore[arg-type]
    work = found.transposed_forward() if operand(node, "transposed") else found.forward()
    copies = _copies(sizes, x)  # type: ignore[arg-type]
    return [m + copies for m in found.moments(work, [found.columns])]


def _copies(sizes: Sizes, *operands: fx.Node) -> Expr:
    """Operands in neither of the layouts that convolutions take are copied."""
    return sum(sizes.nbytes(o) for o in operands if not (_contiguous(_tensor(o)) or _channels_last(_tensor(o))))


def _convolution_backward(node: fx.Node, sizes: Sizes) -> Moments:
    gradient, x, w = node.args[:3]
    found = _convolution_of(node, sizes, x, w, sizes.shape(gradient))  # type: ignore[arg-type]
    data, weight, _ = operand(node, "output_mask")
    copies = _copies(sizes, gradient, x)  # type: ignore[arg-type]
    return [m + copies for m in found.moments(found.backward(data, weight), [found.columns])]


FORMULAS: Mapping[Any, Callable[[fx.Node, Sizes], Moments]] = {
    aten.convolution: _convolution,
    aten.convolution_backward: _convolution_backward,
    aten.native_batch_norm_backward: _as_much_as_result,
    aten.native_layer_norm: _contiguous_operands(0),
    aten.native_layer_norm_backward: _contiguous_operands(0, 1),
    aten.native_group_norm: _contiguous_operands(0),
    aten.native_group_norm_backward: _contiguous_operands(0, 1),
    aten.native_dropout: _as_much_as_result,
    aten.native_dropout_backward: _as_much_as_result,
    aten.embedding: _contiguous_operands(1),
    aten.embedding_dense_backward: _contiguous_operands(0),
    aten._safe_softmax: _safe_softmax,
    aten.mkldnn_rnn_layer: _recurrent,
    aten.mkldnn_rnn_layer_backward: _recurrent_backward,
    aten._scaled_dot_product_flash_attention_for_cpu: _flash_attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _flash_attention_backward,
    aten.mm: _matrices,
    aten.addmm: _matrices,
    aten.cumsum: _cast_input,
    aten.sum: _cast_input,
    aten.mse_loss: _loss,
    aten.smooth_l1_loss: _loss,
    aten.huber_loss: _loss,
    aten.binary_cross_entropy_with_logits: _loss,
    aten.where: lambda node, sizes: [],
}
"""By operator. Those that are not here (and not pointwise over several dtypes) work in their results."""
