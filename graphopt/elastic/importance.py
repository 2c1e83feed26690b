"""Importance order: channels and heads sorted, so that slices keep the best. The whole model's output does not change.

A subnet has the first indices of each axis. Before training a supernet from a trained model the indices are permuted,
most important first, in every parameter and buffer that carries the axis: the same function, but for rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from graphopt.elastic.slices import Slice
from graphopt.errors import ElasticError
from graphopt.graph.axes import Axes, Axis, Dim, Form
from graphopt.graph.batch import compute_loss, normalise
from graphopt.graph.resize import cuts_of
from graphopt.graph.training_graph import InputKind

if TYPE_CHECKING:
    from graphopt.elastic.space import Space

Scores = Mapping[str, torch.Tensor]
"""For each parameter how much each of its elements matters, in its own shape."""


def sort_by_importance(
    space: Space,
    by: str | Scores = "norm",
    *,
    batches: Iterable[Any] = (),
    loss: Callable[..., Any] | str | None = None,
) -> dict[str, torch.Tensor]:
    """Sort the indices of each dimension by importance, the best first, in all tensors that carry it, a layer's own
    weights for transformations (`Own`) among them.

    Do it before an optimizer has state: moments are not permuted. Axes whose indices tensors of the model's own code
    carry (constants of the graph), or hidden states that the model returns, stay as they are.

    Args:
        space: its model's parameters and buffers are permuted in place.
        by: ``"norm"``: the norms of the weights at an index; ``"gradient"``: ``|gradient x weight|`` over ``batches``,
            a first-order estimate of what the loss would lose; or scores of your own.
        batches, loss: for ``"gradient"``: as in `graphopt.capture`. The model's gradients are not touched.

    Returns:
        The order of each dimension, int64: index i is now what index ``order[i]`` was. Dimensions of depth and kernel
        size have none.

    Raises:
        ElasticError: ``by`` is no known way, or there are no batches.
    """
    scores = _scores(space, by, batches, loss)
    supergraph = space.primary
    tensors = {**dict(space.model.named_parameters()), **dict(space.model.named_buffers())}  # as they are now
    constants = set(supergraph.graph.constants)
    outward = {
        axis for n in supergraph.axes.hidden_states.values() for dim in supergraph.axes.of(n) for axis in dim.axes()
    }
    orders: dict[Axis, torch.Tensor] = {}
    found: dict[str, torch.Tensor] = {}
    for dimension in space.dimensions:
        for axis in supergraph.handles[dimension.name].axes(dimension.full):
            if axis not in outward and not any(place.name in constants for place in axis.places):
                order = torch.argsort(_of_axis(supergraph.axes, axis, scores), descending=True, stable=True)
                orders[axis] = order
                found.setdefault(dimension.name, order)
    with torch.no_grad():
        for name, cuts in cuts_of(supergraph.axes, orders).items():
            tensor = tensors[name]
            for part in (tensor, *space.layers.like(name)):
                same = {d: cut for d, cut in cuts.items() if part.shape[d] == tensor.shape[d]}
                part.copy_(Slice.of(part.dim(), same).take(part))
    _forget_computed(space.model)
    return found


def _forget_computed(model: torch.nn.Module) -> None:
    """Let modules drop what they computed of their parameters: some keep it from one call to the next while they are in
    eval mode (timm's attention biases), until `train()` is called."""
    modes = [(module, module.training) for module in model.modules()]
    model.train()
    for module, training in modes:
        module.training = training


def _scores(space: Space, by: Any, batches: Iterable[Any], loss: Any) -> dict[str, torch.Tensor]:
    parameters = {name: p.detach() for name, p in space.model.named_parameters()}
    if isinstance(by, Mapping):
        return {name: by[name].detach() for name in parameters if name in by}
    if by == "norm":
        return {name: p.float().square() for name, p in parameters.items() if p.is_floating_point()}
    if by != "gradient":
        raise ElasticError(f"by: expected 'norm', 'gradient' or scores of parameters, got {by!r}")
    return _sensitivity(space, batches, loss)


def _sensitivity(space: Space, batches: Iterable[Any], loss: Any) -> dict[str, torch.Tensor]:
    """``|gradient x weight|``, summed over batches."""
    parameters = {name: p for name, p in space.model.named_parameters() if p.requires_grad}
    totals = {name: torch.zeros_like(p) for name, p in parameters.items()}
    buffers = {name: b.clone() for name, b in space.model.named_buffers()}
    seen = False
    with torch.enable_grad():
        for batch in batches:
            seen = True
            value = compute_loss(space.model, normalise(batch), loss if loss is not None else "model")
            gradients = torch.autograd.grad(value, list(parameters.values()), allow_unused=True)
            for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True):
                if gradient is not None:
                    totals[name] += (gradient * parameter).detach().abs()
    with torch.no_grad():
        for name, buffer in space.model.named_buffers():  # running statistics: nothing was trained
            buffer.copy_(buffers[name])
    if not seen:
        raise ElasticError("batches: by='gradient' needs at least one batch")
    return totals


def _of_axis(axes: Axes, axis: Axis, scores: Scores) -> torch.Tensor:
    """How much each index of an axis matters: over all weights that carry it, each weight counting the same."""
    total = torch.zeros(int(axis.size), dtype=torch.float64)
    for name, node in axes.graph.input_nodes(InputKind.PARAMETER).items():
        dims = axes.of(node)
        if name not in scores or len(dims) < 2:
            continue  # gains and biases alone say little, and their scale is another one
        score = scores[name].double().cpu()
        mean = float(score.mean()) or 1.0
        for d, dim in enumerate(dims):
            if any(a is axis for a in dim.axes()):
                line = score.sum([other for other in range(len(dims)) if other != d])
                owner = _owner(dim, axis)
                total.index_add_(0, owner[owner >= 0], line[owner >= 0] / mean)
    return total


def _owner(dim: Dim, axis: Axis) -> torch.Tensor:
    """For each index of a dimension the index of an axis that it has, -1 where it has none."""
    if dim.axis is not None:
        size = dim.count({})
        return torch.arange(size) if dim.axis is axis else torch.full((size,), -1)
    parts = [_owner(part, axis) for part in dim.parts]
    if dim.form is Form.CONCAT:
        return torch.cat(parts)
    found = torch.full((1,), -1)
    for part in parts:
        found = torch.maximum(found[:, None], part[None, :]).flatten()
    return found
