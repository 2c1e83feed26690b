"""The flat scheme: the captured and optimised graph as straight-line code without autograd."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from graphopt.cost_model import Estimate
from graphopt.cost_model.work import Mode
from graphopt.errors import CaptureError
from graphopt.graph.lowering import Lowered, lower
from graphopt.graph.training_graph import TrainingGraph
from graphopt.schemes.base import Machines, Prepared, Runner
from graphopt.schemes.captured_step import CapturedStep as CapturedStep
from graphopt.schemes.captured_step import capture_task as capture_task
from graphopt.schemes.channels_last import ChannelsLastImages
from graphopt.schemes.fused_optimizer import counts_elsewhere
from graphopt.schemes.graph_step import GraphStep
from graphopt.schemes.one_processor import OneProcessor
from graphopt.schemes.variants import Form, LateStep


@dataclass(frozen=True)
class Flat(OneProcessor):
    """One straight-line Python function of ATen calls: no autograd, no module dispatch, memory freed at last use.

    Without options its results are eager's bit for bit.
    """

    kind: ClassVar[str] = "flat"
    mode: ClassVar[Mode] = "flat"

    @property
    def form(self) -> Form:
        """The form of the captured step that it runs."""
        return Form(self.channels_last, self.precision, self.fused)

    def why_not(self, prepared: Prepared, size: int) -> str | None:
        """See `Scheme.why_not`."""
        found = super().why_not(prepared, size)
        if found is None and self.fused and counts_elsewhere(prepared.task.optimizers):
            found = "the optimizer counts steps in tensors that fused kernels do not read (float64, or another device)"
        return found if found is not None else self.form.why_not(prepared, size)

    def start_seconds(self, prepared: Prepared) -> float:
        """See `Scheme.start_seconds`: another capture takes as long as the first did."""
        another = self.channels_last or self.precision
        known = not another or prepared.step is None or prepared.has_variant(self.form)
        return 0.0 if known else float(prepared.step.seconds)

    def lowered(self, graph: TrainingGraph) -> Lowered:
        """How this scheme makes a graph callable."""
        return lower(graph)

    def runner(self, prepared: Prepared) -> Runner:
        """See `OneProcessor.runner`."""
        if self.form.plain:
            return GraphStep(prepared, self.lowered)
        runner = LateStep(prepared, self.form, self.lowered)
        return ChannelsLastImages(runner, prepared.layout) if self.channels_last else runner

    def estimate(self, prepared: Prepared, size: int, machines: Machines) -> Estimate | None:
        """See `Scheme.estimate`. None for channels-last kernels, which no calibration measures."""
        machine = self.machine(prepared, machines)
        if machine is None or self.channels_last:
            return None
        try:
            step = Form(fused=self.fused).of(prepared)  # a precision is a rate of the machine
        except CaptureError:  # which the runner will raise too, where it counts
            return None
        return self.priced(step.graph, size, machine, self.mode)
