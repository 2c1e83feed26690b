"""Workspace: memory that an operator's CPU kernel takes beyond its results and gives back before it returns.

A table from operator to formula, as torch's kernels allocate it (the profiler shows each block). Each formula says how
much more than the results is there at certain *moments* of the kernel; the workspace is the largest of them. All sizes
come through one gateway, `Sizes`, so that a graph can be priced for other shapes than those in its metadata.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import reduce
from typing import Any

import torch
from torch import fx

from graphopt.cost_model.convolution_workspace import convolution, convolution_backward
from graphopt.cost_model.kernel_sizes import Moments, Sizes, at_most, contiguous, flag, is_tensor, tensor_of
from graphopt.graph.op_rules import is_pointwise, output_mask
from graphopt.graph.sizes import Expr, expression

aten = torch.ops.aten


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


def _total(sizes: Iterable[Expr]) -> Expr:
    return sum(sizes, 0)


# -- copies ---------------------------------------------------------------------------------------------------------


def _promoted_operands(node: fx.Node, sizes: Sizes) -> Moments:
    """Kernels over several dtypes (``mul(float, bool)``) first copy operands to the common one."""
    operands = [a for a in node.args if is_tensor(a) and tensor_of(a).dim() > 0]
    if not operands or not is_tensor(node):
        return []
    dtypes = [tensor_of(a).dtype for a in operands]
    result = tensor_of(node).dtype
    common = reduce(torch.promote_types, dtypes) if result is torch.bool else result
    return [_total(sizes.numel(a) for a, d in zip(operands, dtypes, strict=True) if d != common) * common.itemsize]


def _contiguous_operands(*positions: int) -> Callable[[fx.Node, Sizes], Moments]:
    """Kernels that make these arguments contiguous."""

    def formula(node: fx.Node, sizes: Sizes) -> Moments:
        given = [a for a in (node.args[i] for i in positions) if is_tensor(a)]
        return [_total(sizes.nbytes(a) for a in given if not contiguous(tensor_of(a)))]

    return formula


def _cast_input(node: fx.Node, sizes: Sizes) -> Moments:
    """Sums of another dtype copy their input to it: ``cumsum`` of a mask."""
    source, dtype = node.args[0], tensor_of(node).dtype
    return [sizes.numel(source) * dtype.itemsize] if is_tensor(source) and tensor_of(source).dtype != dtype else []


def _matrices(node: fx.Node, sizes: Sizes) -> Moments:
    """BLAS takes matrices whose rows or columns are contiguous; others are copied."""

    def odd(tensor: torch.Tensor) -> bool:
        (m, n), (row, column) = tensor.shape[-2:], tensor.stride()[-2:]
        row, column, m, n = (expression(v) for v in (row, column, m, n))
        return not (m == 1 or n == 1 or row == 1 or column == 1)

    matrices = [a for a in node.args if is_tensor(a) and tensor_of(a).dim() == 2]
    return [_total(sizes.nbytes(a) for a in matrices if odd(tensor_of(a)))]


# -- dropout, normalisation, attention, losses ----------------------------------------------------------------------


def _as_much_as_result(node: fx.Node, sizes: Sizes) -> Moments:
    """One temporary like the first result: batch norm's backward allocates it twice; dropout's mask as floats."""
    mask = output_mask(node)
    return [sizes.nbytes(node)] if mask is None or mask.value[0] else []


def _safe_softmax(node: fx.Node, sizes: Sizes) -> Moments:
    """Looks for rows that are masked out: a bool an element."""
    return [sizes.numel(node)]


def _attention_blocks(q_length: Expr, kv_length: Expr) -> tuple[Expr, Expr]:
    """Rows and columns of the blocks of attention on the CPU (aten/src/ATen/native/cpu/FlashAttentionKernel.cpp)."""
    rows = 32 + 32 * flag(q_length, 192) + 192 * flag(q_length, 768)
    return at_most(q_length, rows), at_most(kv_length, 512)


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
    return [] if tensor_of(node).dim() else [2 * sizes.nbytes(source)]  # type: ignore[arg-type]


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
    return {(3,): 4 * batch * hidden * (4 * steps + 10 * (steps + 1) + steps) + 3 * _PAGE}


FORMULAS: Mapping[Any, Callable[[fx.Node, Sizes], Moments]] = {
    aten.convolution: convolution,
    aten.convolution_backward: convolution_backward,
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
