"""What a subnet must be, checked by execution: one helper for each kind of claim.

*Resized*: outputs and gradients are those of the graph that `graphopt.graph.resize` makes, operator by operator, on
copies of the slices (`assert_is_slice`). *Built*: they are those of the module that was built at that size
(`assert_is_module`). Gradients land in the slices and nowhere else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from graphopt.elastic import Choice, Space
from graphopt.elastic.supergraph import Supergraph
from graphopt.graph.batch import flatten
from graphopt.graph.resize import indices, resize, take
from tests.axes_oracles_resize import far, gradients, run

SEED = 0


def outputs(result: Any) -> list[Tensor]:
    """The tensors of a model's output."""
    return [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]


def ours(space: Space, choice: Mapping[str, Any], batch: Any) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Outputs of the subnet, and the gradients that land in the model's own parameters; ``.grad`` is left as it was."""
    parameters = {name: p for name, p in space.model.named_parameters() if p.requires_grad}
    torch.manual_seed(SEED)
    got = outputs(space.run(choice, **batch) if isinstance(batch, dict) else space.run(choice, *batch))
    differentiable = [r for r in got if r.requires_grad]
    return got, gradients(differentiable, parameters) if differentiable else {}


def state(space: Space, batch: Any) -> Supergraph:
    """The supergraph that `Space.run` takes for this batch in the present mode."""
    return space._state(batch, None)


def kept(space: Space, choice: Choice, batch: Any) -> dict[Any, Tensor]:
    """The indices of axes that a choice leaves, in the graph of the present mode."""
    return dict(state(space, batch).subnet(choice).chosen)


def assert_is_slice(space: Space, choice: Choice, batch: Any) -> None:
    """The subnet (one without left-out layers) against the resized graph, in the present mode of the model."""
    found = state(space, batch)
    chosen = kept(space, choice, batch)
    small = resize(found.graph, found.axes, keep=chosen) if chosen else found.graph
    remaining = indices(found.axes, keep=chosen)
    tensors = {name: t.detach() for name, t in found.tensors.items()}
    numbers = {name: t.clone() for name, t in take(tensors, remaining).items()}
    wanted = {n: numbers[n].requires_grad_() for n, p in space.model.named_parameters() if p.requires_grad}
    torch.manual_seed(SEED)
    right = list(run(small, numbers, flatten(batch)[0]).values())
    theirs = gradients([r for r in right if r.requires_grad], wanted) if any(r.requires_grad for r in right) else {}
    got, landed = ours(space, choice, batch)
    assert len(got) == len(right)
    problems = [far(f"output {i}", a, b) for i, (a, b) in enumerate(zip(got, right, strict=True))]
    problems += [
        far(f"gradient of {n}", landed[n], _scattered(landed[n], g, remaining.get(n))) for n, g in theirs.items()
    ]
    assert not any(problems), [p for p in problems if p]


def _scattered(like: Tensor, gradient: Tensor, rows: Sequence[Tensor | None] | None) -> Tensor:
    """The gradient of a slice in zeros of the shape of the whole."""
    if rows is None:
        return gradient
    whole = torch.zeros_like(like)
    lines = [torch.arange(s) if row is None else row for s, row in zip(like.shape, rows, strict=True)]
    whole[torch.meshgrid(*lines, indexing="ij")] = gradient
    return whole


def assert_is_module(
    space: Space, choice: Choice, batch: tuple[Tensor, ...], small: nn.Module, slices: Mapping[str, Any]
) -> None:
    """The subnet against a module that was built at its size. ``slices``: by parameter, a function that takes the part
    that the module has (of the parameter, and of its gradient)."""
    with torch.no_grad():
        shared = {**dict(space.model.named_parameters()), **dict(space.model.named_buffers())}
        for name, tensor in [*small.named_parameters(), *small.named_buffers()]:
            tensor.copy_(slices[name](shared[name]) if name in slices else shared[name])
    right = outputs(small(*batch))
    parameters = dict(small.named_parameters())
    theirs = gradients(right, parameters)
    got, landed = ours(space, choice, batch)
    problems = [far(f"output {i}", a, b) for i, (a, b) in enumerate(zip(got, right, strict=True))]
    for name, gradient in theirs.items():
        part = slices[name](landed[name]) if name in slices else landed[name]
        problems.append(far(f"gradient of {name}", part, gradient))
        beside = float(landed[name].abs().sum() - part.abs().sum())
        if abs(beside) > 1e-6 * max(1.0, float(part.abs().sum())):
            problems.append(f"gradient of {name} beside the slice: {beside}")
    assert not any(problems), [p for p in problems if p]
