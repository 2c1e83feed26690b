"""What schemes that divide a step over processors of this machine have in common."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from graphopt.cost_model import Estimate
from graphopt.cost_model.machine import available_cores
from graphopt.errors import CaptureError, GraphoptError
from graphopt.graph.training_graph import TrainingGraph
from graphopt.passes import Pass
from graphopt.schemes.base import Machines, Prepared, Scheme
from graphopt.schemes.divided_price import price
from graphopt.schemes.divided_step import Divided


class SeveralProcessors(Scheme):
    """A scheme that runs one step on this process and workers that it starts.

    Each processor runs forward and backward on its part; this process, which owns parameters and optimizer state,
    updates when all have finished. A step happens whole or not at all. What a step computes is what one processor
    would: means are those of the whole batch, masks are drawn for all of it. Sums are taken in another order, so
    results differ in their last bits.

    Subclasses are dataclasses with these fields. ``processors``: how many take part, at least 2. ``batch_norm``:
    ``"synchronized"``: statistics of the whole batch; ``"local"``: of each processor's rows, as DDP. ``threads``: of
    torch on each processor.
    """

    processors: int
    batch_norm: Any
    threads: int

    def __post_init__(self) -> None:
        if isinstance(self.processors, bool) or not isinstance(self.processors, int) or self.processors < 2:
            raise GraphoptError(f"processors: expected an integer of at least 2, got {self.processors!r}")
        self._check("batch_norm", ("synchronized", "local"))

    def _check(self, name: str, known: tuple[str, ...]) -> None:
        value = getattr(self, name)
        if value not in known:
            raise GraphoptError(f"{name}: expected one of {', '.join(known)}, got {value!r}")

    @property
    def name(self) -> str:
        """See `Scheme.name`."""
        parts = [f"{self.kind} on {self.processors}", *self.options]
        parts += ["local batch norm"] * (self.batch_norm == "local")
        parts += [f"{self.threads} threads each"] * (self.threads > 1)
        return ", ".join(parts)

    @property
    def options(self) -> tuple[str, ...]:
        """Words of the name for options that not all such schemes have."""
        return ()

    def why_not(self, prepared: Prepared, size: int) -> str | None:
        """See `Scheme.why_not`. Divides the graph, which is kept with the step."""
        found = super().why_not(prepared, size)
        if found is None and prepared.task.accumulate > 1:
            found = "gradients are accumulated over several batches"
        if found is None and any(device.type != "cpu" for device in prepared.layout.devices):
            found = "the batch is not on the CPU, where local workers run"
        if found is not None:
            return found
        try:
            return self.why_not_divided(prepared, size)
        except CaptureError as error:
            return str(error)

    @abstractmethod
    def why_not_divided(self, prepared: Prepared, size: int) -> str | None:
        """What speaks against this division of a batch of ``size``; None if nothing does. Raises CaptureError with the
        reason where the step cannot be divided."""

    @abstractmethod
    def divided(self, prepared: Prepared, size: int) -> Divided:
        """The step divided for batches of ``size``, made once. Raises CaptureError where it cannot be."""

    def estimate(self, prepared: Prepared, size: int, machines: Machines) -> Estimate | None:
        """See `Scheme.estimate`: the largest part and its communication, then the update. None without a link."""
        machine = machines(self.threads)
        if machine is None or machine.link is None:
            return None
        return price(self.divided(prepared, size), size, machine)


def rewritten(rewrite: Pass, graph: TrainingGraph) -> TrainingGraph:
    """What a pass that must not refuse makes of ``graph``. Raises CaptureError with its reasons."""
    result = rewrite(graph)
    if result.graph is graph:
        raise CaptureError(f"the step cannot be divided: {'; '.join(r.why for r in result.refusals)}")
    return result.graph


def threads_of_each(processors: int) -> int:
    """How many threads each of so many processors gets where they share the cores of this machine."""
    return max(available_cores() // processors, 1)
