"""Statistics of batch norms for one subnet: estimated anew before it is evaluated or extracted.

While a supernet trains, all its subnets write into the same running statistics, so these fit none of them. Each subnet
needs its own: the mean over some batches of what its layers see. Norms over features of one sample need none.

Source: Yu and Huang, "Universally Slimmable Networks and Improved Training Techniques", ICCV 2019, section 3.2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, fx

from graphopt.elastic.choice import Choice
from graphopt.elastic.modes import evaluating
from graphopt.elastic.space import Space
from graphopt.errors import ElasticError
from graphopt.graph.batch import TARGET_KEYS, flatten, normalise
from graphopt.graph.training_graph import InputKind, TrainingGraph

aten = torch.ops.aten


def batch_norm_statistics(
    space: Space, choice: Mapping[str, Any], batches: Iterable[Any], *, targets: bool = True
) -> dict[str, Tensor]:
    """Running means and (unbiased) variances of a subnet's batch norms: the plain mean over batches.

    Each norm normalises by the statistics of its batch while the next ones are estimated; everything else runs as in
    eval mode, without dropout. Nothing of the model is changed.

    Args:
        choice: the subnet.
        batches: about a hundred samples or more in all; ``(inputs..., target)``, mappings, or inputs alone.
        targets: the last tensor of each batch (or a key such as ``labels``) is a target, which the model is not given.

    Returns:
        By name of the buffer, with the shape that it has in the subnet: ``module.load_state_dict(found, strict=False)``
        gives them to an extracted one. Empty for a model without batch norms.

    Raises:
        ElasticError: there are no batches.
        BatchError: the model rejects one.
    """
    sums: dict[str, Tensor] = {}
    count = 0
    with evaluating(space.model), torch.no_grad():
        for batch in batches:
            inputs = without_target(batch) if targets else normalise(batch)
            subnet = space.subnet(choice, batch=inputs)
            tensors = subnet.tensors()
            found = _statistics(subnet.graph, tensors, flatten(inputs)[0])
            if not found and not count:
                return {}
            for name, value in found.items():
                sums[name] = sums[name] + value if name in sums else value
            count += 1
    if not count:
        raise ElasticError("batches: there are none to estimate the statistics of batch norms from")
    return {name: total / count for name, total in sums.items()}


@contextmanager
def with_statistics(space: Space, choice: Mapping[str, Any], statistics: Mapping[str, Tensor]) -> Iterator[None]:
    """The model has these statistics in the part of its buffers that the subnet reads; afterwards those it had."""
    buffers = dict(space.model.named_buffers())
    before = {name: buffers[name].clone() for name in statistics}
    with evaluating(space.model):
        slices = space.subnet(choice).slices
    try:
        with torch.no_grad():
            for name, value in statistics.items():
                if name in slices:
                    slices[name].write(buffers[name], value)
                else:
                    buffers[name].copy_(value)
        yield
    finally:
        with torch.no_grad():
            for name, value in before.items():
                buffers[name].copy_(value)


def evaluate(
    space: Space,
    choice: Mapping[str, Any],
    batches: Iterable[Any],
    metric: Callable[[Any, Any], Any],
    *,
    calibration: Iterable[Any] | None = None,
) -> float:
    """The mean of ``metric(output, target)`` over batches, by samples, in eval mode.

    Args:
        choice: the subnet.
        batches: ``(inputs..., target)`` each.
        metric: a number or scalar tensor, mean over the batch: a loss, or the share of right answers.
        calibration: batches to estimate the statistics of batch norms from before; without them those of the model
            count, which fit no subnet after a training of several.
    """
    choice = choice if isinstance(choice, Choice) else space.choice(choice)
    statistics = batch_norm_statistics(space, choice, calibration) if calibration is not None else {}
    total, samples = 0.0, 0
    with with_statistics(space, choice, statistics) if statistics else nullcontext():
        with evaluating(space.model), torch.no_grad():
            for batch in batches:
                given = normalise(batch)
                if isinstance(given, dict) or len(given) < 2:
                    raise ElasticError("batches: expected (inputs..., target) each")
                *inputs, target = given
                value = float(metric(space.run(choice, *inputs), target))
                size = len(target)
                total, samples = total + value * size, samples + size
    if not samples:
        raise ElasticError("batches: there are none to evaluate on")
    return total / samples


def without_target(batch: Any) -> Any:
    """The inputs of a batch for training."""
    given = normalise(batch)
    if isinstance(given, dict):
        return {name: value for name, value in given.items() if name not in TARGET_KEYS}
    return given[:-1] if len(given) > 1 else given


# -- by running the graph ---------------------------------------------------------------------------------------------


def _statistics(graph: TrainingGraph, tensors: Mapping[str, Tensor], batch: list[Tensor]) -> dict[str, Tensor]:
    """Statistics of the norms of a forward graph on one batch, by name of the buffer."""
    buffers = {node: name for name, node in graph.input_nodes(InputKind.BUFFER).items()}
    norms = {node: names for node in graph.nodes if (names := _running(node, buffers))}
    if not norms:
        return {}
    found: dict[str, Tensor] = {}
    values: dict[fx.Node, Any] = {}
    last = {source: node for node in graph.nodes for source in node.all_input_nodes}
    rest = iter(batch)
    for input_, node in zip(graph.inputs, graph.placeholders, strict=True):
        values[node] = next(rest) if input_.kind is InputKind.BATCH else tensors.get(input_.name)
    missing = set(norms)
    for node in graph.nodes:
        if node.op == "get_attr":
            values[node] = graph.constants[str(node.target)]
        elif node.op == "call_function":
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
            if node in norms:
                values[node], mean, variance = _normalised(node, args)
                found.update(zip(norms[node], (mean, variance)))
                missing.discard(node)
                if not missing:  # what follows is not needed
                    break
            else:
                values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
            for source in node.all_input_nodes:
                if last[source] is node:
                    values.pop(source, None)
    return found


_NORMS = {
    aten.batch_norm.default,
    aten.native_batch_norm.default,
    aten._native_batch_norm_legit_no_training.default,
    aten._native_batch_norm_legit_functional.default,
    aten.cudnn_batch_norm.default,
}
"""Operators with the arguments ``input, weight, bias, running_mean, running_var`` first."""


def _running(node: fx.Node, buffers: Mapping[fx.Node, str]) -> tuple[str, str] | None:
    """The buffers of a batch norm's running statistics; None for any other operator, and a norm without them."""
    if node.target not in _NORMS or node.args[3] not in buffers or node.args[4] not in buffers:
        return None
    return buffers[node.args[3]], buffers[node.args[4]]  # type: ignore[index]


def _normalised(node: fx.Node, args: tuple[Any, ...]) -> tuple[Any, Tensor, Tensor]:
    """What a batch norm gives in training, nested as its own result, and mean and unbiased variance of its input."""
    x, weight, bias = args[:3]
    names = [a.name for a in node.target._schema.arguments]  # type: ignore[union-attr]
    eps = args[names.index("eps" if "eps" in names else "epsilon")]
    mean, variance = torch.zeros_like(args[3]), torch.zeros_like(args[4])
    result = torch.nn.functional.batch_norm(x, mean, variance, weight, bias, training=True, momentum=1.0, eps=eps)
    single = isinstance(node.meta["val"], Tensor)
    return result if single else (result,), mean, variance
