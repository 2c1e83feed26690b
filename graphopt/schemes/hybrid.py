"""The hybrid scheme: each region of a step is divided over processors along an axis of its own, or not at all."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal, cast

import torch

from graphopt.cost_model import Estimate, Machine
from graphopt.cost_model.machine import kept
from graphopt.errors import AxisError, CaptureError, CostModelError, PassError
from graphopt.graph.halves import Halves, cut_update
from graphopt.passes import DivideRegions
from graphopt.passes._strategies import Strategies
from graphopt.schemes.base import Machines, Prepared, Runner, fitting
from graphopt.schemes.divided_price import price
from graphopt.schemes.divided_step import Divided, lowered
from graphopt.schemes.graph_step import GraphStep
from graphopt.schemes.region_prices import axes_that_matter
from graphopt.schemes.regions import Regions, choose_regions
from graphopt.schemes.several_processors import SeveralProcessors, rewritten, threads_of_each

MOST = 8
"""Divided graphs that are kept: those of the batch sizes that were run last. Workers keep them too."""


@dataclass(frozen=True)
class Hybrid(SeveralProcessors):
    """Each operator of forward and backward along the axis that suits it: rows of the batch in one region of the model,
    features, channels or heads in another, everything on each processor in a third.

    Which operators run along which axis is chosen by price, for each batch size anew (`graphopt.schemes.regions`).
    Large linear layers on small batches are divided along their features, which leaves gradients where they are,
    convolutions along the batch (Krizhevsky, "One weird trick for parallelizing convolutional neural networks", 2014);
    attention and MLPs along heads and hidden features (Shoeybi et al., "Megatron-LM", 2019). Values are converted by
    collectives between regions. This process updates. See `SeveralProcessors` for what a step is.

    Where another scheme does the same (all rows, or nothing divided), it says so and is not tried.

    Args:
        processors: how many take part, at least 2.
        batch_norm: ``"synchronized"``: statistics of the whole batch; there are no others.
        threads: of torch on each processor.
        machine: by which prices regions are chosen; by default the kept calibration of this machine.

    Raises:
        GraphoptError: an option has no such value.
    """

    processors: int = 2
    batch_norm: Literal["synchronized", "local"] = "synchronized"
    threads: int = 1
    machine: Machine | None = field(default=None, kw_only=True)

    kind: ClassVar[str] = "hybrid"

    def why_not_divided(self, prepared: Prepared, size: int) -> str | None:
        """See `SeveralProcessors.why_not_divided`."""
        if self.batch_norm == "local":
            return "regions are joined by statistics of the whole batch: batch_norm='local' has no such form"
        if self._machine() is None:
            how = f"`graphopt calibrate --processors {self.processors}`"
            return f"collectives of this machine are not calibrated, so regions have no prices; {how} gives some"
        regions = self.regions(prepared, size)
        if regions.kind == "data parallel":
            return f"at a batch of {size} each layer is best divided along the batch: that is data parallel"
        if regions.kind == "whole":
            return f"at a batch of {size} dividing any layer costs more than it saves"
        self.divided(prepared, size)
        return None

    def regions(self, prepared: Prepared, size: int) -> Regions:
        """Which operators run along which axis at a batch of ``size``, chosen once. Raises CaptureError where the step
        cannot be divided, or has no price."""
        return cast(Regions, prepared.variant(("regions", *self._key, size), lambda: self._chosen(prepared, size)))

    def divided(self, prepared: Prepared, size: int) -> Divided:
        """See `SeveralProcessors.divided`; batch sizes with the same regions share it while it is kept (`MOST`)."""
        regimes = self.regions(prepared, size).regimes
        kept: OrderedDict[Hashable, Divided] = prepared.variant(("divided", self.processors), OrderedDict)
        key = tuple(regimes.items())
        if key not in kept:
            kept[key] = self._divided(prepared, regimes)
        kept.move_to_end(key)
        while len(kept) > MOST:
            kept.popitem(last=False)
        return kept[key]

    @property
    def _key(self) -> tuple[Hashable, ...]:
        return self.processors, self.threads, self.machine

    def _machine(self) -> Machine | None:
        machine = self.machine if self.machine is not None else kept(self.threads)
        return machine if machine is not None and machine.link is not None else None

    def _halves(self, prepared: Prepared) -> Halves:
        return cast(Halves, prepared.variant("cut update", lambda: cut_update(prepared.step.whole.graph)))

    def _strategies(self, prepared: Prepared) -> Strategies:
        def make() -> Strategies:
            graph = self._halves(prepared).first
            try:
                return Strategies(graph, self.processors, axes_that_matter(graph, self.processors))
            except PassError as error:
                raise CaptureError(f"the step cannot be divided: {error}") from error

        return cast(Strategies, prepared.variant(("strategies", self.processors), make))

    def _chosen(self, prepared: Prepared, size: int) -> Regions:
        machine = self._machine()
        assert machine is not None, "asked for without prices"
        try:
            return choose_regions(self._strategies(prepared), machine, size)
        except CostModelError as error:
            raise CaptureError(f"regions have no price: {error}") from error
        except AxisError as error:
            raise CaptureError(f"the step cannot be divided: {error}") from error

    def _divided(self, prepared: Prepared, regimes: dict[str, str | None]) -> Divided:
        halves = self._halves(prepared)
        graph = rewritten(DivideRegions(self.processors, regimes), halves.first)
        return Divided(halves.first, (graph,) * self.processors, halves.second)

    def estimate(self, prepared: Prepared, size: int, machines: Machines) -> Estimate | None:
        """See `SeveralProcessors.estimate`; the regions are those that `why_not` looked at."""
        machine = machines(self.threads) or self._machine()
        if machine is None or machine.link is None:
            return None
        return price(self.divided(prepared, size), size, machine)

    def build(self, prepared: Prepared) -> Runner:
        """See `Scheme.build`. Starts the workers, which are ready at the first step."""
        return _BySize(self, prepared)


class _BySize:
    """Runs each batch by the step that is divided for its size. The least recently run ones are given back."""

    def __init__(self, scheme: Hybrid, prepared: Prepared):
        self._scheme, self._prepared = scheme, prepared
        self._pool = prepared.task.pools.of(scheme.processors, scheme.threads)
        self._divided: dict[int, Divided] = {}  # by batch size, of those in `_steps`
        self._steps: OrderedDict[int, tuple[Divided, GraphStep]] = OrderedDict()  # by the identity of the first
        self._first = next(i for i, shape in enumerate(prepared.layout.shapes) if shape)

    def __call__(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        """One batch. Raises Stale, before anything is run, where a step is built that does not fit the optimizers."""
        size = int(tensors[self._first].shape[0])
        divided = self._divided.get(size)
        if divided is None:
            divided = self._scheme.divided(self._prepared, size)
            self._build(divided)
            self._divided[size] = divided
        self._steps.move_to_end(id(divided))
        return self._steps[id(divided)][1](tensors)

    def _build(self, divided: Divided) -> None:
        if id(divided) not in self._steps:
            pool = self._pool
            self._steps[id(divided)] = divided, GraphStep(self._prepared, lambda graph: lowered(divided, pool, graph))
        fitting(self._steps[id(divided)][1])
        if len(self._steps) > MOST:
            _, (oldest, step) = self._steps.popitem(last=False)
            self._divided = {size: each for size, each in self._divided.items() if each is not oldest}
            step.close()

    def fresh(self) -> bool:
        """See `Runner.fresh`."""
        return all(step.fresh() for _, step in self._steps.values())

    def close(self) -> None:
        """See `Runner.close`."""
        for _, step in self._steps.values():
            step.close()
        self._steps.clear()
        self._divided.clear()


def hybrid(processors: int, batch_norm: str) -> Hybrid:
    """The hybrid scheme for so many processors, which share the cores of this machine."""
    return Hybrid(processors, batch_norm, threads_of_each(processors))  # type: ignore[arg-type]
