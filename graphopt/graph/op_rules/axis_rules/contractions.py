"""Axis rules of products: dimensions that are contracted, kept, or kept in batches."""

from __future__ import annotations

from itertools import combinations
from typing import TYPE_CHECKING, Any

from torch import fx

from graphopt.graph.op_rules.arguments import operand, operand_names
from graphopt.graph.op_rules.axis_rules.pattern import Pattern
from graphopt.graph.op_rules.reductions import parse_einsum

if TYPE_CHECKING:
    from graphopt.graph.axes.factors import Factor
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


def trilinear(see: Propagation, node: fx.Node) -> Any:
    """Three operands, each with dimensions of size 1 put in, are multiplied and summed over ``sumdim``."""
    dims: tuple[Factor, ...] = ()
    for i in (1, 2, 3):
        source = list(see.of(operand(node, f"i{i}")))
        for d in operand(node, f"expand{i}"):
            source.insert(d, see.one)
        dims = see.broadcast(dims, tuple(source))
    return tuple(f for d, f in enumerate(dims) if d not in operand(node, "sumdim"))


def grouped_mm(see: Propagation, node: fx.Node) -> Any:
    """Rows sorted by expert times the matrix of their expert; offsets say which rows an expert has.

    ``[rows, k] @ [experts, k, n]``, ``[experts, m, k] @ [k, rows]``, and the gradient ``[k, rows] @ [rows, n]`` of all
    matrices; ``[experts, m, k] @ [experts, k, n]`` is `bmm`.
    """
    a, b, offsets = (see.of(operand(node, n)) for n in operand_names(node)[:3])
    see.unify(a[-1], b[-2])
    result: tuple[Factor, ...]
    if len(a) == len(b) == 3:
        return (see.meet(a[0], b[0]), a[1], b[2])
    if len(b) == 3:
        rows, experts, result = a[0], b[0], (a[0], b[2])
        see.feature(b[1])
        see.feature(b[2])
    elif len(a) == 3:
        rows, experts, result = b[1], a[0], (a[1], b[1])
    else:
        rows, experts, result = a[1], offsets[0], (offsets[0], a[0], b[1])
    see.broadcast((experts,), offsets)
    for f in (rows, experts):
        see.freeze(f, f"{node.target} ({node.name}) lets data choose among it")
    return result


def grouped_mm_backward(see: Propagation, node: fx.Node) -> Any:
    """Gradients of rows and weight."""
    see.broadcast(see.of(operand(node, "grad_output")), grouped_mm(see, node))
    return [see.of(node.args[0]), see.of(node.args[1])]


def distances(see: Propagation, node: fx.Node) -> Any:
    """``cdist``: between all rows of two matrices."""
    a, b = see.of(node.args[0]), see.of(node.args[1])
    see.unify(a[-1], b[-1])
    see.statistics(a[-1], "distances", node)
    return (*see.broadcast(a[:-2], b[:-2]), a[-2], b[-2])
