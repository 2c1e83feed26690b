"""Other forms of a captured step: with channels-last images, in low precision, with a fused update.

They are made when they are first needed and kept with the step (`Prepared.variant`). A fused update goes behind the
joint graph that is there; the other two take a capture.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch

from graphopt.errors import CaptureError, GraphoptError
from graphopt.graph.lowering import Lowered
from graphopt.graph.training_graph import OutputKind, TrainingGraph
from graphopt.schemes.base import Prepared, fitting
from graphopt.schemes.captured_step import CapturedStep, capture_task, finish_step
from graphopt.schemes.channels_last import converted, image_positions
from graphopt.schemes.fused_optimizer import without_momentum
from graphopt.schemes.graph_step import GraphStep
from graphopt.schemes.low_precision import low_precision


@dataclass(frozen=True)
class Form:
    """Which form of a captured step. See the options of `OneProcessor`."""

    channels_last: bool = False
    precision: str | None = None
    fused: bool = False

    @property
    def plain(self) -> bool:
        """Whether it is the step as it was captured."""
        return self == Form()

    def of(self, prepared: Prepared) -> CapturedStep:
        """The step in this form, made now if it was not yet. Raises CaptureError where there is none."""
        if self.plain:
            return cast(CapturedStep, prepared.step)
        return cast(CapturedStep, prepared.variant(self, lambda: self._make(prepared)))

    def why_not(self, prepared: Prepared, size: int) -> str | None:
        """Why there is no step in this form for batches of ``size``, as far as is known without making it."""
        if self.plain or not prepared.has_variant(self) or self.of(prepared).admits(size):
            return None
        return f"in this form the captured step does not hold for a batch of {size}"

    def _make(self, prepared: Prepared) -> CapturedStep:
        if self.fused:
            plain = replace(self, fused=False).of(prepared)
            _check_momenta(prepared, plain)
            return finish_step(prepared.task, plain.joint, plain.passes, fused=True)
        layout, step = prepared.layout, prepared.step
        tensors = layout.example(step.graph.symbols.hints["batch"])
        if self.channels_last:
            tensors = converted(tensors, image_positions(layout))
        try:
            with low_precision(prepared, self.precision):
                return capture_task(prepared.task, layout.restore(tensors), step.passes)
        except CaptureError:
            raise
        except GraphoptError as error:  # of this form only: as it is, the step was captured
            raise CaptureError(str(error)) from error


def _check_momenta(prepared: Prepared, step: CapturedStep) -> None:
    names = {id(p): name for name, p in prepared.task.model.named_parameters()}
    given = step.joint.output_nodes(OutputKind.GRADIENT)
    for optimizer in prepared.task.optimizers:
        for group in optimizer.param_groups:
            with_gradient = [p for p in group["params"] if names.get(id(p)) in given]
            if group.get("dampening") and without_momentum(optimizer, group, with_gradient):
                raise CaptureError("SGD with dampening: some parameters of a group have no momentum yet, others have")


class LateStep:
    """A captured step in another form, which is made at the first call."""

    def __init__(self, prepared: Prepared, form: Form, lowered: Callable[[TrainingGraph], Lowered]):
        self._prepared, self._form, self._lowered = prepared, form, lowered
        self._first = prepared.layout.batched.index(True)
        self._sizes: set[int] = set()  # for which it is known to hold
        self._runner: GraphStep | None = None

    def __call__(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        """One batch. Raises, before anything is run, CaptureError where the step has no such form at this size, and
        Stale where it was made before an optimizer changed."""
        size = int(tensors[self._first].shape[0])
        if size not in self._sizes:
            step = self._form.of(self._prepared)
            if reason := self._form.why_not(self._prepared, size):
                raise CaptureError(reason)
            if self._runner is None:
                self._runner = GraphStep(replace(self._prepared, step=step), self._lowered)
            fitting(self._runner)
            self._sizes.add(size)
        assert self._runner is not None
        return self._runner(tensors)

    def fresh(self) -> bool:
        """See `Runner`."""
        return self._runner is None or self._runner.fresh()

    def close(self) -> None:
        """See `Runner`."""
        if self._runner is not None:
            self._runner.close()
