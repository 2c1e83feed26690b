"""`OneProcessor`: what schemes on one processor share, the options by which they differ."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

import torch

from graphopt.cost_model import Estimate, Machine, estimate
from graphopt.cost_model.work import Mode
from graphopt.errors import GraphoptError
from graphopt.graph.training_graph import TrainingGraph
from graphopt.schemes.base import Machines, Prepared, Runner, Scheme
from graphopt.schemes.channels_last import why_not_channels_last
from graphopt.schemes.fused_optimizer import why_not_fused
from graphopt.schemes.low_precision import PRECISIONS, why_not_low
from graphopt.schemes.threads import WithThreads


@dataclass(frozen=True)
class OneProcessor(Scheme):
    """A scheme on one processor.

    Args:
        threads: of torch's operators on a CPU, within its steps only; None: as many as the process has. Another number
            takes sums in another order: results may differ in their last bits.
        fused: the optimizer's fused kernel, one call for all parameters, whatever its own options are. It rounds in
            another order than the loop over parameters: results may differ in their last bits.
        channels_last: the images of the batch are brought into channels-last memory, which convolutions hand on.
            Parameters, gradients and state keep their layout. Other kernels: results may differ in their last bits.
        precision: ``"bf16"``: forward and loss under autocast. Another training, with errors of 1 in 256.

    Raises:
        GraphoptError: an option has no such value.
    """

    _: KW_ONLY
    threads: int | None = None
    fused: bool = False
    channels_last: bool = False
    precision: str | None = field(default=None)

    def __post_init__(self) -> None:
        if self.threads is not None and (type(self.threads) is not int or self.threads < 1):
            raise GraphoptError(f"threads: expected a positive integer or None, got {self.threads!r}")
        if self.precision is not None and self.precision not in PRECISIONS:
            raise GraphoptError(f"precision: expected None or one of {', '.join(PRECISIONS)}, got {self.precision!r}")

    @property
    def options(self) -> tuple[str, ...]:
        """The options that are not the defaults, in words."""
        count = f"{self.threads} thread{'' if self.threads == 1 else 's'}" if self.threads is not None else ""
        flags = (
            "fused optimizer" if self.fused else "", "channels-last" if self.channels_last else "",
            self.precision or "", count,
        )  # fmt: skip
        return tuple(filter(None, flags))

    @property
    def name(self) -> str:
        """See `Scheme.name`."""
        return ", ".join((self.kind, *self.options))

    def why_not(self, prepared: Prepared, size: int) -> str | None:
        """See `Scheme.why_not`."""
        found = super().why_not(prepared, size)
        if found is None and self.threads is not None and any(d.type != "cpu" for d in prepared.layout.devices):
            found = "the batch is not on the CPU, whose threads these are"
        if found is None and self.fused:
            found = why_not_fused(prepared.task.optimizers)
        if found is None and self.channels_last:
            found = why_not_channels_last(prepared)
        if found is None and self.precision is not None:
            found = why_not_low(prepared)
        return found

    @abstractmethod
    def runner(self, prepared: Prepared) -> Runner:
        """The step with all options but the number of threads."""

    def build(self, prepared: Prepared) -> Runner:
        """See `Scheme.build`."""
        runner = self.runner(prepared)
        return runner if self.threads is None else WithThreads(runner, self.threads)

    def machine(self, prepared: Prepared, machines: Machines) -> Machine | None:
        """The calibrated machine that its steps run on, None if there is none."""
        found = machines(torch.get_num_threads() if self.threads is None else self.threads)
        return found if found is not None and {d.type for d in prepared.layout.devices} == {found.device} else None

    def priced(self, graph: TrainingGraph, size: int, machine: Machine, mode: Mode) -> Estimate | None:
        """The price of ``graph`` run in this way; None at a size that it does not hold for."""
        sizes = {"batch": size}
        if not graph.symbols.admits(sizes):
            return None
        options: dict[str, Any] = {"mode": mode, "precision": self.precision}
        rates = {name for curve in machine.curves.values() for name in curve.rates}
        if self.precision is not None and self.precision not in rates:
            return None
        return estimate(graph, machine, sizes, **options)
