"""Axis rules of operators that look up or write at places given by data: what is indexed keeps its order."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from graphopt.graph.op_rules.arguments import operand, operand_names

if TYPE_CHECKING:
    from graphopt.graph.axes.factors import Factor
    from graphopt.graph.axes.propagation import Propagation


def embedding(see: Propagation, node: fx.Node) -> Any:
    """Rows of the weight at the indices."""
    weight, indices = see.of(node.args[0]), see.of(node.args[1])
    see.vocabulary(weight[0], node)
    see.feature(weight[1])
    return (*indices, weight[1])


def embedding_backward(see: Propagation, node: fx.Node) -> Any:
    """The gradient of the table: rows are new, the last dimension is that of the gradient."""
    grad, indices = see.of(node.args[0]), see.of(node.args[1])
    see.broadcast(grad[:-1], indices)
    rows = see.new(see.sizes(node)[0])
    see.vocabulary(rows, node)
    return (rows, grad[-1])


def embedding_bag(see: Propagation, node: fx.Node) -> Any:
    """Sums, means or maxima of the rows of each bag, then bookkeeping; offsets say where a bag begins."""
    weight = see.of(node.args[0])
    see.vocabulary(weight[0], node)
    _freeze_bags(see, node, 1)
    several = isinstance(node.meta["val"], (list, tuple))
    sizes = see.sizes(node, 0) if several else see.sizes(node)
    result = (see.new(sizes[0], f"bags of {node.target} ({node.name})"), weight[1])
    if not several:
        return result
    behind = range(1, len(node.meta["val"]))
    return [result, *(result if see.sizes(node, i) == sizes else see.fresh(node, "bookkeeping", i) for i in behind)]


def embedding_bag_backward(see: Propagation, node: fx.Node) -> Any:
    """The gradient of the table."""
    grad = see.of(node.args[0])
    largest = see.of(operand(node, "maximum_indices")) if "maximum_indices" in operand_names(node) else ()
    if [f.size for f in largest] == [f.size for f in grad]:
        see.broadcast(grad, largest)
    see.freeze(grad[0], f"bags of {node.target} ({node.name})")
    _freeze_bags(see, node, 1)
    rows = see.new(see.sizes(node)[0])
    see.vocabulary(rows, node)
    return (rows, grad[-1])


def _freeze_bags(see: Propagation, node: fx.Node, first: int) -> None:
    """The vectors that say which rows a bag has keep their order."""
    for source in node.args[first:]:
        dims = see.of(source)
        if len(dims) == 1:
            see.freeze(dims[0], f"bags of {node.target} ({node.name})")


def index(see: Propagation, node: fx.Node) -> Any:
    """``x[i, :, j]``: dimensions that are indexed keep their order; those of the index tensors stand in their place,
    in front where slices stand between them. A mask indexes as many dimensions as it has and gives one, in order."""
    dims = see.of(node.args[0])
    place, covered, chosen = _indexed(see, node, dims, node.args[1])
    kept = [f for d, f in enumerate(dims) if d not in covered]
    if chosen is None:
        count = len(see.sizes(node)) - len(kept)
        reason = f"{node.target} ({node.name}): data decide what is taken"
        chosen = tuple(see.new(s, reason) for s in see.sizes(node)[place : place + count])
    return (*kept[:place], *chosen, *kept[place:])


def _indexed(
    see: Propagation, node: fx.Node, dims: tuple[Factor, ...], indices: Any
) -> tuple[int, list[int], tuple[Factor, ...] | None]:
    """Where the dimensions of the index tensors go, the dimensions that are indexed, which freeze, and those of the
    index tensors (None where one is a mask)."""
    covered: list[int] = []
    chosen: tuple[Factor, ...] | None = ()
    reason = f"{node.target} ({node.name}) looks up positions of it"
    place, at, adjacent = 0, 0, True
    for given in indices:
        if given is None:
            at += 1
            continue
        found = see.of(given)
        mask = given.meta["val"].dtype is torch.bool
        width = len(found) if mask else 1
        place = place if covered else at
        adjacent = adjacent and (not covered or covered[-1] == at - 1)
        covered += range(at, at + width)
        fixed = None if mask else see.constant(given)
        if fixed is not None:
            _look_up_one(see, dims[at], fixed, reason)
        else:
            for f in (*dims[at : at + width], *(found if mask else ())):
                see.freeze(f, reason)
        chosen = None if mask or chosen is None else see.broadcast(chosen, found)
        at += width
    return (place if adjacent else 0), covered, chosen


def _look_up_one(see: Propagation, factor: Factor, index: int, reason: str) -> None:
    """A constant index sets one position apart. What it is counted from, the front or the end, keeps its size."""
    begin = index % factor.size
    pieces = see.cut(factor, [b for b in (begin, begin + 1) if 0 < b < factor.size])
    if index < 0 and begin + 1 < factor.size:
        see.freeze(pieces[-1], reason)
    if index > 0:
        see.freeze(pieces[0], reason)


def index_put(see: Propagation, node: fx.Node) -> Any:
    """Values are written, or added, at the places that the indices say."""
    dims, values = see.of(node.args[0]), see.of(node.args[2])
    place, covered, chosen = _indexed(see, node, dims, node.args[1])
    kept = tuple(f for d, f in enumerate(dims) if d not in covered)
    if chosen is not None:
        see.broadcast((*kept[:place], *chosen, *kept[place:]), values)
        return dims
    behind = kept[place:]
    see.broadcast(behind, values[max(0, len(values) - len(behind)) :])
    for f in values[: max(0, len(values) - len(behind))]:
        see.freeze(f, f"{node.target} ({node.name}) writes in order where a mask says")
    if place:  # what stands before the places of the mask
        see.freeze_operands(node, f"{node.target} ({node.name}) writes in order where a mask says")
    return dims


def index_select(see: Propagation, node: fx.Node) -> Any:
    """The positions of ``dim`` that the index says."""
    dims, chosen = list(see.of(node.args[0])), see.of(operand(node, "index"))
    at = operand(node, "dim") % len(dims)
    see.freeze(dims[at], f"{node.target} ({node.name}) looks up positions of it")
    dims[at] = chosen[0] if chosen else see.one
    return tuple(dims)


def gather(see: Propagation, node: fx.Node) -> Any:
    """``gather``: the result is like the index; ``dim`` is looked up, the others agree."""
    dims, index_dims = see.of(node.args[0]), see.of(operand(node, "index"))
    _aligned(see, node, dims, index_dims)
    return index_dims


def scatter(see: Propagation, node: fx.Node) -> Any:
    """``scatter``: the result is like the first operand; ``dim`` is written at places that data say."""
    dims, index_dims = see.of(node.args[0]), see.of(operand(node, "index"))
    _aligned(see, node, dims, index_dims)
    if "src" in operand_names(node) and isinstance(source := operand(node, "src"), fx.Node):
        _aligned(see, node, see.of(source), index_dims, looked_up=False)
    return dims


def _aligned(
    see: Propagation, node: fx.Node, dims: tuple[Factor, ...], others: tuple[Factor, ...], *, looked_up: bool = True
) -> None:
    at = operand(node, "dim") % max(1, len(dims))
    reason = f"{node.target} ({node.name}) looks up positions of it"
    for d, (a, b) in enumerate(zip(dims, others, strict=True)):
        if d == at and looked_up:
            see.freeze(a, reason)
        elif a.size == b.size:
            see.unify(a, b)
        else:
            see.freeze(a, reason)
            see.freeze(b, reason)


def index_add(see: Propagation, node: fx.Node) -> Any:
    """``index_add``, ``index_copy``: rows of the source go where the index says."""
    dims = see.of(node.args[0])
    at = operand(node, "dim") % len(dims)
    see.freeze(dims[at], f"{node.target} ({node.name}) looks up positions of it")
    source = see.of(operand(node, "source"))
    see.broadcast(source[at : at + 1], see.of(operand(node, "index")))
    for d, (a, b) in enumerate(zip(dims, source, strict=True)):
        if d != at:
            see.unify(a, b)
    return dims


def index_fill(see: Propagation, node: fx.Node) -> Any:
    """A number is written where the index says."""
    dims = see.of(node.args[0])
    see.freeze(dims[operand(node, "dim") % len(dims)], f"{node.target} ({node.name}) looks up positions of it")
    return dims


def nll_loss(see: Propagation, node: fx.Node) -> Any:
    """``[n, classes, *positions]`` against targets ``[n, *positions]``; the classes are what targets name."""
    logits = see.of(node.args[0])
    rest = _targets(see, node, logits, node.args[1])
    result = rest if operand(node, "reduction") == 0 else ()
    return [result, ()] if isinstance(node.meta["val"], (list, tuple)) else result


def nll_loss_backward(see: Propagation, node: fx.Node) -> Any:
    """The gradient of the log-probabilities."""
    logits = see.of(operand(node, "self"))
    rest = _targets(see, node, logits, operand(node, "target"))
    see.broadcast(rest, see.of(node.args[0]))
    return logits


def _targets(see: Propagation, node: fx.Node, logits: tuple[Factor, ...], target: Any) -> tuple[Factor, ...]:
    """Relates logits and targets; the dimensions without classes."""
    at = 1 if len(logits) > 1 else 0
    dims = see.of(target)
    rest = logits[:at] + logits[at + 1 :]
    if dims and len(dims) == len(logits):  # probabilities
        see.broadcast(logits, dims)
        see.statistics(logits[at], "softmax", node)
    else:
        see.classes(logits[at], node)
        see.broadcast(rest, dims)
    if "weight" in operand_names(node) and isinstance(weight := operand(node, "weight"), fx.Node):
        see.unify(see.of(weight)[0], logits[at])
    return rest


def ctc_loss(see: Propagation, node: fx.Node) -> Any:
    """Losses of ``[time, n, classes]`` against sequences, the lengths of which numbers tell: all keeps its order."""
    dims = see.of(operand(node, "log_probs"))
    see.classes(dims[-1], node)
    reason = f"sequences of {node.target} ({node.name})"
    see.freeze_operands(node, reason)
    if "grad" in operand_names(node):
        return dims
    return [(dims[1],), see.fresh(node, reason, 1)]
