"""Operators that are slower or faster than their family: each timed once, relative to the family's curve.

Kernels of one family differ on a CPU: a comparison writes booleans one by one, `where` guesses each branch, tanh is a
longer series than the sigmoid, and some operators are several kernels in one. One size of each tells; sizes are the
business of the family's curve.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from graphopt.cost_model.probes import Probe

aten = torch.ops.aten

_SIZE = (512, 512)


def operator_probes() -> Iterator[Probe]:
    """A probe of each operator; none of those that the curves themselves are fitted to."""
    x, g = torch.randn(_SIZE), torch.randn(_SIZE)
    positive, mask = x.abs() + 0.01, torch.rand(_SIZE) < 0.5
    for unary in (
        aten.tanh, aten.erf, aten.exp, aten.sin, aten.cos, aten.silu, aten.mish, aten.softplus, aten.hardswish,
        aten.elu, aten.log_sigmoid_forward, aten.relu, aten.leaky_relu, aten.hardtanh, aten.abs, aten.neg,
    ):  # fmt: skip
        yield Probe(unary.default, (x,))
    for unary in (aten.log, aten.log1p, aten.sqrt, aten.rsqrt, aten.reciprocal):
        yield Probe(unary.default, (positive,))
    yield Probe(aten.sqrt.default, (positive,), torch.sqrt)
    for comparison in (aten.eq, aten.ne, aten.gt, aten.ge, aten.lt, aten.le):
        yield Probe(partial(_of, comparison.Scalar, 0.5), (x,))
    yield Probe(aten.mul.Tensor, (x, g))
    yield Probe(aten.div.Tensor, (x, positive))
    yield Probe(aten.maximum.default, (x, g))
    yield Probe(lambda t: aten.pow.Tensor_Scalar(t, 3.0), (x,))
    yield Probe(lambda t: aten.clamp.default(t, -1.0, 1.0), (x,))
    yield Probe(aten.where.self, (mask, x, g))
    yield Probe(lambda t, m: aten.masked_fill.Scalar(t, m, 0.0), (x, mask))
    yield Probe(aten.logical_and.default, (mask, ~mask))
    yield Probe(aten.bitwise_not.default, (mask,))
    for backward in (aten.tanh_backward, aten.sigmoid_backward, aten.gelu_backward, aten.silu_backward,
                     aten.hardswish_backward, aten.mish_backward):  # fmt: skip
        yield Probe(backward.default, (g, x))
    yield Probe(lambda g, t: aten.leaky_relu_backward.default(g, t, 0.01, False), (g, x))
    yield Probe(lambda g, t: aten.hardtanh_backward.default(g, t, -1.0, 1.0), (g, x))
    yield Probe(lambda g, t: aten.softplus_backward.default(g, t, 1.0, 20.0), (g, x))
    yield Probe(lambda g, t: aten.elu_backward.default(g, 1.0, 1.0, 1.0, False, t), (g, x))
    yield Probe(lambda t: aten._safe_softmax.default(t, -1), (x,))
    yield Probe(lambda t: aten._log_softmax.default(t, -1, False), (x,))
    yield Probe(lambda g, t: aten._log_softmax_backward_data.default(g, t, -1, torch.float32), (g, x))
    yield Probe(lambda g, m: aten.native_dropout_backward.default(g, m, 1.1), (g, mask))
    yield Probe(lambda t: aten.bernoulli.p(t, 0.1), (x,))
    yield Probe(partial(_of, aten.cumsum.default, -1), (x,))
    yield Probe(partial(_of, aten.argmax.default, -1), (x,))
    yield Probe(partial(_of, aten.amax.default, [-1]), (x,))
    yield Probe(partial(_of, aten.mean.dim, [-1]), (x,))
    yield Probe(lambda t: aten.max.dim(t, -1), (x,))
    yield Probe(lambda m: aten.any.dim(m, -1), (mask,))
    yield Probe(lambda m: aten.all.dim(m, -1), (mask,))


def _of(operator: Any, argument: Any, x: torch.Tensor) -> Any:
    return operator(x, argument)
