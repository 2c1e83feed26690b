"""`Capturing`: a captured step for a batch, or why the step has to run in eager mode."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch
from torch import nn

from graphopt.errors import BatchError, CaptureError, GraphoptError, LossError, PassError, StaleGraphError
from graphopt.passes import Pass
from graphopt.schemes import ModelWatch, Task
from graphopt.schemes.flat import CapturedStep, capture_task
from graphopt.schemes.world.ranks import synchronises_itself
from graphopt.situation import Situation
from graphopt.verify import drop_failing
from graphopt.verify_forms import check_form

log = logging.getLogger("graphopt")


class Capturing:
    """Captures steps of one task.

    Args:
        task: what is trained.
        passes: run on each captured step.
        verify: check each, and each of its forms that is about to run, against eager and a float64 reference.
        warn: says something to the user, once.
    """

    def __init__(self, task: Task, passes: Sequence[Pass], verify: bool, warn: Callable[[str], None]):
        self.task = task
        self.verify = verify
        self._passes, self._warn = tuple(passes), warn
        self._names = set(_names(task.model))

    def capture(self, situation: Situation, tensors: Sequence[torch.Tensor], size: int) -> None:
        """Add a step that is valid at ``size`` to the situation; where that cannot be, ``situation.failed`` says why.

        Raises:
            BatchError, LossError: eager would fail too.
            StaleGraphError: the model has lost parameters or buffers.
        """
        if self.verify:
            situation.check, situation.sample = check_form, list(tensors)
        if reason := self._eager_only(situation.watch):
            situation.failed = reason
            self._warn(f"the step runs in eager mode: {reason}")
            return
        if situation.watch.forward_hooks:
            kinds = ", ".join(sorted(set(situation.watch.forward_hooks)))
            note = f"forward hooks (on {kinds}) run once, at capture; their effects outside the graph are not repeated"
            situation.notes.append(note)
            self._warn(note)
        batch = situation.layout.restore(list(tensors))
        log.info("capturing the step of %s at batch size %d", type(self.task.model).__name__, size)
        try:
            step = self._captured(situation, batch)
        except (BatchError, LossError) as error:
            self._check_tensors(error)
            raise
        except (CaptureError, PassError) as error:
            self._check_tensors(error)
            situation.failed = str(error)
            self._warn(f"the step runs in eager mode: {error}")
            return
        situation.steps.append(step)

    def _captured(self, situation: Situation, batch: object) -> CapturedStep:
        if not self.verify:
            return capture_task(self.task, batch, self._passes)
        step, notes = drop_failing(self.task, batch, self._passes)
        situation.notes += notes
        for note in notes:
            self._warn(note)
        return step

    def _eager_only(self, watch: ModelWatch) -> str | None:
        """Why this step cannot be a graph although its model could."""
        if self.task.needs_closure:
            return "the optimizer evaluates the loss several times a step (LBFGS)"
        if watch.tensor_hooks:
            return "a hook is registered on a parameter; it has to see the gradient when autograd computes it"
        if watch.backward_hooks:
            return "a module has backward hooks, which only autograd calls"
        if synchronises_itself(self.task.model):
            return (
                "the model (DistributedDataParallel, FSDP) brings the gradients of ranks together itself, in autograd"
            )
        return None

    def _check_tensors(self, error: GraphoptError) -> None:
        """Say which parameter or buffer is gone where that is why the model cannot run any more."""
        gone = sorted(self._names - set(_names(self.task.model)))
        if gone:
            raise StaleGraphError(
                f"model: it has lost {', '.join(gone[:3])} since optimize() was called and does not run without; "
                "restore it, or call optimize() on the new model"
            ) from error


def _names(model: nn.Module) -> list[str]:
    return [name for name, _ in (*model.named_parameters(), *model.named_buffers())]
