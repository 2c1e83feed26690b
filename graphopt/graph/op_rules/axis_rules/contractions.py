"""Axis rules of products: dimensions that are contracted, kept, or kept in batches."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import fx

from graphopt.graph.op_rules.arguments import operand

if TYPE_CHECKING:
    from graphopt.graph.axes.factors import Factor
    from graphopt.graph.axes.propagation import Propagation


def linear(see: Propagation, node: fx.Node) -> Any:
    """``input @ weight.T + bias``: the input's last dimension is the weight's last."""
    source, weight = see.of(operand(node, "input")), see.of(operand(node, "weight"))
    see.unify(source[-1], weight[-1])
    see.feature(weight[-1])
    dims = (*source[:-1], *weight[:-1])
    bias = operand(node, "bias")
    if bias is not None:
        see.broadcast(dims, see.of(bias))
    if len(weight) > 1:
        see.feature(weight[0])
    return dims


def linear_backward(see: Propagation, node: fx.Node) -> Any:
    """Gradients of input, weight and bias."""
    source, weight = see.of(operand(node, "self")), see.of(operand(node, "weight"))
    grad = see.of(operand(node, "grad_output"))
    see.unify(source[-1], weight[-1])
    see.broadcast(grad, (*source[:-1], weight[0]))
    return [source, weight, weight[:1]]


def product(left: str, right: str, added: str = "") -> Any:
    """``mm``, ``bmm``, ``addmm`` ...: ``left @ right``, plus ``added`` broadcast to it."""

    def rule(see: Propagation, node: fx.Node) -> Any:
        dims = matrix_product(see, node, operand(node, left), operand(node, right))
        if added:
            dims = see.broadcast(dims, see.of(operand(node, added)))
        return dims

    return rule


def matmul(see: Propagation, node: fx.Node) -> Any:
    """``torch.matmul``: the last two dimensions are matrices, those before are broadcast."""
    return matrix_product(see, node, node.args[0], node.args[1])


def matrix_product(see: Propagation, node: fx.Node, left: Any, right: Any) -> tuple[Factor, ...]:
    """The dimensions of ``left @ right``; vectors are as in `torch.matmul`."""
    a, b = see.of(left), see.of(right)
    inner = b[-2] if len(b) > 1 else b[0]
    see.unify(a[-1], inner)
    lead = see.broadcast(a[:-2], b[:-2])
    kept_a, kept_b = a[-2:-1] if len(a) > 1 else (), b[-1:] if len(b) > 1 else ()
    see.contracted(left, right, inner, (*kept_a, *kept_b), lead, node)
    return (*lead, *kept_a, *kept_b)


def matmul_backward(see: Propagation, node: fx.Node) -> Any:
    """Gradients of both operands of `matmul`."""
    a, b = (operand(node, n) for n in ("self", "other"))
    see.broadcast(see.of(operand(node, "grad")), matrix_product(see, node, a, b))
    return [see.of(a), see.of(b)]


def addbmm(see: Propagation, node: fx.Node) -> Any:
    """The sum over a batch of products."""
    a, b = see.of(node.args[1]), see.of(node.args[2])
    see.unify(a[0], b[0])
    see.unify(a[2], b[1])
    return see.broadcast((a[1], b[2]), see.of(node.args[0]))


def einsum(see: Propagation, node: fx.Node) -> Any:
    """``torch.einsum`` by its equation; without ``->`` the result has the letters that stand once, in order."""
    equation = str(node.args[0]).replace(" ", "").replace("...", ".")
    left, arrow, right = equation.partition("->")
    sources: Any = node.args[1]
    bound: dict[str, Any] = {}
    for term, source in zip(left.split(","), sources, strict=True):
        dims = see.of(source)
        before, star, behind = term.partition(".")
        if star:
            count = len(dims) - len(before) - len(behind)
            middle = dims[len(before) : len(before) + count]
            bound["."] = see.broadcast(bound["."], middle) if "." in bound else middle
            dims = dims[: len(before)] + dims[len(before) + count :]
        for letter, dim in zip(before + behind, dims, strict=True):
            bound[letter] = see.meet(bound[letter], dim) if letter in bound else dim
    if not arrow:
        letters = left.replace(",", "").replace(".", "")
        right = ("." if "." in left else "") + "".join(sorted(x for x in set(letters) if letters.count(x) == 1))
    if len(sources) == 2:
        a, b = (set(t.replace(".", "")) for t in left.split(","))
        batch = tuple(bound[x] for x in sorted(a & b & set(right))) + (bound.get(".", ()) if "." in right else ())
        kept = tuple(bound[x] for x in sorted((a ^ b) & set(right)))
        for letter in sorted((a & b) - set(right)):
            see.contracted(sources[0], sources[1], bound[letter], kept, batch, node)
    for letter in sorted(set(left) - set(right) - {",", "."}):
        see.reduced(bound[letter], node)
    return tuple(f for x in right for f in (bound[x] if x == "." else (bound[x],)))


def grouped_mm(see: Propagation, node: fx.Node) -> Any:
    """Rows sorted by expert times the matrix of their expert: ``[rows, k] @ [experts, k, n]``."""
    rows, weight = see.of(node.args[0]), see.of(node.args[1])
    if len(weight) != 3 or len(rows) != 2:
        return see.unknown(node)
    see.freeze(weight[0], f"{node.target} ({node.name}) lets data choose among it")
    see.unify(rows[1], weight[1])
    see.feature(weight[1])
    see.feature(weight[2])
    return (rows[0], weight[2])
