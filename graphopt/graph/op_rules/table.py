"""The table of operator rules: one entry an operator (or one for several that share their rule).

An entry says what the operator costs (``flops``), when it needs the values of an operand (``reads``), in which
operands it is linear (``linear``), when it draws random numbers (``draws``), and whether a boolean mask can stand for a
saved operand (``masked``). Conditions see the node's arguments by name: ``lambda a: a.output_mask[1]``.
Sources: torch's ``derivatives.yaml`` and ``aten/src/ATen/native`` (CPU and CUDA kernels); each condition under
``reads`` is tested by poisoning the operand.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch

from graphopt.graph.op_rules import flop_formulas as cost
from graphopt.graph.op_rules.masked_forms import THRESHOLD, MaskedForm

Condition = Callable[[SimpleNamespace], Any]


@dataclass(frozen=True)
class OpRule:
    """What is known of an operator.

    ``family``: what kind of operator it is. ``flops``: FLOPs from shapes, None where there are no multiply-adds.
    ``reads``: operands whose values are needed only under a condition; all others are always needed. ``linear``: sets
    of operands in which the operator is linear together, joined by ``+``; alternatives are separated by ``|``
    (``mul: "self | other"``, ``add: "self + other"``). ``draws``: when the operator draws random numbers, None: iff it
    is tagged. ``gathers``: operand of which only as many elements are read as the result has. ``masked``: the form
    with a boolean mask.
    """

    family: str
    flops: cost.Formula | None = None
    reads: Mapping[str, Condition] = field(default_factory=dict)
    linear: str = ""
    draws: Condition | None = None
    gathers: str = ""
    masked: MaskedForm | None = None


RULES: dict[torch._ops.OpOverloadPacket | torch._ops.OpOverload, OpRule] = {}
"""Rules by operator; an overload that differs from the others of its operator (``div.Tensor_mode``) has its own."""


def _rule(names: str, family: str, **axes: Any) -> None:
    """Enter one rule for the operators in ``names``; those that this torch does not have are left out."""
    entry = OpRule(family, **axes)
    for name in names.split():
        packet_name, _, overload = name.partition(".")
        operator = getattr(torch.ops.aten, packet_name, None)
        if operator is not None and overload:
            operator = getattr(operator, overload, None)
        if operator is not None:
            assert operator not in RULES, f"{name} has two entries"
            RULES[operator] = entry


def never(a: SimpleNamespace) -> bool:
    """The operand lends its shape, strides and dtype only."""
    return False


def always(a: SimpleNamespace) -> bool:
    """The operand is read whatever the other arguments are."""
    return True


_UNREAD_SELF = {"self": never}

# -- contractions -----------------------------------------------------------------------------------------------------
# beta = 0 ignores `self`, even its NaN
_BETA = {"self": lambda a: a.beta != 0}
_rule("mm", "contraction", flops=cost.contraction("self: mk, mat2: kn"), linear="self | mat2")
_rule("bmm", "contraction", flops=cost.contraction("self: bmk, mat2: bkn"), linear="self | mat2")
_rule("addmm", "contraction", flops=cost.contraction("mat1: mk, mat2: kn"), reads=_BETA,
      linear="self + mat1 | self + mat2")  # fmt: skip
_rule("baddbmm", "contraction", flops=cost.contraction("batch1: bmk, batch2: bkn"), reads=_BETA,
      linear="self + batch1 | self + batch2")  # fmt: skip
_rule("addbmm", "contraction", flops=cost.contraction("batch1: bmk, batch2: bkn"), reads=_BETA,
      linear="self + batch1 | self + batch2")  # fmt: skip
_rule("mv", "contraction", flops=cost.contraction("self: mk, vec: k"), linear="self | vec")
_rule("addmv", "contraction", flops=cost.contraction("mat: mk, vec: k"), reads=_BETA,
      linear="self + mat | self + vec")  # fmt: skip
_rule("dot", "contraction", flops=cost.contraction("self: k, tensor: k"), linear="self | tensor")
_rule(
    "linear",
    "contraction",
    flops=cost.contraction("input: *k, weight: nk"),
    linear="input + bias | weight + bias",
)
_rule("_scaled_mm", "contraction", flops=cost.contraction("self: mk, mat2: kn"))
_rule("matmul_backward", "contraction", flops=cost.matmul_backward, linear="grad",
      reads={"self": lambda a: a.mask[1], "other": lambda a: a.mask[0]})  # fmt: skip
_rule("linear_backward mkldnn_linear_backward", "contraction", flops=cost.linear_backward, linear="grad_output",
      reads={"self": lambda a: a.output_mask[1], "weight": lambda a: a.output_mask[0]})  # fmt: skip

# -- convolution ------------------------------------------------------------------------------------------------------
_rule("convolution _convolution convolution_overrideable", "convolution", flops=cost.convolution("input"),
      linear="input + bias | weight + bias")  # fmt: skip
_rule("cudnn_convolution", "convolution", flops=cost.convolution("self"), linear="self | weight")
_rule(
    "_slow_conv2d_forward",
    "convolution",
    flops=cost.convolution("self"),
    linear="self + bias | weight + bias",
)
_rule("convolution_backward", "convolution", flops=cost.convolution_backward, linear="grad_output",
      reads={"input": lambda a: a.output_mask[1], "weight": lambda a: a.output_mask[0]})  # fmt: skip

# -- attention: draws random numbers only with dropout; its backward reads the seed that forward saved ----------------
_DROPOUT = lambda a: a.dropout_p != 0
_rule("_scaled_dot_product_flash_attention _scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention "
      "_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_fused_attention_overrideable "
      "_scaled_dot_product_attention_math _flash_attention_forward _efficient_attention_forward",
      "attention", flops=cost.attention, draws=_DROPOUT)  # fmt: skip
_rule("_scaled_dot_product_flash_attention_backward _scaled_dot_product_cudnn_attention_backward "
      "_scaled_dot_product_flash_attention_for_cpu_backward _scaled_dot_product_fused_attention_overrideable_backward "
      "_flash_attention_backward", "attention", flops=cost.attention_backward, linear="grad_out",
      draws=never)  # fmt: skip
_rule("_scaled_dot_product_efficient_attention_backward _efficient_attention_backward", "attention",
      flops=cost.attention_backward, linear="grad_out_", draws=never)  # fmt: skip
_rule("_fused_sdp_choice", "number", draws=never)

# -- recurrent layers -------------------------------------------------------------------------------------------------
_rule("mkldnn_rnn_layer", "recurrent", flops=cost.recurrent(1, "weight0", "weight1"))
_rule("mkldnn_rnn_layer_backward", "recurrent", flops=cost.recurrent(2, "weight1", "weight2"),
      linear="grad_output + grad_hy + grad_cy")  # fmt: skip
_rule(
    "_cudnn_rnn", "recurrent", flops=cost.recurrent(1, "weight"), draws=lambda a: a.train and a.dropout != 0
)
_rule(
    "_cudnn_rnn_backward",
    "recurrent",
    flops=cost.recurrent(2, "weight"),
    linear="grad_output + grad_hy + grad_cy",
)
_rule("_thnn_fused_lstm_cell _thnn_fused_gru_cell", "recurrent")
_rule(
    "_thnn_fused_lstm_cell_backward _thnn_fused_lstm_cell_backward_impl",
    "recurrent",
    linear="grad_hy + grad_cy",
)
_rule("_thnn_fused_gru_cell_backward", "recurrent", linear="grad_hy")

# -- normalisation ----------------------------------------------------------------------------------------------------
_rule("native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_functional "
      "_native_batch_norm_legit_no_training _batch_norm_with_update _batch_norm_with_update_functional "
      "_batch_norm_no_update cudnn_batch_norm miopen_batch_norm native_layer_norm native_group_norm _fused_rms_norm",
      "normalisation")  # fmt: skip
# dx = w invstd (dy - mean(dy) - xhat mean(dy xhat)) in training, w invstd dy in eval; dw = sum dy xhat; db = sum dy
_rule("native_batch_norm_backward", "normalisation", linear="grad_out", reads={
    "input": lambda a: a.output_mask[1] or (a.train and a.output_mask[0]),
    "weight": lambda a: a.output_mask[0],
    "running_mean": lambda a: not a.train and a.output_mask[1],
    "running_var": lambda a: not a.train and (a.output_mask[0] or a.output_mask[1]),
    "save_mean": lambda a: a.train and (a.output_mask[0] or a.output_mask[1]),
    "save_invstd": lambda a: a.train and (a.output_mask[0] or a.output_mask[1]),
})  # fmt: skip
# as above; on CUDA `update` may choose cuDNN, which makes all three gradients whatever the mask
_rule("batch_norm_backward", "normalisation", linear="grad_out", reads={
    "input": lambda a: a.output_mask[1] or a.update,
    "weight": lambda a: a.output_mask[0] or a.update,
    "running_mean": lambda a: not a.update and a.output_mask[1],
    "running_var": lambda a: not a.update and (a.output_mask[0] or a.output_mask[1]),
    "save_mean": lambda a: a.update,
    "save_var": lambda a: a.update,
    "reserve": lambda a: a.update,
})  # fmt: skip
# always in training mode: batch statistics only
_rule("cudnn_batch_norm_backward miopen_batch_norm_backward", "normalisation", linear="grad_output",
      reads={"running_mean": never, "running_var": never})  # fmt: skip
_rule("native_layer_norm_backward", "normalisation", linear="grad_out", reads={
    "input": lambda a: a.output_mask[0] or a.output_mask[1],
    "mean": lambda a: a.output_mask[0] or a.output_mask[1],
    "rstd": lambda a: a.output_mask[0] or a.output_mask[1],
    "weight": lambda a: a.output_mask[0],
    "bias": never,
})  # fmt: skip
_rule("native_group_norm_backward", "normalisation", linear="grad_out", reads={
    "input": lambda a: a.output_mask[0] or a.output_mask[1],
    "mean": lambda a: a.output_mask[0] or a.output_mask[1],
    "rstd": lambda a: a.output_mask[0] or a.output_mask[1],
    "weight": lambda a: a.output_mask[0],
})  # fmt: skip
_rule(
    "_fused_rms_norm_backward",
    "normalisation",
    linear="grad_out",
    reads={"weight": lambda a: a.output_mask[0]},
)

# -- pooling, resampling, padding: `self` lends its shape and memory format -------------------------------------------
_rule("max_pool2d_with_indices max_pool3d_with_indices adaptive_max_pool2d adaptive_max_pool3d fractional_max_pool2d "
      "fractional_max_pool3d", "pooling")  # fmt: skip
_rule("max_pool2d_with_indices_backward max_pool3d_with_indices_backward adaptive_max_pool2d_backward "
      "adaptive_max_pool3d_backward fractional_max_pool2d_backward fractional_max_pool3d_backward",
      "pooling", linear="grad_output", reads=_UNREAD_SELF)  # fmt: skip
_rule("avg_pool2d avg_pool3d _adaptive_avg_pool2d _adaptive_avg_pool3d", "pooling", linear="self")
_rule("avg_pool2d_backward avg_pool3d_backward _adaptive_avg_pool2d_backward _adaptive_avg_pool3d_backward",
      "pooling", linear="grad_output", reads=_UNREAD_SELF)  # fmt: skip
_rule("upsample_nearest1d upsample_nearest2d upsample_nearest3d _upsample_nearest_exact1d _upsample_nearest_exact2d "
      "_upsample_nearest_exact3d upsample_linear1d upsample_bilinear2d upsample_trilinear3d upsample_bicubic2d "
      "_upsample_bilinear2d_aa _upsample_bicubic2d_aa", "resampling", linear="self")  # fmt: skip
_rule("upsample_nearest1d_backward upsample_nearest2d_backward upsample_nearest3d_backward "
      "_upsample_nearest_exact1d_backward _upsample_nearest_exact2d_backward _upsample_nearest_exact3d_backward "
      "upsample_linear1d_backward upsample_bilinear2d_backward upsample_trilinear3d_backward "
      "upsample_bicubic2d_backward _upsample_bilinear2d_aa_backward _upsample_bicubic2d_aa_backward",
      "resampling", linear="grad_output")  # fmt: skip
_rule("grid_sampler_2d grid_sampler_3d", "resampling", linear="input")
_rule("grid_sampler_2d_backward grid_sampler_3d_backward", "resampling", linear="grad_output",
      reads={"input": lambda a: a.output_mask[1]})  # fmt: skip
_rule("constant_pad_nd", "padding", linear="self + value")
_rule("reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d replication_pad3d",
      "padding", linear="self")  # fmt: skip
_rule("reflection_pad1d_backward reflection_pad2d_backward reflection_pad3d_backward replication_pad1d_backward "
      "replication_pad2d_backward replication_pad3d_backward", "padding", linear="grad_output",
      reads=_UNREAD_SELF)  # fmt: skip

# -- softmax and losses -----------------------------------------------------------------------------------------------
_rule("_softmax _log_softmax", "softmax")
_rule("_softmax_backward_data _log_softmax_backward_data", "softmax", linear="grad_output")
_rule("nll_loss_forward nll_loss2d_forward", "loss")
# the gradient is scattered to the targets' places: of the log-probabilities only the shape; 1 is mean
_rule("nll_loss_backward nll_loss2d_backward", "loss", linear="grad_output",
      reads={"self": never, "total_weight": lambda a: a.reduction == 1})  # fmt: skip
_rule("mse_loss smooth_l1_loss huber_loss binary_cross_entropy soft_margin_loss multi_margin_loss "
      "multilabel_margin_loss_forward", "loss")  # fmt: skip
_rule("mse_loss_backward", "loss", linear="grad_output | self + target")
_rule("smooth_l1_loss_backward huber_loss_backward binary_cross_entropy_backward soft_margin_loss_backward "
      "multi_margin_loss_backward multilabel_margin_loss_backward", "loss", linear="grad_output")  # fmt: skip
_rule("_ctc_loss", "loss")
_rule("_ctc_loss_backward", "loss", linear="grad")

# -- activations ------------------------------------------------------------------------------------------------------
_rule("threshold_backward", "pointwise", linear="grad_output", masked=THRESHOLD)
_rule("hardtanh_backward leaky_relu_backward hardsigmoid_backward elu_backward gelu_backward silu_backward "
      "mish_backward sigmoid_backward tanh_backward softplus_backward hardswish_backward log_sigmoid_backward "
      "logit_backward", "pointwise", linear="grad_output")  # fmt: skip
_rule("hardshrink_backward", "pointwise", linear="grad_out")
_rule("softshrink_backward", "pointwise", linear="grad_output")
_rule("hardswish log_sigmoid_forward _prelu_kernel", "pointwise")
_rule("_prelu_kernel_backward", "pointwise", linear="grad_output")
_rule("glu", "activation")
_rule("glu_backward", "activation", linear="grad_output")
# training: the noise is the slope
_rule("rrelu_with_noise rrelu_with_noise_functional", "random", draws=lambda a: a.training)
_rule("rrelu_with_noise_backward", "pointwise", linear="grad_output",
      reads={"self": lambda a: not (a.training and a.upper - a.lower > 1e-6)})  # fmt: skip

# -- random -----------------------------------------------------------------------------------------------------------
_rule("native_dropout", "random", draws=lambda a: a.train is not False)
_rule("native_dropout_backward", "pointwise", linear="grad_output")
_rule(
    "uniform normal_functional exponential geometric cauchy log_normal random", "random", reads=_UNREAD_SELF
)
_rule("rand_like randn_like randint_like bernoulli.p", "random", reads=_UNREAD_SELF)
_rule("bernoulli multinomial poisson normal _fused_dropout", "random")

# -- gather and scatter -----------------------------------------------------------------------------------------------
_rule("embedding", "gather", linear="weight", gathers="weight")
_rule("embedding_dense_backward", "scatter", linear="grad_output")
_rule("_embedding_bag _embedding_bag_forward_only", "gather", linear="")
_rule("_embedding_bag_dense_backward _embedding_bag_per_sample_weights_backward", "scatter", linear="grad")
_rule("index gather index_select", "gather", linear="self", gathers="self")
_rule("index_put _unsafe_index_put", "scatter", linear="self + values")
_rule("index_add", "scatter", linear="self + source")
_rule("scatter", "scatter", linear="self + src + value")
_rule("scatter.reduce scatter.value_reduce scatter_reduce", "scatter")
_rule("scatter_add slice_scatter select_scatter diagonal_scatter as_strided_scatter", "scatter",
      linear="self + src")  # fmt: skip
_rule("masked_scatter", "scatter", linear="self + source")
_rule("slice_backward select_backward diagonal_backward", "scatter", linear="grad_output")
_rule("unfold_backward", "scatter", linear="grad_in")

_rule("view.dtype", "view")

# -- linear pointwise operators, reductions and copies ----------------------------------------------------------------
_rule("add sub rsub", "pointwise", linear="self + other")
_rule("mul", "pointwise", linear="self | other")
_rule("div", "pointwise", linear="self")
_rule("div.Tensor_mode div.Scalar_mode", "pointwise")
_rule("neg clone positive", "pointwise", linear="self")
_rule("where", "pointwise", linear="self + other")
_rule("masked_fill", "pointwise", linear="self + value")
_rule("lerp", "pointwise", linear="self + end")
_rule("addcmul", "pointwise", linear="self + tensor1 | self + tensor2")
_rule("addcdiv", "pointwise", linear="self + tensor1")
_rule("sum mean", "reduction", linear="self")
_rule("cumsum", "scan", linear="self")
_rule("cumprod logcumsumexp cummax cummin", "scan")
_rule("cat stack", "copy", linear="tensors")
_rule("_to_copy flip roll tril triu repeat im2col col2im pixel_shuffle pixel_unshuffle unfold_copy",
      "copy", linear="self")  # fmt: skip
_rule("sort topk argsort kthvalue median mode nonzero", "order")
_rule("var var_mean std std_mean linalg_vector_norm", "reduction")

# -- values made from nothing but a shape -----------------------------------------------------------------------------
_rule("zeros_like ones_like empty_like full_like new_zeros new_ones new_empty new_full new_empty_strided zero",
      "factory", reads=_UNREAD_SELF)  # fmt: skip
_rule("fill copy", "factory", reads=_UNREAD_SELF)
_rule("sym_size sym_stride sym_numel sym_storage_offset", "number", reads=_UNREAD_SELF)
_rule("_local_scalar_dense", "number")
