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
    groups = operand(node, "groups") if "groups" in names else 1
    out = _channels(see, source[-rank - 1], weight, groups, transposed)
    bias = operand(node, "bias") if "bias" in names else None
    if bias is not None:
        see.unify(see.of(bias)[0], out)
    sizes = see.sizes(node) if not isinstance(node.meta["val"], (list, tuple)) else see.sizes(node, 0)
    return (*lead, out, *_moved(see, node, source[-rank:], sizes[-rank:], _kernel(weight)))


def convolution_backward(see: Propagation, node: fx.Node) -> Any:
    """Gradients of input, weight and bias."""
    grad, source, weight = (see.of(operand(node, n)) for n in ("grad_output", "input", "weight"))
    out = _channels(see, source[1], weight, operand(node, "groups"), bool(operand(node, "transposed")))
    see.unify(grad[0], source[0])
    see.unify(grad[1], out)
    sizes = tuple(f.size for f in grad[2:])
    see.broadcast(_moved(see, node, source[2:], sizes, _kernel(weight)), grad[2:])
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


def _kernel(weight: tuple[Factor, ...]) -> str:
    """``point`` for a kernel of size 1, else ``window``."""
    return "point" if all(f.size == 1 for f in weight[2:]) else "window"


def _moved(
    see: Propagation, node: fx.Node, before: tuple[Factor, ...], sizes: tuple[int, ...], kernel: str
) -> tuple[Factor, ...]:
    """Positions after windows went over them: other ones, in order. ``kernel``: ``point`` where each position makes
    one, ``whole`` where a window over all of them counts them alike: their order means nothing there."""
    dims = []
    for f, size in zip(before, sizes, strict=True):
        if kernel == "point" and f.size == size:
            dims.append(f)
            continue
        if size != 1 or kernel != "whole":
            see.spatial(f, f"positions: {node.target} ({node.name}) takes windows of it")
        dims.append(see.new(size, f"positions that {node.target} ({node.name}) made"))
        see.spatial(dims[-1], "")
    return tuple(dims)


def windows(see: Propagation, node: fx.Node) -> Any:
    """Pooling, resampling and padding over the last dimensions; several results (indices) are alike."""
    source, rank = see.of(node.args[0]), _rank(node.target)
    several = isinstance(node.meta["val"], (list, tuple))
    sizes = see.sizes(node, 0) if several else see.sizes(node)
    kernel = "window" if several else _pooled(node, source[-rank:])
    return see.repeated(node, (*source[:-rank], *_moved(see, node, source[-rank:], sizes[-rank:], kernel)))


def _pooled(node: fx.Node, positions: tuple[Factor, ...]) -> str:
    """``whole`` where one window of a pooling is all there is: the mean or maximum of all positions."""
    if "adaptive" in str(node.target):
        return "whole"
    names = operand_names(node)
    if "kernel_size" not in names or ("padding" in names and any(operand(node, "padding"))):
        return "window"
    size = operand(node, "kernel_size")
    size = list(size) * len(positions) if len(size) == 1 else size
    return "whole" if all(k == f.size for k, f in zip(size, positions, strict=True)) else "window"


def windows_backward(see: Propagation, node: fx.Node) -> Any:
    """The gradient of `windows`: the dimensions of what went in, or new ones where only its size is given."""
    grad, rank = see.of(node.args[0]), _rank(node.target)
    names = operand_names(node)
    source = see.of(operand(node, "self")) if "self" in names else see.fresh(node)
    lead = see.broadcast(source[:-rank], grad[:-rank])
    kernel = _pooled(node, source[-rank:])
    if "indices" in names:  # they name positions
        kernel, indices = "window", see.of(operand(node, "indices"))
        see.broadcast(grad, indices)
    see.broadcast(_moved(see, node, source[-rank:], tuple(f.size for f in grad[-rank:]), kernel), grad[-rank:])
    return (*lead, *source[-rank:])


@cache
def _rank(operator: Any) -> int:
    """How many dimensions an operator's windows have: the number in its name (``max_pool2d``)."""
    found = re.search(r"([123])d", str(operator))
    assert found, operator
    return int(found[1])


def grid_sample(see: Propagation, node: fx.Node) -> Any:
    """Channels pass, positions come from the grid ``[n, *positions, 2]``."""
    return _sampled(see, node, see.of(node.args[0]), see.of(node.args[1]))


def grid_sample_backward(see: Propagation, node: fx.Node) -> Any:
    """Gradients of input and grid."""
    grad, source, grid = (see.of(a) for a in node.args[:3])
    see.broadcast(grad, _sampled(see, node, source, grid))
    return [source, grid]


def _sampled(see: Propagation, node: fx.Node, source: tuple[Factor, ...], grid: tuple[Factor, ...]) -> Any:
    see.unify(source[0], grid[0])
    for f in source[2:]:
        see.spatial(f, f"positions: {node.target} ({node.name}) samples it")
    see.freeze(grid[-1], "coordinates")
    return (*source[:2], *grid[1:-1])


def unpool(see: Propagation, node: fx.Node) -> Any:
    """Values go to the places in an image that the indices name."""
    rank = _rank(node.target)
    dims = see.broadcast(see.of(node.args[0]), see.of(operand(node, "indices")))
    sizes = see.sizes(node)[-rank:]
    return (*dims[:-rank], *(see.new(s, f"places that {node.target} ({node.name}) fills") for s in sizes))
