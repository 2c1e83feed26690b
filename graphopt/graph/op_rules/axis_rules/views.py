"""Axis rules of views and copies: where dimensions are split, joined, moved and repeated."""

from __future__ import annotations

from math import prod
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
    if _packed(see, before) and _packed(see, value) and prod(sizes) == prod(see.sizes(source)):  # type: ignore[arg-type]
        return tuple(see.reshape(see.of(source), sizes))
    reason = f"{node.target} ({node.name}) reads memory by strides"
    see.freeze_operands(node, reason)
    return see.fresh(node, reason)


def _packed(see: Propagation, value: Any) -> bool:
    """Whether the elements of a tensor lie one behind the other in the order of their indices."""
    expected = 1
    for size, stride in reversed(list(zip(map(see.size, value.shape), map(see.size, value.stride()), strict=True))):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return see.size(value.storage_offset()) == 0


def as_strided_scatter(see: Propagation, node: fx.Node) -> Any:
    """The whole of the first operand replaced where sizes agree, or as many elements lie in the same order; else all
    keep their order."""
    dims, source = see.of(node.args[0]), see.of(node.args[1])
    sizes = [f.size for f in dims]
    if sizes == [f.size for f in source]:
        return see.broadcast(dims, source)
    if all(_packed(see, n.meta["val"]) for n in node.args[:2]) and prod(sizes) == prod(f.size for f in source):  # type: ignore[union-attr]
        return see.broadcast(dims, tuple(see.reshape(source, sizes)))
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
