"""`Inferred`: metadata of operators that run on operands of the same look, once for all layers that are alike."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import fx

from graphopt.graph.draft import Draft, infer_or_copy
from graphopt.graph.sizes import expression


class Inferred:
    """What operators of one graph give, by operator, arguments, and the shapes, strides and types of operands.

    Running an operator without data takes a millisecond, and most layers of a deep model are alike. Nodes share the
    fake tensors that they are given, which nothing changes.
    """

    def __init__(self) -> None:
        self._known: dict[Hashable, Any] = {}

    def infer(self, draft: Draft, node: fx.Node) -> None:
        """As `infer_or_copy`: give a draft's node whose operands changed its metadata."""
        key = (node.target, _look(node.args), _look(node.kwargs))
        if key in self._known:
            node.meta["val"] = self._known[key]
            return
        target = node.target
        infer_or_copy(draft, node)
        value = node.meta["val"]
        tensors = value if isinstance(value, (list, tuple)) else [value]
        if node.target is target and all(isinstance(t, torch.Tensor) for t in tensors):
            self._known[key] = value


def _look(value: Any) -> Hashable:
    """All that metadata depend on, of an argument or of the value of a node."""
    if isinstance(value, fx.Node):
        value = value.meta["val"]
    if isinstance(value, torch.Tensor):
        shape, strides = (tuple(map(expression, sizes)) for sizes in (value.shape, value.stride()))
        return shape, strides, value.dtype, value.device
    if isinstance(value, torch.SymInt):
        return expression(value)
    if isinstance(value, (list, tuple)):
        return tuple(map(_look, value))
    if isinstance(value, dict):
        return tuple((name, _look(each)) for name, each in value.items())
    return type(value), value
