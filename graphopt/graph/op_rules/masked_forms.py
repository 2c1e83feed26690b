"""Backward operators of ReLU-like functions that can live with a boolean mask in place of a float operand.

A form applies its mask with a kernel that takes it in the operand's place: ``hardtanh_backward`` and
``leaky_relu_backward`` promote a boolean operand to 0 and 1. On CPU that is vectorised (1.1 ms for 10^6 floats; the
float kernels take 0.4 to 0.7), while ``where``, ``masked_fill`` and a product with the mask branch or multiply
(2.1 to 5.3 ms; a product also turns inf into NaN). Result strides are those of the original operator too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import fx

from graphopt.graph.op_rules.arguments import operand

aten = torch.ops.aten

_ONE_SIXTH = torch.tensor(1 / 6, dtype=torch.float32).item()
"""The slope in ``hardsigmoid_backward``: a float32 constant in the kernels of every dtype."""


class Add(Protocol):
    """How a form makes nodes: ``add(op, *args)``. Nodes must stand in the order of the calls (`Draft.add` with
    ``before=`` bound by ``functools.partial``)."""

    def __call__(self, op: Callable[..., Any], *args: Any) -> fx.Node: ...


@dataclass(frozen=True)
class MaskedForm:
    """``node == apply(mask(operand))`` bit for bit, where ``mask`` is boolean and can be made in the forward.

    ``operand``: name of the float operand that the mask replaces. ``mask(add, node)``: makes the mask from the
    operand. ``apply(add, node, mask)``: makes the result from the gradient and the mask. ``holds(node)``: whether
    the form is exact for this node's arguments. ``exact_for_nan``: whether that includes places where the operand
    is NaN. Where it does not, torch has no one answer there: 0 in the vector lanes of its CPU kernel, the gradient
    in the scalar tail and on CUDA; the form gives 0 everywhere.
    """

    operand: str
    mask: Callable[[Add, fx.Node], fx.Node]
    apply: Callable[[Add, fx.Node, fx.Node], fx.Node]
    holds: Callable[[fx.Node], bool]
    exact_for_nan: bool = True


def _bounds_are_exact(*names: str) -> Callable[[fx.Node], bool]:
    """Whether a comparison sees the same bounds as the kernel: on 16-bit floats it rounds them to the dtype, the
    kernel compares in float32."""

    def holds(node: fx.Node) -> bool:
        value = operand(node, "self").meta["val"]
        bounds = [operand(node, name) for name in names]
        if not value.is_floating_point() or not all(isinstance(b, (int, float)) for b in bounds):
            return False
        if value.dtype in (torch.float32, torch.float64):
            return True
        return all(torch.tensor(b, dtype=value.dtype).item() == b for b in bounds)

    return holds


def _drop(add: Add, gradient: fx.Node, dropped: fx.Node) -> fx.Node:
    """dropped ? 0 : gradient, as hardtanh_backward: 0 lies between -1 and 1/2, 1 does not."""
    return add(aten.hardtanh_backward.default, gradient, dropped, -1.0, 0.5)


def _keep(add: Add, gradient: fx.Node, kept: fx.Node) -> fx.Node:
    """kept ? gradient : 0, as hardtanh_backward: 1 lies between 1/2 and 2, 0 does not."""
    return add(aten.hardtanh_backward.default, gradient, kept, 0.5, 2.0)


def _between(add: Add, value: fx.Node, low: Any, high: Any) -> fx.Node:
    """low < value < high; False for NaN."""
    return add(aten.logical_and.default, add(aten.gt.Scalar, value, low), add(aten.lt.Scalar, value, high))


def _shrink(gradient: str) -> MaskedForm:
    """x < -lambd or x > lambd ? g : 0"""
    return MaskedForm(
        operand="self",
        mask=lambda add, n: add(aten.gt.Scalar, add(aten.abs.default, operand(n, "self")), operand(n, "lambd")),
        apply=lambda add, n, mask: _keep(add, operand(n, gradient), mask),
        holds=lambda n: _bounds_are_exact("lambd")(n) and operand(n, "lambd") >= 0,
        exact_for_nan=False,
    )


# threshold_backward(g, x, t) = x <= t ? 0 : g        (a NaN in x lets g through, so not `x > t ? g : 0`)
THRESHOLD = MaskedForm(
    operand="self",
    mask=lambda add, n: add(aten.le.Scalar, operand(n, "self"), operand(n, "threshold")),
    apply=lambda add, n, mask: _drop(add, operand(n, "grad_output"), mask),
    holds=_bounds_are_exact("threshold"),
)

# hardtanh_backward(g, x, low, high) = low < x < high ? g : 0
HARDTANH = MaskedForm(
    operand="self",
    mask=lambda add, n: _between(add, operand(n, "self"), operand(n, "min_val"), operand(n, "max_val")),
    apply=lambda add, n, mask: _keep(add, operand(n, "grad_output"), mask),
    holds=_bounds_are_exact("min_val", "max_val"),
    exact_for_nan=False,
)

# leaky_relu_backward(g, x, slope) = x > 0 ? g : g slope        (of the result the sign is the same)
LEAKY_RELU = MaskedForm(
    operand="self",
    mask=lambda add, n: add(aten.gt.Scalar, operand(n, "self"), 0),
    apply=lambda add, n, mask: add(
        aten.leaky_relu_backward.default, operand(n, "grad_output"), mask, operand(n, "negative_slope"), False
    ),
    holds=_bounds_are_exact(),
)

# hardsigmoid_backward(g, x) = -3 < x < 3 ? g / 6 : 0
HARDSIGMOID = MaskedForm(
    operand="self",
    mask=lambda add, n: _between(add, operand(n, "self"), -3, 3),
    apply=lambda add, n, mask: _keep(add, add(aten.mul.Tensor, operand(n, "grad_output"), _ONE_SIXTH), mask),
    holds=_bounds_are_exact(),
)

SOFTSHRINK = _shrink("grad_output")
HARDSHRINK = _shrink("grad_out")
