"""Axis rules of normalisations: dimensions pass; those over which means are taken are marked."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import fx

from graphopt.graph.op_rules.arguments import operand, operand_names

if TYPE_CHECKING:
    from graphopt.graph.axes.factors import Factor
    from graphopt.graph.axes.propagation import Propagation

_PER_CHANNEL = ("weight", "bias", "running_mean", "running_var", "save_mean", "save_invstd", "save_var", "mean", "rstd")


def _vectors(see: Propagation, node: fx.Node, channel: Factor) -> None:
    for name in _PER_CHANNEL:
        if name in operand_names(node) and isinstance(value := operand(node, name), fx.Node):
            dims = see.of(value)
            if len(dims) == 1 and dims[0].size == channel.size:
                see.unify(dims[0], channel)


def batch_norm(see: Propagation, node: fx.Node) -> Any:
    """Per channel (dimension 1); statistics over all others. Results behind the first are one value a channel."""
    dims = see.of(node.args[0])
    channel = dims[1]
    _vectors(see, node, channel)
    for d, f in enumerate(dims):
        if d != 1:
            see.statistics(f, "batch norm", node)
    if not isinstance(node.meta["val"], (list, tuple)):
        return dims
    return [dims, *(_per_channel(see, node, i, channel) for i in range(1, len(node.meta["val"])))]


def _per_channel(see: Propagation, node: fx.Node, index: int, channel: Factor) -> tuple[Factor, ...]:
    sizes = see.sizes(node, index)
    return (channel,) if sizes == (channel.size,) else tuple(see.new(s) for s in sizes)


def batch_norm_backward(see: Propagation, node: fx.Node) -> Any:
    """Gradients of input, weight and bias."""
    grad, source = see.of(node.args[0]), see.of(node.args[1])
    dims = see.broadcast(grad, source)
    _vectors(see, node, dims[1])
    return [dims, dims[1:2], dims[1:2]]


def instance_norm(see: Propagation, node: fx.Node) -> Any:
    """Per sample and channel; statistics over positions."""
    dims = see.of(node.args[0])
    _vectors(see, node, dims[1])
    for f in dims[2:]:
        see.statistics(f, "instance norm", node)
    return dims


def layer_norm(see: Propagation, node: fx.Node) -> Any:
    """Statistics over the last dimensions, which weight and bias share; statistics are results too."""
    dims = see.of(node.args[0])
    count = len(operand(node, "normalized_shape"))
    _last(see, node, dims[-count:])
    if not isinstance(node.meta["val"], (list, tuple)):
        return dims
    rest = dims[:-count] + (see.one,) * count
    return [dims, *(rest for _ in node.meta["val"][1:])]


def _last(see: Propagation, node: fx.Node, last: tuple[Factor, ...]) -> None:
    for name in ("weight", "bias"):
        if name in operand_names(node) and isinstance(value := operand(node, name), fx.Node):
            see.broadcast(last, see.of(value))
    for f in last:
        see.statistics(f, "layer norm", node)


def layer_norm_backward(see: Propagation, node: fx.Node) -> Any:
    """Gradients of input, weight and bias."""
    names = operand_names(node)
    grad, source = see.of(node.args[0]), see.of(operand(node, "input"))
    dims = see.broadcast(grad, source)
    count = len(operand(node, "normalized_shape"))
    _last(see, node, dims[-count:])
    for name in ("mean", "rstd"):
        if name in names:
            see.broadcast(dims[:-count] + (see.one,) * count, see.of(operand(node, name)))
    return [dims, dims[-count:], dims[-count:]] if "bias" in names else [dims, dims[-count:]]


def group_norm(see: Propagation, node: fx.Node) -> Any:
    """Channels are groups x channels of a group; statistics over the latter and all positions."""
    dims = see.of(node.args[0])
    name = "num_groups" if "num_groups" in operand_names(node) else "group"
    groups = operand(node, name)
    group = _grouped(see, node, dims, groups)
    if not isinstance(node.meta["val"], (list, tuple)):
        return dims
    return [dims, (dims[0], group), (dims[0], group)]


def _grouped(see: Propagation, node: fx.Node, dims: tuple[Factor, ...], groups: int) -> Factor:
    group, inner = see.reshape([dims[1]], [groups, dims[1].size // groups])
    _vectors(see, node, dims[1])
    for f in (inner, *dims[2:]):
        see.statistics(f, "group norm", node)
    return group


def group_norm_backward(see: Propagation, node: fx.Node) -> Any:
    """Gradients of input, weight and bias."""
    dims = see.broadcast(see.of(node.args[0]), see.of(node.args[1]))
    group = _grouped(see, node, dims, operand(node, "group"))
    for name in ("mean", "rstd"):
        see.broadcast((dims[0], group), see.of(operand(node, name)))
    return [dims, dims[1:2], dims[1:2]]


def weight_norm(see: Propagation, node: fx.Node) -> Any:
    """``v g / norm(v)``, the norm over all dimensions but ``dim``."""
    dims = see.broadcast(see.of(node.args[0]), see.of(node.args[1]))
    for d, f in enumerate(dims):
        if d != operand(node, "dim") % len(dims):
            see.statistics(f, "weight norm", node)
    return [dims, see.of(node.args[1])] if isinstance(node.meta["val"], (list, tuple)) else dims


def weight_norm_backward(see: Propagation, node: fx.Node) -> Any:
    """Gradients of direction and length."""
    grad, v, g, norms = (see.of(a) for a in node.args[:4])
    dims = see.broadcast(see.broadcast(see.broadcast(grad, v), g), norms)
    return [dims, g]
