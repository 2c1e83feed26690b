"""Functional collectives in a draft: what joins the values of all processors, with full metadata."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from graphopt.graph.draft import Draft
from graphopt.graph.sizes import Expr, expression, nbytes

aten = torch.ops.aten
c10d = torch.ops._c10d_functional


def join(draft: Draft, node: fx.Node, how: str, group: str) -> Expr:
    """All-reduce ``node`` right behind it and let all its readers read the result; gives the bytes."""
    readers = list(node.users)
    joined = all_reduced(draft, node, how, group, node.next)
    for reader in readers:
        reader.replace_input_with(node, joined)
    return nbytes(node.meta["val"])


def all_reduced(draft: Draft, node: fx.Node, how: str, group: str, before: fx.Node) -> fx.Node:
    """The all-reduced value of ``node``, with its strides.

    The collective gives contiguous memory, so a value that lies otherwise goes through as a permutation of itself and
    comes out with the strides that it had.
    """
    value, source = node.meta["val"], node
    order = _dense_order(value)
    if order is not None:
        source = draft.add(aten.permute.default, node, order, like=node, before=before)
    joined = waited(draft, c10d.all_reduce.default, (source, how, group), source.meta["val"], node, before)
    if order is not None:
        back = [order.index(d) for d in range(len(order))]
        joined = draft.add(aten.permute.default, joined, back, like=node, before=before)
    return joined


def waited(draft: Draft, op: Any, args: tuple[Any, ...], like: Any, place: fx.Node, before: fx.Node) -> fx.Node:
    """A collective and the wait for it; see `collective`."""
    started = collective(draft, op, args, like, place, before)
    return collective(draft, c10d.wait_tensor.default, (started,), like, place, before)


def collective(draft: Draft, op: Any, args: tuple[Any, ...], like: Any, place: fx.Node, before: fx.Node) -> fx.Node:
    """A collective whose result has the shape and dtype of ``like``, contiguous, before a node and with the origin of
    ``place``; fake kernels would need a process group to tell."""
    with draft.graph.inserting_before(before):
        node = draft.graph.call_function(op, args)
    node.meta["val"] = like.new_empty(like.shape)
    node.meta.update({key: place.meta.get(key, "") for key in ("phase", "module", "source")})
    return node


def _dense_order(value: torch.Tensor) -> list[int] | None:
    """The order of dimensions in which a dense tensor is contiguous; None if it is as it stands, or is not dense."""
    strides = [expression(s) for s in value.stride()]
    sizes = [expression(s) for s in value.shape]
    if not all(isinstance(s, int) for s in (*strides, *sizes)):
        return None
    order = sorted(range(len(sizes)), key=lambda d: (-strides[d], d))
    expected: Any = 1
    for d in reversed(order):
        if sizes[d] != 1 and strides[d] != expected:
            return None
        expected *= sizes[d]
    return None if order == list(range(len(order))) else order
