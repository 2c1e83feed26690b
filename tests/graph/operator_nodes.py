"""Single operators as fx nodes on real tensors, and bitwise comparison of their results."""

from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree


def node_of(operator: Callable[..., Any], *args: Any, result: Any = None, **kwargs: Any) -> fx.Node:
    """A node that calls ``operator`` on placeholders of the tensors given; all have values in ``meta["val"]``.

    ``result``: the value of the node, for an operator that has no kernel here; else it is run.
    """
    graph = fx.Graph()

    def placeholder(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        node = graph.placeholder(f"x{len(graph.nodes)}")
        node.meta["val"] = value
        return node

    node_args, node_kwargs = pytree.tree_map(placeholder, (args, kwargs))
    node = graph.call_function(operator, node_args, node_kwargs)
    node.meta["val"] = operator(*args, **kwargs) if result is None else result
    return node


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The elements' bit patterns as integers: equal for equal NaNs, different for 0.0 and -0.0."""
    if not tensor.is_floating_point():
        return tensor
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.contiguous().view(integers[tensor.element_size()])


def same_bits(one: Any, other: Any) -> bool:
    """Whether two results (tensors, or tuples of tensors and None) are equal in strides and bit for bit."""
    ones, others = pytree.tree_leaves(one), pytree.tree_leaves(other)
    return len(ones) == len(others) and all(
        (a is None and b is None) or (a.stride() == b.stride() and torch.equal(bits(a), bits(b)))
        for a, b in zip(ones, others)
    )


LAYOUTS = ("contiguous", "channels_last", "sliced", "transposed", "expanded")


def with_layout(tensor: torch.Tensor, layout: str) -> torch.Tensor:
    """The tensor's values (``expanded``: those of its first row) in another memory layout of the same shape."""
    if tensor.dim() < 2 or layout == "contiguous":
        return tensor.contiguous()
    if layout == "channels_last":
        formats = {4: torch.channels_last, 5: torch.channels_last_3d}
        return tensor.contiguous(memory_format=formats.get(tensor.dim(), torch.contiguous_format))
    if layout == "sliced":
        wide = tensor.new_empty((*tensor.shape[:-1], 2 * tensor.shape[-1]))
        wide[..., ::2] = tensor
        return wide[..., ::2]
    if layout == "transposed":
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)
    return tensor[:1].expand(tensor.shape)
