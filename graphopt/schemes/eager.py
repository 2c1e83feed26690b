"""The eager scheme: the step as a user writes it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from graphopt.errors import LossError
from graphopt.graph.batch import check_loss, compute_loss
from graphopt.graph.hyper_parameters import ClipNorm
from graphopt.graph.step_module import active_autocast, autocast, device_types
from graphopt.schemes.base import Prepared, Runner, Scheme
from graphopt.schemes.task import Task


@dataclass(frozen=True)
class Eager(Scheme):
    """Forward, loss, ``backward()``, clipping and ``optimizer.step()`` by autograd, one operator at a time."""

    name: ClassVar[str] = "eager"
    needs_graph: ClassVar[bool] = False

    def build(self, prepared: Prepared) -> Runner:
        """See `Scheme.build`."""
        return EagerStep(prepared)


class EagerStep:
    """Runs a task in eager mode."""

    def __init__(self, prepared: Prepared):
        self.task, self.layout = prepared.task, prepared.layout

    def fresh(self) -> bool:
        """Always: nothing was specialised."""
        return True

    def __call__(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        """One batch: a whole step, or a part of one while gradients are accumulated."""
        task = self.task
        batch = self.layout.restore(list(tensors))
        if task.needs_closure:
            return self._closure_step(batch)
        if task.begins:
            clear_gradients(task)
        with torch.enable_grad():
            loss = self._backward(batch)
        if task.ends:
            finish_eager(task)
        task.count()
        return loss

    def _backward(self, batch: Any) -> torch.Tensor:
        loss = check_loss(compute_loss(self.task.model, batch, self.task.loss or "model"))
        if not loss.requires_grad and any(p.requires_grad for p in self.task.model.parameters()):
            raise LossError("loss: it does not depend on any parameter that requires grad; is it detached?")
        scaled = loss if self.task.accumulate == 1 else loss / self.task.accumulate
        regions = active_autocast(device_types(self.task.model, [loss]))
        with autocast(regions, enabled=False):  # they are for forward and loss
            if scaled.requires_grad:
                scaled.backward()
        return loss.detach()

    def _closure_step(self, batch: Any) -> torch.Tensor:
        losses: list[torch.Tensor] = []

        def closure() -> torch.Tensor:
            clear_gradients(self.task)
            with torch.enable_grad():
                losses.append(self._backward(batch))
            clip_gradients(self.task)
            return losses[-1]

        for optimizer in self.task.optimizers:
            optimizer.step(closure)  # type: ignore[arg-type]
        if not self.task.keep_grads:
            clear_gradients(self.task)
        return losses[0]


def clip_gradients(task: Task) -> None:
    """Clip all gradients of the model as the task says."""
    if isinstance(task.clip, ClipNorm):
        torch.nn.utils.clip_grad_norm_(task.model.parameters(), task.clip.max_norm, task.clip.norm_type)
    elif task.clip is not None:
        torch.nn.utils.clip_grad_value_(task.model.parameters(), task.clip.value)


def finish_eager(task: Task) -> None:
    """From gradients in ``.grad`` to the end of the step: clip, update, and drop the gradients unless they are kept."""
    clip_gradients(task)
    for optimizer in task.optimizers:
        optimizer.step()
    if not task.keep_grads:
        clear_gradients(task)


def clear_gradients(task: Task) -> None:
    """Set every ``.grad`` to None."""
    for parameter in task.parameters:
        if parameter.grad is not None:
            parameter.grad = None
