"""Backward operators of ReLU-like functions that can live with a boolean mask in place of a float operand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import fx

from graphopt.graph.op_rules.arguments import operand

aten = torch.ops.aten


class Add(Protocol):
    """How a form makes nodes: ``add(op, *args)``, e.g. `Draft.add` with its place bound by ``functools.partial``."""

    def __call__(self, op: Callable[..., Any], *args: Any) -> fx.Node: ...


@dataclass(frozen=True)
class MaskedForm:
    """``backward(node) == apply(mask(operand))`` bit for bit, where ``mask`` is boolean and can be made in forward.

    ``operand``: name of the float operand that the mask replaces. ``mask(add, node)`` makes the mask from the operand
    (nodes of the forward); ``apply(add, node, mask)`` makes the result from the gradient and the mask. ``holds``:
    whether the form is exact for the arguments of this node.
    """

    operand: str
    mask: Callable[[Add, fx.Node], fx.Node]
    apply: Callable[[Add, fx.Node, fx.Node], fx.Node]
    holds: Callable[[fx.Node], bool]


def _representable(*names: str) -> Callable[[fx.Node], bool]:
    """Whether the scalars are exact in the operand's dtype: comparisons round them, the kernels may not."""

    def holds(node: fx.Node) -> bool:
        dtype = operand(node, "self").meta["val"].dtype
        scalars = [operand(node, name) for name in names]
        return all(isinstance(s, (int, float)) and torch.tensor(s, dtype=dtype).item() == s for s in scalars)

    return holds


# threshold_backward(g, x, t) = x <= t ? 0 : g      (NaN in x lets g through)
THRESHOLD = MaskedForm(
    operand="self",
    mask=lambda add, n: add(aten.le.Scalar, operand(n, "self"), operand(n, "threshold")),
    apply=lambda add, n, mask: add(aten.masked_fill.Scalar, operand(n, "grad_output"), mask, 0),
    holds=_representable("threshold"),
)
