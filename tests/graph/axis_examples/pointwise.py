"""Calls of operators on each element, and of reductions, scans and orders."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from tests.graph.axis_examples._calls import below, call, floats, positive
from tests.graph.axis_rule_oracle import Call

ONE_OPERAND = """
abs ceil cos cosh erf exp expm1 floor log1p neg positive reciprocal relu relu6 round rsqrt selu sigmoid sign silu sin
sqrt square tan tanh mish softplus elu gelu hardsigmoid hardswish hardtanh leaky_relu hardshrink softshrink log_sigmoid
logit celu isnan isinf absolute arccos arcsin arcsinh arctan arctanh fix isreal negative special_digamma
special_erf special_erfc special_exp2 special_expit special_expm1 special_gammaln special_i0 special_log1p
special_logit special_ndtr special_round special_sinc clone bitwise_not detach alias contiguous lift_fresh_copy _to_copy
log_sigmoid_forward
"""


def pointwise() -> Iterator[Call]:
    x, row, column = floats(3, 4), floats(4), floats(3, 1)
    for name in ONE_OPERAND.split():
        yield call(name, below(5, 3, 4) if name.startswith("bitwise") else positive(3, 4))
    for other in (x + 1, row, column, positive(2, 3, 4)):
        for name in ("add", "sub", "rsub", "mul", "div"):
            yield call(f"{name}.Tensor", x, other)
        yield call("where.self", x > 0, x, other)
        yield call("lerp.Tensor", x, other, row)
        yield call("addcmul", x, other, row)
        yield call("addcdiv", x, row, other)
        yield call("maximum", x, other)
        yield call("pow.Tensor_Tensor", positive(3, 4), other)
    yield call("div.Tensor_mode", x, row, rounding_mode="floor")
    yield call("div.Scalar_mode", x, 2, rounding_mode="floor")
    yield call("masked_fill.Scalar", x, column > 0, 0.0)
    yield call("masked_fill.Tensor", x, row > 0, torch.tensor(1.0, dtype=torch.float64))
    yield call("floor_divide", floats(3, 4), floats(4).abs() + 1)
    for name in ("__and__", "__or__", "__xor__"):
        yield call(f"{name}.Tensor", x > 0, row > 0)
    for name in [
        "multiply",
        "subtract",
        "divide",
        "true_divide",
        "greater",
        "greater_equal",
        "less",
        "less_equal",
        "not_equal",
    ]:
        yield call(f"{name}.Tensor", positive(3, 4), positive(1, 4))
    yield call("arctan2", x, row)
    yield call("arccosh", positive(3, 4) + 1)
    yield call("isclose", x, row)
    yield call("special_xlogy", x, positive(4))
    yield call("threshold", x, 0.1, 0.0)
    yield call("rrelu_with_noise", x, torch.zeros_like(x), 0.1, 0.3, False)
    yield call("rrelu_with_noise_functional", x, torch.zeros_like(x), 0.1, 0.3, False)
    yield call("rrelu_with_noise_backward", x, -x, positive(3, 4), 0.1, 0.3, True, False)
    yield call("prelu", floats(2, 3, 4), floats(3))
    yield call("prelu", floats(2, 3, 4), floats(1))
    yield call("_prelu_kernel", x, row.view(1, 4))
    for dim in (0, 1, -1):
        yield call("glu", floats(4, 6, 8), dim)
    yield call("type_as", x, row)
    yield call("to.dtype", x, torch.float32)


def reductions() -> Iterator[Call]:
    x = floats(3, 4, 5)
    for dims in ([0], [1, -1], None):
        for keep in (False, True):
            yield call("sum.dim_IntList", x, dims, keep)
            yield call("mean.dim", x, dims, keep)
            yield call("var.correction", x, dims, correction=1, keepdim=keep)
            yield call("std.correction", x, dims, correction=0, keepdim=keep)
            yield call("var_mean.correction", x, dims, correction=1, keepdim=keep)
            yield call("std_mean.correction", x, dims, correction=1, keepdim=keep)
            yield call("linalg_vector_norm", x, 2, dims, keep)
            if dims is not None:
                yield call("amax", x, dims, keep)
                yield call("amin", x, dims, keep)
                yield call("logsumexp", x, dims, keep)
                yield call("norm.ScalarOpt_dim", x, 2, dims, keep)
    for name in ("sum", "mean", "max", "min", "prod", "all", "any"):
        yield call(name, x > 0 if name in ("all", "any") else x)
    yield call("prod.dim_int", x, 1)
    for name in ("max.dim", "min.dim", "argmax", "argmin"):
        yield call(name, x, 1)
    yield call("argmax", x)
    yield call("cosine_similarity", x, floats(4, 5), 1)
    yield call("cosine_similarity", x, floats(3, 4, 5), -1)
    for name in ("cumsum", "cumprod", "logcumsumexp", "cummax", "cummin", "sort", "argsort"):
        yield call(name, x, 1)
    yield call("diff", x, 1, 1)
    yield call("topk", x, 2, 1)
    yield call("kthvalue", x, 2, 1)
    yield call("median.dim", x, 1)
    yield call("nanmedian.dim", x, 1)
    yield call("median", x)
    yield call("mode", x, 1)
    yield call("searchsorted.Tensor", floats(6).sort().values, x)
    yield call("bucketize.Tensor", x, floats(6).sort().values)
    yield call("histc", x, 4)
    yield call("bincount", below(4, 9))
    yield call("one_hot", below(4, 3), 4)
