"""Models that run through a `torch.autograd.Function` with a backward of its own, which no graph of operators holds.

A subnet differentiates the operators of the function's forward. That is right where the backward is their derivative
(written out to save memory, as BLOOM's GELU is), and wrong where it is something else (a straight-through estimator).
Which of both it is shows in the gradients of the whole model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from graphopt.elastic.subnet import Subnet
from graphopt.graph.batch import call_model, flatten, normalise

_TOLERANCE = 1e-3
"""Of the largest element of a gradient: more than rounding in float32, less than any other derivative."""


def same_gradients(whole: Subnet, model: nn.Module, batch: Any) -> bool:
    """Whether the graph of the whole model has the gradients that the model has on a batch.

    Buffers and the state of the random generator stay."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    tensors, *_ = flatten(batch)
    ours = _gradients(model, parameters, lambda: whole(tensors))
    theirs = _gradients(model, parameters, lambda: call_model(model, normalise(batch)))
    return all(_close(a, b) for a, b in zip(ours, theirs, strict=True))


def _gradients(
    model: nn.Module, parameters: Sequence[nn.Parameter], run: Callable[[], Any]
) -> tuple[torch.Tensor | None, ...]:
    """Gradients of a sum of all outputs with weights that differ from one element to the next."""
    with same_buffers(model), torch.enable_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        outputs = [t for t in pytree.tree_leaves(run()) if isinstance(t, torch.Tensor) and t.requires_grad]
        total = sum((t * torch.arange(t.numel(), device=t.device).view(t.shape).cos()).sum() for t in outputs)
        return torch.autograd.grad(total, list(parameters), allow_unused=True)  # type: ignore[arg-type]


def _close(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    if a is None or b is None:
        return (a if b is None else b) is None or not (a if b is None else b).any()  # type: ignore[union-attr]
    scale = float(b.abs().max())
    return bool((a - b).abs().max() <= _TOLERANCE * scale)


@contextmanager
def same_buffers(model: nn.Module) -> Iterator[None]:
    """Buffers that keep their shape and type get their values back at the end."""
    before = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}
    try:
        yield
    finally:
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                old = before.get(name)
                if old is not None and (buffer.shape, buffer.dtype) == (old.shape, old.dtype):
                    buffer.copy_(old)
