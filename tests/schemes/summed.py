"""Joint graphs with collectives put in by hand, for tests of workers: every processor has its rows of the batch, and
loss and gradients are the sums over all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed import _functional_collectives as _  # noqa: F401  (shapes of collectives)

import graphopt
from graphopt.graph.training_graph import InputKind, OutputKind, Phase, TrainingGraph
from graphopt.schemes.workers import Job

collectives = torch.ops._c10d_functional


def summed(graph: TrainingGraph) -> TrainingGraph:
    """``graph`` with its loss and every gradient summed over all processors."""
    draft = graph.draft()
    results = draft.results
    for position, (output, result) in enumerate(zip(graph.outputs, draft.results, strict=True)):
        if output.kind in (OutputKind.LOSS, OutputKind.GRADIENT) and result is not None:
            phase = {"like": result, "before": draft.output, "phase": Phase.BACKWARD}
            reduced = draft.add(collectives.all_reduce.default, result, "sum", "any", **phase)
            results[position] = draft.add(collectives.wait_tensor.default, reduced, **phase)
    draft.output.args = (tuple(results),)
    return draft.finish()


def sum_loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """A loss that is a sum over rows, so that sums over processors are the whole batch's."""
    return ((output - target) ** 2).sum()


def captured(model: nn.Module, *shapes: Sequence[int], loss: Callable[..., Any] = sum_loss) -> TrainingGraph:
    """The joint graph of ``model``, summed; a batch of random tensors of ``shapes``."""
    dtype = next(model.parameters()).dtype
    return summed(graphopt.capture(model, tuple(torch.randn(*s, dtype=dtype) for s in shapes), loss=loss))


def values(job: Job, model: nn.Module) -> list[Any]:
    """The common inputs of ``job``, from the model."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert {i.kind for i in job.common} <= {InputKind.PARAMETER, InputKind.BUFFER}
    return [tensors[i.name] for i in job.common]


def gradients(job: Job, results: Sequence[Any]) -> dict[str, torch.Tensor]:
    """The gradients among the results of a step, by name."""
    return {o.name: r for o, r in zip(job.outputs, results, strict=True) if o.kind is OutputKind.GRADIENT}


def loss_of(job: Job, results: Sequence[Any]) -> torch.Tensor:
    """The loss among the results of a step."""
    return next(r for o, r in zip(job.outputs, results, strict=True) if o.kind is OutputKind.LOSS)
