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
from graphopt.graph.op_rules.axis_rules import attention as att
from graphopt.graph.op_rules.axis_rules import contractions as con
from graphopt.graph.op_rules.axis_rules import gather as look
from graphopt.graph.op_rules.axis_rules import images as img
from graphopt.graph.op_rules.axis_rules import normalisation as norm
from graphopt.graph.op_rules.axis_rules import pointwise as pw
from graphopt.graph.op_rules.axis_rules import views
from graphopt.graph.op_rules.axis_rules.pattern import AxisRule, pattern
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
    axes: AxisRule | None = None
    flops: cost.Formula | None = None
    reads: Mapping[str, Condition] = field(default_factory=dict)
    linear: str = ""
    draws: Condition | None = None
    gathers: str = ""
    stays: Mapping[int, Condition] = field(default_factory=dict)
    masked: masks.MaskedForm | None = None


RULES: dict[torch._ops.OpOverloadPacket | torch._ops.OpOverload, OpRule] = {}
"""Rules by operator; an overload that differs from the others of its operator (``div.Tensor_mode``) has its own."""


def _rule(names: str, family: str, **facts: Any) -> None:
    """Enter one rule for the operators in ``names``; those that this torch does not have are left out."""
    entry = OpRule(family, **facts)
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
_rule("mm", "contraction", axes=con.product("self", "mat2"), flops=cost.contraction("self: mk, mat2: kn"), linear="self | mat2")
_rule("bmm", "contraction", axes=con.product("self", "mat2"), flops=cost.contraction("self: bmk, mat2: bkn"), linear="self | mat2")
_rule("addmm", "contraction", axes=con.product("mat1", "mat2", added="self"), flops=cost.contraction("mat1: mk, mat2: kn"),
      linear="self + mat1 | self + mat2", reads=_BETA)
_rule("baddbmm", "contraction", axes=con.product("batch1", "batch2", added="self"),
      flops=cost.contraction("batch1: bmk, batch2: bkn"), linear="self + batch1 | self + batch2", reads=_BETA)
_rule("addbmm", "contraction", axes=con.addbmm,
      flops=cost.contraction("batch1: bmk, batch2: bkn"), linear="self + batch1 | self + batch2", reads=_BETA)
_rule("mv", "contraction", axes=con.product("self", "vec"), flops=cost.contraction("self: mk, vec: k"), linear="self | vec")
_rule("addmv", "contraction", axes=con.product("mat", "vec", added="self"), flops=cost.contraction("mat: mk, vec: k"),
      linear="self + mat | self + vec", reads=_BETA)
_rule("dot", "contraction", axes=con.product("self", "tensor"), flops=cost.contraction("self: k, tensor: k"), linear="self | tensor")
_rule("linear", "contraction", axes=con.linear, flops=cost.contraction("input: *k, weight: nk"),
      linear="input + bias | weight + bias")
_rule("_scaled_mm", "contraction", axes=con.product("self", "mat2"), flops=cost.contraction("self: mk, mat2: kn"))
_rule("matmul_backward", "contraction", axes=con.matmul_backward, flops=cost.matmul_backward, linear="grad")
_rule("linear_backward mkldnn_linear_backward", "contraction", axes=con.linear_backward, flops=cost.linear_backward, linear="grad_output")
_rule("_fft_r2c _fft_c2r _fft_c2c fft_fft fft_ifft fft_rfft fft_irfft fft_fft2 fft_ifft2 fft_rfft2 fft_irfft2 "
      "fft_fftn fft_ifftn fft_rfftn fft_irfftn", "transform", axes=pw.transformed, linear="self")

# -- convolution: the input gradient needs the weight, the weight gradient the input -----------------------------
_rule("convolution _convolution convolution_overrideable", "convolution", axes=img.convolution, flops=cost.convolution("input"),
      linear="input + bias | weight + bias")
_rule("cudnn_convolution", "convolution", axes=img.convolution, flops=cost.convolution("self"), linear="self | weight")
_rule("_slow_conv2d_forward", "convolution", flops=cost.convolution("self"),
      linear="self + bias | weight + bias")
_rule("convolution_backward", "convolution", axes=img.convolution_backward, flops=cost.convolution_backward, linear="grad_output",
      reads={"input": _MASK_1, "weight": _MASK_0})

# -- attention: draws random numbers only with dropout; its backward reads the seed that the forward saved -------
_rule("_scaled_dot_product_flash_attention _scaled_dot_product_efficient_attention "
      "_scaled_dot_product_cudnn_attention _scaled_dot_product_flash_attention_for_cpu "
      "_scaled_dot_product_fused_attention_overrideable _scaled_dot_product_attention_math "
      "_flash_attention_forward _efficient_attention_forward",
      "attention", axes=att.attention, flops=cost.attention, draws=_DROPOUT)
_rule("_scaled_dot_product_flash_attention_backward _scaled_dot_product_cudnn_attention_backward "
      "_scaled_dot_product_flash_attention_for_cpu_backward "
      "_scaled_dot_product_fused_attention_overrideable_backward _flash_attention_backward",
      "attention", axes=att.attention_backward, flops=cost.attention_backward, linear="grad_out", draws=never)
_rule("_scaled_dot_product_efficient_attention_backward _efficient_attention_backward",
      "attention", axes=att.attention_backward, flops=cost.attention_backward, linear="grad_out_", draws=never)
_rule("_fused_sdp_choice", "number", axes=pw.number, draws=never)

# -- recurrent layers --------------------------------------------------------------------------------------------
_rule("mkldnn_rnn_layer", "recurrent", axes=att.recurrent_layer, flops=cost.recurrent(1, "weight0", "weight1"))
_rule("mkldnn_rnn_layer_backward", "recurrent", axes=att.recurrent_layer_backward, flops=cost.recurrent(2, "weight1", "weight2"),
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
      "_batch_norm_no_update cudnn_batch_norm miopen_batch_norm batch_norm", "normalisation", axes=norm.batch_norm)
_rule("native_layer_norm _fused_rms_norm layer_norm rms_norm", "normalisation", axes=norm.layer_norm)
_rule("native_group_norm group_norm", "normalisation", axes=norm.group_norm)
_rule("instance_norm", "normalisation", axes=norm.instance_norm)
# x' = (x - mean) invstd; dw = sum dy x'; db = sum dy
# dx = w invstd (dy - avg(dy) - x' avg(dy x')) in training, with the batch's statistics
# dx = w invstd dy                              in evaluation, with the running statistics
_rule("native_batch_norm_backward", "normalisation", axes=norm.batch_norm_backward, linear="grad_out", reads={
    "input": lambda a: a.output_mask[1] or (a.train and a.output_mask[0]),
    "weight": _MASK_0,
    "running_mean": lambda a: not a.train and a.output_mask[1],
    "running_var": lambda a: not a.train and (a.output_mask[0] or a.output_mask[1]),
    "save_mean": lambda a: a.train and (a.output_mask[0] or a.output_mask[1]),
    "save_invstd": lambda a: a.train and (a.output_mask[0] or a.output_mask[1]),
})
# the same, but in training (`update`) CUDA may choose cuDNN, which makes all three gradients whatever the mask
_rule("batch_norm_backward", "normalisation", axes=norm.batch_norm_backward, linear="grad_out", reads={
    "input": lambda a: a.output_mask[1] or a.update,
    "weight": lambda a: a.output_mask[0] or a.update,
    "running_mean": lambda a: not a.update and a.output_mask[1],
    "running_var": lambda a: not a.update and (a.output_mask[0] or a.output_mask[1]),
    "save_mean": lambda a: a.update,
    "save_var": lambda a: a.update,
    "reserve": lambda a: a.update,
})
_rule("cudnn_batch_norm_backward miopen_batch_norm_backward", "normalisation", linear="grad_output")
_rule("native_layer_norm_backward", "normalisation", axes=norm.layer_norm_backward, linear="grad_out", reads={
    "input": _MASK_0_OR_1, "mean": _MASK_0_OR_1, "rstd": _MASK_0_OR_1, "weight": _MASK_0, "bias": never,
})
# the CPU kernel for channels-last memory crashes without an input gradient (torch 2.13: GroupNormBackwardNHWC)
_rule("native_group_norm_backward", "normalisation", axes=norm.group_norm_backward, linear="grad_out", reads={
    "input": _MASK_0_OR_1, "mean": _MASK_0_OR_1, "rstd": _MASK_0_OR_1, "weight": _MASK_0,
}, stays={0: _channels_last_on_cpu})
_rule("_fused_rms_norm_backward", "normalisation", axes=norm.layer_norm_backward, linear="grad_out")
_rule("_weight_norm_interface", "normalisation", axes=norm.weight_norm, linear="g")
_rule("_weight_norm_interface_backward", "normalisation", axes=norm.weight_norm_backward, linear="grad_w")

# -- pooling, resampling, padding: in backward `self` lends its shape and memory format --------------------------
_rule("max_pool1d max_pool2d max_pool3d max_pool1d_with_indices max_pool2d_with_indices max_pool3d_with_indices "
      "adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d fractional_max_pool2d fractional_max_pool3d",
      "pooling", axes=img.windows)
_rule("max_pool2d_with_indices_backward max_pool3d_with_indices_backward adaptive_max_pool2d_backward "
      "adaptive_max_pool3d_backward fractional_max_pool2d_backward fractional_max_pool3d_backward",
      "pooling", axes=img.windows_backward, linear="grad_output", reads=_SHAPE_ONLY)
_rule("avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d "
      "_adaptive_avg_pool2d _adaptive_avg_pool3d", "pooling", axes=img.windows, linear="self")
_rule("avg_pool2d_backward avg_pool3d_backward _adaptive_avg_pool2d_backward _adaptive_avg_pool3d_backward",
      "pooling", axes=img.windows_backward, linear="grad_output", reads=_SHAPE_ONLY)
_rule("max_unpool2d max_unpool3d", "scatter", linear="self")
_rule("upsample_nearest1d upsample_nearest2d upsample_nearest3d _upsample_nearest_exact1d "
      "_upsample_nearest_exact2d _upsample_nearest_exact3d upsample_linear1d upsample_bilinear2d "
      "upsample_trilinear3d upsample_bicubic2d _upsample_bilinear2d_aa _upsample_bicubic2d_aa",
      "resampling", axes=img.windows, linear="self")
_rule("upsample_nearest1d_backward upsample_nearest2d_backward upsample_nearest3d_backward "
      "_upsample_nearest_exact1d_backward _upsample_nearest_exact2d_backward "
      "_upsample_nearest_exact3d_backward upsample_linear1d_backward upsample_bilinear2d_backward "
      "upsample_trilinear3d_backward upsample_bicubic2d_backward _upsample_bilinear2d_aa_backward "
      "_upsample_bicubic2d_aa_backward", "resampling", axes=img.windows_backward, linear="grad_output")
_rule("grid_sampler_2d grid_sampler_3d", "resampling", axes=img.grid_sample, linear="input")
_rule("grid_sampler_2d_backward grid_sampler_3d_backward", "resampling", axes=img.grid_sample_backward, linear="grad_output",
      reads={"input": _MASK_1})
_rule("constant_pad_nd", "padding", axes=views.pad, linear="self + value")
_rule("reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d "
      "replication_pad3d", "padding", axes=img.windows, linear="self")
_rule("reflection_pad1d_backward reflection_pad2d_backward reflection_pad3d_backward "
      "replication_pad1d_backward replication_pad2d_backward replication_pad3d_backward",
      "padding", axes=img.windows_backward, linear="grad_output", reads=_SHAPE_ONLY)

# -- softmax and losses ------------------------------------------------------------------------------------------
_rule("_softmax _log_softmax _safe_softmax", "softmax", axes=pw.softmax)
_rule("_softmax_backward_data _log_softmax_backward_data", "softmax", axes=pw.softmax, linear="grad_output")
_rule("nll_loss_forward nll_loss2d_forward", "loss", axes=look.nll_loss)
# the gradient goes to the targets' places: of the log-probabilities only the shape; reduction 1 is the mean
_rule("nll_loss_backward nll_loss2d_backward", "loss", axes=look.nll_loss_backward, linear="grad_output",
      reads={"self": never, "total_weight": lambda a: a.reduction == 1})
_rule("mse_loss l1_loss smooth_l1_loss huber_loss binary_cross_entropy binary_cross_entropy_with_logits "
      "soft_margin_loss kl_div poisson_nll_loss", "loss", axes=pw.loss)
_rule("multi_margin_loss multilabel_margin_loss_forward", "loss", axes=pw.ordered)
_rule("mse_loss_backward", "loss", axes=pw.pointwise, linear="grad_output | self + target")
_rule("smooth_l1_loss_backward huber_loss_backward binary_cross_entropy_backward soft_margin_loss_backward",
      "loss", axes=pw.pointwise, linear="grad_output")
_rule("multi_margin_loss_backward multilabel_margin_loss_backward", "loss", axes=pw.ordered, linear="grad_output")
_rule("_ctc_loss", "loss", axes=look.ctc_loss)
_rule("_ctc_loss_backward", "loss", axes=look.ctc_loss, linear="grad")

# -- activations -------------------------------------------------------------------------------------------------
_rule("threshold_backward", "pointwise", linear="grad_output", masked=masks.THRESHOLD)
_rule("hardtanh_backward", "pointwise", linear="grad_output", masked=masks.HARDTANH)
_rule("leaky_relu_backward", "pointwise", linear="grad_output", masked=masks.LEAKY_RELU)
_rule("hardsigmoid_backward", "pointwise", linear="grad_output", masked=masks.HARDSIGMOID)
_rule("softshrink_backward", "pointwise", linear="grad_output", masked=masks.SOFTSHRINK)
_rule("hardshrink_backward", "pointwise", linear="grad_out", masked=masks.HARDSHRINK)
_rule("elu_backward gelu_backward silu_backward mish_backward sigmoid_backward tanh_backward softplus_backward "
      "hardswish_backward log_sigmoid_backward logit_backward", "pointwise", linear="grad_output")
_rule("hardswish log_sigmoid_forward _prelu_kernel", "pointwise", axes=pw.pointwise)
_rule("_prelu_kernel_backward", "pointwise", axes=pw.prelu_backward, linear="grad_output")
_rule("glu", "activation", axes=pw.glu)
_rule("glu_backward", "activation", axes=pw.glu_backward, linear="grad_output")

# -- random ------------------------------------------------------------------------------------------------------
_rule("native_dropout", "random", axes=pw.first, draws=lambda a: a.train is not False)  # draws for p = 0 and p = 1 too
_rule("native_dropout_backward", "pointwise", linear="grad_output")
_rule("rrelu_with_noise rrelu_with_noise_functional", "random", axes=pw.pointwise, draws=lambda a: a.training)
# in training the noise is the slope (RReLU draws it from [lower, upper])
_rule("rrelu_with_noise_backward", "pointwise", linear="grad_output",
      reads={"self": lambda a: not (a.training and a.upper - a.lower > 1e-6)})
_rule("rand_like randn_like randint_like bernoulli.p uniform normal_functional exponential geometric cauchy "
      "log_normal random", "random", axes=pw.first, reads=_SHAPE_ONLY)
_rule("bernoulli multinomial poisson normal _fused_dropout", "random", axes=pw.first)

# -- gather and scatter ------------------------------------------------------------------------------------------
_rule("embedding", "gather", axes=look.embedding, linear="weight", gathers="weight")
_rule("embedding_dense_backward", "scatter", axes=look.embedding_backward, linear="grad_output")
_rule("_embedding_bag _embedding_bag_forward_only", "gather", axes=look.embedding_bag)
_rule("_embedding_bag_backward _embedding_bag_dense_backward _embedding_bag_per_sample_weights_backward", "scatter", axes=look.embedding_bag_backward,
      linear="grad")
_rule("index _unsafe_index", "gather", axes=look.index, linear="self", gathers="self")
_rule("gather", "gather", axes=look.gather, linear="self", gathers="self")
_rule("index_select", "gather", axes=look.index_select, linear="self", gathers="self")
_rule("index_put _unsafe_index_put", "scatter", axes=look.index_put, linear="self + values")
_rule("index_add index_copy", "scatter", axes=look.index_add, linear="self + source")
_rule("masked_scatter", "scatter", axes=pw.ordered, linear="self + source")
_rule("scatter", "scatter", axes=look.scatter, linear="self + src + value")
_rule("scatter.reduce scatter.value_reduce scatter_reduce", "scatter", axes=look.scatter)
_rule("scatter_add", "scatter", axes=look.scatter, linear="self + src")
_rule("slice_scatter", "scatter", axes=views.slice_scatter, linear="self + src")
_rule("select_scatter", "scatter", axes=views.select_scatter, linear="self + src")
_rule("as_strided_scatter", "scatter", axes=views.as_strided_scatter, linear="self + src")
_rule("diagonal_scatter", "scatter", axes=pw.ordered, linear="self + src")
_rule("slice_backward", "scatter", axes=views.slice_backward, linear="grad_output")
_rule("select_backward", "scatter", axes=views.select_backward, linear="grad_output")
_rule("diagonal_backward", "scatter", axes=pw.ordered, linear="grad_output")
_rule("unfold_backward", "scatter", axes=pw.ordered, linear="grad_in")
_rule("nonzero masked_select", "gather", axes=pw.ordered)

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
_rule("sum mean", "reduction", axes=pw.reduction, linear="self")
_rule("cumsum", "scan", axes=pw.along, linear="self")
_rule("cumprod logcumsumexp cummax cummin", "scan", axes=pw.along)
_rule("cat concat", "copy", axes=views.cat, linear="tensors")
_rule("stack", "copy", axes=views.stack, linear="tensors")
_rule("_to_copy lift_fresh_copy", "copy", axes=pw.first, linear="self")
_rule("flip roll", "copy", axes=pw.shifted, linear="self")
_rule("tril triu", "copy", axes=pw.triangle, linear="self")
_rule("repeat tile", "copy", axes=views.repeat, linear="self")
_rule("repeat_interleave.self_int", "copy", axes=views.repeat_interleave, linear="self")
_rule("im2col", "copy", axes=views.im2col, linear="self")
_rule("col2im", "copy", axes=views.col2im, linear="self")
_rule("pixel_shuffle", "copy", axes=views.pixel_shuffle, linear="self")
_rule("pixel_unshuffle", "copy", axes=views.pixel_unshuffle, linear="self")
_rule("channel_shuffle native_channel_shuffle", "copy", axes=views.channel_shuffle, linear="self")
_rule("unfold_copy", "copy", axes=views.unfold, linear="self")
_rule("view.dtype", "view", axes=views.view_dtype)
_rule("sort argsort", "order", axes=pw.along)
_rule("topk kthvalue", "order", axes=pw.topk)
_rule("median mode searchsorted bucketize histc bincount unique one_hot", "order", axes=pw.ordered)
_rule("max.dim min.dim argmax argmin", "reduction", axes=pw.reduction_with_index)

# -- views: linear, nothing is computed --------------------------------------------------------------------------
_rule("view _unsafe_view reshape flatten unflatten view_as reshape_as _reshape_alias", "view", axes=views.view, linear="self")
_rule("permute", "view", axes=views.permute, linear="self")
_rule("t transpose swapaxes swapdims mT adjoint", "view", axes=views.transpose, linear="self")
_rule("numpy_T", "view", axes=views.reversed_dims, linear="self")
_rule("movedim moveaxis", "view", axes=views.movedim, linear="self")
_rule("squeeze", "view", axes=views.squeeze, linear="self")
_rule("unsqueeze", "view", axes=views.unsqueeze, linear="self")
_rule("expand expand_as broadcast_to", "view", axes=views.expand, linear="self")
_rule("select", "view", axes=views.select, linear="self")
_rule("slice narrow", "view", axes=views.slice_, linear="self")
_rule("split split_with_sizes chunk unsafe_chunk unsafe_split tensor_split unbind", "view", axes=views.split, linear="self")
_rule("unfold", "view", axes=views.unfold, linear="self")
_rule("diagonal", "view", axes=views.diagonal, linear="self")
_rule("as_strided", "view", axes=views.unchanged_or_fixed, linear="self")
_rule("view_as_real", "view", axes=views.real, linear="self")
_rule("view_as_complex", "view", axes=views.complex_, linear="self")
_rule("detach alias contiguous", "view", axes=pw.first, linear="self")

# -- whole layers, as they stand before autograd takes them apart ------------------------------------------------
_rule("matmul", "contraction", axes=con.matmul, linear="self | other")
_rule("einsum", "contraction", axes=con.einsum)
_rule("conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d", "convolution", axes=img.convolution,
      linear="input + bias | weight + bias")
_rule("scaled_dot_product_attention", "attention", axes=att.attention, draws=_DROPOUT)
_rule("lstm gru rnn_tanh rnn_relu", "recurrent", axes=att.recurrent)
_rule("softmax log_softmax", "softmax", axes=pw.softmax)
_rule("cross_entropy_loss nll_loss nll_loss_nd nll_loss2d", "loss", axes=look.nll_loss)
_rule("dropout feature_dropout alpha_dropout feature_alpha_dropout", "random", axes=pw.first, draws=lambda a: a.train and a.p != 0)
_rule("pad", "padding", axes=views.pad)
_rule("prelu", "pointwise", axes=pw.prelu)
_rule("type_as to", "copy", axes=pw.first, linear="self")
_rule("__and__ __or__ __xor__", "pointwise")
_rule("broadcast_tensors", "view", axes=views.broadcast_tensors)
_rule("diff", "scan", axes=pw.differences)
_rule("_weight_norm", "normalisation", axes=norm.weight_norm)
_rule("upsample_linear1d.vec upsample_bilinear2d.vec upsample_trilinear3d.vec upsample_bicubic2d.vec "
      "upsample_nearest1d.vec upsample_nearest2d.vec upsample_nearest3d.vec", "resampling", axes=img.windows)
_rule("norm linalg_vector_norm std var std_mean var_mean", "reduction", axes=pw.reduction)
_rule("outer", "contraction", axes=pattern("self: a, vec2: b -> ab"), linear="self | vec2")
_rule("bilinear", "contraction", axes=pattern("input1: *a, input2: *b, weight: oab, bias?: o -> *o"))
_rule("cosine_similarity", "reduction", axes=pw.pairwise_reduction)
_rule("meshgrid", "copy", axes=views.meshgrid)
_rule("logsumexp", "reduction", axes=pw.reduction)

# -- values made from a shape alone, numbers ---------------------------------------------------------------------
_rule("zeros_like ones_like empty_like full_like zero fill", "factory", axes=pw.first, reads=_SHAPE_ONLY)
_rule("copy", "factory", axes=pw.pointwise, reads=_SHAPE_ONLY)
_rule("new_zeros new_ones new_empty new_full new_empty_strided", "factory", axes=pw.factory, reads=_SHAPE_ONLY)
_rule("arange linspace logspace eye tril_indices triu_indices", "factory", axes=pw.positions)
_rule("zeros ones empty full rand randn randint scalar_tensor empty_strided randperm", "factory", axes=pw.factory)
_rule("sym_size sym_stride sym_numel sym_storage_offset sym_is_contiguous", "number", axes=pw.number, reads=_SHAPE_ONLY)
_rule("_local_scalar_dense item", "number", axes=pw.number)
