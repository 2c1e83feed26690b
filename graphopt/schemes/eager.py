"""The eager scheme: the step as a user writes it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from graphopt.cost_model import Estimate
from graphopt.errors import CaptureError, LossError
from graphopt.graph.batch import check_loss, compute_loss
from graphopt.graph.hyper_parameters import ClipNorm
from graphopt.graph.step_module import active_autocast, autocast, device_types
from graphopt.schemes.base import Machines, Prepared, Runner
from graphopt.schemes.channels_last import check_model, converted, image_positions
from graphopt.schemes.fused_optimizer import counts_elsewhere, fused
from graphopt.schemes.low_precision import low_precision
from graphopt.schemes.one_processor import OneProcessor
from graphopt.schemes.task import Task, clear_gradients
from graphopt.schemes.variants import Form


@dataclass(frozen=True)
class Eager(OneProcessor):
    """Forward, loss, ``backward()``, clipping and ``optimizer.step()`` by autograd, one operator at a time."""

    kind: ClassVar[str] = "eager"
    needs_graph: ClassVar[bool] = False

    def why_not(self, prepared: Prepared, size: int) -> str | None:
        """See `Scheme.why_not`."""
        found = super().why_not(prepared, size)
        if found is None and prepared.task.needs_closure and self.options:
            found = "the optimizer evaluates the loss several times a step (LBFGS)"
        return found

    def runner(self, prepared: Prepared) -> Runner:
        """See `OneProcessor.runner`."""
        return EagerStep(prepared, fused=self.fused, channels_last=self.channels_last, precision=self.precision)

    def estimate(self, prepared: Prepared, size: int, machines: Machines) -> Estimate | None:
        """See `Scheme.estimate`. None without a graph, and for channels-last kernels, which no calibration measures."""
        machine = self.machine(prepared, machines)
        unknown = machine is None or prepared.step is None or self.channels_last
        if machine is None or unknown or (self.fused and counts_elsewhere(prepared.task.optimizers)):
            return None
        try:
            step = Form(fused=self.fused).of(prepared)  # a precision is a rate of the machine
        except CaptureError:  # an update that has no graph
            return None
        return self.priced(step.before, size, machine, "eager")


class EagerStep:
    """Runs a task in eager mode."""

    def __init__(
        self, prepared: Prepared, *, fused: bool = False, channels_last: bool = False, precision: str | None = None
    ):
        self.task, self.layout = prepared.task, prepared.layout
        self._prepared, self._precision, self._fused = prepared, precision, fused
        self._images = image_positions(prepared.layout) if channels_last else ()
        self._unchecked = channels_last

    def fresh(self) -> bool:
        """Always: nothing was specialised."""
        return True

    def close(self) -> None:
        """Nothing is held."""

    def __call__(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        """One batch: a whole step, or a part of one while gradients are accumulated."""
        task = self.task
        if self._images:
            tensors = self._in_channels_last(tensors)
        batch = self.layout.restore(list(tensors))
        if task.needs_closure:
            return self._closure_step(batch)
        if task.begins:
            clear_gradients(task)
        with torch.enable_grad():
            loss = self.backward(batch)
        if task.ends:
            finish_eager(task, fused_update=self._fused)
        task.count()
        return loss

    def _in_channels_last(self, tensors: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        if self._unchecked:
            size = int(tensors[self.layout.batched.index(True)].shape[0])
            self._prepared.variant("channels-last eager", lambda: check_model(self.task, self.layout, size))
            self._unchecked = False
        return converted(tensors, self._images)

    def scaled(self, loss: torch.Tensor) -> torch.Tensor:
        """What backward starts from: the share of this batch in the loss of a step."""
        return loss if self.task.accumulate == 1 else loss / self.task.accumulate

    def backward(self, batch: Any) -> torch.Tensor:
        """Forward, loss and gradients. The loss, detached."""
        with low_precision(self._prepared, self._precision):
            loss = check_loss(compute_loss(self.task.model, batch, self.task.loss or "model"))
        if not loss.requires_grad and any(p.requires_grad for p in self.task.model.parameters()):
            raise LossError("loss: it does not depend on any parameter that requires grad; is it detached?")
        scaled = self.scaled(loss)
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
                losses.append(self.backward(batch))
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


def finish_eager(task: Task, *, fused_update: bool = False) -> None:
    """From gradients in ``.grad`` to the end of the step: clip, update (by fused kernels, if asked), and drop the
    gradients unless they are kept."""
    clip_gradients(task)
    for optimizer in task.optimizers:
        with fused(optimizer) if fused_update else nullcontext():
            optimizer.step()
    if not task.keep_grads:
        clear_gradients(task)
