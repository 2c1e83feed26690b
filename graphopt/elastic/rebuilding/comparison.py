"""`difference`: whether a model of the user's class is the subnet, by its parameters and by what it computes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from graphopt.elastic.forward_arguments import tensor_arguments
from graphopt.elastic.mode_states import ModeState
from graphopt.elastic.modes import keeping_modes
from graphopt.elastic.space import Space
from graphopt.graph.batch import call_model, flatten, normalise


def difference(space: Space, model: nn.Module, written: nn.Module, states: Mapping[bool, ModeState]) -> str:
    """What distinguishes a model from the written module of a subnet; empty if nothing does.

    Parameters are compared by name, shape and tie; then both run with the same random numbers, in each of the modes, on
    the space's batch and on a longer one where the batch size is free: outputs and new values of buffers are the same
    bits. Both are as they were afterwards.
    """
    ours, theirs = _parameters(model), _parameters(written)
    if ours != theirs:
        name = min(dict(ours.items() ^ theirs.items()))
        return f"its {name} would be {ours.get(name, 'missing')}, and must be {theirs.get(name, 'missing')}"
    if _tied(model) != _tied(written):
        return "other parameters of it would be tied"
    for training, state in states.items():
        for batch in _batches(space, state):
            if why := _other_results(space, model, written, batch, training):
                return f"{why} (in {'train' if training else 'eval'} mode)"
    return ""


def _parameters(module: nn.Module) -> dict[str, str]:
    return {n: str(tuple(p.shape)) for n, p in module.named_parameters(remove_duplicate=False)}


def _tied(module: nn.Module) -> set[frozenset[str]]:
    """The names of parameters that are one, together."""
    names: dict[int, list[str]] = defaultdict(list)
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names[id(parameter)].append(name)
    return {frozenset(several) for several in names.values()}


def _batches(space: Space, state: ModeState) -> list[Any]:
    """The space's batch, and one that has its first row twice."""
    given = normalise(space.batch)
    tensors, layout, size = flatten(given)
    if not state.graph.symbols.symbols.get("batch") or not state.graph.symbols.admits({"batch": size + 1}):
        return [given]
    longer = [torch.cat([t, t[:1]]) if batched else t for t, batched in zip(tensors, layout.batched, strict=True)]
    return [given, layout.restore(longer)]


def _other_results(space: Space, model: nn.Module, written: nn.Module, batch: Any, training: bool) -> str:
    with keeping_modes(model), keeping_modes(written), _keeping_buffers(model), _keeping_buffers(written):
        if training is not space.model.training:  # else it is in the modes of the space's model
            model.train(training)
        written.train(training)
        right = _results(written, tensor_arguments(batch))
        try:
            found = _results(model, batch)
        except Exception as error:  # whatever a class does that was not made for such sizes
            text = str(error).strip().partition("\n")[0]
            return f"its forward does not run at these sizes: {type(error).__name__}: {text}"
        if len(found) != len(right) or any(a.dtype != b.dtype for a, b in zip(found, right, strict=True)):
            return "its output is another one"
        if not all(map(torch.equal, found, right)):
            return "it computes other numbers"
        values = dict(model.named_buffers())
        for name, value in written.named_buffers():
            if name in values and not torch.equal(value, values[name]):
                return f"it gives {name} other values"
    return ""


def _results(module: nn.Module, batch: Any) -> list[torch.Tensor]:
    """The tensors that a module gives, by the same random numbers each time. Gradients are on: without them torch runs
    other kernels in eval mode (attention)."""
    with torch.random.fork_rng(), torch.enable_grad():
        torch.manual_seed(0)
        result = call_model(module, batch)
    return [leaf.detach() for leaf in pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor)]


@contextmanager
def _keeping_buffers(module: nn.Module) -> Iterator[None]:
    """Buffers have the values afterwards that they have now."""
    before = [(buffer, buffer.clone()) for buffer in module.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in before:
                buffer.copy_(value)
