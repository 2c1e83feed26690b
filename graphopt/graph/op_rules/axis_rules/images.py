"""Axis rules of convolution, pooling, resampling: channels pass or are contracted, positions are mixed."""

from __future__ import annotations

import re
from functools import cache
from typing import TYPE_CHECKING, Any

from torch import fx

from graphopt.graph.op_rules.arguments import operand, operand_names

if TYPE_CHECKING:
    from graphopt.graph.axes.factors import Factor
    from graphopt.graph.axes.propagation import Propagation


def convolution(see: Propagation, node: fx.Node) -> Any:
    """``convolution``, ``conv2d``, ``conv_transpose2d`` ...: see `_channels`; positions are new unless windows are
    single points."""
    source, weight = see.of(node.args[0]), see.of(operand(node, "weight"))
    names = operand_names(node)
    transposed = bool(operand(node, "transposed")) if "transposed" in names else "transpose" in str(node.target)
    rank = len(weight) - 2
    lead = source[: len(source) - rank - 1]
    out = _channels(see, source[-rank - 1], weight, operand(node, "groups"), transposed)
    bias = operand(node, "bias") if "bias" in names else None
    if bias is not None:
        see.unify(see.of(bias)[0], out)
    sizes = see.sizes(node) if not isinstance(node.meta["val"], (list, tuple)) else see.sizes(node, 0)
    return (*lead, out, *_moved(see, node, source[-rank:], sizes[-rank:], weight[2:]))


def convolution_backward(see: Propagation, node: fx.Node) -> Any:
    """Gradients of input, weight and bias."""
    grad, source, weight = (see.of(operand(node, n)) for n in ("grad_output", "input", "weight"))
    out = _channels(see, source[1], weight, operand(node, "groups"), bool(operand(node, "transposed")))
    see.unify(grad[0], source[0])
    see.unify(grad[1], out)
    return [source, weight, (out,)]


def _channels(see: Propagation, channels: Factor, weight: tuple[Factor, ...], groups: int, transposed: bool) -> Factor:
    """The output channels. With g groups the input channels are g x i and the output channels g x o; the weight is
    ``[g x o, i, *kernel]``, transposed ``[g x i, o, *kernel]``."""
    for position, f in enumerate(weight[2:]):
        see.kernel(f, position, len(weight) - 2)
    a, b = weight[:2]
    see.channel(a)
    see.channel(b)
    if groups == 1:
        see.unify(channels, a if transposed else b)
        return b if transposed else a
    group, inner = see.reshape([channels], [groups, channels.size // groups])
    if transposed:
        see.unify(channels, a)
        return see.product([group, b])
    see.unify(inner, b)
    see.unify(group, see.reshape([a], [groups, a.size // groups])[0])
    return a


def _moved(
    see: Propagation, node: fx.Node, before: tuple[Factor, ...], sizes: tuple[int, ...], kernel: tuple[Factor, ...] = ()
) -> tuple[Factor, ...]:
    """Positions after windows went over them. Where a window is all there is, or one point that stays, order means
    nothing."""
    dims = []
    points = kernel and all(k.size == 1 for k in kernel)
    for f, size in zip(before, sizes, strict=True):
        if points and f.size == size:
            dims.append(f)
            continue
        if size != 1 or kernel:
            see.spatial(f, f"positions: {node.target} ({node.name}) takes windows of it")
        dims.append(see.new(size, f"positions that {node.target} ({node.name}) made"))
        see.spatial(dims[-1], "")
    return tuple(dims)


def windows(see: Propagation, node: fx.Node) -> Any:
    """Pooling, resampling and padding over the last dimensions; several results (indices) are alike."""
    source, rank = see.of(node.args[0]), _rank(node.target)
    several = isinstance(node.meta["val"], (list, tuple))
    sizes = see.sizes(node, 0) if several else see.sizes(node)
    return see.repeated(node, (*source[:-rank], *_moved(see, node, source[-rank:], sizes[-rank:])))


def windows_backward(see: Propagation, node: fx.Node) -> Any:
    """The gradient of `windows`: the dimensions of what went in, or new ones where only its size is given."""
    grad, rank = see.of(node.args[0]), _rank(node.target)
    if "self" in operand_names(node):
        dims = see.of(operand(node, "self"))
        see.broadcast(grad[:-rank], dims[:-rank])
        return dims
    reason = f"positions that {node.target} ({node.name}) made"
    return (*grad[:-rank], *(see.new(s, reason) for s in see.sizes(node)[-rank:]))


@cache
def _rank(operator: Any) -> int:
    """How many dimensions an operator's windows have: the number in its name (``max_pool2d``)."""
    found = re.search(r"([123])d", str(operator))
    assert found, operator
    return int(found[1])


def grid_sample(see: Propagation, node: fx.Node) -> Any:
    """Channels pass, positions come from the grid ``[n, *positions, 2]``."""
    source, grid = see.of(node.args[0]), see.of(node.args[1])
    see.unify(source[0], grid[0])
    for f in source[2:]:
        see.spatial(f, f"positions: {node.target} ({node.name}) samples it")
    see.freeze(grid[-1], "coordinates")
    return (*source[:2], *grid[1:-1])


def grid_sample_backward(see: Propagation, node: fx.Node) -> Any:
    """Gradients of input and grid."""
    grad, source, grid = (see.of(a) for a in node.args[:3])
    see.broadcast(grad, (*source[:2], *grid[1:-1]))
    return [source, grid]
