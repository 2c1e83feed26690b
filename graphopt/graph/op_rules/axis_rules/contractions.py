"""Axis rules of products: dimensions that are contracted, kept, or kept in batches."""

from __future__ import annotations

from itertools import combinations
from typing import TYPE_CHECKING, Any

from torch import fx

from graphopt.graph.op_rules.arguments import operand
from graphopt.graph.op_rules.axis_rules.pattern import Pattern
from graphopt.graph.op_rules.reductions import parse_einsum

if TYPE_CHECKING:
    from graphopt.graph.axes.propagation import Propagation


MATMUL = Pattern(
    "self: k, other: k -> | self: k, other: *kn -> *n | self: *mk, other: k -> *m | self: *mk, other: *kn -> *mn"
)
"""``torch.matmul``: the last two dimensions are matrices, those before are broadcast; or vectors."""


def matmul_backward(see: Propagation, node: fx.Node) -> Any:
    """Gradients of both operands of `matmul`."""
    see.broadcast(see.of(operand(node, "grad")), MATMUL(see, node))
    return [see.of(operand(node, name)) for name in ("self", "other")]


def einsum(see: Propagation, node: fx.Node) -> Any:
    """``torch.einsum`` by its equation; without ``->`` the result has the letters that stand once, in order."""
    terms, right, sources = parse_einsum(node)
    bound: dict[str, Any] = {}
    for term, source in zip(terms, sources, strict=True):
        dims = see.of(source)
        before, star, behind = term.partition(".")
        if star:
            count = len(dims) - len(before) - len(behind)
            middle = dims[len(before) : len(before) + count]
            bound["."] = see.broadcast(bound["."], middle) if "." in bound else middle
            dims = dims[: len(before)] + dims[len(before) + count :]
        for letter, dim in zip(before + behind, dims, strict=True):
            bound[letter] = see.meet(bound[letter], dim) if letter in bound else dim
    for i, j in combinations(range(len(sources)), 2):
        a, b = (set(terms[k]) - {"."} for k in (i, j))
        stays = set(right).union(*(t for k, t in enumerate(terms) if k not in (i, j)))
        batch = tuple(bound[x] for x in sorted(a & b & stays)) + (bound.get(".", ()) if "." in right else ())
        kept = tuple(bound[x] for x in sorted((a ^ b) & stays))
        inner = sorted((a & b) - stays)
        for letter in inner:
            see.contracted(sources[i], sources[j], bound[letter], kept, batch, node)
        weights = [n for n in (sources[i], sources[j]) if n not in see.activations]
        for f in see.of(weights[0]) if inner and len(weights) == 1 else ():
            see.feature(f)
    return tuple(f for x in right for f in (bound[x] if x == "." else (bound[x],)))


def grouped_mm(see: Propagation, node: fx.Node) -> Any:
    """Rows sorted by expert times the matrix of their expert: ``[rows, k] @ [experts, k, n]``."""
    rows, weight = see.of(node.args[0]), see.of(node.args[1])
    if len(weight) != 3 or len(rows) != 2:
        return see.unknown(node)
    for f in (rows[0], weight[0]):
        see.freeze(f, f"{node.target} ({node.name}) lets data choose among it")
    see.unify(rows[1], weight[1])
    see.feature(weight[1])
    see.feature(weight[2])
    return (rows[0], weight[2])


def grouped_mm_backward(see: Propagation, node: fx.Node) -> Any:
    """Gradients of rows and weight."""
    see.broadcast(see.of(operand(node, "grad_output")), grouped_mm(see, node))
    return [see.of(node.args[0]), see.of(node.args[1])]
