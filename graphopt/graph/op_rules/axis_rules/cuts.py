"""Axis rules of operators that cut dimensions and put pieces together, and of their backward."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import fx

from graphopt.graph.op_rules.arguments import operand, operand_names

if TYPE_CHECKING:
    from graphopt.graph.axes.factors import Factor
    from graphopt.graph.axes.propagation import Propagation


def select(see: Propagation, node: fx.Node) -> Any:
    """One index of a dimension: it is cut there."""
    dims = list(see.of(node.args[0]))
    at = operand(node, "dim") % len(dims)
    cut_out(see, node, dims[at], operand(node, "index"), 1)
    del dims[at]
    return tuple(dims)


def slice_(see: Propagation, node: fx.Node) -> Any:
    """A range of a dimension: it is cut at both ends. Every k-th index: one index of an inner factor k."""
    dims = list(see.of(node.args[0]))
    at = operand(node, "dim") % len(dims)
    names = operand_names(node)
    start = operand(node, "start")
    step = operand(node, "step") if "step" in names else 1
    size = see.sizes(node)[at]
    begin = _index(see, start or 0, dims[at].size)
    dims[at] = sliced(see, node, dims[at], begin, size, step)
    return tuple(dims)


def sliced(see: Propagation, node: fx.Node, factor: Factor, begin: Any, size: int, step: Any) -> Factor:
    """The dimension of ``size`` indices of ``factor`` from ``begin`` in steps of ``step``."""
    if size == factor.size:
        return factor
    if step == 1:
        return cut_out(see, node, factor, begin, size)
    if isinstance(begin, int) and isinstance(step, int) and factor.size % step == 0 and size == factor.size // step:
        outer, inner = see.reshape([factor], [size, step])
        cut_out(see, node, inner, begin % step, 1)
        return outer
    reason = f"{node.target} ({node.name}) takes every {step}-th of {factor.size}"
    see.freeze(factor, reason)
    return see.new(size, reason)


def cut_out(see: Propagation, node: fx.Node, factor: Factor, begin: Any, size: int) -> Factor:
    """The piece of ``factor`` of this size from ``begin``; a place that is no constant freezes it."""
    begin = _index(see, begin, factor.size)
    if begin is None:
        reason = f"{node.target} ({node.name}) cuts it at a place that data decides"
        see.freeze(factor, reason)
        return see.new(size, reason)
    borders = [b for b in (begin, begin + size) if 0 < b < factor.size]
    if not borders:
        return factor if size == factor.size else see.new(size)
    if size == 0:
        return see.new(0)
    pieces = see.cut(factor, borders)
    return pieces[1 if begin else 0]


def _index(see: Propagation, value: Any, size: int) -> int | None:
    """A position as an int from 0 to ``size``, negative ones counted from the end; None if data decide."""
    found = see.number(value)
    if found is None:
        return None
    return max(0, min(size, found + size if found < 0 else found))


def split(see: Propagation, node: fx.Node) -> Any:
    """``split``, ``chunk``, ``unbind`` ...: the dimension is cut into the sizes of the results."""
    dims = see.of(node.args[0])
    at = operand(node, "dim") % len(dims)
    drops = len(node.meta["val"][0].shape) < len(dims) if node.meta["val"] else False
    sizes = [1 if drops else see.sizes(node, i)[at] for i in range(len(node.meta["val"]))]
    borders, end = [], 0
    for size in sizes[:-1]:
        end += size
        borders.append(end)
    pieces = see.cut(dims[at], [b for b in borders if 0 < b < dims[at].size]) if dims[at].size > 1 else [dims[at]]
    if len(pieces) != len(sizes):  # an empty piece
        reason = f"{node.target} ({node.name}) has an empty piece"
        see.freeze(dims[at], reason)
        pieces = [see.new(s, reason) for s in sizes]
    if drops:
        return [dims[:at] + dims[at + 1 :] for _ in sizes]
    return [(*dims[:at], piece, *dims[at + 1 :]) for piece in pieces]


def cat(see: Propagation, node: fx.Node) -> Any:
    """Dimensions one behind the other along ``dim``; all others are the same."""
    sources = [see.of(n) for n in node.args[0]]  # type: ignore[union-attr]
    sources = [s for s in sources if len(s) != 1 or s[0].size] or sources[:1]  # an empty vector counts for nothing
    return _joined(see, sources, operand(node, "dim") % len(sources[0]))


def stacked(see: Propagation, node: fx.Node) -> Any:
    """``vstack``, ``hstack``, ``dstack``: `cat` along the first, second or third dimension, which all have."""
    sources = [see.of(n) for n in node.args[0]]  # type: ignore[union-attr]
    rank = min(map(len, sources))
    at, least = {"h": (min(1, rank - 1), 1), "v": (0, 2), "r": (0, 2), "d": (2, 3)}[str(node.target._opname)[0]]  # type: ignore[union-attr]
    return _joined(see, sources, at) if rank >= least else see.unknown(node)


def _joined(see: Propagation, sources: list[tuple[Factor, ...]], at: int) -> tuple[Factor, ...]:
    whole = see.concat([s[at] for s in sources])
    dims = sources[0]
    for other in sources[1:]:
        for d, (a, b) in enumerate(zip(dims, other, strict=True)):
            if d != at:
                see.unify(a, b)
    return (*dims[:at], whole, *dims[at + 1 :])


def stack(see: Propagation, node: fx.Node) -> Any:
    """A new dimension over the tensors, each of which is one index of it."""
    sources = [see.of(n) for n in node.args[0]]  # type: ignore[union-attr]
    dims = list(sources[0])
    for other in sources[1:]:
        for a, b in zip(dims, other, strict=True):
            see.unify(a, b)
    at = operand(node, "dim")
    dims.insert(at if at >= 0 else at + len(dims) + 1, see.concat([see.one] * len(sources)))
    return tuple(dims)


def pad(see: Propagation, node: fx.Node) -> Any:
    """New pieces before and behind, filled with a constant; negative padding cuts."""
    dims, sizes = list(see.of(node.args[0])), see.sizes(node)
    amounts = operand(node, "pad")
    reflect = "mode" in operand_names(node) and operand(node, "mode") != "constant"
    for i in range(len(amounts) // 2):
        d = len(dims) - 1 - i
        before = see.number(amounts[2 * i])
        behind = see.number(amounts[2 * i + 1])
        if before == 0 and behind == 0:
            continue
        reason = f"{node.target} ({node.name}) pads it"
        if before is None or behind is None or reflect:
            see.freeze(dims[d], reason)
            dims[d] = see.new(sizes[d], reason)
            continue
        size = dims[d].size
        if before < 0 or behind < 0:
            begin, end = max(0, -before), size - max(0, -behind)
            dims[d] = cut_out(see, node, dims[d], begin, end - begin)
        edges = [see.new(max(0, e), reason) for e in (before, behind)]
        dims[d] = see.concat([edges[0], dims[d], edges[1]])
    return tuple(dims)


def slice_backward(see: Propagation, node: fx.Node) -> Any:
    """Zeros around the gradient of a slice."""
    grad, sizes = see.of(node.args[0]), see.sizes(node)
    at = operand(node, "dim") % len(sizes)
    begin, step = _index(see, operand(node, "start"), sizes[at]), operand(node, "step")
    dims = list(grad)
    dims[at] = _around(see, node, grad[at], begin, sizes[at], step)
    return tuple(dims)


def _around(see: Propagation, node: fx.Node, piece: Factor, begin: int | None, size: int, step: Any) -> Factor:
    if piece.size == size:
        return piece
    if begin is not None and step == 1:
        return see.concat([see.new(begin), piece, see.new(size - begin - piece.size)])
    if begin is not None and isinstance(step, int) and size == piece.size * step:
        return see.product([piece, see.concat([see.new(begin), see.one, see.new(step - begin - 1)])])
    reason = f"{node.target} ({node.name}) fills every {step}-th of {size}"
    see.freeze(piece, reason)
    return see.new(size, reason)


def select_backward(see: Propagation, node: fx.Node) -> Any:
    """Zeros around the gradient of one index."""
    dims, sizes = list(see.of(node.args[0])), see.sizes(node)
    at = operand(node, "dim") % len(sizes)
    begin = _index(see, operand(node, "index"), sizes[at])
    dims.insert(at, _around(see, node, see.one, begin, sizes[at], 1))
    return tuple(dims)


def slice_scatter(see: Propagation, node: fx.Node) -> Any:
    """A range of the first operand is replaced by the second."""
    dims, source = see.of(node.args[0]), see.of(node.args[1])
    at = operand(node, "dim") % len(dims)
    begin = _index(see, operand(node, "start") or 0, dims[at].size)
    piece = sliced(see, node, dims[at], begin, source[at].size, operand(node, "step"))
    see.broadcast((*dims[:at], piece, *dims[at + 1 :]), source)
    return dims


def select_scatter(see: Propagation, node: fx.Node) -> Any:
    """One index of the first operand is replaced by the second."""
    dims, source = see.of(node.args[0]), see.of(node.args[1])
    at = operand(node, "dim") % len(dims)
    cut_out(see, node, dims[at], operand(node, "index"), 1)
    see.broadcast(dims[:at] + dims[at + 1 :], source)
    return dims
