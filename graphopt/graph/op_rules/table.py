"""The table of operator rules: one entry an operator (or one for several that share their rule).

Conditions see the node's arguments by name: ``lambda a: a.output_mask[1]``. Sources: torch's ``derivatives.yaml``
and the kernels in ``aten/src/ATen/native`` (CPU and CUDA). Each condition under ``reads`` is tested by poisoning the
operand; where no kernel was at hand to test, there is no condition.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch

from graphopt.graph.op_rules import flop_formulas as cost
from graphopt.graph.op_rules import masked_forms as masks
from graphopt.graph.sizes import expression

Condition = Callable[[SimpleNamespace], Any]


@dataclass(frozen=True)
class OpRule:
    """What is known of an operator.

    ``family``: what kind of operator it is. ``flops``: FLOPs from shapes, None where there are no multiply-adds.
    ``reads``: operands whose values are needed only under a condition; all others are always needed.
    ``linear``: sets of operands in which the operator is linear together, joined by ``+``; alternatives are separated
    by ``|`` (``mul: "self | other"``, ``add: "self + other"``). ``draws``: when the operator draws random numbers;
    None: iff torch tags it. ``gathers``: operand of which only as many elements are read as the result has.
    ``stays``: results of the output mask that the kernel cannot leave out, under a condition. ``masked``: the form
    with a boolean mask in place of an operand.
    """

    family: str
    flops: cost.Formula | None = None
    reads: Mapping[str, Condition] = field(default_factory=dict)
    linear: str = ""
    draws: Condition | None = None
    gathers: str = ""
    stays: Mapping[int, Condition] = field(default_factory=dict)
    masked: masks.MaskedForm | None = None


RULES: dict[torch._ops.OpOverloadPacket | torch._ops.OpOverload, OpRule] = {}
"""Rules by operator; an overload that differs from the others of its operator (``div.Tensor_mode``) has its own."""


def _rule(names: str, family: str, **axes: Any) -> None:
    """Enter one rule for the operators in ``names``; those that this torch does not have are left out."""
    entry = OpRule(family, **axes)
    for name in names.split():
        packet, _, overload = name.partition(".")
        operator = getattr(torch.ops.aten, packet, None)
        if operator is not None and overload:
            operator = getattr(operator, overload, None)
        if operator is not None:
            assert operator not in RULES, f"{name} has two entries"
            RULES[operator] = entry


def never(a: SimpleNamespace) -> bool:
    """Whatever the arguments are: the operand lends its shape, strides and dtype only; nothing is drawn."""
    return False


def _channels_last_on_cpu(a: SimpleNamespace) -> bool:
    """The operand ``input`` is on CPU and may take a kernel for channels-last memory."""
    value = a.input.meta["val"]
    return value.device.type == "cpu" and value.dim() >= 3 and expression(value.stride(1)) == 1


_SHAPE_ONLY = {"self": never}
_BETA = {"self": lambda a: a.beta != 0}  # beta = 0 ignores `self`, even its NaN
_DROPOUT = lambda a: a.dropout_p != 0
_MASK_0 = lambda a: a.output_mask[0]
_MASK_1 = lambda a: a.output_mask[1]
_MASK_0_OR_1 = lambda a: a.output_mask[0] or a.output_mask[1]

# fmt: off

# -- contractions ------------------------------------------------------------------------------------------------
_rule("mm", "contraction", flops=cost.contraction("self: mk, mat2: kn"), linear="self | mat2")
_rule("bmm", "contraction", flops=cost.contraction("self: bmk, mat2: bkn"), linear="self | mat2")
_rule("addmm", "contraction", flops=cost.contraction("mat1: mk, mat2: kn"),
      linear="self + mat1 | self + mat2", reads=_BETA)
_rule("baddbmm addbmm", "contraction", flops=cost.contraction("batch1: bmk, batch2: bkn"),
      linear="self + batch1 | self + batch2", reads=_BETA)
_rule("mv", "contraction", flops=cost.contraction("self: mk, vec: k"), linear="self | vec")
_rule("addmv", "contraction", flops=cost.contraction("mat: mk, vec: k"),
      linear="self + mat | self + vec", reads=_BETA)
_rule("dot", "contraction", flops=cost.contraction("self: k, tensor: k"), linear="self | tensor")
_rule("linear", "contraction", flops=cost.contraction("input: *k, weight: nk"),
      linear="input + bias | weight + bias")
_rule("_scaled_mm", "contraction", flops=cost.contraction("self: mk, mat2: kn"))
_rule("matmul_backward", "contraction", flops=cost.matmul_backward, linear="grad")
_rule("linear_backward mkldnn_linear_backward", "contraction", flops=cost.linear_backward, linear="grad_output")
_rule("_fft_r2c _fft_c2r _fft_c2c", "transform", linear="self")

# -- convolution: the input gradient needs the weight, the weight gradient the input -----------------------------
_rule("convolution _convolution convolution_overrideable", "convolution", flops=cost.convolution("input"),
      linear="input + bias | weight + bias")
_rule("cudnn_convolution", "convolution", flops=cost.convolution("self"), linear="self | weight")
_rule("_slow_conv2d_forward", "convolution", flops=cost.convolution("self"),
      linear="self + bias | weight + bias")
_rule("convolution_backward", "convolution", flops=cost.convolution_backward, linear="grad_output",
      reads={"input": _MASK_1, "weight": _MASK_0})

# -- attention: draws random numbers only with dropout; its backward reads the seed that the forward saved -------
_rule("_scaled_dot_product_flash_attention _scaled_dot_product_efficient_attention "
      "_scaled_dot_product_cudnn_attention _scaled_dot_product_flash_attention_for_cpu "
      "_scaled_dot_product_fused_attention_overrideable _scaled_dot_product_attention_math "
      "_flash_attention_forward _efficient_attention_forward",
      "attention", flops=cost.attention, draws=_DROPOUT)
_rule("_scaled_dot_product_flash_attention_backward _scaled_dot_product_cudnn_attention_backward "
      "_scaled_dot_product_flash_attention_for_cpu_backward "
      "_scaled_dot_product_fused_attention_overrideable_backward _flash_attention_backward",
      "attention", flops=cost.attention_backward, linear="grad_out", draws=never)
_rule("_scaled_dot_product_efficient_attention_backward _efficient_attention_backward",
      "attention", flops=cost.attention_backward, linear="grad_out_", draws=never)
_rule("_fused_sdp_choice", "number", draws=never)

# -- recurrent layers --------------------------------------------------------------------------------------------
_rule("mkldnn_rnn_layer", "recurrent", flops=cost.recurrent(1, "weight0", "weight1"))
_rule("mkldnn_rnn_layer_backward", "recurrent", flops=cost.recurrent(2, "weight1", "weight2"),
      linear="grad_output + grad_hy + grad_cy")
_rule("_cudnn_rnn", "recurrent", flops=cost.recurrent(1, "weight"),
      draws=lambda a: a.train and a.dropout != 0)
_rule("_cudnn_rnn_backward", "recurrent", flops=cost.recurrent(2, "weight"),
      linear="grad_output + grad_hy + grad_cy")
_rule("_thnn_fused_lstm_cell _thnn_fused_gru_cell", "recurrent")
_rule("_thnn_fused_lstm_cell_backward _thnn_fused_lstm_cell_backward_impl", "recurrent",
      linear="grad_hy + grad_cy")
_rule("_thnn_fused_gru_cell_backward", "recurrent", linear="grad_hy")

# -- normalisation -----------------------------------------------------------------------------------------------
_rule("native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_functional "
      "_native_batch_norm_legit_no_training _batch_norm_with_update _batch_norm_with_update_functional "
      "_batch_norm_no_update cudnn_batch_norm miopen_batch_norm native_layer_norm native_group_norm "
      "_fused_rms_norm", "normalisation")
# x' = (x - mean) invstd; dw = sum dy x'; db = sum dy
# dx = w invstd (dy - avg(dy) - x' avg(dy x')) in training, with the batch's statistics
# dx = w invstd dy                              in evaluation, with the running statistics
_rule("native_batch_norm_backward", "normalisation", linear="grad_out", reads={
    "input": lambda a: a.output_mask[1] or (a.train and a.output_mask[0]),
    "weight": _MASK_0,
    "running_mean": lambda a: not a.train and a.output_mask[1],
    "running_var": lambda a: not a.train and (a.output_mask[0] or a.output_mask[1]),
    "save_mean": lambda a: a.train and (a.output_mask[0] or a.output_mask[1]),
    "save_invstd": lambda a: a.train and (a.output_mask[0] or a.output_mask[1]),
})
# the same, but in training (`update`) CUDA may choose cuDNN, which makes all three gradients whatever the mask
_rule("batch_norm_backward", "normalisation", linear="grad_out", reads={
    "input": lambda a: a.output_mask[1] or a.update,
    "weight": lambda a: a.output_mask[0] or a.update,
    "running_mean": lambda a: not a.update and a.output_mask[1],
    "running_var": lambda a: not a.update and (a.output_mask[0] or a.output_mask[1]),
    "save_mean": lambda a: a.update,
    "save_var": lambda a: a.update,
    "reserve": lambda a: a.update,
})
_rule("cudnn_batch_norm_backward miopen_batch_norm_backward", "normalisation", linear="grad_output")
_rule("native_layer_norm_backward", "normalisation", linear="grad_out", reads={
    "input": _MASK_0_OR_1, "mean": _MASK_0_OR_1, "rstd": _MASK_0_OR_1, "weight": _MASK_0, "bias": never,
})
# the CPU kernel for channels-last memory crashes without an input gradient (torch 2.13: GroupNormBackwardNHWC)
_rule("native_group_norm_backward", "normalisation", linear="grad_out", reads={
    "input": _MASK_0_OR_1, "mean": _MASK_0_OR_1, "rstd": _MASK_0_OR_1, "weight": _MASK_0,
}, stays={0: _channels_last_on_cpu})
_rule("_fused_rms_norm_backward", "normalisation", linear="grad_out")
_rule("_weight_norm_interface", "normalisation", linear="g")
_rule("_weight_norm_interface_backward", "normalisation", linear="grad_w")

# -- pooling, resampling, padding: in backward `self` lends its shape and memory format --------------------------
_rule("max_pool2d_with_indices max_pool3d_with_indices adaptive_max_pool2d adaptive_max_pool3d "
      "fractional_max_pool2d fractional_max_pool3d", "pooling")
_rule("max_pool2d_with_indices_backward max_pool3d_with_indices_backward adaptive_max_pool2d_backward "
      "adaptive_max_pool3d_backward fractional_max_pool2d_backward fractional_max_pool3d_backward",
      "pooling", linear="grad_output", reads=_SHAPE_ONLY)
_rule("avg_pool2d avg_pool3d _adaptive_avg_pool2d _adaptive_avg_pool3d", "pooling", linear="self")
_rule("avg_pool2d_backward avg_pool3d_backward _adaptive_avg_pool2d_backward _adaptive_avg_pool3d_backward",
      "pooling", linear="grad_output", reads=_SHAPE_ONLY)
_rule("max_unpool2d max_unpool3d", "scatter", linear="self")
_rule("upsample_nearest1d upsample_nearest2d upsample_nearest3d _upsample_nearest_exact1d "
      "_upsample_nearest_exact2d _upsample_nearest_exact3d upsample_linear1d upsample_bilinear2d "
      "upsample_trilinear3d upsample_bicubic2d _upsample_bilinear2d_aa _upsample_bicubic2d_aa",
      "resampling", linear="self")
_rule("upsample_nearest1d_backward upsample_nearest2d_backward upsample_nearest3d_backward "
      "_upsample_nearest_exact1d_backward _upsample_nearest_exact2d_backward "
      "_upsample_nearest_exact3d_backward upsample_linear1d_backward upsample_bilinear2d_backward "
      "upsample_trilinear3d_backward upsample_bicubic2d_backward _upsample_bilinear2d_aa_backward "
      "_upsample_bicubic2d_aa_backward", "resampling", linear="grad_output")
_rule("grid_sampler_2d grid_sampler_3d", "resampling", linear="input")
_rule("grid_sampler_2d_backward grid_sampler_3d_backward", "resampling", linear="grad_output",
      reads={"input": _MASK_1})
_rule("constant_pad_nd", "padding", linear="self + value")
_rule("reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d "
      "replication_pad3d", "padding", linear="self")
_rule("reflection_pad1d_backward reflection_pad2d_backward reflection_pad3d_backward "
      "replication_pad1d_backward replication_pad2d_backward replication_pad3d_backward",
      "padding", linear="grad_output", reads=_SHAPE_ONLY)

# -- softmax and losses ------------------------------------------------------------------------------------------
_rule("_softmax _log_softmax _safe_softmax", "softmax")
_rule("_softmax_backward_data _log_softmax_backward_data", "softmax", linear="grad_output")
_rule("nll_loss_forward nll_loss2d_forward", "loss")
# the gradient goes to the targets' places: of the log-probabilities only the shape; reduction 1 is the mean
_rule("nll_loss_backward nll_loss2d_backward", "loss", linear="grad_output",
      reads={"self": never, "total_weight": lambda a: a.reduction == 1})
_rule("mse_loss smooth_l1_loss huber_loss binary_cross_entropy binary_cross_entropy_with_logits soft_margin_loss "
      "multi_margin_loss multilabel_margin_loss_forward", "loss")
_rule("mse_loss_backward", "loss", linear="grad_output | self + target")
_rule("smooth_l1_loss_backward huber_loss_backward binary_cross_entropy_backward soft_margin_loss_backward "
      "multi_margin_loss_backward multilabel_margin_loss_backward", "loss", linear="grad_output")
_rule("_ctc_loss", "loss")
_rule("_ctc_loss_backward", "loss", linear="grad")

# -- activations -------------------------------------------------------------------------------------------------
_rule("threshold_backward", "pointwise", linear="grad_output", masked=masks.THRESHOLD)
_rule("hardtanh_backward", "pointwise", linear="grad_output", masked=masks.HARDTANH)
_rule("leaky_relu_backward", "pointwise", linear="grad_output", masked=masks.LEAKY_RELU)
_rule("hardsigmoid_backward", "pointwise", linear="grad_output", masked=masks.HARDSIGMOID)
_rule("softshrink_backward", "pointwise", linear="grad_output", masked=masks.SOFTSHRINK)
_rule("hardshrink_backward", "pointwise", linear="grad_out", masked=masks.HARDSHRINK)
_rule("elu_backward gelu_backward silu_backward mish_backward sigmoid_backward tanh_backward softplus_backward "
      "hardswish_backward log_sigmoid_backward logit_backward", "pointwise", linear="grad_output")
_rule("hardswish log_sigmoid_forward _prelu_kernel", "pointwise")
_rule("_prelu_kernel_backward", "pointwise", linear="grad_output")
_rule("glu", "activation")
_rule("glu_backward", "activation", linear="grad_output")

# -- random ------------------------------------------------------------------------------------------------------
_rule("native_dropout", "random", draws=lambda a: a.train is not False)  # draws for p = 0 and p = 1 too
_rule("native_dropout_backward", "pointwise", linear="grad_output")
_rule("rrelu_with_noise rrelu_with_noise_functional", "random", draws=lambda a: a.training)
# in training the noise is the slope (RReLU draws it from [lower, upper])
_rule("rrelu_with_noise_backward", "pointwise", linear="grad_output",
      reads={"self": lambda a: not (a.training and a.upper - a.lower > 1e-6)})
_rule("rand_like randn_like randint_like bernoulli.p uniform normal_functional exponential geometric cauchy "
      "log_normal random", "random", reads=_SHAPE_ONLY)
_rule("bernoulli multinomial poisson normal _fused_dropout", "random")

# -- gather and scatter ------------------------------------------------------------------------------------------
_rule("embedding", "gather", linear="weight", gathers="weight")
_rule("embedding_dense_backward", "scatter", linear="grad_output")
_rule("_embedding_bag _embedding_bag_forward_only", "gather")
_rule("_embedding_bag_backward _embedding_bag_dense_backward _embedding_bag_per_sample_weights_backward", "scatter",
      linear="grad")
_rule("index _unsafe_index gather index_select", "gather", linear="self", gathers="self")
_rule("index_put _unsafe_index_put", "scatter", linear="self + values")
_rule("index_add masked_scatter", "scatter", linear="self + source")
_rule("scatter", "scatter", linear="self + src + value")
_rule("scatter.reduce scatter.value_reduce scatter_reduce", "scatter")
_rule("scatter_add slice_scatter select_scatter diagonal_scatter as_strided_scatter", "scatter",
      linear="self + src")
_rule("slice_backward select_backward diagonal_backward", "scatter", linear="grad_output")
_rule("unfold_backward", "scatter", linear="grad_in")
_rule("nonzero masked_select", "gather")

# -- linear pointwise operators, reductions, scans and copies ----------------------------------------------------
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
_rule("_to_copy flip roll tril triu repeat im2col col2im lift_fresh_copy pixel_shuffle pixel_unshuffle unfold_copy",
      "copy", linear="self")
_rule("view.dtype", "view")
_rule("sort topk argsort kthvalue median mode searchsorted bucketize", "order")

# -- values made from a shape alone, numbers ---------------------------------------------------------------------
_rule("zeros_like ones_like empty_like full_like new_zeros new_ones new_empty new_full new_empty_strided zero "
      "fill copy", "factory", reads=_SHAPE_ONLY)
_rule("sym_size sym_stride sym_numel sym_storage_offset sym_is_contiguous", "number", reads=_SHAPE_ONLY)
_rule("_local_scalar_dense item", "number")
