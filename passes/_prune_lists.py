"""Shorter lists for operators on lists of tensors (``_foreach_*``, ``_fused_*``) some of whose results nobody reads."""

from __future__ import annotations

from operator import getitem
from typing import Any

import torch
from torch import fx

from graphopt.graph.draft import Draft


def prune_lists(draft: Draft) -> bool:
    """Drop from every list operator the elements whose results are not read; True if anything was dropped.

    Legal because these operators treat element k of every list apart from the others.
    """
    return any([_prune(node, draft) for node in list(draft.graph.nodes) if is_list_operator(node)])


def is_list_operator(node: fx.Node) -> bool:
    """Whether a node is an operator of ``_foreach_*`` or ``_fused_*`` that gives lists as long as those it takes."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    schema = node.target._schema
    if not schema.name.startswith(("aten::_foreach_", "aten::_fused_")) or not schema.returns:
        return False
    return all(str(r.type) == "List[Tensor]" for r in schema.returns) and isinstance(node.args[0], (list, tuple))


def _prune(node: fx.Node, draft: Draft) -> bool:
    several = len(node.target._schema.returns) > 1  # type: ignore[union-attr]
    lists = [u for u in node.users if u.target is getitem] if several else [node]
    elements = [u for part in lists for u in part.users]
    if any(u.target is not getitem for u in elements) or len(lists) != (len(node.users) if several else 1):
        return False
    length = len(node.args[0])  # type: ignore[arg-type]
    index: dict[fx.Node, Any] = {u: u.args[1] for u in elements}
    read = sorted(set(index.values()))
    if len(read) == length or not read:
        return False
    place = {old: new for new, old in enumerate(read)}

    def shorter(value: Any) -> Any:
        return [value[i] for i in read] if isinstance(value, (list, tuple)) and len(value) == length else value

    node.args = tuple(shorter(a) for a in node.args)
    node.kwargs = {k: shorter(v) for k, v in node.kwargs.items()}
    value = node.meta["val"]
    node.meta["val"] = tuple(shorter(v) for v in value) if several else shorter(value)
    for part in lists if several else []:
        part.meta["val"] = shorter(part.meta["val"])
    for user in elements:
        user.args = (user.args[0], place[index[user]])
    return True
