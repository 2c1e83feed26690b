"""Storages of a training graph: which values share memory, and which memory is kept for backward."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from operator import getitem
from typing import Any

import torch
from torch import fx

from graphopt.graph.sizes import Expr, Shaped, nbytes
from graphopt.graph.training_graph import Phase, TrainingGraph

_VIEWS_BY_BEHAVIOUR = {torch.ops.aten._unsafe_view.default, torch.ops.aten._reshape_alias.default}
"""Operators whose schema declares a fresh result although it shares the storage of their first argument."""


@dataclass(frozen=True)
class Storage:
    """One storage: the node that made it, the values that live in it, and its bytes (symbolic)."""

    root: fx.Node
    values: tuple[fx.Node, ...]
    nbytes: Expr


def is_view(node: fx.Node) -> bool:
    """Whether the result of ``node`` shares the storage of one of its arguments, by the operator's schema."""
    return node.op == "call_function" and returns_view(node.target)


@cache
def returns_view(target: Any) -> bool:
    """Whether the result of an operator shares the storage of one of its arguments."""
    if target is getitem or target in _VIEWS_BY_BEHAVIOUR:
        return True
    if not isinstance(target, torch._ops.OpOverload):
        return False
    return any(r.alias_info is not None and not r.alias_info.is_write for r in target._schema.returns)


def viewed(node: fx.Node) -> fx.Node:
    """The value a view node looks at."""
    return node.all_input_nodes[0]


def storage_root(node: fx.Node) -> fx.Node:
    """The node that made the storage ``node`` lives in. Elements of an operator with several results are their own
    roots (``getitem`` nodes, also of lists in tuples), except where the operator returns views (``split``)."""
    while is_view(node):
        maker = node
        while maker.target is getitem:
            maker = viewed(maker)
        if maker is not node and not is_view(maker):
            return node
        node = viewed(maker)
    return node


def tensors(value: Any) -> list[torch.Tensor | Shaped]:
    """The (fake) tensors in a node's ``meta["val"]``."""
    if isinstance(value, (torch.Tensor, Shaped)):
        return [value]
    if isinstance(value, (tuple, list)):
        return [t for v in value for t in tensors(v)]
    return []


def kept_for_backward(graph: TrainingGraph | fx.Graph) -> list[Storage]:
    """Distinct storages alive across the forward/backward border: made by forward nodes (not by inputs or
    constants) and read by a backward node. Numbers (symbolic sizes) are not memory. The loss is not counted unless
    backward reads it; values that only the update reads (new buffers) are not counted."""
    found: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.nodes:
        if node.meta.get("phase") != Phase.FORWARD or not isinstance(node.meta.get("val"), torch.Tensor):
            continue
        if any(user.meta.get("phase") == Phase.BACKWARD for user in node.users):
            root = storage_root(node)
            if root.op == "call_function":
                found.setdefault(root, []).append(node)
    return [Storage(root, tuple(values), nbytes(root.meta["val"])) for root, values in found.items()]
