"""Axis rules of operators that work on each element, along one dimension, or reduce some."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from graphopt.graph.op_rules.arguments import operand, operand_names

if TYPE_CHECKING:
    from graphopt.graph.axes.factors import Factor
    from graphopt.graph.axes.propagation import Propagation


def pointwise(see: Propagation, node: fx.Node) -> Any:
    """All tensor operands are broadcast against each other; every result has their dimensions."""
    dims: tuple[Factor, ...] | None = None
    for argument in (*node.args, *node.kwargs.values()):
        if isinstance(argument, fx.Node) and see.is_tensor(argument):
            found = see.of(argument)
            dims = found if dims is None else see.broadcast(dims, found)
    return see.repeated(node, dims or ())


def first(see: Propagation, node: fx.Node) -> Any:
    """Every result has the dimensions of the first operand; the others lend nothing."""
    return see.repeated(node, see.of(node.args[0]))


def lists(see: Propagation, node: fx.Node) -> Any:
    """Operators on lists of tensors (``_foreach_add``): element i of each list takes part in result i."""
    given = [a for a in (*node.args, *node.kwargs.values()) if isinstance(a, (list, tuple)) and a]
    rows = [a for a in given if isinstance(a[0], fx.Node)]
    results: list[Any] = []
    for i in range(len(rows[0])):
        dims = see.of(rows[0][i])
        for row in rows[1:]:
            if len(row) == len(rows[0]) and isinstance(row[i], fx.Node):
                dims = see.broadcast(dims, see.of(row[i]))
        results.append(dims if _has_rank(node, i, len(dims)) else ())  # norms: one number a tensor
    if (
        isinstance(node.meta.get("val"), (list, tuple))
        and node.meta["val"]
        and isinstance(node.meta["val"][0], (list, tuple))
    ):  # fused updates return one list for each kind of state, an empty one for a kind that they do without
        return [results[: len(each)] for each in node.meta["val"]]
    return results


def _has_rank(node: fx.Node, index: int, rank: int) -> bool:
    """Whether result ``index`` of an operator on lists has this rank."""
    value = node.meta["val"]
    value = value[index] if isinstance(value, (list, tuple)) and index < len(value) else None
    return not isinstance(value, torch.Tensor) or value.dim() == rank


def axes_named(node: fx.Node, rank: int, name: str = "dim") -> tuple[int, ...]:
    """The dimensions that the argument ``name`` (int, list or None for all) means in a tensor of this rank."""
    given = operand(node, name) if name in operand_names(node) else None
    if given is None or given == []:
        return tuple(range(rank))
    return tuple(d % rank if rank else 0 for d in (given if isinstance(given, (list, tuple)) else [given]))


def reduction(see: Propagation, node: fx.Node) -> Any:
    """Reduces the dimensions of ``dim`` (all without it); one result, or several of the same dimensions."""
    source = see.of(node.args[0])
    reduced = axes_named(node, len(source))
    keep = "keepdim" in operand_names(node) and operand(node, "keepdim")
    for d in reduced:
        see.reduced(source[d], node)
    if keep:
        dims = tuple(see.one if d in reduced else f for d, f in enumerate(source))
    else:
        dims = tuple(f for d, f in enumerate(source) if d not in reduced)
    return see.repeated(node, dims)


def reduction_with_index(see: Propagation, node: fx.Node) -> Any:
    """A reduction that also tells where (``max.dim``, ``argmax``): positions matter along what it reduces."""
    source = see.of(node.args[0])
    if isinstance(node.meta.get("val"), (list, tuple)) or "arg" in str(node.target):
        for d in axes_named(node, len(source)):
            see.freeze(source[d], f"{node.target} tells positions along it ({node.name})")
    return reduction(see, node)


def along(see: Propagation, node: fx.Node) -> Any:
    """Works along ``dim`` in order (``cumsum``, ``sort``, ``flip``): positions matter, the dimensions stay."""
    source = see.of(node.args[0])
    name = "dims" if "dims" in operand_names(node) else "dim"
    for d in axes_named(node, len(source), name):
        see.freeze(source[d], f"{node.target} works along it in order ({node.name})")
    return see.repeated(node, source)


def shifted(see: Propagation, node: fx.Node) -> Any:
    """Moves positions along ``dims`` (``roll``, ``flip``): what comes out is another axis, both keep their order."""
    source = see.of(node.args[0])
    moved = axes_named(node, len(source), "dims")
    reason = f"{node.target} moves positions along it ({node.name})"
    for d in moved:
        see.freeze(source[d], reason)
    return tuple(see.new(f.size, reason) if d in moved else f for d, f in enumerate(source))


def topk(see: Propagation, node: fx.Node) -> Any:
    """The first few in order of value along ``dim``."""
    source = see.of(node.args[0])
    reason = f"{node.target} orders by value along it ({node.name})"
    dims = list(source)
    for d in axes_named(node, len(source)):
        see.freeze(source[d], reason)
        dims[d] = see.new(see.sizes(node, 0)[d], reason)
    return see.repeated(node, tuple(dims))


def softmax(see: Propagation, node: fx.Node) -> Any:
    """Softmax over ``dim``, and its backward: all tensor operands have the same dimensions."""
    dims = pointwise(see, node)
    if dims:
        see.statistics(dims[operand(node, "dim")], "softmax", node)
    return dims


def triangle(see: Propagation, node: fx.Node) -> Any:
    """``tril``, ``triu``: the last two dimensions are compared by position."""
    dims = see.of(node.args[0])
    for f in dims[-2:]:
        see.freeze(f, f"{node.target} compares positions ({node.name})")
    return dims


def glu(see: Propagation, node: fx.Node) -> Any:
    """Both halves along ``dim`` are the same dimension, which is that of the result."""
    dims = list(see.of(node.args[0]))
    d = operand(node, "dim") % len(dims)
    size = dims[d].size // 2
    a, b = see.cut(dims[d], [size])
    see.unify(a, b)
    dims[d] = a
    return tuple(dims)


def glu_backward(see: Propagation, node: fx.Node) -> Any:
    """The gradient of `glu` has the dimensions of its operand."""
    grad, dims = see.of(node.args[0]), see.of(node.args[1])
    d = operand(node, "dim") % len(dims)
    a, b = see.cut(dims[d], [dims[d].size // 2])
    see.unify(a, b)
    see.broadcast(grad, tuple(a if i == d else f for i, f in enumerate(dims)))
    return dims


def prelu(see: Propagation, node: fx.Node) -> Any:
    """The weight is of size 1 or that of dimension 1 (`prelu`); already broadcast in `_prelu_kernel`."""
    dims, weight = see.of(node.args[0]), see.of(node.args[1])
    if len(weight) == 1 and weight[0] is not see.one and len(dims) > 1:
        see.unify(dims[1], weight[0])
    return dims


def prelu_backward(see: Propagation, node: fx.Node) -> Any:
    """Gradients of input and of the broadcast weight."""
    grad, source, weight = (see.of(a) for a in node.args[:3])
    dims = see.broadcast(see.broadcast(grad, source), weight)
    return [dims, dims]


def loss(see: Propagation, node: fx.Node) -> Any:
    """Pointwise against the target, then reduced unless ``reduction`` is 0."""
    dims = pointwise(see, node)
    if operand(node, "reduction") == 0:
        return dims
    for f in dims:
        see.reduced(f, node)
    return ()


def factory(see: Propagation, node: fx.Node) -> Any:
    """The same value everywhere, or independent random ones: new dimensions whose order means nothing."""
    return see.fresh(node)


def drawn(see: Propagation, node: fx.Node) -> Any:
    """Independent random numbers, each by the parameters in its place; new dimensions where parameters are numbers."""
    several = any(isinstance(a, fx.Node) and see.is_tensor(a) for a in node.args)
    return pointwise(see, node) if several else see.fresh(node)


def multinomial(see: Propagation, node: fx.Node) -> Any:
    """Indices of the last dimension drawn by weight."""
    dims = see.of(node.args[0])
    see.freeze(dims[-1], f"{node.target} draws indices of it ({node.name})")
    return (*dims[:-1], see.new(see.sizes(node)[-1], f"draws of {node.target} ({node.name})"))


def positions(see: Propagation, node: fx.Node) -> Any:
    """``arange``, ``eye`` ...: values depend on the position."""
    return see.fresh(node, f"{node.target} gives positions ({node.name})")


def ordered(see: Propagation, node: fx.Node) -> Any:
    """Operators that order or look up by value over whole tensors: everything keeps its order."""
    reason = f"{node.target} ({node.name}) depends on order"
    see.freeze_operands(node, reason)
    return see.fresh(node, reason)


def number(see: Propagation, node: fx.Node) -> Any:
    """A number has no dimensions."""
    return ()


def transformed(see: Propagation, node: fx.Node) -> Any:
    """Fourier transforms along ``dim``: frequencies are another axis."""
    dims, sizes = list(see.of(node.args[0])), see.sizes(node)
    reason = f"{node.target} transforms it ({node.name})"
    for d in axes_named(node, len(dims)):
        see.freeze(dims[d], reason)
        dims[d] = see.new(sizes[d], reason)
    return tuple(dims)


def spectrogram(see: Propagation, node: fx.Node) -> Any:
    """Short Fourier transforms along the last dimension: frequencies and frames are other axes."""
    dims, sizes = see.of(node.args[0]), see.sizes(node)
    reason = f"{node.target} transforms windows of it ({node.name})"
    window = operand(node, "window")
    for f in (dims[-1], *see.of(window)):
        see.freeze(f, reason)
    return (*dims[:-1], *(see.new(s, reason) for s in sizes[len(dims) - 1 :]))


def differences(see: Propagation, node: fx.Node) -> Any:
    """Differences of neighbours along ``dim``."""
    dims, sizes = list(see.of(node.args[0])), see.sizes(node)
    d = operand(node, "dim") % len(dims)
    reason = f"{node.target} compares neighbours along it ({node.name})"
    see.freeze(dims[d], reason)
    dims[d] = see.new(sizes[d], reason)
    return tuple(dims)


def pairwise_reduction(see: Propagation, node: fx.Node) -> Any:
    """Two operands broadcast against each other, then ``dim`` reduced (``cosine_similarity``)."""
    dims = see.broadcast(see.of(node.args[0]), see.of(node.args[1]))
    d = operand(node, "dim") % len(dims)
    see.statistics(dims[d], str(node.target), node)
    return dims[:d] + dims[d + 1 :]
