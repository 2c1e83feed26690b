"""Operators on each element, reductions, scans and orders. Those without an entry follow from torch's tags."""

from graphopt.graph.op_rules import masked_forms as masks
from graphopt.graph.op_rules import reductions as red
from graphopt.graph.op_rules.axis_rules import pointwise as pw
from graphopt.graph.op_rules.op_rule import entry

# fmt: off
ENTRIES = (
    entry("add sub rsub", "pointwise", linear="self + other"),
    entry("mul", "pointwise", linear="self | other"),
    entry("div", "pointwise", linear="self"),
    entry("div.Tensor_mode div.Scalar_mode", "pointwise"),
    entry("neg clone positive", "pointwise", linear="self"),
    entry("where", "pointwise", linear="self + other"),
    entry("masked_fill", "pointwise", linear="self + value"),
    entry("lerp", "pointwise", linear="self + end"),
    entry("addcmul", "pointwise", linear="self + tensor1 | self + tensor2"),
    entry("addcdiv", "pointwise", linear="self + tensor1"),
    entry("__and__ __or__ __xor__ floor_divide", "pointwise"),
    entry("absolute arccos arccosh arcsin arcsinh arctan arctan2 arctanh divide fix greater greater_equal isclose "
          "isreal less less_equal multiply negative not_equal special_digamma special_erf special_erfc special_exp2 "
          "special_expit special_expm1 special_gammaln special_i0 special_log1p special_logit special_ndtr "
          "special_round special_sinc special_xlogy subtract true_divide", "pointwise"),  # without a tag of torch

    entry("threshold_backward", "pointwise", linear="grad_output", masked=masks.THRESHOLD),
    entry("hardtanh_backward", "pointwise", linear="grad_output", masked=masks.HARDTANH),
    entry("leaky_relu_backward", "pointwise", linear="grad_output", masked=masks.LEAKY_RELU),
    entry("hardsigmoid_backward", "pointwise", linear="grad_output", masked=masks.HARDSIGMOID),
    entry("softshrink_backward", "pointwise", linear="grad_output", masked=masks.SOFTSHRINK),
    entry("hardshrink_backward", "pointwise", linear="grad_out", masked=masks.HARDSHRINK),
    entry("elu_backward gelu_backward silu_backward mish_backward sigmoid_backward tanh_backward softplus_backward "
          "hardswish_backward log_sigmoid_backward logit_backward", "pointwise", linear="grad_output"),
    entry("hardswish log_sigmoid log_sigmoid_forward _prelu_kernel", "pointwise", axes=pw.pointwise),
    entry("_prelu_kernel_backward", "pointwise", axes=pw.prelu_backward, linear="grad_output"),
    entry("prelu", "pointwise", axes=pw.prelu),
    entry("glu", "activation", axes=pw.glu),
    entry("glu_backward", "activation", axes=pw.glu_backward, linear="grad_output"),

    entry("sum mean", "reduction", linear="self"),
    entry("logsumexp norm linalg_vector_norm std var std_mean var_mean", "reduction"),
    entry("max.dim min.dim argmax argmin", "reduction", axes=pw.reduction_with_index),
    entry("cosine_similarity", "reduction", axes=pw.pairwise_reduction, reduces=red.along("other", name="x1")),
    entry("cumsum", "scan", axes=pw.along, linear="self"),
    entry("cumprod logcumsumexp cummax cummin", "scan", axes=pw.along),
    entry("diff", "scan", axes=pw.differences),
    entry("sort argsort", "order", axes=pw.along),
    entry("topk", "order", axes=pw.topk),
    entry("kthvalue mode median.dim nanmedian.dim", "order", axes=pw.reduction_with_index),
    entry("median searchsorted bucketize histc bincount unique one_hot", "order", axes=pw.ordered),
)
