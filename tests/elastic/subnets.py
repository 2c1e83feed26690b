"""Claims about subnets, by execution: `check_extraction` compares a slice of a supernet with its extraction."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from graphopt.elastic import Choice, Space
from graphopt.elastic.module_tree import CONSTANTS


def call(function: Any, batch: Any, *first: Any) -> list[Tensor]:
    """The tensors among the results of a function of a batch, drawn with the same random numbers each time."""
    torch.manual_seed(3)
    result = function(*first, **batch) if isinstance(batch, Mapping) else function(*first, *batch)
    return [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]


def gradients(results: list[Tensor], of: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Gradients of a sum of all results with weights that differ from one element to the next; zero where none."""
    total = sum(
        (r * torch.linspace(0.5, 1.5, r.numel(), dtype=r.dtype).view(r.shape)).sum()
        for r in results
        if r.is_floating_point() and r.requires_grad
    )
    found = torch.autograd.grad(total, list(of.values()), allow_unused=True)  # type: ignore[arg-type]
    return {n: torch.zeros_like(t) if g is None else g for (n, t), g in zip(of.items(), found, strict=True)}


def part(space: Space, choice: Choice, name: str, whole: Tensor) -> Tensor:
    """What a subnet has of a tensor of the model."""
    found = space.subnet(choice).slices.get(name)
    return whole if found is None else found.take(whole.detach())


def trained(module: nn.Module) -> dict[str, Tensor]:
    return {n: p for n, p in module.named_parameters() if p.requires_grad}


def check_extraction(
    space: Space, choice: Choice, batch: Any, *, training: bool, transformed: Collection[str] = ()
) -> nn.Module:
    """The extracted module is the slice bit for bit: outputs, gradients of every parameter, new values of buffers; the
    model's gradients are zero beside the slice. Returns the module.

    ``transformed``: weights that the module has as they are behind a transformation: their gradients are others."""
    model = space.model.train(training)
    module = space.extract(choice).train(training)
    before = {n: b.clone() for n, b in model.named_buffers()}
    theirs = call(space.run, batch, choice)
    ours = call(module, batch)
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape and torch.equal(a, b), float((a - b).abs().max())
    after = {n: part(space, choice, n, b) for n, b in model.named_buffers()}
    for name, buffer in module.named_buffers():
        assert name.startswith(CONSTANTS) or torch.equal(buffer, after[name]), name
    if any(r.requires_grad for r in theirs):
        shared = gradients(theirs, trained(model))
        for name, own in gradients(ours, trained(module)).items():
            if name not in transformed:
                whole = part(space, choice, name, shared[name])
                whole = whole[tuple(slice(0, size) for size in own.shape)]  # a layer may read a part of what there is
                assert torch.equal(own, whole), f"{name}: {float((own - whole).abs().max())}"
                assert int(shared[name].count_nonzero()) == int(own.count_nonzero()), f"{name}: beside the slice"
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if not torch.equal(buffer, before[name]):
                buffer.copy_(before[name])
    return module
