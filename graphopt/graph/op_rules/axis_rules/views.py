"""Axis rules of views, copies and their backward: where dimensions are split, joined, cut, moved and repeated."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import fx

from graphopt.graph.op_rules.arguments import operand, operand_names

if TYPE_CHECKING:
    from graphopt.graph.axes.factors import Factor
    from graphopt.graph.axes.propagation import Propagation


def view(see: Propagation, node: fx.Node) -> Any:
    """``view``, ``reshape``, ``flatten``, ``unflatten``: factors are matched from left to right."""
    return tuple(see.reshape(see.of(node.args[0]), see.sizes(node)))


def view_dtype(see: Propagation, node: fx.Node) -> Any:
    """Elements of another type: the last dimension changes its meaning where its size does."""
    dims, sizes = see.of(node.args[0]), see.sizes(node)
    if not dims or dims[-1].size == sizes[-1]:
        return dims
    reason = f"{node.target} ({node.name}) reads its elements as another type"
    see.freeze(dims[-1], reason)
    return (*dims[:-1], see.new(sizes[-1], reason))


def permute(see: Propagation, node: fx.Node) -> Any:
    """The dimensions in the order of ``dims``."""
    dims = see.of(node.args[0])
    return tuple(dims[d] for d in operand(node, "dims"))


def transpose(see: Propagation, node: fx.Node) -> Any:
    """Two dimensions exchanged: those given, or the last two (``t``, ``mT``)."""
    dims = list(see.of(node.args[0]))
    names = operand_names(node)
    pairs = (("dim0", "dim1"), ("axis0", "axis1"))
    found = next(((operand(node, a), operand(node, b)) for a, b in pairs if a in names), (-2, -1))
    if len(dims) > 1:
        a, b = (d % len(dims) for d in found)
        dims[a], dims[b] = dims[b], dims[a]
    return tuple(dims)


def reversed_dims(see: Propagation, node: fx.Node) -> Any:
    """``numpy_T``: all dimensions in reverse."""
    return see.of(node.args[0])[::-1]


def movedim(see: Propagation, node: fx.Node) -> Any:
    """``movedim``: each source dimension goes to its destination, the others fill up in order."""
    dims = see.of(node.args[0])
    pair = [operand(node, n) for n in ("source", "destination")]
    sources, targets = ([d % len(dims) for d in (p if isinstance(p, (list, tuple)) else [p])] for p in pair)
    placed = dict(zip(targets, sources, strict=True))
    rest = iter(d for d in range(len(dims)) if d not in sources)
    return tuple(dims[placed[i] if i in placed else next(rest)] for i in range(len(dims)))


def squeeze(see: Propagation, node: fx.Node) -> Any:
    """Dimensions of size 1 are dropped: all, or those given."""
    dims = see.of(node.args[0])
    given = operand(node, "dim") if "dim" in operand_names(node) else None
    chosen = range(len(dims)) if given is None else given if isinstance(given, (list, tuple)) else [given]
    dropped = {d % len(dims) for d in chosen} if dims else set()
    return tuple(f for d, f in enumerate(dims) if not (d in dropped and f.size == 1))


def unsqueeze(see: Propagation, node: fx.Node) -> Any:
    """A dimension of size 1 is put in."""
    dims = list(see.of(node.args[0]))
    at = operand(node, "dim")
    dims.insert(at if at >= 0 else at + len(dims) + 1, see.one)
    return tuple(dims)


def expand(see: Propagation, node: fx.Node) -> Any:
    """A dimension of size 1, or one that was not there, becomes a new dimension along which all is the same."""
    dims, sizes = see.of(node.args[0]), see.sizes(node)
    dims = (see.one,) * (len(sizes) - len(dims)) + dims
    if len(node.args) > 1 and isinstance(node.args[1], fx.Node) and see.is_tensor(node.args[1]):  # expand_as
        return see.broadcast(dims, see.of(node.args[1]))
    return tuple(f if f.size == s else see.new(s) for f, s in zip(dims, sizes, strict=True))


def repeat(see: Propagation, node: fx.Node) -> Any:
    """``repeat``, ``tile``: r copies one behind the other are a product of a new outer factor and the dimension."""
    dims, sizes = see.of(node.args[0]), see.sizes(node)
    dims = (see.one,) * (len(sizes) - len(dims)) + dims
    return tuple(see.product([see.new(s // f.size), f]) for f, s in zip(dims, sizes, strict=True))


def repeat_interleave(see: Propagation, node: fx.Node) -> Any:
    """Each element r times: a product of the dimension and a new inner factor."""
    dims, sizes, at = see.of(node.args[0]), see.sizes(node), operand(node, "dim")
    if at is None:
        dims, at = (see.product(dims),), 0
    at %= len(dims)
    copies = [see.new(sizes[at] // dims[at].size)]
    return tuple(see.product([f, *copies]) if d == at else f for d, f in enumerate(dims))


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
    at = operand(node, "dim") % len(sources[0])
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
    piece = sliced(see, node, dims[at], operand(node, "start") or 0, source[at].size, operand(node, "step"))
    see.broadcast((*dims[:at], piece, *dims[at + 1 :]), source)
    return dims


def select_scatter(see: Propagation, node: fx.Node) -> Any:
    """One index of the first operand is replaced by the second."""
    dims, source = see.of(node.args[0]), see.of(node.args[1])
    at = operand(node, "dim") % len(dims)
    cut_out(see, node, dims[at], operand(node, "index"), 1)
    see.broadcast(dims[:at] + dims[at + 1 :], source)
    return dims


def unfold(see: Propagation, node: fx.Node) -> Any:
    """Windows of a dimension: a view where they do not overlap and leave nothing over."""
    dims, sizes = list(see.of(node.args[0])), see.sizes(node)
    at, size, step = operand(node, "dimension") % len(dims), operand(node, "size"), operand(node, "step")
    if size == step and dims[at].size % size == 0:
        outer, inner = see.reshape([dims[at]], [dims[at].size // size, size])
    else:
        reason = f"{node.target} ({node.name}) takes windows of it"
        see.freeze(dims[at], reason)
        outer, inner = see.new(sizes[at], reason), see.new(size, reason)
    dims[at] = outer
    return (*dims, inner)


def diagonal(see: Propagation, node: fx.Node) -> Any:
    """The diagonal of two dimensions: their positions are compared."""
    dims = see.of(node.args[0])
    a, b = (operand(node, n) % len(dims) for n in ("dim1", "dim2"))
    reason = f"{node.target} ({node.name}) compares positions"
    see.freeze(dims[a], reason)
    see.freeze(dims[b], reason)
    rest = tuple(f for d, f in enumerate(dims) if d not in (a, b))
    return (*rest, see.new(see.sizes(node)[-1], reason))


def unchanged_or_fixed(see: Propagation, node: fx.Node) -> Any:
    """``as_strided`` and its kind: dimensions survive where sizes and strides do (those of dimensions of size 1 say
    nothing); else all keep their order."""
    source, value = node.args[0], node.meta["val"]
    before = source.meta["val"]  # type: ignore[union-attr]
    sizes = see.sizes(node)
    if sizes == see.sizes(source) and all(  # type: ignore[arg-type]
        size == 1 or a == b for size, a, b in zip(sizes, value.stride(), before.stride(), strict=True)
    ):
        return see.of(source)
    reason = f"{node.target} ({node.name}) reads memory by strides"
    see.freeze_operands(node, reason)
    return see.fresh(node, reason)


def as_strided_scatter(see: Propagation, node: fx.Node) -> Any:
    """The whole of the first operand replaced where sizes agree; else all keep their order."""
    dims, source = see.of(node.args[0]), see.of(node.args[1])
    if [f.size for f in dims] == [f.size for f in source]:
        return see.broadcast(dims, source)
    see.freeze_operands(node, f"{node.target} ({node.name}) writes memory by strides")
    return dims


def pixel_shuffle(see: Propagation, node: fx.Node) -> Any:
    """C x r x r channels become C channels of an image r times as high and wide."""
    *lead, channels, height, width = see.of(node.args[0])
    r = operand(node, "upscale_factor")
    c, a, b = see.reshape([channels], [channels.size // (r * r), r, r])
    return (*lead, c, see.product([height, a]), see.product([width, b]))


def pixel_unshuffle(see: Propagation, node: fx.Node) -> Any:
    """The inverse of `pixel_shuffle`."""
    *lead, channels, height, width = see.of(node.args[0])
    r = operand(node, "downscale_factor")
    (h, a), (w, b) = (see.reshape([f], [f.size // r, r]) for f in (height, width))
    return (*lead, see.product([channels, a, b]), h, w)


def channel_shuffle(see: Propagation, node: fx.Node) -> Any:
    """g x c channels become c x g."""
    lead, channels, *rest = see.of(node.args[0])
    g = operand(node, "groups")
    outer, inner = see.reshape([channels], [g, channels.size // g])
    return (lead, see.product([inner, outer]), *rest)


def im2col(see: Propagation, node: fx.Node) -> Any:
    """Windows as columns: C x kernel height x kernel width, and the windows."""
    *lead, channels, _, _ = see.of(node.args[0])
    sizes = see.sizes(node)
    reason = f"{node.target} ({node.name}) takes windows"
    for f in see.of(node.args[0])[-2:]:
        see.freeze(f, reason)
    kernel = [see.new(k, reason) for k in operand(node, "kernel_size")]
    return (*lead, see.product([channels, *kernel]), see.new(sizes[-1], reason))


def col2im(see: Propagation, node: fx.Node) -> Any:
    """The inverse of `im2col`, with sums where windows overlap."""
    *lead, columns, windows = see.of(node.args[0])
    sizes = see.sizes(node)
    reason = f"{node.target} ({node.name}) adds windows up"
    channels, *kernel = see.reshape([columns], [sizes[-3], *operand(node, "kernel_size")])
    for f in (*kernel, windows):
        see.freeze(f, reason)
    return (*lead, channels, *(see.new(s, reason) for s in sizes[-2:]))


def real(see: Propagation, node: fx.Node) -> Any:
    """``view_as_real``: a last dimension of real and imaginary parts."""
    return (*see.of(node.args[0]), see.new(2, "real and imaginary part"))


def complex_(see: Propagation, node: fx.Node) -> Any:
    """``view_as_complex``: real and imaginary parts become one number."""
    dims = see.of(node.args[0])
    see.freeze(dims[-1], "real and imaginary part")
    return dims[:-1]


def meshgrid(see: Propagation, node: fx.Node) -> Any:
    """The outer product of vectors."""
    dims = tuple(f for n in node.args[0] for f in see.of(n) or (see.one,))  # type: ignore[union-attr]
    if "indexing" in operand_names(node) and operand(node, "indexing") == "xy" and len(dims) > 1:
        dims = (dims[1], dims[0], *dims[2:])
    return [dims for _ in node.args[0]]  # type: ignore[union-attr]


def broadcast_tensors(see: Propagation, node: fx.Node) -> Any:
    """All operands broadcast against each other."""
    dims: tuple[Factor, ...] = ()
    for source in node.args[0]:  # type: ignore[union-attr]
        dims = see.broadcast(dims, see.of(source))
    return [dims for _ in node.args[0]]  # type: ignore[union-attr]


def unfold_backward(see: Propagation, node: fx.Node) -> Any:
    """Windows added up: the inverse view of `unfold` where they do not overlap and leave nothing over."""
    *dims, inner = see.of(node.args[0])
    at, sizes = operand(node, "dim") % len(dims), see.sizes(node)
    if operand(node, "size") == operand(node, "step") and dims[at].size * inner.size == sizes[at]:
        dims[at] = see.product([dims[at], inner])
        return tuple(dims)
    reason = f"{node.target} ({node.name}) adds windows up"
    for f in (dims[at], inner):
        see.freeze(f, reason)
    return tuple(see.new(sizes[at], reason) if d == at else f for d, f in enumerate(dims))
