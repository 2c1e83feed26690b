"""The arguments of an extracted subnet: those of the model that hold tensors."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from graphopt.errors import ElasticError
from graphopt.graph.batch import BatchLayout, normalise


def tensor_arguments(batch: Any) -> tuple[Any, ...] | dict[str, Any]:
    """The arguments that an extracted module takes, of a batch for the model: those with tensors."""
    batch = normalise(batch)
    held = lambda value: any(isinstance(leaf, torch.Tensor) for leaf in pytree.tree_leaves(value))
    if isinstance(batch, dict):
        return {name: value for name, value in batch.items() if held(value)}
    return tuple(value for value in batch if held(value))


def signature_of(model: nn.Module, layout: BatchLayout) -> tuple[str, list[str]]:
    """The arguments of forward behind ``self``, and the expressions of the batch's tensors in order."""
    given = layout.restore([_Leaf(i) for i in range(len(layout.names))])  # type: ignore[misc]
    parameters = inspect.signature(model.forward).parameters.values()
    named = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    expressions: dict[int, str] = {}
    if isinstance(given, dict):
        keys = [key for key, value in given.items() if _leaves(value)]
        positional = [a for a, b in zip(named, keys) if a == b]
        positional = positional[: next((i for i, (a, b) in enumerate(zip(named, keys)) if a != b), len(positional))]
        arguments = [*positional, *(["*"] if len(keys) > len(positional) else []), *keys[len(positional) :]]
        pairs = [(key, given[key]) for key in keys]
    else:
        names = [named[i] if i < len(named) else f"input{i}" for i in range(len(given))]
        pairs = [(name, value) for name, value in zip(names, given) if _leaves(value)]
        arguments = [name for name, _ in pairs]
    for name, value in pairs:
        _expressions(name, value, expressions)
    return "".join(f", {a}" for a in arguments), [expressions[i] for i in range(len(layout.names))]


@dataclass(frozen=True)
class _Leaf:
    """Stands for a tensor of the batch."""

    index: int


def _leaves(value: Any) -> bool:
    return any(isinstance(leaf, _Leaf) for leaf in pytree.tree_leaves(value))


def _expressions(said: str, value: Any, found: dict[int, str]) -> None:
    """How code says each tensor in an argument."""
    if isinstance(value, _Leaf):
        found[value.index] = said
    elif isinstance(value, (tuple, list)):
        for i, inside in enumerate(value):
            _expressions(f"{said}[{i}]", inside, found)
    elif isinstance(value, dict):
        for key, inside in value.items():
            _expressions(f"{said}[{key!r}]", inside, found)
    elif _leaves(value):
        raise ElasticError(
            f"extract: the argument {said} is a {type(value).__name__}; expected tensors in lists or dicts"
        )
