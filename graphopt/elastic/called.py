"""`same_calls`: whether the code of a model calls the same of torch for two batch sizes, without a capture.

The model runs once for each size, if it can on the meta device, where tensors have shapes and no values. Recorded is
what it calls where Python hands over to torch: functions, the numbers among their arguments, the shapes of tensors. The
calls correspond if they are the same functions, and each number is the same in both, or follows the batch size: with
sizes that have little in common, a number that the code chose by the size (``2 if len(x) > 1 else 1``) does not.
"""

from __future__ import annotations

from math import isclose
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from graphopt.graph.batch import BatchLayout
from graphopt.graph.stateless import functional_call

Call = tuple[Any, list[Any]]
"""A function, and what is known of its arguments and results."""


def same_calls(model: nn.Module, layout: BatchLayout, one: int, other: int) -> bool:
    """Whether a model, in its present mode, makes the same calls for batches of these sizes. False where it does not
    run on batches of zeros.

    >>> from graphopt.graph.batch import flatten
    >>> class Pooled(nn.Module):
    ...     def forward(self, x):
    ...         return x.sum() / x.shape[0] if len(x) > 3 else x.mean()
    >>> layout = flatten(torch.ones(4, 2))[1]
    >>> [same_calls(Pooled(), layout, 7, size) for size in (5, 2)]
    [True, False]
    """
    for device in ("meta", None):  # a model that looks at values runs where its tensors are
        try:
            first, second = (_calls(model, layout, size, device) for size in (one, other))
        except Exception:  # a model may fail in many ways; who asks captures it then, which tells what is the matter
            continue
        return len(first) == len(second) and all(_alike(a, b, one, other) for a, b in zip(first, second, strict=True))
    return False


def _calls(model: nn.Module, layout: BatchLayout, size: int, device: str | None) -> list[Call]:
    """What a model calls for a batch of zeros of this size; nothing of it changes."""
    held = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    there = {
        name: (tensor.detach().to(device) if device else tensor.detach().clone()).requires_grad_(tensor.requires_grad)
        for name, tensor in held.items()
    }
    batch: Any = layout.restore([t.detach().to(device) for t in layout.example(size)])
    given = ((), batch) if isinstance(batch, dict) else (tuple(batch), {})
    with torch.random.fork_rng(), _Recorder() as recorder:
        result = functional_call(model, there, *given)
    return [*recorder.found, (None, [_mark(leaf) for leaf in pytree.tree_leaves(result)])]


class _Recorder(TorchFunctionMode):
    """Keeps what is called while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Call] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch._assert:  # its message may tell the batch size
            args, kwargs = args[:1], None
        self.found.append((func, [_mark(leaf) for leaf in pytree.tree_leaves((args, kwargs or {}, result))]))
        return result


def _mark(leaf: Any) -> Any:
    """What is compared of an argument or result."""
    if isinstance(leaf, torch.Tensor):
        return tuple(leaf.shape)
    return leaf if leaf is None or isinstance(leaf, (bool, int, float, str, torch.dtype)) else type(leaf)


def _alike(a: Call, b: Call, one: int, other: int) -> bool:
    (function, first), (twin, second) = a, b
    return (
        function == twin and len(first) == len(second) and all(_fits(x, y, one, other) for x, y in zip(first, second))
    )


def _fits(x: Any, y: Any, one: int, other: int) -> bool:
    """Whether two marks are equal, or numbers that follow the batch size."""
    if isinstance(x, tuple) and isinstance(y, tuple):
        return len(x) == len(y) and all(_follows(i, j, one, other) for i, j in zip(x, y))
    if type(x) in (int, float) and type(y) is type(x):
        return _follows(x, y, one, other)
    return bool(x == y)


def _follows(x: float, y: float, one: int, other: int) -> bool:
    """Equal, a multiple of the batch size or of its inverse, or at a constant distance from it."""
    return x == y or isclose(x * other, y * one) or isclose(x * one, y * other) or x - one == y - other
